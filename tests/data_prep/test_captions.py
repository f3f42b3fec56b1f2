import json

import pytest

from data_prep import captions
from data_prep.schema import DataError


def _write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def _flat(splits):
    return {split: [(item.file, item.captions, item.caption_ids) for item in items] for split, items in splits.items()}


def test_karpathy(tmp_path):
    def image(name, split, *sentences):
        sentences = [{"raw": text, "sentid": number, "tokens": []} for number, text in sentences]
        return {"filepath": "val2014", "filename": name, "split": split, "sentences": sentences, "cocoid": 1}

    content = {
        "images": [image("b.jpg", "restval", (7, "A dog\n runs. "), (9, "It.")), image("a.jpg", "test", (1, "x"))]
    }
    splits = captions.read(str(_write(tmp_path / "dataset_coco.json", content)))
    assert _flat(splits) == {
        "train": [("val2014/b.jpg", ("A dog runs.", "It."), (7, 9))],
        "test": [("val2014/a.jpg", ("x",), (1,))],
    }
    record = splits["train"][0].record()
    assert record["image_id"] == "b.jpg" and record["caption_ids"].tolist() == [7, 9]


def test_coco_annotations_in_any_order(tmp_path):
    content = {
        "images": [{"id": 3, "file_name": "000000000003.jpg"}, {"id": 4, "file_name": "000000000004.jpg"}],
        "annotations": [
            {"id": 11, "image_id": 4, "caption": "four"},
            {"id": 12, "image_id": 3, "caption": "three"},
            {"id": 13, "image_id": 4, "caption": "vier"},
        ],
    }
    path = _write(tmp_path / "captions_val2017.json", content)
    assert _flat(captions.read(f"val={path}")) == {
        "val": [("000000000004.jpg", ("four", "vier"), (11, 13)), ("000000000003.jpg", ("three",), (12,))]
    }
    with pytest.raises(DataError, match=r"captions_val2017\.json row 0: .*expected a split; give"):
        captions.read(str(path))
    content["annotations"].append({"id": 14, "image_id": 5, "caption": "five"})
    with pytest.raises(DataError, match="image 5, which `images` does not list"):
        captions.read(f"val={_write(path, content)}")


def test_flickr_tokens_with_lists(tmp_path):
    tokens = _write(
        tmp_path / "Flickr8k.token.txt", "1_a.jpg#0\tA dog .\n1_a.jpg#1\tTwo .\n2.jpg#0\tcat\n3.jpg#0\tcow\n"
    )
    lists = [_write(tmp_path / "train.txt", "1_a.jpg\n"), _write(tmp_path / "test.txt", "2.jpg\n")]
    splits = captions.read(str(tokens), f"train={lists[0]},test={lists[1]}")
    assert _flat(splits) == {"train": [("1_a.jpg", ("A dog .", "Two ."), ())], "test": [("2.jpg", ("cat",), ())]}
    with pytest.raises(DataError, match=r"line 1: expected NAME\.jpg#NUMBER"):
        captions.read(f"a={_write(tmp_path / 'x.token', 'no number here')}")
    with pytest.raises(DataError, match=r"test\.txt: image '1_a\.jpg': expected it in one split"):
        captions.read(str(tokens), f"train={lists[0]},test={_write(lists[1], '1_a.jpg')}")


@pytest.mark.parametrize(
    "text",
    [
        'image,caption,split\na.jpg,"big, red",train\nb.jpg,cat,val\na.jpg,dog,train\n',
        "file_name\tcomment\tsplit\na.jpg\tbig, red\ttrain\nb.jpg\tcat\tval\na.jpg\tdog\ttrain\n",
        "image_name| comment_number|comment|split\na.jpg|0| big, red|train\nb.jpg|0| cat|val\n\na.jpg|1|dog|train\n",
    ],
)
def test_tables(tmp_path, text):
    expected = {"train": [("a.jpg", ("big, red", "dog"), ())], "val": [("b.jpg", ("cat",), ())]}
    assert _flat(captions.read(str(_write(tmp_path / "x.csv", text)))) == expected


def test_equal_names_in_two_folders_stay_apart(tmp_path):
    path = _write(tmp_path / "x.csv", "image,caption,split\na/1.jpg,x,train\nb/1.jpg,y,train\n")
    assert [item.image_id for item in captions.read(str(path))["train"]] == ["a/1.jpg", "b/1.jpg"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "image,title\na,b\n", "expected a column named caption or .*, found image, title"),
        ("x.csv", "image,caption,split\na,b,val\na,b,c,val\n", "row 3: image 'a': expected 3 columns"),
        (
            "x.csv",
            "image,caption,split\na.jpg,b,train\na.jpg,c,val\n",
            "'a.jpg': expected it in one split, found train and val",
        ),
        ("x.csv", "image,caption,split\na.jpg,   ,train\n", "'a.jpg': expected a caption, found an empty one"),
        ("x.csv", "image,caption,split\n", "expected captions, found none"),
        ("x.json", "{", "expected JSON"),
        ("x.json", "[]", "expected an object with a list `images`"),
        ("x.json", '{"images": [{"split": "train"}]}', "row 0: expected a column named image or filename"),
    ],
)
def test_errors_name_the_place(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        captions.read(str(_write(tmp_path / name, text)))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json: expected a file"):
        captions.read(f"{tmp_path}/absent.json")


@pytest.mark.parametrize(
    ("image_id", "keys"),
    [
        ("COCO_val2014_000000391895.jpg", ["COCO_val2014_000000391895.jpg", "COCO_val2014_000000391895", "391895"]),
        ("000000391895.jpg", ["000000391895.jpg", "000000391895", "391895"]),
        ("391895", ["391895"]),
        ("1007129816.jpg", ["1007129816.jpg", "1007129816"]),
        ("dog_12.jpg", ["dog_12.jpg", "dog_12"]),  # not number 12
        ("v1.5", ["v1.5"]),
        ("a/0001.jpg", ["a/0001.jpg", "a/0001"]),
    ],
)
def test_names_of_an_image(image_id, keys):
    assert list(captions.keys(image_id)) == keys
