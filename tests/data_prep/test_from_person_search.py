"""The annotation files of the person searches, with pictures and persons made up here."""

import json

import numpy as np
import pytest
from PIL import Image

from data_prep.from_person_search import main, read_annotations
from data_prep.schema import DataError
from shnet_jax.data.records import open_dataset


def rows(field="file_path", val=True):
    made = []
    for person, split in ((1, "train"), (2, "train"), (3, "test"), *([(4, "val")] if val else [])):
        for shot in range(2):
            captions = [f"a man with bag {person}", f"he wears coat {shot}"]
            row = {"split": split, "captions": captions, field: f"cam/{person}_{shot}.png", "id": person}
            made.append(row | {"processed_tokens": [["a"]]})
    return made


def folder(tmp_path, made, field="file_path"):
    (tmp_path / "imgs" / "cam").mkdir(parents=True)
    for number, row in enumerate(made):
        pixels = np.full((20, 10, 3), 10 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "imgs" / row[field])
    (tmp_path / "raw.json").write_text(json.dumps(made))
    return tmp_path


def run(tmp_path, *more):
    paths = [f"--annotations={tmp_path / 'raw.json'}", f"--images={tmp_path / 'imgs'}", f"--out={tmp_path / 'out'}"]
    return main([*paths, "--name=persons", "--size=12x4", *more])


@pytest.mark.parametrize("field", ["file_path", "img_path"])
def test_a_set_is_imported(tmp_path, field):
    folder(tmp_path, rows(field), field)
    assert run(tmp_path) == 0
    dataset = open_dataset(tmp_path / "out")
    assert dict(dataset.splits) == {"train": 4, "val": 2, "test": 2}
    np.testing.assert_array_equal(dataset.identities("train"), [1, 1, 2, 2])
    record = dataset.open_split("train", ("image_id", "captions", "caption_ids", "image"))[1]
    assert record["image_id"] == "cam/1_1.png" and record["captions"] == ["a man with bag 1", "he wears coat 1"]
    np.testing.assert_array_equal(record["caption_ids"], [2, 3])
    np.testing.assert_array_equal(record["image"], np.full((12, 4, 3), 10))


def test_persons_are_held_out_of_training(tmp_path, capsys):
    folder(tmp_path, rows(val=False))
    assert run(tmp_path, "--hold_out=1") == 0
    dataset = open_dataset(tmp_path / "out")
    np.testing.assert_array_equal(dataset.identities("train"), [1, 1])
    np.testing.assert_array_equal(dataset.identities("val"), [2, 2])
    assert run(tmp_path, "--hold_out=2", "--overwrite") == 1
    assert "--hold_out=2: expected no split val and more than 2 persons" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": -1}, "raw.json row 5: field 'id': expected a whole number >= 0, found -1"),
        ({"id": 1}, "raw.json row 5: field 'id': person 1 is in the splits train and test"),
        ({"split": "dev"}, "raw.json row 5: field 'split': expected one of train, val, test, found 'dev'"),
        ({"captions": []}, r"raw.json row 5: field 'captions': expected a list of sentences, found \[\]"),
        ({"file_path": "../a.png"}, "raw.json row 5: field 'file_path': expected a path inside"),
    ],
)
def test_faults_name_file_row_and_field(tmp_path, change, message):
    made = rows()
    made[5] |= change
    (tmp_path / "raw.json").write_text(json.dumps(made))
    with pytest.raises(DataError, match=message):
        read_annotations(tmp_path / "raw.json")


def test_a_picture_that_is_none_is_named(tmp_path, capsys):
    folder(tmp_path, rows())
    (tmp_path / "imgs" / "cam" / "2_0.png").write_bytes(b"no picture")
    assert run(tmp_path) == 1
    assert "2_0.png: expected a picture" in capsys.readouterr().err
    (tmp_path / "imgs" / "cam" / "2_0.png").unlink()
    assert run(tmp_path) == 1
    assert "2_0.png: expected a picture" in capsys.readouterr().err
