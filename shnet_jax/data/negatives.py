"""Lists of hard negatives of a training split, as `shnet mine` writes them, and what a batch draws from them.

A folder has
  images_for_captions.npy   [T, k] int32, rows of images that score high with each caption, the highest first
  captions_for_images.npy   [N, k] int32, rows of captions that score high with each image
  negatives.json            what they were mined from, with the SHA-256 of both files; written last
Places without a negative are NONE and stand at the end of their list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from shnet_jax.data.checksums import CHECKSUMS, sha256
from shnet_jax.data.errors import DataError
from shnet_jax.data.records import DataSet
from shnet_jax.paths import to_path
from shnet_jax.untrusted import open_npy, read_object

SOURCE, IMAGES, CAPTIONS = "negatives.json", "images_for_captions.npy", "captions_for_images.npy"
FORMAT = 1  # raised when a file or key changes its name or meaning
NONE = -1
"""Entry of a list that has fewer negatives than places."""


@dataclass(frozen=True)
class Negatives:
    """Hard negatives of a split of N images and T captions, and how many of them an example brings into its batch.

    first: [N + 1], first caption of each image.
    images: [T, k] rows of images for each caption. captions: [N, k] rows of captions for each image.
    count: captions that are drawn for each example; each comes with its image.
    """

    first: np.ndarray
    images: np.ndarray
    captions: np.ndarray
    count: int

    def draw(self, captions: np.ndarray, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Captions [n, count] that, with their images, are hard negatives of n examples.

        captions, images: [n] rows of the examples. In turn a caption of one of the hard images of the caption, and one
        of the hard captions of the image; any caption of the split where such a list is empty.
        """
        drawn = np.empty((len(captions), self.count), np.int64)
        for place in range(self.count):
            if place % 2:
                chosen = _one_of(self.captions[images], rng)
                hard_captions = chosen
            else:
                chosen = _one_of(self.images[captions], rng)
                hard_captions = self.first[chosen] + _below(self.first[chosen + 1] - self.first[chosen], rng)
            anything = rng.integers(int(self.first[-1]), size=len(captions))
            drawn[:, place] = np.where(chosen == NONE, anything, hard_captions)
        return drawn


def _below(bounds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A number [n] from 0 to each bound - 1; 0 for a bound of 0."""
    return np.minimum((rng.random(len(bounds)) * bounds).astype(np.int64), np.maximum(bounds - 1, 0))


def _one_of(lists: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An entry [n] of each list [n, k], each as likely; NONE of an empty one."""
    lists = np.asarray(lists)
    places = _below((lists != NONE).sum(axis=1), rng)
    return lists[np.arange(len(lists)), places].astype(np.int64)


def group_size(data: ConfigDict) -> int:
    """Examples of a batch that belong together: one, and its hard negatives.

    Raises ValueError for a folder without a count, and a count without a folder.
    """
    folder, count = data.negatives.folder, data.negatives.count
    if count < 0 or bool(folder) != bool(count):
        raise ValueError(
            f"config.data.negatives.folder is {folder!r} and count {count}: give the folder that shnet mine made and a "
            "count of at least 1, or '' and 0 for none"
        )
    return 1 + count


def open_negatives(data: ConfigDict, dataset: DataSet) -> Negatives | None:
    """The hard negatives of config.data.negatives for config.data.train_split; None where there is no folder.

    The lists stay in their files. Raises DataError for lists of another data set or split, and for damaged ones;
    FileNotFoundError, ValueError.
    """
    group_size(data)
    if not data.negatives.folder:
        return None
    folder = to_path(data.negatives.folder)
    if not (folder / SOURCE).is_file():
        raise FileNotFoundError(
            f"{folder}: no {SOURCE}; make hard negatives with shnet mine --workdir=RUN, which says their folder"
        )
    source = read_object(folder / SOURCE)
    _check_source(folder / SOURCE, source, dataset, data.train_split)
    first = dataset.first_captions(data.train_split)
    images, captions = len(first) - 1, int(first[-1])
    return Negatives(
        first,
        _read(folder, IMAGES, source, (captions, images)),
        _read(folder, CAPTIONS, source, (images, captions)),
        data.negatives.count,
    )


def _check_source(path: Path, source: Mapping[str, Any], dataset: DataSet, split: str) -> None:
    """Raises DataError unless the lists were mined from this split of this data set."""
    if source.get("format") != FORMAT:
        raise DataError(f"{path}: expected format {FORMAT}, found {source.get('format')!r:.80}", file=path.name)
    here = {
        "split": split,
        "images": dataset.splits[split],
        "captions": int(dataset.first_captions(split)[-1]),
        "dataset_sha256": sha256(dataset.path / CHECKSUMS) if (dataset.path / CHECKSUMS).is_file() else None,
    }
    for name, expected in here.items():
        if (stored := source.get(name)) != expected:
            raise DataError(
                f"{path}: {name}: expected {expected!r} of {dataset.path}, found {stored!r:.80}: these hard negatives "
                "are of another data set or split; make them anew with shnet mine --workdir=RUN",
                file=path.name,
                field=name,
            )


def _read(folder: Path, name: str, source: Mapping[str, Any], sizes: tuple[int, int]) -> np.ndarray:
    """Lists [rows, k], memory-mapped, whose entries are rows of the other side or NONE. sizes: of both sides."""
    path, (rows, others) = folder / name, sizes
    sums = source.get("files")
    expected = sums.get(name) if isinstance(sums, dict) else None
    if not path.is_file() or (actual := sha256(path)) != expected:
        actual = actual if path.is_file() else "no file"
        raise DataError(
            f"{path}: expected sha256 {expected!r:.80}, found {actual}; copy the folder again, or delete it and make "
            "it anew with shnet mine --workdir=RUN",
            file=name,
        )
    lists = open_npy(path)
    if lists.ndim != 2 or lists.dtype != np.int32 or len(lists) != rows or not lists.shape[1]:
        raise DataError(f"{path}: expected int32 [{rows}, k], found {lists.dtype} {list(lists.shape)}", file=name)
    low, high = int(lists.min(initial=0)), int(lists.max(initial=0))
    if low < NONE or high >= others:
        raise DataError(f"{path}: expected rows from {NONE} to {others - 1}, found {low} to {high}", file=name)
    return lists
