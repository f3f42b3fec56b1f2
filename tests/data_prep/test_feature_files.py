"""Feature files of the wild: each is read as its tool meant it, or refused or remarked on in one line."""

import json
import pickle

import h5py
import msgpack
import numpy as np
import pytest

from data_prep import from_bottom_up, from_grid_feats, from_hdf5, from_npz, from_vinvl, notes
from data_prep.names import FileNames, Names
from data_prep.schema import DataError
from data_prep.sources import row_ids
from data_prep.sources.bottom_up import decode
from data_prep.sources.hdf5 import Hdf5Features
from data_prep.sources.lmdb_files import arrays_of, parse_value
from data_prep.sources.row_ids import read_index
from data_prep.sources.units import as_units
from tests.data_prep.example import FILES, NUMBERS, cell

RNG = np.random.default_rng(0)
REGIONS = RNG.normal(size=(2, 3, 64)).astype(np.float32)
BOXES = np.array([[0, 0, 200, 100], [10, 20, 30, 40], [5, 5, 90, 60]], np.float32)


def _npz(folder, names=NUMBERS, **arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        np.savez(folder / f"{name}.npz", **{"x": REGIONS[i]} | arrays)
    return f"--npz={folder}"


# ---------------------------------------------------------------------------------------------------------- whose file


def test_files_lie_in_folders_by_split(tmp_path, run):
    _npz(tmp_path / "f" / "val2014", NUMBERS[:1])
    np.savez(_made(tmp_path / "f" / "train2014") / "139.npz", x=REGIONS[1])
    records, _ = run(from_npz.main, f"--npz={tmp_path / 'f'}", "--feature_dtype=float32")
    np.testing.assert_array_equal([record["regions"] for record in records], REGIONS)
    names = FileNames(tmp_path / "f", (".npz",))
    assert names.find("val2014/000042.jpg") == tmp_path / "f/val2014/42.npz"
    assert names.find("train2014/42.jpg") is None  # another folder than the one that is named


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("entries", "image_id", "found"),
    [
        (["b/42", "42"], "42.jpg", "42"),
        (["b/42", "0042"], "COCO_val2014_000000000042.jpg", "0042"),
        (["a/42", "b/COCO_val2014_000000000042"], "a/042.jpg", "a/42"),
        (["a/42", "b/042"], "42.jpg", None),
    ],
)
def test_a_name_without_its_folder(entries, image_id, found):
    names = Names("here")
    for name in entries:
        names.add(name, [name])
    if found is None:
        with pytest.raises(DataError, match=r"found 'a/42' and 'b/042'"):
            names.find(image_id)
    else:
        assert names.find(image_id) == [found]
    assert f"{len(entries)} others, such as '{entries[0]}'" in names.none_found


# ------------------------------------------------------------------------------------------------- what is said of them


def test_what_is_changed_or_not_read_is_said_once(tmp_path, run):
    others = {"info": np.array({"objects": [1]}, object), "attrs": np.ones(3), "scale": 0.1}
    quantised = {"x": (REGIONS[0] * 20).astype(np.int8), "bbox": BOXES + np.float32(0.7)}
    _, printed = run(from_npz.main, _npz(tmp_path / "f", image_w=200, image_h=100, **quantised, **others))
    lines = [line for line in printed.splitlines() if line.startswith("note: ")]
    for remark in (
        "not read: attrs, info, scale",
        "boxes that end up to a pixel",
        "regions are int8: stored as they are",
    ):
        assert sum(remark in line and "(2 times, first in " in line for line in lines) == 1, printed
    assert len(lines) == 3 and not notes._FOUND


def test_scores_of_one_column_and_of_many(tmp_path, run):
    records, printed = run(
        from_npz.main, _npz(tmp_path / "f", conf=np.full((3, 1), 0.5), objects_id=np.ones((3, 9), int))
    )
    assert records[0]["box_scores"].tolist() == [0.5] * 3 and "box_classes" not in records[0]
    assert "note: not read: objects_id [9] of each region, expected one number (2 times" in printed


@pytest.mark.parametrize(
    ("arrays", "remark"),
    [
        ({"x": np.pad(REGIONS[0], ((0, 4), (0, 0)))}, "regions of zeros behind the others are taken as padding"),
        ({"x": REGIONS.reshape(6, 64), "num_bbox": 3}, "regions behind the number in num_bbox are left out"),
        ({"cls_prob": np.ones((3, 81))}, "not read: cls_prob [81] of each region, expected 1601"),
    ],
)
def test_padding_and_what_else_is_left_out(arrays, remark, tmp_path, run):
    records, printed = run(from_npz.main, _npz(tmp_path / "f", **arrays), "--max_regions=5")
    assert f"note: {remark} (2 times" in printed and records[0]["region_mask"].tolist() == [True] * 3 + [False] * 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": REGIONS[0]}, "expected features under one name, found x and features"),
        ({"x": np.zeros((3, 8))}, "field 'regions': expected features, found zeros alone"),
        ({"x": np.full((3, 8), 1e-9)}, "found magnitudes below 1e-09; --feature_dtype=float32"),
        ({"x": np.full((3, 8), 1e9)}, "found magnitudes up to 1e+09; --feature_dtype=float32"),
        ({"bbox": BOXES, "image_w": 100, "image_h": 200}, "are width and height exchanged?"),
    ],
)
def test_what_is_refused(arrays, message, tmp_path, run):
    records, printed = run(from_npz.main, _npz(tmp_path / "f", **arrays))
    assert records is None and message in printed and printed.count("\n") == 1, printed


def test_different_numbers_of_regions_name_the_flag(tmp_path, run):
    flag = _npz(tmp_path / "f")
    np.savez(tmp_path / "f" / "139.npz", x=REGIONS[1, :2])
    assert "--max_regions, --max_cells or --max_units pads them" in run(from_npz.main, flag)[1]


# ------------------------------------------------------------------------------------------- files of another kind, cut


def test_a_file_that_cannot_be_opened_is_a_bad_record(tmp_path, run):
    flag = _npz(tmp_path / "f")
    (tmp_path / "f" / "42.npz").unlink()
    (tmp_path / "f" / "42.npz").symlink_to("nothing.npz")
    assert "42.npz: cannot be read: No such file" in run(from_npz.main, flag)[1]
    records, printed = run(from_npz.main, flag, "--on_bad_record=skip")
    assert [record["image_id"] for record in records] == [FILES[1]] and "left out 1: 1 bad records" in printed


@pytest.mark.parametrize(
    ("main", "flag", "end"), [(from_npz.main, "npz", "npz"), (from_grid_feats.main, "grids", "npy")]
)
def test_half_of_a_file_is_called_so(main, flag, end, tmp_path, run):
    for i, number in enumerate(NUMBERS):
        if end == "npz":
            np.savez(_made(tmp_path / "f") / f"{number}.npz", x=REGIONS[i])
        else:
            np.save(_made(tmp_path / "f") / f"{number}.npy", REGIONS[i])
    path = tmp_path / "f" / f"42.{end}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "(cut off?)" in run(main, f"--{flag}={tmp_path / 'f'}")[1]
    assert "no such folder, it is a file" in run(main, f"--{flag}={path}")[1]


@pytest.mark.parametrize(
    ("main", "flag"), [(from_hdf5.main, "hdf5"), (from_bottom_up.main, "bottom_up"), (from_vinvl.main, "vinvl")]
)
def test_a_folder_or_other_bytes_in_place_of_a_file(main, flag, tmp_path, run):
    (tmp_path / "d" / "features.tsv" / "features.tsv").mkdir(parents=True)
    assert "no such file, it is a folder" in run(main, f"--{flag}={tmp_path / 'd' / 'features.tsv'}")[1]
    for content, what in ((b"", "an empty file"), (b"\x1f\x8b\x08abc", "a gzip archive")):
        (tmp_path / "a").write_bytes(content)
        assert what in run(main, f"--{flag}={tmp_path / 'a'}")[1]


# ----------------------------------------------------------------------------------------------------------- one format


@pytest.mark.parametrize("shape", [(7, 2048, 7), (1, 7, 256, 7), (16, 768, 16)])
def test_a_map_with_its_channels_in_the_middle(shape):
    with pytest.raises(DataError, match="longest axis between the others"):
        as_units(np.ones(shape), "here")


def test_ids_of_variable_length(tmp_path, monkeypatch):
    def write(name, ids):
        with h5py.File(tmp_path / name, "w") as file:
            file["features"], file["image_id"] = REGIONS, ids
        return tmp_path / name

    for ids in (list(FILES), [["42"], ["139"]]):
        np.testing.assert_array_equal(Hdf5Features([write("a.h5", ids)]).read(FILES[1])["regions"], REGIONS[1])
    path = write("b.h5", ["é42", "x" * 99])
    assert row_ids.texts_in_hdf5(path, "image_id") == ["é42", "x" * 99]
    monkeypatch.setattr(row_ids, "MAX_BYTES", 50)
    with pytest.raises(DataError, match=r"b\.h5: image_id: .*: more than 50 letters; --hdf5_ids=FILE gives the ids"):
        Hdf5Features([path])
    monkeypatch.setattr(row_ids, "_READ_TEXTS", "import time; time.sleep(600)")
    monkeypatch.setattr(row_ids, "_PATIENCE", 0.2)
    with pytest.raises(DataError, match=r"no answer in 0\.2 seconds; --hdf5_ids=FILE"):
        Hdf5Features([path])


@pytest.mark.parametrize("form", ["{name}", "{number}_{name}", "{number}/{name}"])
def test_what_of_hdf5_is_not_read_is_said(form, tmp_path, run):
    arrays = {"features": REGIONS, "attrs_id": np.ones((2, 3), int), "mask": np.ones((2, 3), bool)}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, values in arrays.items():
            if form == "{name}":
                file[name] = values
            else:
                for number, value in zip(NUMBERS, values, strict=True):
                    file[form.format(number=number, name=name)] = value
        if form == "{name}":
            file["image_id"] = NUMBERS
    records, printed = run(from_hdf5.main, f"--hdf5={tmp_path / 'a.h5'}")
    assert records and "note: not read: attrs_id, mask (1 times, first in " in printed


def test_hdf5_of_one_data_set_an_image_has_nothing_else(tmp_path, run):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["42"], file["139"], file["1390"] = *REGIONS, REGIONS[0]
    records, printed = run(from_hdf5.main, f"--hdf5={tmp_path / 'a.h5'}")
    assert records and "note:" not in printed


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([[0, 2], [3, 5]], "expected the end behind the last region"),
        ([[0, 4], [3, 6]], r"found row 0 with \[0, 4\] and row 1 with \[3, 6\]"),
        ([[1, 4], [4, 6]], "expected the first region to be number 0"),
        ([[3, 6], [0, 3]], None),
        ([[0, 2], [4, 6]], None),  # of some images of a larger file
    ],
)
def test_places_of_regions_in_a_row(places, message, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image_features"], file["pos_boxes"], file["ids"] = REGIONS.reshape(6, 64), places, NUMBERS
    if message:
        with pytest.raises(DataError, match=f"pos_boxes: .*{message}"):
            Hdf5Features([tmp_path / "a.h5"])
    else:
        start, end = places[0]
        actual = Hdf5Features([tmp_path / "a.h5"]).read("42.jpg")["regions"]
        np.testing.assert_array_equal(actual, REGIONS.reshape(6, 64)[start:end])


@pytest.mark.parametrize("ids", [np.array(NUMBERS), np.array([b"42", b"139"]), np.array([[42], [139]], ">i4")])
def test_ids_as_an_array(ids, tmp_path):
    np.save(tmp_path / "ids.npy", ids)
    assert read_index(tmp_path / "ids.npy", 2) == {"42": 0, "139": 1}
    np.save(tmp_path / "ids.npy", ids.astype(float))
    with pytest.raises(DataError, match=r"ids\.npy: expected ids as whole numbers or bytes, found float64"):
        read_index(tmp_path / "ids.npy", 2)


NUMBERS_OF_FEATURES = RNG.normal(size=(4, 512))


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("once", [np.float16, np.float32, np.float64])
def test_base64_of_other_floats_is_refused(dtype, once):
    """Nothing but the width says it, which is half or twice: also of numbers that were of another type once."""
    array = np.maximum(NUMBERS_OF_FEATURES, 0).astype(once).astype(dtype)
    with pytest.raises(DataError, match=f"'features': expected float32, found what looks like {np.dtype(dtype)}"):
        decode(cell(array).encode(), np.float32, 4, "here", "features")


@pytest.mark.parametrize(
    "array",
    [
        NUMBERS_OF_FEATURES,
        NUMBERS_OF_FEATURES.astype(np.float16),
        np.maximum(NUMBERS_OF_FEATURES, 0),
        NUMBERS_OF_FEATURES.round(),
        np.zeros((4, 512)),
        np.ones((4, 512)),
        np.full((4, 512), np.nan),
    ],
)
def test_base64_of_float32_is_read(array):
    actual = decode(cell(array.astype(np.float32)).encode(), np.float32, 4, "here", "features")
    np.testing.assert_array_equal(actual, array.astype(np.float32))


def test_msgpack_of_texts_for_bytes():
    """As versions before 1.0 wrote it."""
    array = {b"nd": True, b"type": b"<f4", b"shape": [3, 64], b"data": REGIONS[0].tobytes()}
    value = msgpack.packb({b"features": array}, use_bin_type=False)
    np.testing.assert_array_equal(arrays_of(parse_value(value, "here"), "here")["features"], REGIONS[0])


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_pickles_are_called_so(protocol):
    with pytest.raises(DataError, match=f"protocol 2 to 5.*, found a pickle of protocol {protocol}"):
        parse_value(pickle.dumps({"features": 1}, protocol), "here")


@pytest.mark.parametrize("sizes", [{}, {"image_w": 200, "image_h": 100}])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_labels_of_regions_in_another_order(order, sizes, tmp_path, run):
    shares = BOXES / [200, 100, 200, 100]
    place = np.concatenate([shares, shares[:, 2:] - shares[:, :2]], 1)
    features = cell(np.concatenate([np.ones((3, 2048)), place], 1).astype(np.float32))
    objects = [{"rect": BOXES[i].tolist(), "class": "dog", "conf": 0.5} for i in order]
    content = sizes | {"objects": objects} if sizes else objects
    start = "\ufeff"
    rows = [f"{number}\t{json.dumps({'num_boxes': '3', 'features': features})}\n" for number in NUMBERS]
    (tmp_path / "val.feature.tsv").write_text(start + "".join(rows))
    (tmp_path / "val.label.tsv").write_text("".join(f"{number}\t{json.dumps(content)}\n" for number in NUMBERS))
    flags = [f"--vinvl={tmp_path / 'val.feature.tsv'}", f"--vinvl_labels={tmp_path / 'val.label.tsv'}"]
    records, printed = run(from_vinvl.main, *flags)
    if order == (0, 1, 2):
        np.testing.assert_allclose(records[0]["boxes"], shares, atol=1e-6)
    else:
        assert records is None and "expected the objects of the features' regions, found boxes elsewhere" in printed
