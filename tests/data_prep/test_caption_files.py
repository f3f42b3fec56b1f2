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
from data_prep.schema import DataError, is_text
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
    '[a "list"] of no texts',
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
    return [(f"{i}.jpg", text) for i, group in enumerate(sentences) for text in group]


def _parquet(columns):
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def _torch(sentences):
    file = io.BytesIO()
    torch_writer.save(file, {f"{i}.jpg": json.dumps(group) for i, group in enumerate(sentences)})
    return file.getvalue()


def _csv(rows, **options):
    table = io.StringIO()
    csv.writer(table, **options).writerows(rows)
    return table.getvalue()


def _karpathy(sentences):
    images = [
        {"filename": f"{i}.jpg", "split": "train", "sentences": [{"raw": text} for text in group]}
        for i, group in enumerate(sentences)
    ]
    return json.dumps({"images": images})


def _coco(sentences):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(len(sentences))]
    annotations = [{"image_id": i, "caption": text} for i, group in enumerate(sentences) for text in group]
    return json.dumps({"images": images, "annotations": annotations})


def _objects(sentences):
    return [{"image": f"{i}.jpg", "caption": group} for i, group in enumerate(sentences)]


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
    "cells.csv": lambda s: _csv([("raw", "filename"), *((json.dumps(group), f"{i}.jpg") for i, group in enumerate(s))]),
    "printed.csv": lambda s: _csv([("raw", "filename"), *((repr(group), f"{i}.jpg") for i, group in enumerate(s))]),
    "numpy.csv": lambda s: _csv(
        [("raw", "filename"), *((str(np.array(group)), f"{i}.jpg") for i, group in enumerate(s))]
    ),
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
).filter(is_text)
LIKE_A_LIST = re.compile(r"\s*(\[|\(.*,|\{|array\()", re.DOTALL)
"""What may be the print of a list; a TSV of such quotation marks may be written by csv."""


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_list_that_was_stored_as_text(name, tmp_path):
    """The common CSV of Flickr30k, as pandas turns it into other formats."""
    row = {"raw": '["Two dogs", "[ a cat ]"]', "sentids": "[5, 6]", "filename": "1.jpg"}
    content = json.dumps(row) if name == "a.jsonl" else _parquet({key: [value] for key, value in row.items()})
    (row,) = caption_files.read_captions(_write(tmp_path / name, content))
    assert (row.captions, row.numbers) == (("Two dogs", "[ a cat ]"), (5, 6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all examples of a property, each of which writes its files anew."""
    return tmp_path_factory.mktemp("captions")


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30)
@given(st.lists(st.lists(TEXT, min_size=1, max_size=3), min_size=1, max_size=4))
@example([NASTY[:3], NASTY[3:]])
def test_as_many_captions_are_read_as_were_written(folder, name, sentences):
    path = _write(folder / name, FORMATS[name](sentences))
    expected = {f"{i}.jpg": [_spaced(text) for text in group] for i, group in enumerate(sentences)}
    texts = [text for group in sentences for text in group]
    if any(LIKE_A_LIST.match(text) for text in texts):
        return  # see test_what_a_cell_holds_that_is_no_sentence
    unclear = name in ("plain.tsv", "results.csv") and all('"' not in t or t[0] == t[-1] == '"' for t in texts)
    if unclear or any(character in text for text in texts for character in HOLDS_NO.get(name, "")):
        try:
            actual = _flat(path)
        except DataError as error:
            assert name in str(error)
            return
        assert sum(map(len, actual.values())) >= len(texts)
        return
    assert _flat(path) == expected


@settings(max_examples=60)
@given(st.lists(TEXT.filter(lambda text: "\n" not in text), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]))
@example(NASTY, "\r\n")
def test_as_many_lines_of_the_scan_layout_are_read(folder, sentences, end):
    _write(folder / "x_caps.txt", "".join(text + end for text in sentences for _ in range(2)))
    _write(folder / "x_ids.txt", "".join(f"{i}\n" for i in range(len(sentences))))
    split = from_scan.open_split(folder, "x", need="ids")
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
    assert list(stored) == [[_spaced(text) for text in group] for group in sentences]
    printed = capsys.readouterr().err.splitlines()[-1]
    count = len(texts)
    assert (
        f"{count} captions of 2 images; stored 2 images with {count} captions" in printed and "none left out" in printed
    )


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


@pytest.mark.parametrize("text", ["image,caption\nSüd.jpg,a dog\n", "Süd.jpg#0\ta dog\n"])
def test_the_name_of_an_image_in_another_encoding_is_refused(tmp_path, text):
    with pytest.raises(DataError, match=r"expected the name of an image in UTF-8, found 'S.*d\.jpg'; save the file as"):
        list(caption_files.read_captions(_write(tmp_path / "captions.txt", text.encode("latin-1"))))


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
        _refused(path, r"row 3: .*expected (3 columns|a whole number as comment_number).*--on_bad_record=skip")
        items = captions.read(f"train={path}", strict=False)["train"]
        assert [(item.image_id, bool(item.fault)) for item in items] == [("1.jpg", 0), ("2.jpg", 1), ("3.jpg", 0)]
        assert "row 3" in str(items[1].record().error)


def test_a_torn_row_is_the_fault_of_its_image_where_that_is_known(tmp_path):
    path = _write(tmp_path / "x.csv", "image,caption,split\n1.jpg,a,b,train\n1.jpg,x,train\n2.jpg,y,val\n")
    _refused(path, "row 2: .*expected 3 columns", "{}")
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
    _refused(
        _write(path, _csv(rows)),
        "row 2: image '1.jpg': 'sentids': expected a caption id for each of 2 captions, found 1",
        "{}",
    )
    rows[1] = (rows[1][0], "[0, x]", *rows[1][2:])
    _refused(_write(path, _csv(rows)), "row 2: image '1.jpg': 'sentids': expected a whole number of 64 bits", "{}")


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ('["b", "caf\\u00e9"]', ["b", "café"]),
        ("['b' 'c']", ["b", "c"]),
        ("('b', 'c')", ["b", "c"]),
        ("array(['b', 'c'],\n      dtype='<U1')", ["b", "c"]),
        ("array(['b'\n 'c'], dtype=object)", ["b", "c"]),
        ('[["b", "c"]]', ["b", "c"]),
        ('[{"raw": "b", "sentid": 3}, {"raw": "c", "sentid": 4}]', ["b", "c"]),
        ("{'raw': 'b', 'tokens': ['b']}", ["b"]),
        ("{'a': 1}", ["{'a': 1}"]),
        ('("b") said', ['("b") said']),
        ('["b", "c', "list of sentences that is whole"),
        ("['b', 'c...", "list of sentences that is whole"),
        ("[1, 2]", "a list of texts"),
        ('[{"tokens": ["b"]}]', "a list of texts"),
        ('["b", null]', "a caption, found an empty one"),
        ("['b', None]", "a caption, found an empty one"),
    ],
)
def test_what_a_cell_holds_that_is_no_sentence(tmp_path, cell, expected):
    """Sentences and lists may stand in one column: each cell says what it is."""
    rows = [("image", "caption"), ("0.jpg", "a dog"), ("1.jpg", cell), ("2.jpg", "x")]
    files = {"a.csv": _csv(rows), "a.json": json.dumps([dict(zip(rows[0], row, strict=True)) for row in rows[1:]])}
    files["a.parquet"] = _parquet({name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])})
    if "\n" not in cell:
        files["a.tsv"] = _csv(rows, delimiter="\t", lineterminator="\n")
    for name, content in files.items():
        path = _write(tmp_path / name, content)
        if isinstance(expected, list):
            assert _flat(path) == {"0.jpg": ["a dog"], "1.jpg": expected, "2.jpg": ["x"]}
            continue
        _refused(path, f"row [123]: image '1.jpg': .*expected .*{expected}.*--on_bad_record=skip")
        items = captions.read(f"train={path}", strict=False)["train"]
        assert len(items) == 3 and [item.fault == "" and "" not in item.captions for item in items] == [
            True,
            False,
            True,
        ]


def test_ids_of_captions_that_do_not_fit_are_the_fault_of_their_image(tmp_path):
    image = {"split": "train", "filename": "1.jpg", "sentences": [{"raw": "a", "sentid": 1}, {"raw": "b"}]}
    other = image | {"filename": "2.jpg", "sentences": [{"raw": "a", "sentid": "7"}, {"raw": "b", "sentid": 8.0}]}
    path = _write(tmp_path / "a.json", json.dumps({"images": [image, other]}))
    _refused(
        path,
        "row 0: image .1.jpg.: .sentences.: expected a caption id for each of 2 captions, found 1; --on_bad",
        "{}",
    )
    items = captions.read(str(path), strict=False)["train"]
    assert items[0].fault and items[1].caption_ids == (7, 8)
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": "2", "file_name": "2.jpg"}]
    annotations = [{"image_id": 1, "caption": "a", "id": 5}, {"image_id": "1", "caption": "b"}]
    content = {"images": images, "annotations": [*annotations, {"image_id": 2, "caption": "c", "id": 6}]}
    _write(path, json.dumps(content))
    items = captions.read(f"train={path}", strict=False)["train"]
    assert "row 1: expected caption ids of all captions" in str(items[0].record().error)
    assert items[1].record()["captions"] == ["c"]
    images[1]["id"] = 1
    _refused(_write(path, json.dumps(content)), "`images` gives id 1 to '1.jpg' and '2.jpg'")


@pytest.mark.parametrize(
    ("flag", "split", "message"),
    [
        ("train", "restval", ""),
        ("val", " VAL ", ""),
        ("train", "test", "row 0: .*expected split train, .* found 'test'"),
    ],
)
def test_a_split_of_the_flag_is_that_of_the_file(tmp_path, flag, split, message):
    image = {"filename": "1.jpg", "split": split, "sentences": [{"raw": "a"}]}
    path = _write(tmp_path / "dataset_coco.json", json.dumps({"images": [image]}))
    if message:
        _refused(path, message, f"{flag}={{}}")
    else:
        assert list(captions.read(f"{flag}={path}")) == [flag]


@pytest.mark.parametrize(
    ("listed", "file"),
    [
        ("1", "1.jpg"),
        ("1.jpg", "1.JPG"),
        ("1.jpg#0\n1.jpg#1", "1.jpg"),
        ("391895", "val2014/COCO_val2014_000000391895.jpg"),
        ("COCO_val2014_000000391895.jpg", "000000391895.jpg"),
        ("val2014/1.jpg", "val2014/1.jpg"),
    ],
)
def test_split_lists_know_an_image_by_any_of_its_names(tmp_path, capsys, listed, file):
    path = _write(tmp_path / "a.csv", f"image,caption\n{file},a\n{file},b\n")
    read = captions.read(str(path), f"test={_write(tmp_path / 'test.txt', listed)}")
    assert [(item.file, item.captions) for item in read["test"]] == [(file, ("a", "b"))] and not read.found.left_out
    assert "names have no captions" not in capsys.readouterr().err


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
        ("sep=;\nimage;caption\n1.jpg;a, b\n", {"1.jpg": ["a, b"]}),  # of Excel
        (" Image Name , Captions \n1.jpg,a\n", {"1.jpg": ["a"]}),
        ("image,text\nval2014\\1.jpg,a\n", {"val2014/1.jpg": ["a"]}),  # of Windows
        ("image_id,caption\n391895.0,a\n", {"391895": ["a"]}),  # of pandas, where other rows lack a value
        ('image\tcaption\n1.jpg\t"cat"\n2.jpg\t"a ""b"""\n', {"1.jpg": ['"cat"'], "2.jpg": ['"a ""b"""']}),
        ('image\tcaption\n1.jpg\t"a ""big"" dog"\n2.jpg\tx\n', {"1.jpg": ['a "big" dog'], "2.jpg": ["x"]}),
        ('image\tcaption\n1.jpg\t"a\tdog"\n', {"1.jpg": ["a dog"]}),
        ('image\tcaption\n1.jpg\t"a ""b"""\n2.jpg\t"x\n', {"1.jpg": ['"a ""b"""'], "2.jpg": ['"x']}),
        ('image,caption\n1.jpg,"a\rb"\n', {"1.jpg": ["a b"]}),
    ],
)
def test_tables_as_programs_write_them(tmp_path, text, expected):
    for encoding in ("utf-8", "utf-16", "utf-16-le", "utf-32"):
        path = _write(tmp_path / "x.csv", text.lstrip("" if encoding == "utf-8" else "\ufeff").encode(encoding))
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
    complete = _parquet(columns)
    for broken in (
        complete[:-9],
        complete.replace(b"caption", b"capti\x80n"),
        complete.replace(b"\1\0\0\0b", b"\1\0\0\0\xb8"),
    ):
        assert broken != complete
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
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1].startswith(
        "toy: read 9 rows, 16 captions of 9 images; stored 4 images with 8 captions (train 4 with 8); left out 5: "
        "1 bad records; 1 absent from a joined file; 1 without captions, such as '0.jpg'; 2 in no split list, such as "
        "'6.jpg'; the bad ones are listed in "
    )
    assert "note: --split_lists: 1 of 8 names have no captions, such as '77.jpg'" in printed
    assert any(line.startswith("toy: 6 records, 2 of them left out in ") for line in printed)


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
        ("a.csv", "image,caption\n1.jpg,é\n".encode("latin-1"), "row 2: image '1.jpg': expected visible text in UTF-8"),
        (
            "a.csv",
            "image,caption\n1.jpg,é\n".encode("utf-16")[:-1],
            "expected UTF-16-LE, as it begins|expected UTF-16, as it begins",
        ),
        ("a.token", b"1.jpg#0\tA\r1.jpg#1\tB\r", "found a file with CR alone"),
        ("a.csv", b"image,caption\r1.jpg,a\r", "found a file with CR alone"),
    ],
)
def test_what_a_file_is_instead_is_said(tmp_path, name, content, message):
    _refused(_write(tmp_path / name, content), message)
