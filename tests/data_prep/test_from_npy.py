import numpy as np
import pytest

from data_prep import from_npy
from data_prep.schema import DataError
from data_prep.sources import units
from shnet_jax.data.records import open_dataset
from shnet_jax.observe import progress
from tests.data_prep.example import stored_records

IDS = ["391895.jpg", "522418.jpg"]


@pytest.fixture
def src(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "test_ids.txt").write_text("".join(f"{i}\n" for i in IDS))
    (folder / "test_caps.txt").write_text("".join(f"caption {i}\n" for i in range(6)))
    return folder


def _features(tmp_path, *arrays):
    folder = tmp_path / "features"
    folder.mkdir()
    for image_id, array in zip(IDS, arrays, strict=True):
        np.save(folder / f"{image_id.removesuffix('.jpg')}.npy", array)
    return folder


def _records(src, features, field, out, **options):
    path = from_npy.import_npy(src, features, field, "toy", out, **{"feature_dtype": None} | options)
    return stored_records(path, "test")


@pytest.mark.parametrize("field", ["grid", "regions"])
def test_units_by_image(src, tmp_path, field):
    arrays = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    records = _records(src, _features(tmp_path, *arrays), field, tmp_path / "out")
    assert [r["image_id"] for r in records] == IDS
    assert records[1]["captions"] == ["caption 3", "caption 4", "caption 5"]
    np.testing.assert_array_equal([r[field] for r in records], arrays)
    assert records[0].keys() == {"image_id", "captions", field}


@pytest.mark.parametrize("shape", [(3, 2, 4), (1, 3, 2, 4)])
def test_cells_of_a_map_become_units_row_by_row(src, tmp_path, shape):
    array = np.arange(24, dtype=np.float32).reshape(shape)
    records = _records(src, _features(tmp_path, array, array), "grid", tmp_path / "out")
    cells = array.reshape(3, 2, 4)
    expected = [cells[:, row, column] for row in range(2) for column in range(4)]
    np.testing.assert_array_equal(records[0]["grid"], expected)


@pytest.mark.parametrize(("field", "mask"), [("grid", "grid_mask"), ("regions", "region_mask")])
def test_ragged_units_are_padded_with_a_mask(src, tmp_path, field, mask):
    features = _features(tmp_path, np.ones((2, 3), np.float16), np.ones((4, 3), np.float16))
    records = _records(src, features, field, tmp_path / "out", max_units=5)
    assert [r[mask].tolist() for r in records] == [[True] * 2 + [False] * 3, [True] * 4 + [False]]
    for record in records:
        np.testing.assert_array_equal(record[field], np.outer(record[mask], np.ones(3)))


def test_pooling_is_that_of_adaptive_average_pooling():
    cells = np.random.default_rng(0).normal(size=(2, 5, 9))
    rows, columns = [(0, 2), (1, 4), (3, 5)], [(0, 3), (3, 6), (6, 9)]  # by hand from floor and ceil
    expected = [[cells[:, a:b, c:d].mean((1, 2)) for c, d in columns] for a, b in rows]
    np.testing.assert_allclose(units.adaptive_average(cells, 3), np.moveaxis(np.array(expected), 2, 0), rtol=1e-12)


def test_maps_of_different_sizes_are_pooled_to_one(src, tmp_path):
    features = _features(tmp_path, np.ones((1, 3, 5, 8), np.float32), np.full((1, 3, 9, 4), 2, np.float32))
    records = _records(src, features, "grid", tmp_path / "out", pool=2)
    np.testing.assert_array_equal([r["grid"] for r in records], [np.ones((4, 3)), np.full((4, 3), 2)])


def test_arrays_of_the_split_are_imported_too(src, tmp_path):
    seg_maps = np.arange(8, dtype=np.int64).reshape(2, 2, 2)
    np.save(src / "test_seg_maps.npy", seg_maps)
    np.save(src / "test_cat_onehots.npy", np.eye(2, 9))
    records = _records(src, _features(tmp_path, *np.ones((2, 4, 3))), "regions", tmp_path / "out")
    np.testing.assert_array_equal([r["seg_map"] for r in records], seg_maps)
    assert records[1]["categories"].tolist() == [False, True] + [False] * 7


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ((np.ones((2, 3)), np.ones((4, 3))), {}, r"row 1 .*ID\.npy: field 'grid': expected float32 \[2, 3\]"),
        (
            (np.ones((2, 3)), np.ones((4, 3))),
            {"max_units": 3},
            r"522418\.npy: expected at most max_units = 3 units, found 4",
        ),
        ((np.ones((2, 3, 4, 5)), np.ones(3)), {}, r"391895\.npy: expected an array .*found \[2, 3, 4, 5\]"),
        ((np.ones((2, 3)), np.ones((2, 3))), {"pool": 7}, r"391895\.npy: .*to pool, found \[2, 3\]"),
        ((np.ones((2, 3)), np.full((2, 3), np.nan)), {}, r"row 1 .*ID\.npy: field 'grid': expected finite"),
        (
            (np.ones((2, 3)), np.full((2, 3), 1e6)),
            {"feature_dtype": "float16"},
            r"image '522418\.jpg'\), .*ID\.npy: field 'grid': .*fit float16",
        ),
    ],
)
def test_an_error_names_the_file(src, tmp_path, arrays, options, message):
    with pytest.raises(DataError, match=message):
        _records(src, _features(tmp_path, *arrays), "grid", tmp_path / "out", **options)


def test_missing_files_are_named(src, tmp_path):
    features = _features(tmp_path, np.ones((2, 3)), np.ones((2, 3)))
    (features / "522418.npy").unlink()
    with pytest.raises(DataError, match=r"image '522418\.jpg': expected a file"):
        _records(src, features, "grid", tmp_path / "out")
    (src / "test_ids.txt").unlink()
    with pytest.raises(DataError, match=r"test_ids\.txt: expected this file"):
        _records(src, features, "grid", tmp_path / "out")
    with pytest.raises(DataError, match="no such folder"):
        _records(src, tmp_path / "absent", "grid", tmp_path / "out")


def test_the_same_field_twice_is_an_error(src, tmp_path):
    np.save(src / "test_grids.npy", np.ones((2, 2, 3)))
    with pytest.raises(DataError, match=r"test_grids\.npy: expected 'grid' only in"):
        _records(src, _features(tmp_path, np.ones((2, 3)), np.ones((2, 3))), "grid", tmp_path / "out")


def test_command_line(src, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    features = _features(tmp_path, np.ones((1, 3, 2, 4)), np.ones((1, 3, 3, 3)))
    flags = [f"--src={src}", f"--features={features}", "--as=grid", "--name=toy", f"--out={tmp_path / 'out'}"]
    assert from_npy.main(flags) == 1
    assert "error: " in capsys.readouterr().err
    assert from_npy.main([*flags, "--max_units=10"]) == 0
    assert "toy: 2/2 (100%)  " in capsys.readouterr().err
    assert open_dataset(tmp_path / "out").features["grid"] == ((10, 3), np.float16)
