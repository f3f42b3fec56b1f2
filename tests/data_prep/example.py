"""A small valid record, two photographs and their records in a data set, for the tests of this folder."""

import base64

import numpy as np

from shnet_jax.data.records import open_dataset

FILES = ("COCO_val2014_000000000042.jpg", "000000000139.jpg")
NUMBERS = (42, 139)


def stored_records(out, split="val"):
    """All records of a split of the data set in a folder, with all fields."""
    dataset = open_dataset(out)
    return list(dataset.open_split(split, list(dataset.features)))


def cell(array):
    """An array in base64, as cells of TSV files hold it."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def record(row: int = 0, count: int = 2, **changes):
    """4 regions of 6, 3 cells of 5, 11 classes; `count` captions; values depend on `row`."""
    rng = np.random.default_rng(row)
    corners = np.sort(rng.random((4, 2, 2)), axis=1).reshape(4, 4)
    base = {
        "image_id": f"image {row}",
        "captions": [f"a dog number {row} runs to tree {n}" for n in range(count)],
        "caption_ids": np.arange(count) + 10 * row,
        "regions": rng.normal(size=(4, 6)).astype(np.float16),
        "region_mask": np.array([True, True, True, False]),
        "boxes": corners.astype(np.float32),
        "box_classes": np.arange(4, dtype=np.int32),
        "box_scores": rng.random(4).astype(np.float32),
        "grid": rng.normal(size=(3, 5)).astype(np.float16),
        "grid_mask": np.array([True, True, False]),
        "seg_semantic": rng.random((11, 2, 2)).astype(np.float16),
        "seg_map": rng.integers(0, 12, (8, 9)).astype(np.uint8),
        "categories": rng.random(11) < 0.5,
        "relations": np.array([[0, 2, 3], [-1, -1, -1]], np.int32),
        "relation_scores": rng.random((4, 4)).astype(np.float16),
        "image_embedding": rng.normal(size=7).astype(np.float32),
        "identity": np.int64(row),
        "caption_embeddings": rng.normal(size=(count, 7)).astype(np.float32),
        "caption_tokens": rng.normal(size=(count, 5, 3)).astype(np.float16),
        "caption_token_mask": np.arange(5) < np.full((count, 1), 4),
        "image": rng.integers(0, 256, (6, 4, 3), dtype=np.uint8),
    }
    return {name: value for name, value in (base | changes).items() if value is not None}


def put(name, value, *place):
    """spoil(folder): another value at a place of an array file."""

    def change(array):
        array[place] = value
        return array

    return altered(name, change)


def altered(name, change):
    """spoil(folder): an array file becomes what `change` makes of its array."""
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


def line(name, number, text):
    """spoil(folder): another line, counted from 1, of a text file."""

    def spoil(folder):
        lines = (folder / name).read_bytes().split(b"\n")
        lines[number - 1] = text
        (folder / name).write_bytes(b"\n".join(lines))

    return spoil
