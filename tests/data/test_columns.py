"""Columns: what was written comes back by row, from several files, in every dtype; damage is named."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from data_prep.builder import write_dataset
from shnet_jax.data import columns
from shnet_jax.data.columns import Column, ColumnWriter, parse_description
from shnet_jax.data.errors import DataError
from shnet_jax.data.records import open_dataset

SHAPE = (3, 2)


def written(folder, dtype, rows=11):
    values = np.random.default_rng(0).normal(size=(rows, *SHAPE)).astype(dtype)
    writer = ColumnWriter(folder, "caption_tokens", "train")
    for part in np.split(values, [1, 1, 7]):
        writer.add(part)
    writer.close()
    return values, Column(folder, "caption_tokens", "train", rows, SHAPE, np.dtype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, bool])
@pytest.mark.parametrize("rows_in_a_file", [1, 4, 100])
def test_rows_come_back_in_any_order(tmp_path, monkeypatch, dtype, rows_in_a_file):
    monkeypatch.setattr(columns, "SHARD_BYTES", rows_in_a_file * 6 * np.dtype(dtype).itemsize)
    values, column = written(tmp_path, dtype)
    assert len(list(tmp_path.iterdir())) == -(-11 // rows_in_a_file)
    for rows in (np.array([10, 0, 3, 3, 4, 7]), np.arange(11), np.array([], int)):
        taken = column.take(rows)
        assert taken.dtype == values.dtype
        np.testing.assert_array_equal(taken, values[rows])
    np.testing.assert_array_equal(column.block(3, 9), values[3:9])


def test_a_file_of_float16_is_one_of_numpy(tmp_path):
    values, _ = written(tmp_path, np.float16)
    np.testing.assert_array_equal(np.load(tmp_path / columns.column_file("caption_tokens", "train", 0)), values)


@pytest.mark.parametrize(
    "spoil, found",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes; was it copied whole"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: np.save(path, np.zeros((11, 2, 3), np.float32)), r"float32 \[11, 2, 3\]"),
        (lambda path: path.write_bytes(b"nothing"), "magic string"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, spoil, found):
    _, column = written(tmp_path, np.float32)
    path = tmp_path / columns.column_file("caption_tokens", "train", 0)
    spoil(path)
    with pytest.raises(DataError, match=rf"caption_tokens_train-00000\.npy: expected vectors .*found: .*{found}"):
        column.take(np.array([0]))


@pytest.mark.parametrize("shape", [(2**40, 3), (2**32, 2**32)])  # memory; a product that is 0 in 64 bits
def test_a_shape_unlike_the_file_is_an_error_before_memory_is_taken(tmp_path, shape):
    written(tmp_path, np.float32)
    column = Column(tmp_path, "caption_tokens", "train", 11, shape, np.dtype(np.float32))
    with pytest.raises(DataError, match=r"caption_tokens_train-00000\.npy: expected vectors"):
        column.take(np.array([0]))


@pytest.mark.parametrize(
    "entry",
    [
        {"captions": {"shape": [2], "dtype": "float32"}},
        {"image_embedding": {"shape": [-2], "dtype": "float32"}},
        {"image_embedding": {"shape": [2], "dtype": "object"}},
        {"image_embedding": [2]},
        {"image_embedding": {"shape": [2**24 + 1], "dtype": "float32"}},
        {"image_embedding": {"shape": [2**32, 2**32], "dtype": "float32"}},
        7,
    ],
)
def test_a_description_of_something_else_is_refused(entry):
    with pytest.raises(DataError, match="columns: expected shape and dtype of image_embedding"):
        parse_description(entry, "metadata.json")


def records(dtype=np.float16):
    rng = np.random.default_rng(3)
    for i in range(9):
        count = 1 + i % 3
        yield {
            "image_id": f"image {i}",
            "captions": [f"a caption {j} of image {i}" for j in range(count)],
            "regions": rng.normal(size=(2, 4)).astype(np.float16),
            "image_embedding": rng.normal(size=5).astype(dtype),
            "caption_embeddings": rng.normal(size=(count, 3)).astype(dtype),
        }


def test_a_record_has_its_columns_as_any_other_field(tmp_path):
    given = list(records(ml_dtypes.bfloat16))
    dataset = open_dataset(write_dataset(tmp_path, "set", {"train": given}, {}))
    assert dataset.features["caption_embeddings"].shape == (None, 3)
    assert dataset.features["image_embedding"] == ((5,), np.dtype(ml_dtypes.bfloat16))
    fields = ("captions", "regions", "image_embedding", "caption_embeddings")
    for expected, found in zip(given, dataset.open_split("train", fields), strict=True):
        assert tuple(found) == fields or set(found) == set(fields)
        for name in fields:
            np.testing.assert_array_equal(found[name], expected[name])
    stacked = dataset.open_split("train", ("regions", "image_embedding")).stack(np.array([4, 1]))
    for name, values in stacked.items():
        np.testing.assert_array_equal(values, [given[4][name], given[1][name]])
