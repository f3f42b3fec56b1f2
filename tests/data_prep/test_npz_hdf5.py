"""Files of regions and boxes in the layouts that others publish them in, and what is refused of them."""

import json
import pickle
import sys
import tracemalloc
from functools import partial

import h5py
import numpy as np
import pytest

from data_prep import from_hdf5, from_npz
from data_prep.schema import DataError
from data_prep.sources import npz
from data_prep.sources.detections import Reading
from data_prep.sources.hdf5 import Hdf5Features
from data_prep.sources.npz import NpzFiles
from data_prep.sources.row_ids import read_index
from data_prep.sources.units import UnitFiles
from shnet_jax.untrusted import MAX_IMAGE_BYTES
from tests.data_prep.example import FILES, NUMBERS

SIZES = [(200, 100), (90, 120)]  # width and height
COUNTS = (3, 3)
RNG = np.random.default_rng(0)
REGIONS = RNG.normal(size=(2, 3, 8)).astype(np.float32)
SHARES = np.sort(RNG.random((2, 3, 2, 2)), 2).reshape(2, 3, 4).astype(np.float32)
SHARES[:, 0] = [0, 0, 1, 1]
PIXELS = SHARES * np.array([[width, height] * 2 for width, height in SIZES], np.float32)[:, None]
SPATIAL = np.concatenate([SHARES, SHARES[..., 2:] - SHARES[..., :2]], -1)
GRIDS = RNG.normal(size=(2, 9, 16)).astype(np.float32)


@pytest.fixture
def run(run, tmp_path):
    """As in conftest.py, in float32; -> the records, or what is printed."""
    (tmp_path / "sizes.json").write_text(json.dumps({str(n): size for n, size in zip(NUMBERS, SIZES, strict=True)}))

    def run_in_float32(main, *flags):
        records, printed = run(main, "--feature_dtype=float32", *flags)
        return printed if records is None else records

    return run_in_float32


def _check(records, *, boxes=True, regions=REGIONS, grids=None):
    assert not isinstance(records, str), records
    assert [record["image_id"] for record in records] == [*FILES]
    for i, record in enumerate(records):
        if regions is not None:
            np.testing.assert_array_equal(record["regions"], regions[i])
        if grids is not None:
            np.testing.assert_array_equal(record["grid"], grids[i])
        assert ("boxes" in record) == boxes and ("regions" in record) == (regions is not None)
        if boxes:
            np.testing.assert_allclose(record["boxes"], SHARES[i], atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- npz


def _npz(folder, save, names=NUMBERS, **arrays):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        save(folder / f"{name}.npz", **{key: value[i] for key, value in arrays.items()})


SAVES = pytest.mark.parametrize("save", [np.savez, np.savez_compressed])


@SAVES
@pytest.mark.parametrize("scalar", [int, np.int64, lambda n: np.array([n])])
def test_npz_of_bottom_up_attention(save, scalar, tmp_path, run):
    """With an object beside them, which is a pickle and not looked at."""
    widths, heights = ([scalar(size[axis]) for size in SIZES] for axis in (0, 1))
    info = [np.array({"image_id": n}, object) for n in NUMBERS]
    sides = {"image_w": widths, "image_h": heights, "num_bbox": [3, 3]}
    _npz(tmp_path / "f", save, FILES, x=REGIONS, bbox=PIXELS, info=info, **sides)
    _check(run(from_npz.main, f"--npz={tmp_path / 'f'}"))


@SAVES
def test_npz_of_make_bu_data(save, tmp_path, run):
    _npz(tmp_path / "coco_att", save, feat=REGIONS)
    (tmp_path / "coco_box").mkdir()
    for number, boxes in zip(NUMBERS, PIXELS, strict=True):
        np.save(tmp_path / "coco_box" / f"{number}.npy", boxes)
    flag = f"--npz={tmp_path / 'coco_att'}"
    assert "--sizes=FILE gives it" in run(from_npz.main, flag)
    _check(run(from_npz.main, flag, "--boxes=none"), boxes=False)
    _check(run(from_npz.main, flag, f"--sizes={tmp_path / 'sizes.json'}"))
    (tmp_path / "coco_box" / "139.npy").unlink()
    assert "expected its boxes in coco_box, found none" in run(
        from_npz.main, flag, f"--sizes={tmp_path / 'sizes.json'}"
    )


def test_npz_of_maps_with_the_channels_last(tmp_path, run):
    """As self-critical.pytorch keeps the feature maps of a ResNet."""
    _npz(tmp_path / "f", np.savez_compressed, feat=GRIDS.reshape(2, 3, 3, 16))
    assert "looks like [h, w, D]; --layout=hwc" in run(from_npz.main, f"--npz={tmp_path / 'f'}")
    records = run(from_npz.main, f"--npz={tmp_path / 'f'}", "--layout=hwc")
    _check(records, boxes=False, regions=None, grids=GRIDS)
    pooled = run(from_npz.main, f"--npz={tmp_path / 'f'}", "--layout=hwc", "--pool_grids=1")
    np.testing.assert_allclose(pooled[0]["grid"][0], GRIDS[0].mean(0), atol=1e-6)


def test_npz_of_cells_are_a_grid_when_told(tmp_path, run):
    _npz(tmp_path / "f", np.savez, x=GRIDS)
    _check(run(from_npz.main, f"--npz={tmp_path / 'f'}"), boxes=False, regions=GRIDS)
    _check(run(from_npz.main, f"--npz={tmp_path / 'f'}", "--features_as=grid"), boxes=False, regions=None, grids=GRIDS)


def test_npz_of_shares_and_scores(tmp_path, run):
    conf, classes = RNG.random((2, 3)).astype(np.float32), np.arange(6).reshape(2, 3)
    _npz(tmp_path / "f", np.savez, features=REGIONS, norm_bb=SPATIAL, conf=conf, objects_id=classes)
    records = run(from_npz.main, f"--npz={tmp_path / 'f'}")
    _check(records)
    np.testing.assert_array_equal([record["box_scores"] for record in records], conf)
    np.testing.assert_array_equal([record["box_classes"] for record in records], classes)


def test_npz_of_different_counts_are_padded(tmp_path, run):
    sides = {"image_w": [200, 90], "image_h": [100, 120]}
    _npz(tmp_path / "f", np.savez, x=[REGIONS[0], REGIONS[1, :2]], bbox=[PIXELS[0], PIXELS[1, :2]], **sides)
    records = run(from_npz.main, f"--npz={tmp_path / 'f'}", "--max_regions=4")
    assert [record["region_mask"].tolist() for record in records] == [[True] * 3 + [False], [True] * 2 + [False] * 2]
    np.testing.assert_array_equal(records[1]["regions"], [*REGIONS[1, :2], *np.zeros((2, 8))])


def _one(tmp_path, save=np.savez, **arrays):
    _npz(tmp_path / "f", save, ["42"], **{name: [array] for name, array in arrays.items()})
    return NpzFiles(tmp_path / "f").read("42.jpg")


def test_rows_behind_the_number_of_boxes_are_padding(tmp_path):
    actual = _one(
        tmp_path, x=np.ones((5, 8)), bbox=np.pad(PIXELS[0], ((0, 2), (0, 0))), num_bbox=3, image_w=200, image_h=100
    )
    assert actual["regions"].shape == (3, 8) and actual["boxes"].shape == (3, 4)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"y": np.ones(3), "z": np.ones(3)}, r"42\.npz: expected an array named x or feat.*, found y, z"),
        ({"x": np.ones((3, 8)), "bbox": np.ones((2, 4)) * 9}, r"expected the image's size"),
        (
            {"x": np.ones((3, 8)), "bbox": np.ones((2, 4)) * 9, "image_w": 90, "image_h": 90},
            "expected 3, one a region, found 2",
        ),
        ({"x": np.ones((3, 8)), "bbox": SHARES[0], "image_w": 90, "image_h": 90}, "--boxes=shares says"),
        ({"x": np.ones((3, 8)), "norm_bb": PIXELS[0]}, "expected boxes in shares of the image"),
        ({"x": np.ones((3, 8)), "num_bbox": 4}, r"num_bbox: expected 1\.\.3"),
        ({"x": np.ones((3, 8)), "bbox": PIXELS[0], "image_w": 200, "image_h": 0.5}, "whole pixels"),
        ({"x": np.array([{}], object)}, "Python objects"),
        ({"x": np.ones((3, 8, 2, 2))}, "expected an array of one image"),
        ({"x": np.ones((0, 8))}, "found an empty array"),
    ],
)
def test_npz_that_are_refused(arrays, match, tmp_path):
    with pytest.raises(DataError, match=match):
        _one(tmp_path, **arrays)


def test_a_folder_without_npz_says_what_lies_there(tmp_path):
    for name in ("a.npy", "b.npy", "c.pkl"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError, match=r"expected ID\.npz of each image, found 2 of \.npy, 1 of \.pkl"):
        NpzFiles(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        NpzFiles(tmp_path / "a.npy")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.npz").write_text("")
    with pytest.raises(DataError, match=r"expected ID\.npy or ID\.pth or ID\.pt of each image, found 1 of \.npz"):
        UnitFiles(tmp_path / "sub", "grid")
    NpzFiles(tmp_path)  # an id may name a folder


def _peak(read, *arguments):
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"more than|should"):
            read(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_bomb_of_an_npz_is_not_unpacked(tmp_path, monkeypatch):
    assert npz.MAX_IMAGE_BYTES == MAX_IMAGE_BYTES
    monkeypatch.setattr(npz, "MAX_IMAGE_BYTES", most := MAX_IMAGE_BYTES // 16)
    (tmp_path / "f").mkdir()
    np.savez_compressed(tmp_path / "f" / "42.npz", x=np.zeros((most // 8 // 4, 4)), y=np.zeros(10))
    assert (tmp_path / "f" / "42.npz").stat().st_size < 10**5
    assert _peak(NpzFiles(tmp_path / "f").read, "42") < 10**6
    np.savez_compressed(tmp_path / "f" / "42.npz", x=np.zeros((100, 4)), y=np.zeros(most))
    assert NpzFiles(tmp_path / "f").read("42")["regions"].shape == (100, 4)  # nor is what nobody asked for


def test_an_npz_whose_directory_lies_about_a_size(tmp_path):
    """The directory says 1000 bytes, the stream has three million: it is not unpacked further."""
    (tmp_path / "f").mkdir()
    path = tmp_path / "f" / "42.npz"
    np.savez_compressed(path, x=np.zeros((10**5, 4)))
    size = np.uint32(4 * 8 * 10**5 + 128).tobytes()
    assert path.read_bytes().count(size) >= 1
    path.write_bytes(path.read_bytes().replace(size, np.uint32(1000).tobytes()))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"expected arrays as np\.savez writes them"):
        NpzFiles(tmp_path / "f").read("42")
    assert tracemalloc.get_traced_memory()[1] < 2 * 10**6
    tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------------------- HDF5


def _hdf5(path, sets):
    with h5py.File(path, "w") as file:
        for name, value in sets.items():
            file.create_dataset(name, data=value)
    return f"--hdf5={path}"


ORDER = [1, 0]  # rows are not in the order of the captions
ROWS = {"image_features": REGIONS[ORDER], "image_bb": PIXELS[ORDER], "spatial_features": SPATIAL[ORDER]}
INDEX = {139: 0, 42: 1}
SIDECARS = {
    "json": lambda path: path.write_text(json.dumps(INDEX)),
    "list.json": lambda path: path.write_text(json.dumps(list(INDEX))),
    "txt": lambda path: path.write_text("139\n42\n"),
    **{f"{n}.pkl": partial(lambda n, path: path.write_bytes(pickle.dumps(INDEX, n)), n) for n in range(6)},
    "text.pkl": lambda path: path.write_bytes(pickle.dumps({f"{n}.jpg": row for n, row in INDEX.items()})),
    "list.pkl": lambda path: path.write_bytes(pickle.dumps(list(INDEX), 0)),
}


@pytest.mark.parametrize("kind", SIDECARS)
def test_rows_with_ids_in_a_sidecar(kind, tmp_path, run):
    flag = _hdf5(tmp_path / "val36.hdf5", ROWS)
    SIDECARS[kind](tmp_path / f"ids.{kind}")
    _check(run(from_hdf5.main, flag, f"--hdf5_ids={tmp_path / f'ids.{kind}'}"))


def test_the_published_sidecar_is_found(tmp_path, run):
    flag = _hdf5(tmp_path / "val36.hdf5", ROWS)
    assert "found neither; --hdf5_ids=FILE" in run(from_hdf5.main, flag)
    (tmp_path / "val36_imgid2idx.pkl").write_bytes(pickle.dumps(INDEX, 0))
    _check(run(from_hdf5.main, flag))


def test_pixels_without_shares_need_sizes(tmp_path, run):
    flag = _hdf5(tmp_path / "val36.hdf5", {name: ROWS[name] for name in ("image_features", "image_bb")})
    SIDECARS["json"](tmp_path / "val36_imgid2idx.json")
    assert "--sizes=FILE gives it" in run(from_hdf5.main, flag)
    _check(run(from_hdf5.main, flag, f"--sizes={tmp_path / 'sizes.json'}"))


def test_adaptive_rows(tmp_path, run):
    ends = np.array([[0, 2], [2, 5]], np.int32)
    parts = {"image_features": REGIONS, "image_bb": PIXELS, "spatial_features": SPATIAL}
    sets = {name: np.concatenate([value[1, :2], value[0]]) for name, value in parts.items()}
    flag = _hdf5(tmp_path / "val.hdf5", {**sets, "pos_boxes": ends})
    SIDECARS["json"](tmp_path / "val_imgid2idx.json")
    records = run(from_hdf5.main, flag, "--max_regions=3")
    np.testing.assert_array_equal(records[0]["regions"], REGIONS[0])
    np.testing.assert_array_equal(records[1]["regions"], [*REGIONS[1, :2], np.zeros(8)])
    np.testing.assert_allclose(records[1]["boxes"], [*SHARES[1, :2], np.zeros(4)], atol=1e-6)
    assert records[1]["region_mask"].tolist() == [True, True, False]


@pytest.mark.parametrize("shape", ["hw", "batch"])
def test_data_sets_by_id(shape, tmp_path, run):
    """As DLCT writes them: (height, width), with the grid beside."""
    probabilities = RNG.random((2, 3, 1601)).astype(np.float32)
    sets = {}
    for i, number in enumerate(NUMBERS):
        size = np.array(SIZES[i][::-1])
        sets |= {f"{number}_features": REGIONS[i], f"{number}_boxes": PIXELS[i], f"{number}_grids": GRIDS[i]}
        sets |= {f"{number}_size": size[None] if shape == "batch" else size, f"{number}_mask": np.ones((3, 9))}
        sets |= {f"{number}_cls_prob": probabilities[i]}
    flag = _hdf5(tmp_path / "all.hdf5", sets)
    records = run(from_hdf5.main, flag)
    _check(records, grids=GRIDS)
    np.testing.assert_array_equal([r["box_classes"] for r in records], probabilities[..., 1:].argmax(-1))
    assert "--size_order=hw exchanges" in run(from_hdf5.main, flag, "--size_order=wh")


def test_sizes_in_the_other_order(tmp_path, run):
    sets = {}
    for i, number in enumerate(NUMBERS):
        sets |= {f"{number}_features": REGIONS[i], f"{number}_boxes": PIXELS[i], f"{number}_size": np.array(SIZES[i])}
    flag = _hdf5(tmp_path / "all.hdf5", sets)
    assert "expected boxes within 120 x 90" in (error := run(from_hdf5.main, flag, "--on_bad_record=skip"))
    assert "--size_order=wh exchanges" in error
    _check(run(from_hdf5.main, flag, "--size_order=wh"))


def test_grids_by_id(tmp_path, run):
    """As RSTNet writes them; also one data set an image and nothing else."""
    flag = _hdf5(tmp_path / "g.hdf5", {f"{n}_grids": grid for n, grid in zip(NUMBERS, GRIDS, strict=True)})
    _check(run(from_hdf5.main, flag), boxes=False, regions=None, grids=GRIDS)
    flag = _hdf5(tmp_path / "h.hdf5", {str(n): grid for n, grid in zip(NUMBERS, GRIDS, strict=True)})
    _check(run(from_hdf5.main, flag, "--features_as=grid"), boxes=False, regions=None, grids=GRIDS)
    maps = np.moveaxis(GRIDS, 2, 1).reshape(2, 16, 3, 3)
    flag = _hdf5(tmp_path / "m.hdf5", {f"{n}.jpg": grid for n, grid in zip(NUMBERS, maps, strict=True)})
    _check(run(from_hdf5.main, flag), boxes=False, regions=None, grids=GRIDS)


def test_groups_by_id(tmp_path, run):
    sets = {}
    for i, number in enumerate(NUMBERS):
        sets |= {f"{number}/features": REGIONS[i], f"{number}/boxes": PIXELS[i]}
        sets |= {f"{number}/img_w": SIZES[i][0], f"{number}/img_h": SIZES[i][1], f"{number}/obj_id": np.arange(3)}
    records = run(from_hdf5.main, _hdf5(tmp_path / "a.h5", sets))
    _check(records)
    assert records[0]["box_classes"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("ids", [[139, 42], np.array([b"139.jpg", b"42.jpg"])])
def test_ids_in_the_file(ids, tmp_path, run):
    sides = {"width": [SIZES[i][0] for i in ORDER], "height": [SIZES[i][1] for i in ORDER]}
    flag = _hdf5(tmp_path / "a.h5", {"image_id": ids, "features": REGIONS[ORDER], "boxes": PIXELS[ORDER], **sides})
    _check(run(from_hdf5.main, flag))


def test_rows_with_the_channels_first(tmp_path, run):
    """As Cyanogenoid's preparation for VQA: [N, D, K], [N, 4, K] and the number of boxes, padded."""
    features, boxes = (np.pad(array[ORDER], ((0, 0), (0, 2), (0, 0))) for array in (np.tile(REGIONS, 8), PIXELS))
    sides = {"widths": [SIZES[i][0] for i in ORDER], "heights": [SIZES[i][1] for i in ORDER], "num_boxes": [3, 3]}
    sets = {"ids": [139, 42], "features": features.transpose(0, 2, 1), "boxes": boxes.transpose(0, 2, 1), **sides}
    flag = _hdf5(tmp_path / "a.h5", sets)
    assert "this may be [D, units]; --layout=" in run(from_hdf5.main, flag)
    _check(run(from_hdf5.main, flag, "--layout=chw"), regions=np.tile(REGIONS, 8))


def test_two_files_with_compressed_chunks(tmp_path, run):
    for i, name in enumerate(("a", "b")):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for part, value in (("image_features", REGIONS[i : i + 1]), ("spatial_features", SPATIAL[i : i + 1])):
                file.create_dataset(part, data=value, chunks=(1, 2, 2), compression="gzip", shuffle=True)
        (tmp_path / f"{name}_imgid2idx.json").write_text(json.dumps({NUMBERS[i]: 0}))
    _check(run(from_hdf5.main, f"--hdf5={tmp_path / 'a.h5'},{tmp_path / 'b.h5'}"))


def test_an_image_that_no_file_has(tmp_path, run):
    flag = _hdf5(tmp_path / "a.h5", {"42_features": REGIONS[0]})
    error = run(from_hdf5.main, flag)
    assert (
        "image '000000000139.jpg': expected its features, found none among 1 others, such as '42'; --absent=skip"
        in error
    )
    assert len(run(from_hdf5.main, flag, "--absent=skip")) == 1


def _open(tmp_path, sets, **options):
    _hdf5(tmp_path / "a.h5", sets)
    return Hdf5Features([tmp_path / "a.h5"], **options)


@pytest.mark.parametrize(
    ("sets", "match"),
    [
        ({}, r"a\.h5: expected image_features \[N, K, D\].*; found nothing"),
        ({"g/fc": REGIONS, "h/fc": REGIONS}, r"ID/features; found g, h"),
        ({"image_features": REGIONS, "image_id": [1, 2, 3]}, "expected 2 ids, one a row of the features, found 3"),
        ({"image_features": REGIONS, "image_id": [42, 42]}, "id '42': expected it once, found it in rows 0 and 1"),
        ({"image_features": REGIONS, "image_id": [1.5, 2.5]}, "texts or whole numbers, found float64"),
        (
            {"image_features": REGIONS, "features": REGIONS},
            "features under one name, found features and image_features",
        ),
    ],
)
def test_hdf5_of_other_layouts_say_what_is_there(sets, match, tmp_path):
    with pytest.raises(DataError, match=match):
        _open(tmp_path, sets)


@pytest.mark.parametrize(
    ("sets", "match"),
    [
        ({"image_bb": PIXELS[:1]}, r"image_bb: expected 2 rows as of the features, found \[1, 3, 4\]"),
        ({"image_bb": PIXELS[:, :2], "width": [200, 90], "height": [100, 120]}, "expected 3, one a region, found 2"),
        ({"image_features": np.array([b"a", b"b"])}, r"image_features: expected numbers, found \|S1"),
        ({"image_features": [[b"a"], [b"b"]]}, "expected numbers, found"),
        ({"pos_boxes": np.array([[0, 2], [2, 9]])}, r"pos_boxes row 1: expected a range in 0\.\.2, found 2\.\.9"),
        ({"pos_boxes": np.array([[0, 1], [1, 1]])}, r"pos_boxes row 1: expected a range"),
        ({"pos_boxes": np.ones((2, 2))}, r"pos_boxes: expected whole numbers \[N, 2\]"),
    ],
)
def test_hdf5_rows_that_are_refused(sets, match, tmp_path):
    with pytest.raises(DataError, match=match):
        _open(tmp_path, {"image_features": REGIONS, "image_id": [42, 139]} | sets).read("139")


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.json", b"[1]", "expected 2 ids, one a row of the features, found 1"),
        ("a.json", b"[1, 1]", "expected it once"),
        ("a.json", b"[1, [2]]", "expected a list of ids"),
        ("a.json", b"3", "found int"),
        ("a.json", b'{"a": 0, "b": 2}', r"image 'b': expected a row in 0\.\.1, found 2"),
        ("a.json", b'{"a": 0, "b": true}', "found True"),
        ("a.json", b'{"a": 1, "b": 1}', "row 1: expected one image, found 'a' and 'b'"),
        ("a.pkl", pickle.dumps({"a": np.int64(1)}), "it has the opcode .*--hdf5_ids=FILE.json"),
        ("a.pkl", pickle.dumps({"a": [1]}), "it holds 2 lists and dictionaries"),
        ("a.pkl", pickle.dumps({"a": 1})[:-3], "pickle"),
        ("a.pkl", b"cos\nsystem\n(S'true'\ntR.", "it has the opcode GLOBAL"),
    ],
)
def test_sidecars_that_are_refused(name, data, match, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=match):
        read_index(tmp_path / name, 2)


@pytest.mark.parametrize(
    "kind", ["external link", "soft link", "external", "virtual", "chunk", "large", "unwritten", "reference"]
)
def test_what_leads_out_of_a_file_or_takes_memory_is_refused(kind, tmp_path):
    _hdf5(tmp_path / "secret.h5", {"x": REGIONS[0]})
    (tmp_path / "raw").write_bytes(REGIONS[0].tobytes())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        name, match = "42_features", None
        if kind == "external link":
            file[name], match = h5py.ExternalLink(str(tmp_path / "secret.h5"), "x"), "found a link"
        elif kind == "soft link":
            file["y"], file[name], match = REGIONS[0], h5py.SoftLink("/y"), "found a link"
        elif kind == "external":
            file.create_dataset(name, (3, 8), "f4", external=[(str(tmp_path / "raw"), 0, 96)])
            match = "virtual or external data set"
        elif kind == "virtual":
            layout = h5py.VirtualLayout((3, 8), "f4")
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", (3, 8))
            file.create_virtual_dataset(name, layout)
            match = "virtual or external data set"
        elif kind == "chunk":
            file.create_dataset(name, (2**30, 8), "f4", chunks=(2**22, 8), compression="gzip")
            match = "its chunks .* have more than"
        elif kind == "large":
            file.create_dataset(name, (2**40, 8), "f4", chunks=(16, 8), compression="gzip")
            match = "has more than .* bytes of an image"
        elif kind == "unwritten":
            file.create_dataset(name, (3, 8), "f4")
            match = r"expected float32 \[3, 8\], found 0 bytes"
        else:
            file.create_dataset(name, (2,), h5py.ref_dtype)
            match = "expected numbers, found object"
    source = Hdf5Features([tmp_path / "a.h5"])
    tracemalloc.start()
    with pytest.raises(DataError, match=match):
        source.read("42")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "found an empty file"),
        (b"<?xml", "found a page of HTML"),
        (b"\x80\x04}.", "found a pickle"),
    ],
)
def test_files_that_are_no_hdf5(data, match, tmp_path):
    (tmp_path / "a.h5").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.h5: expected an HDF5 file.*{match}"):
        Hdf5Features([tmp_path / "a.h5"])


def test_an_hdf5_file_cut_off_anywhere(tmp_path):
    _hdf5(tmp_path / "a.h5", {"42_features": REGIONS[0]})
    complete = (tmp_path / "a.h5").read_bytes()
    for size in range(0, len(complete), 97):
        (tmp_path / "a.h5").write_bytes(complete[:size])
        with pytest.raises(DataError, match=r"a\.h5: "):
            Hdf5Features([tmp_path / "a.h5"]).read("42")


def test_an_open_source_can_be_sent_to_another_process(tmp_path):
    source = _open(tmp_path, {"42_features": REGIONS[0]}, reading=Reading(max_regions=4))
    source.read("42")
    sent = pickle.dumps(source)
    assert len(sent) < 2000
    np.testing.assert_array_equal(pickle.loads(sent).read("42")["regions"][:3], REGIONS[0])


def test_without_h5py_the_extra_is_named(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.delitem(sys.modules, "data_prep.sources.hdf5")
    assert "reading HDF5 needs h5py: pip install -e '.[hdf5]'" in run(from_hdf5.main, f"--hdf5={tmp_path}")
