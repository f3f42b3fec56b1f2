"""Files with real faults through the real importers: refused by name, or left out and listed on request."""

import base64
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from data_prep import bad_records, from_bottom_up, from_npy, from_person_search, from_scan, relations, verify
from data_prep.builder import write_dataset
from data_prep.schema import DataError
from shnet_jax.data.records import find_dataset, open_dataset
from shnet_jax.observe import progress
from tests.data_prep.example import altered, line, put, record
from tests.patience import PATIENCE

IMAGES, PER = 24, 2
ROOT = Path(from_scan.__file__).parent.parent


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Splits dev and train in SCAN's layout, without a fault."""
    folder = tmp_path_factory.mktemp("good")
    rng = np.random.default_rng(0)
    for split in ("dev", "train"):
        corners = np.sort(rng.random((IMAGES, 3, 2, 2)), axis=2).reshape(IMAGES, 3, 4)
        arrays = {
            "ims": rng.normal(size=(IMAGES, 3, 5)),
            "boxes": corners,
            "seg_maps": rng.integers(0, 11, (IMAGES, 4, 4)),
            "cat_onehots": rng.random((IMAGES, 11)) < 0.5,
        }
        for name, array in arrays.items():
            np.save(folder / f"{split}_{name}.npy", array)
        captions = (f"a {split} dog meets cat {i}\n" for i in range(IMAGES * PER))
        (folder / f"{split}_caps.txt").write_text("".join(captions))
        (folder / f"{split}_ids.txt").write_text("".join(f"{split}{i}.jpg\n" for i in range(IMAGES)))
    return folder


@pytest.fixture
def src(good, tmp_path):
    return shutil.copytree(good, tmp_path / "src")


class Fault(NamedTuple):
    """What spoils a folder, the record that it spoils, the error that says so."""

    spoil: Callable[[Path], None]
    split: str
    row: int
    field: str
    file: str
    message: str


def _fault(spoil, file, row, field, message):
    split = file.partition("_")[0]
    return Fault(spoil, split, row, field, file, message)


def _values(file, row, field, place, value, message):
    where = rf"row {row} \(image '\w+\.jpg'\), {file}: field '{field}': expected "
    return _fault(put(file, value, row, *place), file, row, field, where + message)


def _text(file, row, field, number, text, message):
    return _fault(line(file, number, text), file, row, field, message)


REGIONS, BOXES, CAPTIONS = "dev_ims.npy", "dev_boxes.npy", "dev_caps.txt"
RECORDS = {
    "NaN": _values(REGIONS, 1, "regions", (2, 4), np.nan, r"finite values, found nan at \[2, 4\]"),
    "Inf": _values(REGIONS, 2, "regions", (0, 0), -np.inf, r"finite values, found -inf at \[0, 0\]"),
    "box outside": _values(
        *(BOXES, 4, "boxes", (1,), [0, 0, 640, 480]),
        r"coordinates in 0\.\.1, found \[0\.0, 0\.0, 640\.0, 480\.0\] as box 1",
    ),
    "box inverted": _values(
        *(BOXES, 5, "boxes", (2,), [0.5, 0.5, 0.25, 0.75]),
        r"x1 <= x2 and y1 <= y2, found \[0\.5, 0\.5, 0\.25, 0\.75\] as box 2",
    ),
    "label above": _values(
        *("dev_seg_maps.npy", 7, "seg_map", (0, 3), 12), r"class ids 0\.\.10, or 11 for void, found 12"
    ),
    "empty caption": _text(
        CAPTIONS, 8, "captions", 18, b" ", r"dev_caps\.txt: field 'captions': expected text, found '' as caption 1"
    ),
    "no UTF-8": _text(
        *(CAPTIONS, 9, "captions", 19, b"a caf\xe9"),
        r"dev_caps\.txt: field 'captions': expected text, found 'a caf\\udce9' as caption 0",
    ),
    "id twice": _text(
        *("dev_ids.txt", 11, "image_id", 12, b"dev3.jpg"),
        r"row 11 \(image 'dev3\.jpg'\), dev_ids\.txt: field 'image_id': expected a new id, found that of row 3",
    ),
    "image in two splits": _text(
        *("train_ids.txt", 6, "image_id", 7, b"dev0.jpg"),
        r"row 6 .*train_ids\.txt: .* expected an image of no other split, found that of row 0 of split 'dev'",
    ),
}
# No record is to blame: all have the fault. Counts, objects and missing files are in test_from_scan.py.
FILES = {
    "one class more": (
        altered("train_cat_onehots.npy", lambda a: np.pad(a, ((0, 0), (0, 1)))),
        r"split 'train' row 0 .*train_cat_onehots\.npy: field 'categories': expected bool \[11\] .*found bool \[12\]",
    ),
    "shape": (
        altered("dev_ims.npy", lambda a: a.reshape(IMAGES, 15)),
        r"split 'dev' row 0 .*dev_ims\.npy: field 'regions': expected float16.* \[K, D\], found float16 \[15\]",
    ),
    "dtype": (
        altered("dev_ims.npy", lambda a: a.astype("U4")),
        r"split 'dev' row 0 .*dev_ims\.npy: field 'regions': expected numbers, found an array of <U4",
    ),
}


def _flags(src, out, *more):
    return [f"--src={src}", "--name=toy", f"--out={out}", *more]


def _skipped(out):
    return json.loads((find_dataset(out) / bad_records.SKIPPED).read_text())


@pytest.mark.parametrize(("spoil", "message"), FILES.values(), ids=FILES)
def test_a_bad_file_is_refused_with_or_without_skipping(spoil, message, src, tmp_path, capsys):
    spoil(src)
    assert from_scan.main(_flags(src, tmp_path / "out")) == 1
    assert re.search(message, capsys.readouterr().err)
    assert from_scan.main(_flags(src, tmp_path / "out", "--on_bad_record=skip")) == 1
    error = capsys.readouterr().err
    assert re.search(
        rf"error: split '\w+': expected at most 50% bad records, found 24 of 24; the first: {message}", error
    )
    assert not list((tmp_path / "out").glob("toy/*"))


def test_bad_records_are_left_out_and_listed(good, src, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    for fault in RECORDS.values():
        fault.spoil(src)
    assert from_scan.main(_flags(src, tmp_path / "out", "--on_bad_record=skip")) == 0
    error = capsys.readouterr().err
    path = find_dataset(tmp_path / "out")
    assert error.splitlines()[-1] == (
        "toy: read 96 rows, 96 captions of 48 images; "
        "stored 39 images with 78 captions (dev 16 with 32, train 23 with 46); "
        f"left out 9: 9 bad records; the bad ones are listed in {path / 'skipped.json'}"
    )
    assert re.search(r"toy: 3/48 \(6%\)  \S+ records/s  2 left out  ETA", error)
    assert "toy: 48 records, 9 of them left out in 0:00:0" in error

    expected = {(f.split, f.row, f.field, f.file) for f in RECORDS.values()}
    listed = _skipped(tmp_path / "out")
    assert len(listed) == len(expected)
    assert {(bad["split"], bad["row"], bad["field"], bad["file"]) for bad in listed} == expected
    assert [bad["row"] for bad in listed] == [1, 2, 4, 5, 7, 8, 9, 11, 6]
    for bad, fault in zip(listed, RECORDS.values(), strict=True):
        assert re.search(fault.message, bad["reason"]), bad
    assert "expected coordinates in 0..1, found [0.0, 0.0, 640.0, 480.0] as box 1 (in pixels? " in listed[2]["reason"]
    assert listed[6]["image_id"] == "dev9.jpg"

    from_scan.main(_flags(good, tmp_path / "whole"))
    full, rest = open_dataset(tmp_path / "whole"), open_dataset(tmp_path / "out")
    for split in ("dev", "train"):
        rows = sorted(set(range(IMAGES)) - {f.row for f in RECORDS.values() if f.split == split})
        records = full.open_split(split, ["image_id", "regions", "captions"])
        kept = list(rest.open_split(split, ["image_id", "regions", "captions"]))
        assert rest.image_ids(split).tolist() == [record["image_id"] for record in kept]
        for left, row in zip(kept, rows, strict=True):
            assert left["image_id"] == records[row]["image_id"] and left["captions"] == records[row]["captions"]
            np.testing.assert_array_equal(left["regions"], records[row]["regions"])
    report = verify.verify(path)
    assert not report.problems and "skipped.json: lists bad records that the import left out" in report.notes


def test_a_good_import_lists_nothing(good, tmp_path):
    path = from_scan.import_scan(good, "toy", tmp_path, on_bad_record="skip")
    assert not (path / bad_records.SKIPPED).exists()


def test_more_than_half_bad_is_no_data_set(src, tmp_path):
    put(REGIONS, np.nan, slice(12, None))(src)
    options = {"splits": ["dev"], "on_bad_record": "skip"}
    assert open_dataset(from_scan.import_scan(src, "half", tmp_path, **options)).splits == {"dev": 12}
    put(REGIONS, np.nan, 0)(src)
    with pytest.raises(
        DataError, match=r"split 'dev': expected at most 50% bad records, found 13 of 24; the first: .*row 0"
    ):
        from_scan.import_scan(src, "more", tmp_path, **options)


def test_an_import_without_a_good_record_ends_soon(tmp_path):
    with pytest.raises(DataError, match=r"split 'a': expected at most 50% bad records, found 100 of 100; the first: "):
        write_dataset(tmp_path, "toy", {"a": repeat(record(captions=[]))}, {}, on_bad_record="skip")


def test_files_of_single_images(src, tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    for i in range(IMAGES):
        np.save(folder / f"dev{i}.npy", np.ones((2, 3)))
    cut, text = folder / "dev1.npy", folder / "dev2.npy"
    cut.write_bytes(cut.read_bytes()[:-8])
    np.save(text, np.array([["a", "b"]]))
    np.save(folder / "dev3.npy", np.ones((2, 4)))
    np.save(folder / "dev4.npy", np.ones((0, 3)))
    for path in src.glob("*.npy"):
        path.unlink()
    flags = _flags(src, tmp_path / "out", f"--features={folder}", "--as=grid", "--splits=dev", "--max_units=4")
    assert from_npy.main([*flags, "--on_bad_record=skip"]) == 0
    reasons = [(bad["row"], bad["file"], bad["reason"]) for bad in _skipped(tmp_path / "out")]
    assert [(row, file) for row, file, _ in reasons] == [(row, f"{folder}/ID.npy") for row in (1, 2, 3, 4)]
    for (_, _, reason), message in zip(
        reasons,
        (
            r"split 'dev' row 1 \(image 'dev1\.jpg'\), .*dev1\.npy: expected a \.npy",
            r"row 2 .*field 'grid': expected numbers, found an array of <U1",
            r"row 3 .*field 'grid': expected float16 \[4, 3\] as in the first record, found float16 \[4, 4\]",
            r"row 4 .*dev4\.npy: expected features, found an empty array",
        ),
        strict=True,
    ):
        assert re.search(message, reason), reason


def test_lines_of_a_table_joined_to_captions(tmp_path):
    """from_bottom_up stands for all that join files by image id: from_grid_feats, from_panoptic, from_upsnet."""
    (tmp_path / "c.csv").write_text(
        "image,caption\n" + "".join(f"{i}.jpg,{'' if i == 2 else 'a dog'}\n" for i in range(6))
    )

    def cell(array):
        return base64.b64encode(np.asarray(array, np.float32)).decode()

    rows = [[str(i), "640", "480", "2", cell(np.ones((2, 4)) * 100), cell(np.ones((2, 3)))] for i in range(6)]
    rows[4][5] = "%%%"
    rows[5][3] = "0"
    del rows[3]  # absent: neither bad nor counted, and the others keep their numbers
    (tmp_path / "t.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    flags = [f"--bottom_up={tmp_path / 't.tsv'}", f"--captions=test={tmp_path / 'c.csv'}", "--name=toy"]
    flags += [f"--out={tmp_path / 'out'}", "--absent=skip"]
    assert from_bottom_up.main(flags) == 1
    assert from_bottom_up.main([*flags, "--on_bad_record=skip"]) == 0
    listed = _skipped(tmp_path / "out")
    assert [(bad["row"], bad["image_id"]) for bad in listed] == [(2, "2.jpg"), (4, "4.jpg"), (5, "5.jpg")]
    assert listed[0]["file"].endswith("c.csv") and "expected text, found '' as caption 0 of 1" in listed[0]["reason"]
    assert "column 'features': expected base64" in listed[1]["reason"]
    assert "expected an image and boxes, found 640 x 480 with 0" in listed[2]["reason"]


def test_pictures_of_persons(tmp_path):
    rows = []
    for i in range(5):
        Image.new("RGB", (4, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"split": "train", "id": i, "captions": ["a man"], "file_path": f"{i}.png"})
    rows[1]["captions"] = [""]
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:40])
    (tmp_path / "a.json").write_text(json.dumps(rows))
    flags = [f"--annotations={tmp_path / 'a.json'}", f"--images={tmp_path}", "--name=toy", f"--out={tmp_path / 'out'}"]
    assert from_person_search.main([*flags, "--size=8x4"]) == 1
    assert from_person_search.main([*flags, "--size=8x4", "--on_bad_record=skip"]) == 0
    listed = _skipped(tmp_path / "out")
    assert [(bad["row"], bad["image_id"], bad["file"]) for bad in listed] == [
        (1, "1.png", "a.json"),
        (3, "3.png", "3.png"),
    ]
    assert open_dataset(tmp_path / "out").image_ids("train").tolist() == ["0.png", "2.png", "4.png"]


def test_what_is_left_of_a_damaged_set(tmp_path):
    """The importer that reads a data set saves what can be read of it."""
    path = write_dataset(tmp_path, "old", {"a": [record(row) for row in range(6)]}, {})
    shard = next(path.glob("*array_record*"))
    data = bytearray(shard.read_bytes())
    data[len(data[: 1 << 16].rstrip(b"\0")) * 5 // 12] ^= 1  # within record 2 of 6; zeros fill the block of 64 KiB
    shard.write_bytes(data)
    flags = [f"--data={path}", "--name=new", f"--out={tmp_path}", "--geometric"]
    assert relations.main(flags) == 1
    assert relations.main([*flags, "--on_bad_record=skip"]) == 0
    assert [(bad["row"], bad["file"]) for bad in _skipped(tmp_path / "new")] == [(2, shard.name)]
    assert open_dataset(tmp_path / "new").splits == {"a": 5}


def test_a_caption_of_ten_thousand_characters(src, tmp_path):
    caption = "a dog " * 1700
    line(CAPTIONS, 3, caption.encode())(src)
    dataset = open_dataset(from_scan.import_scan(src, "toy", tmp_path, splits=["dev"]))
    assert dataset.open_split("dev", ["captions"])[1]["captions"][0] == caption.strip()


@pytest.mark.slow
def test_a_killed_import_lists_the_same(src, tmp_path):
    """The import is killed by a signal, in the midst of its records, and started again with the same command."""
    for fault in RECORDS.values():
        fault.spoil(src)
    for name in ("dev_ims", "dev_boxes", "dev_seg_maps", "dev_cat_onehots"):
        path = src / f"{name}.npy"
        np.save(path, np.tile(np.load(path), (200, *[1] * (np.load(path).ndim - 1))))
    captions = (src / CAPTIONS).read_bytes()
    (src / CAPTIONS).write_bytes(captions * 200)
    ids = (src / "dev_ids.txt").read_text().split()
    (src / "dev_ids.txt").write_text("".join(f"{k}{i}\n" for k in range(200) for i in ids))

    def run(out):
        flags = _flags(src, out, "--splits=dev", "--on_bad_record=skip")
        command = [sys.executable, "-m", "data_prep.from_scan", *flags]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    process = run(tmp_path / "killed")
    shards = tmp_path / "killed" / "toy" / ".1.0.0.incomplete"
    while process.poll() is None and not list(shards.glob("*array_record*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "toy" / "1.0.0").exists()
    for out in ("killed", "whole"):
        process = run(tmp_path / out)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    lists = [(find_dataset(tmp_path / out) / bad_records.SKIPPED).read_bytes() for out in ("killed", "whole")]
    assert lists[0] == lists[1] and len(json.loads(lists[0])) == 200 * 8
