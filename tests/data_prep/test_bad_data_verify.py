"""`verify` finds each fault that is planted in an otherwise good data set: status 1, and a line that names it."""

import json
import re
import shutil

import numpy as np
import pytest

from data_prep import schema, verify
from data_prep.builder import write_checksums, write_dataset
from tests.data_prep.example import record


def _write(folder, changes):
    """Six records for training and seven for testing, some of these with changes: {row: fields}."""
    train = [record(row) for row in range(6)]
    test = [record(10 + row, **changes.get(row, {})) for row in range(7)]
    return write_dataset(folder, "toy", {"train": train, "test": test}, {"source": "by hand"})


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = _write(tmp_path_factory.mktemp("good"), {})
    assert not verify.verify(path).problems
    return path


def _at(name, row, place, value):
    array = record(10 + row)[name].copy()
    array[place] = value
    return {name: array}


CAPTIONS = ["a dog runs", " "]
VALUES = (
    (_at("regions", 0, (1, 2), np.nan), "'regions': expected finite values, found nan at [1, 2]"),
    (_at("grid", 1, (0, 1), np.inf), "'grid': expected finite values, found inf at [0, 1]"),
    (_at("boxes", 2, 2, [0, 0, 2, 1]), "'boxes': expected coordinates in 0..1, found [0.0, 0.0, 2.0, 1.0]"),
    (_at("boxes", 3, 1, [0.5, 0, 0.25, 1]), "'boxes': expected x1 <= x2 and y1 <= y2, found [0.5, 0.0,"),
    (_at("seg_map", 4, (0, 0), 12), "'seg_map': expected class ids 0..10, or 11 for void, found 12"),
    ({"captions": CAPTIONS}, "'captions': expected text, found ' ' as caption 1 of 2"),
    ({"region_mask": np.zeros(4, bool)}, "'region_mask': expected at least one valid unit, found none of 4"),
)


def _found(path, capsys):
    capsys.readouterr()
    assert verify.main([str(path)]) == 1
    out, err = capsys.readouterr()
    faults = [line for line in (out + err).splitlines() if line.startswith(("problem: ", "error: "))]
    assert err or " more" in faults[-1] or out.endswith(f"not usable: {len(faults)} problems\n")
    return "\n".join(faults)


def test_values_that_the_importer_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(schema, "check_record", lambda *args, **_: None)
    path = _write(tmp_path, {row: changes for row, (changes, _) in enumerate(VALUES)})
    monkeypatch.undo()
    problems = _found(path, capsys).splitlines()
    for row, ((_, message), problem) in enumerate(zip(VALUES, problems, strict=True)):
        assert problem.startswith(f"problem: split 'test' row {row} (image 'image {10 + row}'): field {message}")


@pytest.mark.parametrize(
    ("image_id", "message"),
    [("image 12", "1 images in test and test, such as 'image 12'"), ("image 3", "1 images in train and test, such as")],
)
def test_an_image_twice(image_id, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(schema, "check_new", lambda *args: None)
    path = _write(tmp_path, {4: {"image_id": image_id}})
    assert message in _found(path, capsys)


def _flip(place):
    def spoil(path):
        data = bytearray(path.read_bytes())
        data[int(place * len(data))] ^= 4
        path.write_bytes(data)

    return spoil


def _cut(path):
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize("spoil", [_cut, _flip(0.02), lambda path: path.unlink()], ids=["cut", "flipped", "gone"])
@pytest.mark.parametrize(
    "name",
    ["toy-test.array_record-00000", "index_test.npz", "sentencepiece.model", "features.json", "dataset_info.json"],
)
def test_a_file_unlike_its_checksum(name, spoil, good, tmp_path, capsys):
    path = shutil.copytree(good, tmp_path / "toy")
    spoil(path / name)
    assert re.search(
        rf"{re.escape(name)}\b.*(expected sha256|missing|expected this file|no data set)|no data set.*{name}",
        _found(path, capsys),
    )


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (
            "toy-test.array_record-00000",
            _flip(0.02),
            r"array_record-00000: record (\d) of this file \(split 'test' row \1\)",
        ),
        ("toy-test.array_record-00000", _cut, r"array_record-00000: record 0 of this file \(split 'test' row 0\)"),
        ("toy-test.array_record-00000", lambda path: path.unlink(), r"array_record-00000: record 0 .* No such file"),
        ("index_test.npz", _flip(0.5), r"index_test\.npz: expected an index"),
        ("sentencepiece.model", _cut, r"sentencepiece\.model: expected a SentencePiece model"),
        ("features.json", _cut, r"expected .*features\.json"),
    ],
)
def test_damage_without_checksums(name, spoil, message, good, tmp_path, capsys):
    path = shutil.copytree(good, tmp_path / "toy")
    (path / "checksums.json").unlink()
    spoil(path / name)
    assert re.search(message, _found(path, capsys))


def test_damaged_checksums(good, tmp_path, capsys):
    path = shutil.copytree(good, tmp_path / "toy")
    _cut(path / "checksums.json")
    assert "checksums.json: expected JSON" in _found(path, capsys)


def test_another_shape_than_the_records_have(good, tmp_path, capsys):
    path = shutil.copytree(good, tmp_path / "toy")
    described = json.loads((path / "features.json").read_text())
    shape = described["featuresDict"]["features"]["regions"]["tensor"]["shape"]
    assert shape["dimensions"] == ["4", "6"]
    shape["dimensions"] = ["4", "7"]
    (path / "features.json").write_text(json.dumps(described))
    write_checksums(path)
    actual = _found(path, capsys)
    assert (
        "array_record-00000: record 0 of this file (split 'train' row 0): expected a record as it was written" in actual
    )
    assert "ValueError: cannot reshape array of size 24 into shape (4,7)" in actual
