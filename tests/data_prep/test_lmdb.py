"""Regions from LMDB: the records of UNITER, ViLBERT and MMF, and files that are none."""

import io
import json
import pickle
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import lmdb
import msgpack
import numpy as np
import pytest

from data_prep import from_lmdb
from data_prep.schema import DataError
from data_prep.sources.detections import Reading
from data_prep.sources.lmdb_files import Lmdb, parse_value
from tests.data_prep.example import FILES, cell

KEYS = (b"coco_val2014_000000000042.npz", b"coco_val2014_000000000139.npz")
RNG = np.random.default_rng(0)


def write(folder, values, **options):
    """An environment with the values by key."""
    with lmdb.open(str(folder), map_size=2**24, **options) as env, env.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return folder


def uniter(count, columns=6):
    """Arrays of an image, and its boxes in 0..1."""
    boxes = np.sort(RNG.random((count, 2, 2)), 1).reshape(count, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    place = np.concatenate([boxes, sides, sides.prod(1, keepdims=True)], 1)[:, :columns]
    arrays = {
        "features": RNG.normal(size=(count, 8)),
        "norm_bb": place,
        "conf": RNG.random(count),
        "soft_labels": RNG.random((count, 5)),
    }
    return {name: array.astype(np.float16) for name, array in arrays.items()}, boxes


def npz(arrays, save=np.savez_compressed):
    file = io.BytesIO()
    save(file, **arrays, allow_pickle=np.array(True))  # as UNITER's script writes it by mistake
    return file.getvalue()


def of_numpy(array):
    """What msgpack-numpy makes of an array."""
    return {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}


def packed(arrays):
    return msgpack.packb({name: of_numpy(array) for name, array in arrays.items()}, use_bin_type=True)


@pytest.mark.parametrize("columns", [6, 7])
@pytest.mark.parametrize("encode", [npz, lambda arrays: npz(arrays, np.savez), packed])
def test_uniter(tmp_path, run, encode, columns):
    images = [uniter(3, columns), uniter(2, columns)]
    values = {key: encode(arrays) for key, (arrays, _) in zip(KEYS, images, strict=True)}
    folder = write(tmp_path / "feat_th0.2_max100_min10", {**values, b"__keys__": json.dumps([]).encode()})
    records, _ = run(from_lmdb.main, f"--lmdb={folder}", "--max_regions=4")
    for record, (arrays, boxes) in zip(records, images, strict=True):
        count = len(boxes)
        np.testing.assert_array_equal(record["regions"][:count], arrays["features"])
        np.testing.assert_allclose(record["boxes"][:count], boxes, atol=1e-3)
        np.testing.assert_array_equal(record["box_scores"][:count], arrays["conf"])
        assert record["region_mask"].tolist() == [True] * count + [False] * (4 - count)
        assert not record["regions"][count:].any()


def test_uniter_reads_as_many_regions_as_the_file_beside_says(tmp_path):
    (arrays, _), name = uniter(5), "th0.2_max100_min10"
    folder = write(tmp_path / f"feat_{name}_compressed", {KEYS[0]: npz(arrays)})
    counts = tmp_path / f"nbb_{name}.json"
    for count in (3, 5):
        counts.write_text(json.dumps({KEYS[0].decode(): count}))
        np.testing.assert_array_equal(Lmdb(folder, Reading()).read("42")["regions"], arrays["features"][:count])
    counts.write_text(json.dumps({KEYS[0].decode(): 6}))
    with pytest.raises(DataError, match=r"expected 1\.\.5"):
        Lmdb(folder, Reading()).read("42")
    counts.write_text("[1]")
    with pytest.raises(DataError, match=r"nbb_.*expected an object of name: number of regions"):
        Lmdb(folder, Reading()).read("42")


BOXES = np.array([[0, 0, 100, 50], [20, 10, 200, 100]], np.float32)  # of an image of 200 x 100
SHARES = BOXES / [200, 100, 200, 100]
FEATURES = RNG.normal(size=(2, 8)).astype(np.float32)
LIKELY = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]], np.float32)
VILBERT = {"image_id": "42", "image_h": 100, "image_w": 200, "num_boxes": 2, "boxes": BOXES, "features": FEATURES}
MMF = {
    "feature_path": "COCO_val2014_000000000042",
    "features": FEATURES,
    "image_height": 100,
    "image_width": np.int64(200),
    "num_boxes": 1,  # that are sure; MMF reads all
    "objects": np.array([4, 2]),
    "cls_prob": None,
    "bbox": BOXES,
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["base64", "text", "arrays", "mmf"])
def test_vilbert_and_mmf(tmp_path, run, kind, protocol):
    in_base64 = VILBERT | {"boxes": cell(BOXES).encode(), "features": cell(FEATURES).encode(), "cls_prob": LIKELY}
    in_text = VILBERT | {"boxes": cell(BOXES), "features": cell(FEATURES), "cls_prob": LIKELY}
    record = {"base64": in_base64, "text": in_text, "arrays": VILBERT | {"cls_prob": LIKELY}, "mmf": MMF}[kind]
    key = b"folder/COCO_val2014_000000000042" if kind == "mmf" else b"42"
    keys = pickle.dumps([key], protocol)
    path = write(tmp_path / "coco.lmdb", {key: pickle.dumps(record, protocol), b"keys": keys}, subdir=False)
    (actual,), _ = run(from_lmdb.main, f"--lmdb={path}", "--feature_dtype=float32", "--absent=skip")
    np.testing.assert_array_equal(actual["regions"], FEATURES)
    np.testing.assert_allclose(actual["boxes"], SHARES, atol=1e-6)
    if kind == "mmf":
        assert actual["box_classes"].tolist() == [4, 2] and "box_scores" not in actual
    else:
        assert actual["box_classes"].tolist() == [1, 0]
        np.testing.assert_array_equal(actual["box_scores"], np.float32([0.7, 0.5]))


def test_an_image_without_a_record(tmp_path, run):
    folder = write(tmp_path / "x", {b"42": packed({"features": FEATURES})})
    assert f"image '{FILES[1]}': expected its record, found none among 1" in run(from_lmdb.main, f"--lmdb={folder}")[1]


def refused(value, tmp_path, **reading):
    folder = write(tmp_path / "x", {b"42": value})
    with pytest.raises(DataError) as error:
        Lmdb(folder, Reading(**reading)).read("42.jpg")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": None}, "expected the key 'features', found"),
        ({"image_w": None}, "expected the image's size for boxes in pixels, found none; --sizes=FILE"),
        ({"image_w": 0}, "expected whole pixels as width and height"),
        ({"boxes": BOXES[:1]}, "expected 2, one a region, found 1"),
        ({"boxes": BOXES[:, :3]}, r"expected boxes [K, 4], found [2, 3]"),
        ({"boxes": SHARES}, "--boxes=shares says that they are in 0..1 already"),
        ({"boxes": cell(BOXES).encode(), "num_boxes": None}, "expected num_boxes with 'boxes' in base64"),
        ({"boxes": cell(BOXES).encode(), "num_boxes": 3}, "expected a multiple of 3 float32"),
        ({"features": "!!!"}, "column 'features': expected base64"),
        ({"features": np.array(["a"])}, "an array of"),
        ({"features": np.array([{}], object)}, "not a record that can be read safely"),
        ({"features": np.float32(1)}, "'features': expected an array of numbers, or base64 of float32, found float"),
        ({"features": [1.0]}, "'features': expected an array of numbers, or base64 of float32, found list"),
        ({"features": FEATURES[None, None]}, ""),
        ({"cls_prob": LIKELY[0]}, "'cls_prob': expected numbers [K, classes], found [3]"),
        ({"objects": np.array([1, 2, 3])}, "field 'box_classes': expected 2, one a region, found 3"),
    ],
)
def test_a_record_that_is_none_is_refused_with_what_it_lacks(changed, message, tmp_path):
    if message:
        assert message in refused(pickle.dumps(VILBERT | changed), tmp_path)
    else:  # a batch of one is taken
        folder = write(tmp_path / "x", {b"42": pickle.dumps(VILBERT | changed)})
        assert Lmdb(folder, Reading()).read("42.jpg")["regions"].shape == (2, 8)


class Bomb:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "expected a value of npz, msgpack or pickle"),
        (b"\xff\xd8\xff\xe0", "found a JPEG"),
        (b"\x04\x22\x4d\x18....", "found LZ4"),
        (b"PK\x03\x04....", "expected arrays as np.savez writes them"),
        (pickle.dumps([1]), "expected a dictionary, found list"),
        (pickle.dumps({"features": Bomb()}), "it names builtins.print, which is not loaded"),
        (pickle.dumps(VILBERT)[:-9], "not a record that can be read safely"),
        (pickle.dumps(VILBERT) + b"x", "1 bytes behind its pickle"),
        (npz({"features": np.zeros((2**13, 2**12), np.float16)}), "more than the 67108864 that are read of an image"),
        (npz({"norm_bb": np.zeros((2, 6))}), "expected the key 'features', found norm_bb"),
        (packed({"features": FEATURES})[:-3], "expected msgpack with arrays of numbers"),
        (b"\x81\xa8features" + msgpack.packb(of_numpy(FEATURES) | {b"shape": (2**40, 2**40)}), "has 64 bytes"),
        (b"\x81\xa8features" + msgpack.packb(of_numpy(FEATURES) | {b"shape": (-2, -8)}), "has 64 bytes"),
        (
            b"\x81\xa8features"
            + msgpack.packb({b"nd": True, b"type": "|O", b"kind": b"O", b"data": pickle.dumps(Bomb())}),
            "only integers, floats and booleans are loaded",
        ),
        (
            b"\x81\xa8features" + msgpack.packb(of_numpy(FEATURES) | {b"kind": b"V", b"type": [["a", "<f4"]]}),
            "only integers, floats and booleans are loaded",
        ),
        (b"\x81" * 5000, "expected msgpack with arrays of numbers"),
    ],
)
def test_a_value_of_another_kind(value, message, tmp_path, capsys):
    assert message in refused(value or b"?", tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_numbers_of_msgpack_numpy():
    packed_number = {b"nd": False, b"type": "<f8", b"data": np.float64(0.5).tobytes()}
    old = {"nd": True, "type": b"<f4", "shape": [2, 8], "data": FEATURES.tobytes()}  # of its first versions
    actual = parse_value(msgpack.packb({"a": packed_number, "features": old}), "here")
    assert actual["a"] == 0.5 and type(actual["a"]) is float
    np.testing.assert_array_equal(actual["features"], FEATURES)


def test_one_name_in_two_folders_and_two_of_one_number(tmp_path):
    value = packed({"features": FEATURES})
    source = Lmdb(write(tmp_path / "a", {b"a/1": value, b"b/1": value, b"a/2": value}), Reading())
    assert source.read("a/1.jpg")["regions"].shape == (2, 8) == source.read("2.jpg")["regions"].shape
    with pytest.raises(DataError, match=r"image '1\.jpg': expected one entry .*, found 'a/1' and 'b/1'"):
        source.read("1.jpg")
    twice = Lmdb(write(tmp_path / "b", {b"vg_7": value, b"coco_val2014_000000000007": value}), Reading())
    with pytest.raises(DataError, match=r"expected one entry of this name or number"):
        twice.read("7.jpg")


def test_files_that_are_no_lmdb(tmp_path, run):
    (tmp_path / "img_db").mkdir()
    inner = write(tmp_path / "img_db" / "feat_th0.2_max100_min10", {b"42": b"x"})
    complete = (inner / "data.mdb").read_bytes()
    cases = {
        "no such file or folder": tmp_path / "absent",
        "found the folders feat_th0.2_max100_min10; give one of them": inner.parent,
    }
    for name, data, message in (
        ("empty", b"", "expected an LMDB file, found other bytes"),
        ("other", b"x" * 9000, "expected an LMDB file, found other bytes"),
        ("cut", complete[:-4096], f"expected {len(complete)} bytes, found {len(complete) - 4096}: the file is cut off"),
        ("half", complete[:4100], "expected a second page"),
        ("pages", complete[:40] + b"\x07" + complete[41:], "the file is damaged"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 200, "git-LFS pointer"),
        (
            "version",
            complete.replace(b"\xde\xc0\xef\xbe\x01", b"\xde\xc0\xef\xbe\x09"),
            "LMDB data format v9 is not supported",
        ),
    ):
        (tmp_path / f"{name}.lmdb").write_bytes(data)
        cases[message] = tmp_path / f"{name}.lmdb"
    cases["expected a record for each image, found none"] = write(tmp_path / "nothing", {b"keys": b"x"})
    for message, path in cases.items():
        records, error = run(from_lmdb.main, f"--lmdb={path}")
        assert records is None and message in error and str(path) in error and error.count("\n") == 1, error


def test_a_key_without_a_value_is_damage(tmp_path):
    source = Lmdb(write(tmp_path / "x", {b"42": packed({"features": FEATURES})}), Reading())
    source.__dict__["_transaction"] = types.SimpleNamespace(get=lambda key: None)  # as of damaged pages
    with pytest.raises(DataError, match="expected the value of this key, found none: the file is damaged"):
        source.read("42")


_DAMAGED = """
import random, sys
from pathlib import Path
from data_prep.schema import DataError
from data_prep.sources.detections import Reading
from data_prep.sources.lmdb_files import Lmdb

whole, rng, path = Path(sys.argv[1]).read_bytes(), random.Random(sys.argv[2]), Path(sys.argv[1] + ".damaged")
for _ in range(40):
    data = bytearray(whole)
    for _ in range(rng.choice((1, 2, 5, 20))):  # many of them in the headers of pages
        at = rng.randrange(len(data))
        data[at if rng.random() < 0.5 else at // 4096 * 4096 + at % 200] = rng.randrange(256)
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    for name in ("1", "2", "3"):
        try:
            Lmdb(path, Reading()).read(name)
        except DataError:
            pass
"""


@pytest.mark.slow
def test_damage_anywhere_gives_an_error_or_ends_the_process_in_the_library(tmp_path):
    """The inner pages of a file are the C library's matter: it may crash over them. Nothing else may come out."""
    values = {str(i).encode(): packed({"features": np.ones((2, 8 if i % 9 else 4000), np.float32)}) for i in range(60)}
    path = write(tmp_path / "x.lmdb", values, subdir=False)
    for seed in "abc":
        command = [sys.executable, "-c", _DAMAGED, str(path), seed]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode <= 0, done.stderr


def test_one_record_is_in_memory_at_a_time(tmp_path):
    values = {str(i).encode(): packed({"features": np.ones((36, 1000), np.float32)}) for i in range(100)}
    source = Lmdb(write(tmp_path / "x", values), Reading())
    tracemalloc.start()
    for i in range(100):
        source.read(f"{i}.jpg")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 36 * 1000 * 4


def test_without_the_library_its_extra_is_named(tmp_path, monkeypatch, run):
    folder = write(tmp_path / "x", {b"42": packed({"features": FEATURES})})
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert "reading LMDB needs lmdb: pip install -e '.[lmdb]'" in run(from_lmdb.main, f"--lmdb={folder}")[1]
