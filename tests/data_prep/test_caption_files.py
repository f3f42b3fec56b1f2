"""Caption files of every format: what they hold is what is read, or they are refused by name."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_prep import caption_files, captions, from_grid_feats, from_scan
from data_prep.schema import DataError
from shnet_jax.data.records import open_dataset
from tests.interop import torch_writer

SEPARATORS = "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # str.splitlines splits at them
NASTY = [
    '"To be" said a lone "quotation mark',
    '"',
    'He said ""hi"" twice',
    "The player in #5 jersey # 6",
    "'single', commas; semicolons| bars",
    *(f"between{separator}words" for separator in SEPARATORS),
    "[sic] a dog [2]",
    '["almost a list", x]',
    "{'a': 1}",
    "犬 🐕 e\u0301 \u202e x",
    "=1+1",
    "nan",
]


def _write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _flat(path, **options):
    text = f"train={path}"
    read = captions.read(text, **options)
    return {item.file: list(item.captions) for items in read.values() for item in items}


def _refused(path, message, text="train={}", **options):
    with pytest.raises(DataError, match=message) as caught:
        captions.read(text.format(path), **options)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------- writers of each format


def _rows(sentences):
    return [(f"{i}.jpg", text) for i, own in enumerate(sentences) for text in own]


def _parquet(columns):
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def _torch(sentences):
    file = io.BytesIO()
    torch_writer.save(file, {f"{i}.jpg": json.dumps(own) for i, own in enumerate(sentences)})
    return file.getvalue()


def _csv(rows, **options):
    table = io.StringIO()
    csv.writer(table, **options).writerows(rows)
    return table.getvalue()


def _karpathy(sentences):
    images = [
        {"filename": f"{i}.jpg", "split": "train", "sentences": [{"raw": text} for text in own]}
        for i, own in enumerate(sentences)
    ]
    return json.dumps({"images": images})


def _coco(sentences):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(len(sentences))]
    found = [{"image_id": i, "caption": text} for i, own in enumerate(sentences) for text in own]
    return json.dumps({"images": images, "annotations": found})


def _objects(sentences):
    return [{"image": f"{i}.jpg", "caption": own} for i, own in enumerate(sentences)]


FORMATS = {
    "karpathy.json": _karpathy,
    "coco.json": _coco,
    "list.json": lambda s: json.dumps(_objects(s), ensure_ascii=False),
    "one_each.json": lambda s: json.dumps([{"image": name, "caption": text} for name, text in _rows(s)]),
    "lines.jsonl": lambda s: "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in _objects(s)),
    "columns.parquet": lambda s: _parquet({"filename": [f"{i}.jpg" for i in range(len(s))], "caption": s}),
    "oscar_captions.pt": _torch,
    "comma.csv": lambda s: _csv([("image", "caption"), *_rows(s)]),
    "semicolon.csv": lambda s: _csv([("image", "caption"), *_rows(s)], delimiter=";", quoting=csv.QUOTE_ALL),
    "cells.csv": lambda s: _csv([("raw", "filename"), *((json.dumps(own), f"{i}.jpg") for i, own in enumerate(s))]),
    "printed.csv": lambda s: _csv([("raw", "filename"), *((repr(own), f"{i}.jpg") for i, own in enumerate(s))]),
    "numpy.csv": lambda s: _csv([("raw", "filename"), *((str(np.array(own)), f"{i}.jpg") for i, own in enumerate(s))]),
    "captions.txt": lambda s: _csv([("image", "caption"), *_rows(s)], lineterminator="\n"),
    "quoted.tsv": lambda s: _csv([("image", "caption"), *_rows(s)], delimiter="\t", quoting=csv.QUOTE_ALL),
    "plain.tsv": lambda s: "".join(f"{name}\t{text}\n" for name, text in [("image", "caption"), *_rows(s)]),
    "results.csv": lambda s: "".join(f"{a}| {b}| {c}\n" for a, b, c in _numbered(s)),
    "flickr.token": lambda s: "".join(f"{name}#{i}\t{text}\n" for i, (name, text) in enumerate(_rows(s))),
}
HOLDS_NO = {
    **dict.fromkeys(("comma.csv", "semicolon.csv", "captions.txt", "quoted.tsv", "numpy.csv"), "\n"),
    "plain.tsv": "\n\t",
    "results.csv": "\n|",
    "flickr.token": "\n",
}


def _numbered(sentences):
    return [("image_name", "comment_number", "comment"), *((name, 0, text) for name, text in _rows(sentences))]


def _spaced(text):
    return " ".join(text.split())


TEXT = st.text(
    st.one_of(st.sampled_from("\"'\\\t#|;,[]{}()" + SEPARATORS + "\n ax5"), st.characters(exclude_categories=["Cs"])),
    min_size=1,
    max_size=12,
).filter(str.strip)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_list_that_was_stored_as_text(name, tmp_path):
    """The common CSV of Flickr30k, as pandas turns it into other formats."""
    row = {"raw": '["Two dogs", "[ a cat ]"]', "sentids": "[5, 6]", "filename": "1.jpg"}
    content = json.dumps(row) if name == "a.jsonl" else _parquet({key: [value] for key, value in row.items()})
    found = list(caption_files.read_captions(_write(tmp_path / name, content)))
    assert [(line.caption, line.number) for line in found] == [("Two dogs", 5), ("[ a cat ]", 6)]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60)
@given(st.lists(st.lists(TEXT, min_size=1, max_size=3), min_size=1, max_size=4))
@example([NASTY[:3], NASTY[3:]])
def test_as_many_captions_are_read_as_were_written(tmp_path_factory, name, sentences):
    path = _write(tmp_path_factory.getbasetemp() / name, FORMATS[name](sentences))
    expected = {f"{i}.jpg": [_spaced(text) for text in own] for i, own in enumerate(sentences)}
    texts = [text for own in sentences for text in own]
    # a sentence that is a list itself (["x"]) makes a column of which it is not clear what it holds
    unclear = name in HOLDS_NO and any(text.strip().startswith("[") and text.strip().endswith("]") for text in texts)
    if unclear or any(character in text for text in texts for character in HOLDS_NO.get(name, "")):
        try:
            found = _flat(path)
        except DataError as error:
            assert name in str(error)
            return
        assert sum(map(len, found.values())) >= len(texts)
        return
    assert _flat(path) == expected


@settings(max_examples=60)
@given(st.lists(TEXT.filter(lambda text: "\n" not in text), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]))
@example(NASTY, "\r\n")
def test_as_many_lines_of_the_scan_layout_are_read(tmp_path_factory, sentences, end):
    src = tmp_path_factory.mktemp("scan")
    _write(src / "x_caps.txt", "".join(text + end for text in sentences for _ in range(2)))
    _write(src / "x_ids.txt", "".join(f"{i}\n" for i in range(len(sentences))))
    split = from_scan.open_split(src, "x", need="ids")
    assert len(split.captions) == 2 * len(sentences) and split.captions_per_image == 2
    assert [_spaced(text) for text in split.captions[::2]] == [_spaced(text.lstrip("\ufeff")) for text in sentences]


@pytest.mark.parametrize("name", FORMATS)
def test_as_many_captions_are_stored_as_were_written(tmp_path, capsys, name):
    texts = [text for text in NASTY if not any(c in text for c in HOLDS_NO.get(name, ""))]
    sentences = [texts[:4], texts[4:]]
    path = _write(tmp_path / name, FORMATS[name](sentences))
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", np.ones((2, 3), np.float32))
    flags = [f"--captions=train={path}", f"--grids={tmp_path}", "--name=toy", f"--out={tmp_path / 'out'}"]
    assert from_grid_feats.main(flags) == 0
    stored = open_dataset(tmp_path / "out").captions("train")
    assert list(stored) == [[_spaced(text) for text in own] for own in sentences]
    said = capsys.readouterr().err.splitlines()[-1]
    count = len(texts)
    assert f"{count} captions of 2 images; stored 2 images with {count} captions" in said and "none left out" in said


# ---------------------------------------------------------------------------------------------------------- quotation


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('image,caption\n1.jpg,x\n2.jpg,"a dog\n3.jpg,cat\n4.jpg,cow\n', "row 3: .*unexpected end of data"),
        ('image,caption\n1.jpg,"a dog\n2.jpg,cat"\n3.jpg,x\n', r"row 2: column 'caption': .* ends 1 lines on"),
        ('image,caption\n1.jpg,x\n\n2.jpg,"a dog\r\nruns"\r\n', r"row 4: column 'caption': expected text of one line"),
        ('image,caption\n1.jpg,"A" dog\n2.jpg,x\n', "row 2: .*',' expected after"),
        ('image;caption\n1.jpg;"a dog\n2.jpg;x\n', "row 2: .*unexpected end of data"),
        ('"image"\t"caption"\n"1.jpg"\t"a dog\n"2.jpg"\t"x"\n', "row 2: "),
        ("image,caption\n1.jpg," + '"' + "x" * 200_000 + "\n", "row 2: .*field limit"),
    ],
)
def test_an_open_quotation_mark_of_a_quoted_table_is_refused_with_its_row(tmp_path, text, message):
    _refused(_write(tmp_path / "x.csv", text), message)


def test_quotation_marks_of_a_plain_table_are_text(tmp_path):
    path = _write(tmp_path / "x.tsv", 'image\tcaption\n1.jpg\t"a dog\n2.jpg\t"cat"\n3.jpg\tcow "\n')
    assert _flat(path) == {"1.jpg": ['"a dog'], "2.jpg": ['"cat"'], "3.jpg": ['cow "']}


def test_results_of_flickr_as_they_are_downloaded(tmp_path, capsys):
    head = 'image_name| comment_number| comment\n1.jpg| 0| A "dog .\n'
    path = _write(tmp_path / "results.csv", head + "2.jpg| 4   A dog runs across the grass .\n")
    assert _flat(path) == {"1.jpg": ['A "dog .'], "2.jpg": ["A dog runs across the grass ."]}
    assert "results.csv row 3: the last | is missing; read 4 as comment_number, 'A dog" in capsys.readouterr().err
    torn_rows = (
        "2.jpg| 4   A dog | runs .\n",
        "2.jpg| A dog runs .\n",
        "2.jpg| 4| A dog | runs .\n",
        "2.jpg 4 A dog\n",
    )
    for torn in torn_rows:
        _write(path, f"{head}{torn}2.jpg| 5| whole .\n3.jpg| 0| good\n")
        _refused(path, r"row 3: expected (3 columns|a whole number as comment_number).*--on_bad_record=skip")
        items = captions.read(f"train={path}", strict=False)["train"]
        assert [(item.image_id, bool(item.fault)) for item in items] == [("1.jpg", 0), ("2.jpg", 1), ("3.jpg", 0)]
        assert "row 3" in str(items[1].record().error)


def test_a_torn_row_is_the_fault_of_its_image_where_that_is_known(tmp_path):
    path = _write(tmp_path / "x.csv", "image,caption,split\n1.jpg,a,b,train\n1.jpg,x,train\n2.jpg,y,val\n")
    _refused(path, "row 2: expected 3 columns", "{}")
    read = captions.read(str(path), strict=False)
    assert [bool(item.fault) for item in read["train"] + read["val"]] == [True, False]
    _refused(_write(path, "image,caption,split\n1.jpg,a,b,train\n2.jpg,y,val\n"), "'1.jpg'.* row 2", "{}", strict=False)
    _refused(_write(path, "caption,image\na,b,1.jpg\nx,2.jpg\n"), "row 2: expected 2 columns", strict=False)


# ------------------------------------------------------------------------------------------------------- lists, columns


def test_lists_in_cells_of_flickr30k_with_their_ids(tmp_path):
    rows = [
        ("raw", "sentids", "split", "filename", "img_id"),
        (json.dumps(["Two men's.", 'a "b"']), "[0, 1]", "restval", "1.jpg", 0),
        (json.dumps(["x", "y"]), "[2, 3]", "test", "2.jpg", 1),
    ]
    path = _write(tmp_path / "flickr_annotations_30k.csv", _csv(rows))
    read = captions.read(str(path))
    assert {split: [(i.file, i.captions, i.caption_ids) for i in items] for split, items in read.items()} == {
        "train": [("1.jpg", ("Two men's.", 'a "b"'), (0, 1))],
        "test": [("2.jpg", ("x", "y"), (2, 3))],
    }
    rows[1] = (rows[1][0], "[0]", *rows[1][2:])
    _refused(_write(path, _csv(rows)), "row 2: image '1.jpg': expected 2 caption ids, found 1", "{}")
    rows[1] = (rows[1][0], "[0, x]", *rows[1][2:])
    _refused(_write(path, _csv(rows)), "row 2: image '1.jpg': expected a whole number of 64 bits", "{}")


@pytest.mark.parametrize("second", ['["b", "c"]', "['b' 'c']"])
def test_a_list_among_sentences_is_refused(tmp_path, second):
    path = _write(tmp_path / "x.csv", _csv([("image", "caption"), ("1.jpg", "a dog"), ("2.jpg", second)]))
    _refused(path, "row 3: expected a sentence as in the rows before, found a list of sentences")
    path = _write(tmp_path / "x.csv", _csv([("image", "caption"), ("1.jpg", second), ("2.jpg", "a dog")]))
    _refused(path, "row 3: expected a list of sentences as in the rows before, found a sentence")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image,caption_1,caption_2\n1.jpg,a,b\n2.jpg,c,\n", {"1.jpg": ["a", "b"], "2.jpg": ["c"]}),
        ("image,caption,caption\n1.jpg,a,b\n", {"1.jpg": ["a", "b"]}),
        ("IMAGE;Captions;Note\n1.jpg;a, b;x\n", {"1.jpg": ["a, b"]}),
        ('\ufeff"image","caption"\r\n"1.jpg","a ""b"""\r\n\r\n\r\n', {"1.jpg": ['a "b"']}),
        (",image,caption\n0,1.jpg,a\n1,2.jpg,b\n", {"1.jpg": ["a"], "2.jpg": ["b"]}),  # an index of pandas
        ("image,caption,,\n1.jpg,a,,\n,,,\n", {"1.jpg": ["a"]}),  # of a spreadsheet
        ("image_id,caption\n391895,a\n391895,b\n", {"391895": ["a", "b"]}),
        ("image,caption\n1.jpg,a\rb\n", {"1.jpg": ["a b"]}),
        ('image,caption\n1.jpg,"a\rb"\n', {"1.jpg": ["a b"]}),
    ],
)
def test_tables_as_programs_write_them(tmp_path, text, expected):
    for encoding in ("utf-8", "utf-16"):
        path = _write(tmp_path / "x.csv", text.lstrip("\ufeff" if encoding == "utf-16" else "").encode(encoding))
        assert _flat(path) == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", [{"image_id": 391895, "caption": "x"}, {"image_id": 5.0, "caption": "y"}], ["391895", "5"]),
        ("a.json", [{"image": "v/1.jpg", "caption": ["x", "y"], "image_id": "coco_1"}], ["v/1.jpg"]),
        ("a.json", [{"file_name": "1.jpg", "sentences": ["x"], "other": {}}], ["1.jpg"]),
    ],
)
def test_lists_of_objects(tmp_path, name, content, expected):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path = _write(tmp_path / name, json.dumps(content, ensure_ascii=False).encode(encoding))
        assert list(_flat(path)) == expected
    lines = _write(tmp_path / "lines.json", "\n".join(map(json.dumps, content)))  # JSONL by another name
    assert list(_flat(lines)) == expected


def test_parquet_of_hugging_face(tmp_path):
    pictures = [{"bytes": b"x" * 9, "path": "7.jpg"}, {"bytes": b"y", "path": "8.jpg"}]
    columns = {"image": pictures, "caption": [["a", "b"], ["c"]], "sentids": [["0", "1"], ["2"]]}
    columns |= {"split": ["train", "Test "], "filename": ["1.jpg", "2.jpg"]}
    path = _write(tmp_path / "a.parquet", _parquet(columns))
    read = captions.read(str(path))
    assert {split: [(i.file, i.captions, i.caption_ids) for i in items] for split, items in read.items()} == {
        "train": [("1.jpg", ("a", "b"), (0, 1))],
        "test": [("2.jpg", ("c",), (2,))],
    }
    del columns["filename"], columns["split"], columns["sentids"]
    assert _flat(_write(path, _parquet(columns))) == {"7.jpg": ["a", "b"], "8.jpg": ["c"]}
    each = {"image": pictures, "caption_0": ["a", "b"], "caption_1": ["c", None]}
    assert _flat(_write(path, _parquet(each))) == {"7.jpg": ["a", "c"], "8.jpg": ["b"]}
    _refused(_write(path, _parquet({"image": [b"x"], "caption": ["a"]})), "names the image, found pictures alone")
    whole = _parquet(columns)
    for broken in (whole[:-9], whole.replace(b"caption", b"capti\x80n"), whole.replace(b"\1\0\0\0b", b"\1\0\0\0\xb8")):
        assert broken != whole
        _refused(_write(path, broken), "expected a Parquet file|expected a column named caption")


def test_pictures_of_parquet_are_not_read(tmp_path, monkeypatch):
    asked = []
    read = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile, "iter_batches", lambda *a, columns: asked.append(columns) or read(*a, columns=columns)
    )
    pictures = [{"bytes": b"x", "path": "7.jpg"}]
    _flat(_write(tmp_path / "a.parquet", _parquet({"image": pictures, "caption": ["a"], "filename": ["1.jpg"]})))
    _flat(_write(tmp_path / "a.parquet", _parquet({"image": pictures, "caption": ["a"]})))
    assert [sorted(columns) for columns in asked] == [["caption", "filename"], ["caption", "image.path"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.jpg#1\tThe player in #5 jersey .\n", ["The player in #5 jersey ."]),
        ("1.jpg#1\tA #2\tB #3\tC\n\n1.jpg#2\t x \n", ["A #2 B #3 C", "x"]),
        ("1.jpg#1 The player in #5 jersey .\r\n", ["The player in #5 jersey ."]),
        ("1.jpg#1\ta\rb\n", ["a b"]),
    ],
)
def test_tokens_are_split_at_the_first_tab(tmp_path, text, expected):
    assert _flat(_write(tmp_path / "x.token", text)) == {"1.jpg": expected}


# -------------------------------------------------------------------------------------------- splits, images left out


@pytest.mark.parametrize("name", ["restval", " Train ", "TRAIN"])
def test_split_names_mean_the_same_in_every_format(tmp_path, name):
    row = {"image": "1.jpg", "caption": "a", "split": name}
    karpathy = {"images": [{"filename": "1.jpg", "split": name, "sentences": [{"raw": "a"}]}]}
    for file, content in (
        ("a.json", json.dumps([row])),
        ("b.json", json.dumps(karpathy)),
        ("c.jsonl", json.dumps(row)),
        ("d.csv", _csv([list(row), list(row.values())])),
        ("e.tsv", _csv([list(row), list(row.values())], delimiter="\t")),
        ("f.parquet", _parquet({key: [value] for key, value in row.items()})),
    ):
        assert list(captions.read(str(_write(tmp_path / file, content)))) == ["train"], file


def test_what_is_left_out_is_counted_and_said(tmp_path, capsys):
    image = {"split": "train", "filename": "0.jpg", "sentences": []}
    images = [
        image,
        *(image | {"filename": f"{i}.jpg", "sentences": [{"raw": "x"}, {"raw": "y"}]} for i in range(1, 9)),
    ]
    images[8]["sentences"][0]["raw"] = " "
    path = _write(tmp_path / "a.json", json.dumps({"images": images}))
    _write(tmp_path / "train.txt", "".join(f"{i}.jpg\n" for i in (0, 1, 2, 3, 4, 5, 8, 77)))
    for i in range(1, 9):
        if i != 4:
            np.save(tmp_path / f"{i}.npy", np.ones((2, 3), np.float32))
    flags = [f"--captions={path}", f"--split_lists=train={tmp_path / 'train.txt'}", f"--grids={tmp_path}"]
    flags += ["--name=toy", f"--out={tmp_path / 'out'}", "--absent=skip", "--on_bad_record=skip"]
    assert from_grid_feats.main(flags) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(
        "toy: read 9 rows, 16 captions of 9 images; stored 4 images with 8 captions (train 4 with 8); left out 5: "
        "1 bad records; 1 absent from a joined file; 1 without captions, such as '0.jpg'; 2 in no split list, such as "
        "'6.jpg'; the bad ones are listed in "
    )
    assert "note: --split_lists: 1 of 8 names have no captions, such as '77.jpg'" in said
    assert any(line.startswith("toy: 6 records, 2 of them left out in ") for line in said)


# --------------------------------------------------------------------------------------- files that are something else

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.token", "a.txt", "a.parquet"])
def test_what_lies_in_place_of_the_file_is_named(tmp_path, name):
    path = tmp_path / name
    _refused(_write(path, POINTER), "found a git-LFS pointer in place of the file; fetch it with: git lfs pull")
    _refused(_write(path, "<!DOCTYPE html>\n<html>"), "found a web page in place of the file")
    _refused(_write(path, ""), re.escape(name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"\x1f\x8b\x08\0", "found a gzip file"),
        ("a.txt", b"PK\3\4", "found a zip archive"),
        ("a.json", b'[{"image": "1.jpg", "capt', "found a file that is cut off"),
        ("a.json", b"image: 1.jpg", "found other text"),
        (
            "a.jsonl",
            b'{"image": "1.jpg", "caption": "a"}\n{"image": "2',
            "row 2: expected JSON, found a file that is cut",
        ),
        ("a.jsonl", b'"a"\n', "row 1: expected an object, found str"),
        ("a.csv", "image,caption\n1.jpg,é\n".encode("latin-1"), "row 2: image '1.jpg': expected text in UTF-8"),
        ("a.csv", "image,caption\n1.jpg,é\n".encode("utf-16")[:-1], "expected UTF-16, as its mark says"),
        ("a.token", b"1.jpg#0\tA\r1.jpg#1\tB\r", "found a file with CR alone"),
        ("a.csv", b"image,caption\r1.jpg,a\r", "found a file with CR alone"),
    ],
)
def test_what_a_file_is_instead_is_said(tmp_path, name, content, message):
    _refused(_write(tmp_path / name, content), message)
