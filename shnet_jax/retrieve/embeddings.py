"""Folder of embeddings: unit vectors of a gallery's images and captions, their ids and their origin.

images.safetensors, texts.safetensors   vector [n, d] float32; of models that score sets also elements [n, m, d]
                                        float32 and mask [n, m] bool
ids.json                                image_ids, caption_ids, captions, caption_image (row of each caption's image)
embeddings.json                         checkpoint and data set that they come from; written last
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shnet_jax.data.records import DataSet
from shnet_jax.retrieve import tensors
from shnet_jax.types import Embedding
from shnet_jax.untrusted import read_object

SIDES = ("images", "texts")
SOURCE, IDS = "embeddings.json", "ids.json"
FORMAT = 1  # raised when a file or key changes its name or meaning


@dataclasses.dataclass(frozen=True)
class Ids:
    """Ids and captions of the rows.

    image_ids: n names. caption_ids: t names. captions: t sentences. caption_image: [t] row of each caption's image.
    """

    image_ids: list[str]
    caption_ids: list[str]
    captions: list[str]
    caption_image: list[int]

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each image by its id."""
        return {name: row for row, name in enumerate(self.image_ids)}

    @cached_property
    def first(self) -> np.ndarray:
        """First caption [n + 1] of each image; captions lie image by image."""
        return np.searchsorted(np.asarray(self.caption_image), np.arange(len(self.image_ids) + 1))

    def captions_of(self, row: int) -> list[str]:
        """The captions of image `row`."""
        return self.captions[self.first[row] : self.first[row + 1]]


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """An opened folder. images, texts: arrays that stay in their files until they are used (`np.memmap`)."""

    folder: Path
    source: dict[str, Any]
    ids: Ids
    images: Embedding
    texts: Embedding


def make_ids(dataset: DataSet, split: str) -> Ids:
    """The ids of a split; captions without a number of their own are called IMAGE#0, IMAGE#1, ...

    Reading such numbers takes a pass over the records.
    """
    index = dataset.index(split)
    image_ids = [str(name) for name in index.image_ids]
    captions = [caption for of_image in index.all_captions() for caption in of_image]
    if "caption_ids" in dataset.features:
        records = dataset.open_split(split, ["caption_ids"])
        caption_ids = [str(number) for record in records for number in record["caption_ids"]]
    else:
        counts = zip(image_ids, index.caption_counts, strict=True)
        caption_ids = [f"{name}#{k}" for name, count in counts for k in range(count)]
    return Ids(image_ids, caption_ids, captions, np.repeat(np.arange(len(index)), index.caption_counts).tolist())


def read_source(folder: Path) -> dict[str, Any] | None:
    """The contents of embeddings.json; None for a folder without complete embeddings."""
    path = folder / SOURCE
    return read_object(path) if path.is_file() else None


def read_ids(path: Path) -> Ids:
    """The ids of a folder. Raises ValueError for a file whose lists do not fit together, FileNotFoundError."""
    lists = read_object(path)
    kinds = {"image_ids": str, "caption_ids": str, "captions": str, "caption_image": int}
    for name, kind in kinds.items():
        values = lists.get(name)
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise ValueError(f"{path}: {name}: expected a list of {kind.__name__}, found {values!r:.80}")
    ids = Ids(**{name: lists[name] for name in kinds})
    rows, n, t = np.array(ids.caption_image, object), len(ids.image_ids), len(ids.captions)
    if (
        len(ids.caption_ids) != t
        or len(rows) != t
        or any(not 0 <= row < n for row in rows)
        or (rows[1:] < rows[:-1]).any()
    ):
        raise ValueError(f"{path}: expected {t} captions with an id and, in rising order, a row of {n} images each")
    return ids


def open_embeddings(folder: str | Path) -> Embeddings:
    """Opens a complete folder. Raises FileNotFoundError, or ValueError for files that do not fit together."""
    folder = Path(folder)
    source = read_source(folder)
    if source is None:
        raise FileNotFoundError(f"{folder}: no {SOURCE}; make the embeddings with --mode=embed")
    if source.get("format") != FORMAT:
        raise ValueError(f"{folder / SOURCE}: expected format {FORMAT}, found {source.get('format')}")
    ids = read_ids(folder / IDS)
    sides = {}
    for side, count in zip(SIDES, (len(ids.image_ids), len(ids.captions)), strict=True):
        path = folder / f"{side}.safetensors"
        arrays = tensors.open_mapped(path)
        wrong = {
            name: (array.dtype.name, array.shape)
            for name, array in arrays.items()
            if array.shape[:1] != (count,) or array.dtype not in (np.float32, bool)
        }
        if "vector" not in arrays or wrong:
            raise ValueError(f"{path}: expected a vector for each of {count} {side} of {IDS}, found {wrong or 'none'}")
        sides[side] = Embedding(**arrays)  # type: ignore[arg-type]  # files may outgrow the device
    return Embeddings(folder, source, ids, sides["images"], sides["texts"])
