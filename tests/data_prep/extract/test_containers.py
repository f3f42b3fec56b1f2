"""Photographs and captions out of tars and Parquet files, with a stand-in for the models."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from data_prep.extract import __main__ as command
from data_prep.extract.tables import Tables
from data_prep.extract.tars import Tars
from data_prep.schema import DataError
from shnet_jax.data.records import open_dataset


def _picture(number, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, number + 1, number + 2)).save(
        file, kind, **({"lossless": True} if kind == "WEBP" else {})
    )
    return file.getvalue()


def _tar(path, members, **options):
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _img2dataset(folder, first, count, split=None):
    """A shard as img2dataset writes it; returns its tar."""
    members = {}
    for number in range(first, first + count):
        noted = {"caption": f"a  dog {number}\nruns", "key": f"{number:09d}", "url": "http://a", "status": "success"}
        members[f"{number:09d}.jpg"] = _picture(number)
        members[f"{number:09d}.txt"] = noted["caption"].encode()
        members[f"{number:09d}.json"] = json.dumps(noted | ({"split": split} if split else {})).encode()
    path = _tar(folder / f"{first:05d}.tar", members)
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"count": count + 3, "successes": count}))
    pq.write_table(pa.table({"url": ["http://a"], "caption": ["a dog"]}), path.with_suffix(".parquet"))
    return path


@pytest.fixture
def extract(tmp_path, models):
    """Runs an extraction of photographs; returns exit status, and what the models saw."""

    def do(images, *flags, limit=1000):
        colours = models(limit)
        fixed = [f"--images={images}", f"--out={tmp_path / 'sets'}", "--name=dogs", "--backbone=none", "--batch_size=2"]
        return command.main([*fixed, *flags]), colours.seen

    return do


def _records(tmp_path, split="train"):
    dataset = open_dataset(tmp_path / "sets")
    return list(dataset.open_split(split, list(dataset.features)))


def _colours(records):
    return [int(record["image_embedding"][0]) for record in records]


def test_img2dataset_with_its_sidecars(tmp_path, extract, capsys):
    for first, count in ((2, 2), (10, 3)):
        _img2dataset(tmp_path / "in", first, count)
    assert extract(tmp_path / "in", "--split=train")[0] == 0
    records = _records(tmp_path)
    assert [r["image_id"] for r in records] == [f"{n:09d}.jpg" for n in (2, 3, 10, 11, 12)]
    assert [r["captions"] for r in records] == [[f"a dog {n} runs"] for n in (2, 3, 10, 11, 12)]
    assert _colours(records) == [2, 3, 10, 11, 12]
    assert (
        "read 5 rows, 5 captions of 5 images; stored 5 images with 5 captions (train 5 with 5)"
        in capsys.readouterr().err
    )


def test_a_stopped_run_over_tars_goes_on(tmp_path, extract):
    _img2dataset(tmp_path / "in", 0, 8)
    assert extract(tmp_path / "in", "--split=train", limit=5)[0] == 130
    status, seen = extract(tmp_path / "in", "--split=train")
    assert status == 0 and [name.rpartition("/")[2] for name in seen] == [f"{n:09d}.jpg" for n in (3, 4, 5, 6, 7)]
    assert _colours(_records(tmp_path)) == list(range(8))


def test_web_data_set_with_a_caption_a_line(tmp_path, extract, capsys):
    first = {
        "./s.1.jpg": _picture(1),
        "./s.1.txt": b"a dog\n\na  cat\n",
        "./s.2.WEBP": _picture(2, "WEBP"),
        "./s.2.json": b'{"captions": ["one", "two"]}',
        "._s.1.jpg": b"of macOS",
        "s.2.cls": b"7",
        "bare.png": _picture(3),
    }
    _tar(tmp_path / "in" / "train" / "0.tar", {k: v for k, v in first.items() if "2" not in k})
    _tar(tmp_path / "in" / "test-000.tar", {k: v for k, v in first.items() if "2" in k})
    assert extract(tmp_path / "in")[0] == 0
    (train,), (test,) = _records(tmp_path), _records(tmp_path, "test")
    assert (train["image_id"], train["captions"]) == ("s.1.jpg", ["a dog", "a cat"])
    assert (test["image_id"], test["captions"], _colours([test])) == ("s.2.WEBP", ["one", "two"], [2])
    err = capsys.readouterr().err
    assert "left out 1: 1 without captions, such as 'bare.png'" in err and "1 members of no photograph" in err


def test_numbers_of_captions_are_kept(tmp_path, extract):
    _tar(
        tmp_path / "a.tar",
        {"a.png": _picture(1), "a.json": b'{"caption": ["x", "y"], "sentids": [5, "6"], "split": "restval"}'},
    )
    assert extract(tmp_path / "a.tar")[0] == 0
    (record,) = _records(tmp_path)
    assert record["caption_ids"].tolist() == [5, 6]


def test_two_captions_that_differ(tmp_path, extract, capsys):
    path = _tar(tmp_path / "a.tar", {"a.png": _picture(1), "a.txt": b"new", "a.json": b'{"caption": "old"}'})
    assert extract(path, "--split=train")[0] == 1
    assert f"{path}/a.txt: image 'a.png': expected the caption of a.json, 'old', found 'new'" in capsys.readouterr().err
    for choice, expected in (("txt", "new"), ("json", "old")):
        assert extract(path, "--split=train", f"--caption_from={choice}", "--overwrite")[0] == 0
        assert _records(tmp_path)[0]["captions"] == [expected]


def test_tars_with_captions_of_a_file(tmp_path, extract, capsys):
    """Names as the captions have them, in tars of equal member names too."""
    _tar(tmp_path / "in" / "0.tar", {"val2014/a.png": _picture(1), "b.png": _picture(2)})
    _tar(tmp_path / "in" / "1.tar", {"b.png": _picture(3)})
    rows = "image,caption\nCOCO/a.png,a dog\n0.tar/b.png,two\n1.tar/b.png,three\nc.png,none\n"
    (tmp_path / "c.csv").write_text(rows)
    assert extract(tmp_path / "in", f"--captions=train={tmp_path / 'c.csv'}")[0] == 0
    assert [(r["captions"][0], c) for r, c in zip(_records(tmp_path), (1, 2, 3), strict=True)] == [
        ("a dog", 1),
        ("two", 2),
        ("three", 3),
    ]
    assert _colours(_records(tmp_path)) == [1, 2, 3]
    assert "c.png: no such member" in capsys.readouterr().err
    (tmp_path / "c.csv").write_text("image,caption\nb.png,a dog\n")
    assert extract(tmp_path / "in", f"--captions=train={tmp_path / 'c.csv'}", "--overwrite")[0] == 1
    assert "expected one photograph 'b.png', found several" in capsys.readouterr().err


def test_broken_members_are_left_out_or_fail(tmp_path, extract, capsys):
    names = {f"{n}.{end}": _picture(n) if end == "png" else b"a dog" for n in range(4) for end in ("png", "txt")}
    path = _tar(tmp_path / "train.tar", names | {"2.png": _picture(2)[:40]})
    assert extract(path, "--broken=fail")[0] == 1
    assert f"broken image {path}/2.png: expected a picture" in capsys.readouterr().err
    assert extract(path)[0] == 0
    assert _colours(_records(tmp_path)) == [0, 1, 3]


def _with(kind, name, link=""):
    def write(path):
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)

    return write


def _cut(path, at):
    _tar(path, {"a.png": _picture(1), "a.txt": b"x", "b.png": _picture(2)})
    data = path.read_bytes()
    path.write_bytes(data[:at] if at > 0 else data[:2048] + b"?" * 512 + data[2560:])


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (_with(tarfile.REGTYPE, "../a.png"), "member '../a.png' is no name"),
        (_with(tarfile.REGTYPE, "/a.png"), "member '/a.png' is no name"),
        (_with(tarfile.SYMTYPE, "a.png", "/etc/passwd"), "member 'a.png' is a link"),
        (_with(tarfile.LNKTYPE, "a.png", "b.png"), "member 'a.png' is a link"),
        (_with(tarfile.FIFOTYPE, "a.png"), "member 'a.png' is a link or no plain file"),
        (lambda path: _cut(path, 2048), "cut off, or damaged there"),  # between two members
        (lambda path: _cut(path, 2100), "cut off, or damaged there"),  # in a header
        (lambda path: _cut(path, 2600), "expected a tar file"),  # in a picture
        (lambda path: _cut(path, 0), "cut off, or damaged there"),  # tarfile itself stops there without a word
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "a git-LFS pointer"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: _tar(path, {"a.png": _picture(1)}).rename(path) and _gzip(path), "found a gzip archive"),
        (lambda path: path.write_bytes(_tar(path, {"a.png": b"1"}).read_bytes() * 2), "behind the end of the tar"),
        (lambda path: _tar(path, {"a.png": b"", "a.PNG": b""}), "a.png: expected one member of this name, found a.PNG"),
        (lambda path: _tar(path, {"a.png": b"", "a.TXT": b"x", "a.txt": b"y"}), "a.TXT: expected one member of this"),
        (lambda path: _tar(path, {"caf\udce9.png": b""}, errors="surrogateescape"), "is no name of a file"),
        (lambda path: _tar(path, {"a.png": b"", "a.jpg": b""}), "expected one picture of this name, found a.jpg too"),
        (lambda path: _tar(path, {"a.png": b"1", "a.txt": b"\xff"}), "a.txt: image 'a.png': expected UTF-8"),
        (lambda path: _tar(path, {"a.png": b"1", "a.json": b"[" * 5000}), "a.json: image 'a.png': expected JSON"),
        (
            lambda path: _tar(path, {"a.png": b"1", "a.txt": b" " * (2**20 + 1)}),
            "a.txt: image 'a.png': 1048577 bytes, more",
        ),
        (lambda path: _tar(path, {"a.png": b"1", "a.json": b'{"caption": 3}'}), "'caption': expected text"),
    ],
)
def test_tars_that_are_refused(tmp_path, extract, capsys, write, expected):
    write(tmp_path / "train.tar")
    assert extract(tmp_path / "train.tar")[0] == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert expected in err and "train.tar" in err


def _gzip(path):
    import gzip

    path.write_bytes(gzip.compress(path.read_bytes()))


def test_a_caption_that_cannot_be_read_may_be_left_out(tmp_path, extract, capsys):
    names = {f"{n}.{end}": _picture(n) if end == "png" else b"a dog" for n in range(4) for end in ("png", "txt")}
    path = _tar(tmp_path / "train.tar", names | {"1.txt": b"caf\xe9", "2.json": b"[]"})
    assert extract(path)[0] == 1
    assert (
        "1.txt: image '1.png': expected UTF-8 text" in (err := capsys.readouterr().err)
        and "--on_bad_record=skip" in err
    )
    assert extract(path, "--on_bad_record=skip")[0] == 0
    assert _colours(_records(tmp_path)) == [0, 3]
    assert "left out 2: 2 bad records" in capsys.readouterr().err


def test_only_a_line_feed_ends_a_caption(tmp_path, extract):
    text = "one\rdog\u2028here\x0bnow\r\ntwo\n"
    noted = json.dumps({"caption": "caf\u00e9"}).encode("utf-16")
    _tar(tmp_path / "train.tar", {"a.png": _picture(1), "a.txt": text.encode(), "b.png": _picture(2), "b.json": noted})
    assert extract(tmp_path / "train.tar")[0] == 0
    assert [r["captions"] for r in _records(tmp_path)] == [["one dog here now", "two"], ["caf\u00e9"]]


def test_folders_whose_files_would_be_passed_over(tmp_path, extract, capsys):
    folder = tmp_path / "in"
    path = _tar(folder / "A.TAR", {"a.png": _picture(1), "a.txt": b"x"})
    assert extract(folder, "--split=train")[0] == 0
    pq.write_table(_hub(), folder / "b.parquet")
    assert extract(folder, "--overwrite")[0] == 1
    assert "expected tars or Parquet files, found A.TAR and b.parquet; name one" in capsys.readouterr().err
    (folder / "b.parquet").rename(folder / "B.Parquet")
    path.rename(folder / "a.tar.gz")
    assert extract(folder, "--overwrite")[0] == 1
    assert "a.tar.gz: expected tars that are not compressed" in capsys.readouterr().err
    (folder / "a.tar.gz").unlink()
    assert extract(folder, "--overwrite")[0] == 0
    (folder / "B.Parquet").rename(folder / "b.tgz")
    assert extract(folder, "--overwrite")[0] == 1
    assert "b.tgz: expected tars that are not compressed" in capsys.readouterr().err


def test_a_member_that_comes_twice(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match=r"a\.tar: member 'a\.png': expected it once"):
        Tars([tmp_path / "a.tar"], tmp_path)


def test_a_huge_member(tmp_path, extract, capsys):
    """A terabyte in a file with a hole: no memory is taken for it."""
    path = tmp_path / "train.tar"
    huge = tarfile.TarInfo("a.png")
    huge.size = 2**40
    with path.open("wb") as file:
        file.seek(file.write(huge.tobuf()) + 2**40 + 1024 - 1)
        file.write(b"\0")
    (tmp_path / "c.csv").write_text("image,caption\na.png,a dog\n")
    assert extract(path, f"--captions=train={tmp_path / 'c.csv'}", "--broken=fail")[0] == 1
    assert "1099511627776 bytes, more than" in capsys.readouterr().err


def test_a_shard_that_lacks_what_its_stats_count(tmp_path, extract, capsys):
    path = _img2dataset(tmp_path / "in", 0, 2)
    path.with_name("00000_stats.json").write_text('{"successes": 5}')
    assert extract(tmp_path / "in", "--split=train")[0] == 1
    assert "00000.tar: expected 5 photographs as in 00000_stats.json, found 2" in capsys.readouterr().err


def test_flags_that_do_not_go_together(tmp_path, extract, capsys):
    _tar(tmp_path / "a.tar", {"a.png": _picture(1), "a.txt": b"x"})
    assert extract(tmp_path / "a.tar")[0] == 1
    assert "expected a split; give --split=NAME or --split_lists" in capsys.readouterr().err
    (tmp_path / "c.csv").write_text("image,caption\na.png,a dog\n")
    assert extract(tmp_path / "a.tar", f"--captions=train={tmp_path / 'c.csv'}", "--split=train")[0] == 1
    assert "--split: belongs to an extraction without --captions" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert extract(tmp_path / "empty")[0] == 1
    assert "expected photographs (.jpg, " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- Parquet


def _hub(count=7, first=0, **columns):
    """Rows as nlphuji/flickr30k has them."""
    numbers = range(first, first + count)
    values = {
        "image": pa.array([{"bytes": _picture(n), "path": f"{n}.jpg"} for n in numbers]),
        "caption": [[f"a dog {n}", f"a cat {n}"] for n in numbers],
        "sentids": [[str(2 * n), str(2 * n + 1)] for n in numbers],
        "split": ["test" if n % 3 == 1 else "train" for n in numbers],
        "img_id": [str(n) for n in numbers],
        "filename": [f"10{n}.jpg" for n in numbers],
    }
    return pa.table({name: value for name, value in (values | columns).items() if value is not None})


def test_the_hubs_parquet(tmp_path, extract):
    pq.write_table(_hub(), tmp_path / "test-00000-of-00001.parquet", row_group_size=2)
    assert extract(tmp_path / "test-00000-of-00001.parquet")[0] == 0
    train, test = _records(tmp_path), _records(tmp_path, "test")
    assert [r["image_id"] for r in train] == [f"10{n}.jpg" for n in (0, 2, 3, 5, 6)] and _colours(test) == [1, 4]
    assert _colours(train) == [0, 2, 3, 5, 6]
    assert train[1]["captions"] == ["a dog 2", "a cat 2"] and train[1]["caption_ids"].tolist() == [4, 5]


def test_shards_whose_names_tell_the_split(tmp_path, extract):
    """A picture's own path as its name; one caption a row; the shards in the order of their numbers."""
    bare = {"split": None, "img_id": None, "filename": None, "sentids": None}
    for name, first in (("train-2-of-11", 0), ("train-10-of-11", 3), ("validation-0-of-1", 6)):
        captions = [f"a dog {n}" for n in range(first, first + 3)]
        path = tmp_path / "data" / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(_hub(3, first, caption=captions, **bare), path)
    assert extract(tmp_path / "data")[0] == 0
    assert _colours(_records(tmp_path)) == list(range(6))
    assert [r["image_id"] for r in _records(tmp_path, "validation")] == ["6.jpg", "7.jpg", "8.jpg"]


def test_img2datasets_parquet(tmp_path, extract, capsys):
    """Plain bytes; a download that failed has neither picture nor caption, or a caption alone."""
    table = pa.table(
        {
            "url": ["http://a"] * 4,
            "key": ["000", "001", "002", "003"],
            "jpg": [_picture(0), None, _picture(2), None],
            "caption": ["a dog", None, "a cat", "a cow"],
        }
    )
    pq.write_table(table, tmp_path / "00000.parquet")
    assert extract(tmp_path / "00000.parquet", "--split=train")[0] == 0
    assert [(r["image_id"], r["captions"]) for r in _records(tmp_path)] == [("000", ["a dog"]), ("002", ["a cat"])]
    err = capsys.readouterr().err
    assert "left out 2: 1 without captions, such as '001'; 1 broken photographs, such as '003'" in err
    assert "row 3/003: no bytes of a picture" in err


def test_a_row_for_each_caption(tmp_path, extract):
    """As HuggingFaceM4/COCO: sentences are objects, the picture comes again with each."""
    table = pa.table(
        {
            "image": pa.array([{"bytes": _picture(n), "path": None} for n in (1, 1, 2)]),
            "filename": ["a.jpg", "a.jpg", "b.jpg"],
            "sentences": [{"raw": t, "sentid": i} for i, t in enumerate(("one", "two", "three"))],
            "sentids": [[0, 1], [0, 1], [2]],
            "split": ["train", "train", "restval"],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert extract(tmp_path / "a.parquet")[0] == 0
    assert [(r["captions"], r["caption_ids"].tolist()) for r in _records(tmp_path)] == [
        (["one", "two"], [0, 1]),
        (["three"], [2]),
    ]
    assert _colours(_records(tmp_path)) == [1, 2]


def test_rows_in_any_order(tmp_path):
    """Forwards within a row group, over its end, and backwards."""
    pq.write_table(_hub(30), tmp_path / "a.parquet", row_group_size=7)
    tables = Tables([tmp_path / "a.parquet"], tmp_path)
    for row in [0, 1, 5, 6, 7, 8, 20, 29, 3, 3, 28, 0]:
        assert np.asarray(tables.load(f"10{row}.jpg"))[0, 0].tolist() == [row, row + 1, row + 2]


def test_images_without_a_name_have_that_of_their_row(tmp_path):
    table = pa.table({"image": pa.array([{"bytes": _picture(n), "path": None} for n in (4, 5)])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert np.asarray(Tables([tmp_path / "a.parquet"], tmp_path).load("a-1"))[0, 0, 0] == 5


def test_files_of_one_name_in_two_folders(tmp_path, extract):
    for folder, first in (("one", 0), ("two", 2)):
        pictures = pa.array([{"bytes": _picture(n), "path": None} for n in (first, first + 1)])
        (tmp_path / "in" / folder).mkdir(parents=True)
        table = pa.table({"image": pictures, "caption": [f"a dog {first}", f"a dog {first + 1}"]})
        pq.write_table(table, tmp_path / "in" / folder / "0000.parquet")
    assert extract(tmp_path / "in", "--split=train")[0] == 0
    assert [r["image_id"] for r in _records(tmp_path)] == [f"{f}/0000-{n}" for f in ("one", "two") for n in (0, 1)]
    assert _colours(_records(tmp_path)) == [0, 1, 2, 3]


def test_two_pictures_of_one_name(tmp_path, extract, capsys):
    pictures = pa.array([{"bytes": _picture(n), "path": "image.png"} for n in (1, 1, 2)])
    pq.write_table(pa.table({"image": pictures, "caption": ["one", "two", "three"]}), tmp_path / "train.parquet")
    assert extract(tmp_path / "train.parquet")[0] == 1
    assert "train.parquet row 2: 'image.bytes': expected the picture of" in capsys.readouterr().err
    pq.write_table(pq.read_table(tmp_path / "train.parquet").slice(0, 2), tmp_path / "train.parquet")
    assert extract(tmp_path / "train.parquet")[0] == 0
    assert _records(tmp_path)[0]["captions"] == ["one", "two"]


@pytest.mark.parametrize("cell", ['["a dog", "two"]', "['a dog', 'two']", "['a dog'\n 'two']"])
def test_a_list_that_was_stored_as_text(tmp_path, extract, cell):
    table = _hub(1, caption=[cell], sentids=["[8, 9]"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert extract(tmp_path / "a.parquet")[0] == 0
    (record,) = _records(tmp_path)
    assert (record["captions"], record["caption_ids"].tolist()) == (["a dog", "two"], [8, 9])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": None}, "expected a column of pictures (image, jpg, ...), found caption, sentids, split"),
        ({"caption": None}, "expected a column caption or"),
        (
            {"sentids": [["1"]] * 7},
            "row 0: image '100.jpg': 'sentids': expected a caption id for each of 2 captions, found 1",
        ),
        ({"sentids": [["x", "y"]] * 7}, "row 0: image '100.jpg': 'sentids': expected a whole number"),
        ({"caption": list(range(7))}, "row 0: image '100.jpg': 'caption': expected text"),
        ({"caption": [{"en": "a dog"}] * 7}, "row 0: image '100.jpg': 'caption': expected text"),
        ({"filename": ["a.jpg"] * 7}, "image 'a.jpg': expected it in one split, found train and test"),
        ({"split": None}, "expected a split; give --split=NAME"),
    ],
)
def test_tables_that_are_refused(tmp_path, extract, capsys, columns, expected):
    pq.write_table(_hub(**columns), tmp_path / "a.parquet")
    assert extract(tmp_path / "a.parquet")[0] == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert expected in err and "a.parquet" in err


def test_damaged_tables(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(_hub(), path)
    whole = path.read_bytes()
    for data, expected in (
        (whole[:-5], r"a\.parquet: expected a Parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        (b"", r"a\.parquet: expected a Parquet file"),
        (whole.replace(b"10", b"\xff\xff"), r"a\.parquet"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=expected):
            list(Tables([path], tmp_path).rows("train"))
