"""Region and grid features kept as one file an image: .npy, or the .pth of grid-feats-vqa."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import label_maps
from data_prep.files import open_array
from data_prep.names import FileNames
from data_prep.schema import DataError, Record
from data_prep.sources.base import Absent
from shnet_jax.interop.torch_file import open_torch_file
from shnet_jax.interop.torch_pickle import Tensor

MASK = {"grid": "grid_mask", "regions": "region_mask"}


@dataclass(frozen=True)
class UnitFiles:
    """Features of each image from ID.npy or ID.pth in a folder.

    field: "grid" or "regions".
    max_units: pad every image to this many units and add a mask; None when all have the same number.
    pool: average a feature map to pool x pool cells first; None keeps its cells.
    """

    folder: Path
    field: str
    max_units: int | None = None
    pool: int | None = None

    def __post_init__(self) -> None:
        """Raises DataError when there is no such folder."""
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder")

    @property
    def files(self) -> Mapping[str, str]:
        """Where its fields come from."""
        return dict.fromkeys((self.field, MASK[self.field]), f"{self.folder}/ID.npy")

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    @cached_property
    def _features(self) -> FileNames:
        return FileNames(self.folder, (".npy", ".pth"))

    def read(self, image_id: str) -> Record:
        """The features [units, D] and, with max_units, their mask."""
        path = self._features.find(image_id)
        if path is None:
            raise Absent(f"{self.folder}: image {image_id!r}: expected a file {image_id}.npy, found none")
        units = as_units(_read_pth(path) if path.suffix == ".pth" else open_array(path), path, self.pool)
        if self.max_units is None:
            return {self.field: units}
        units, mask = pad(units, self.max_units, path)
        return {self.field: units, MASK[self.field]: mask}


def _read_pth(path: Path) -> np.ndarray:
    """The one tensor in a .pth file, read without torch and without running anything that it names."""
    try:
        file = open_torch_file(path)
        if not isinstance(file.content, Tensor):
            raise DataError(f"{path}: expected a tensor saved by PyTorch, found {type(file.content).__name__}")
        return np.asarray(file.array(file.content), np.float32)
    except ValueError as error:
        raise DataError(str(error)) from error


def as_units(array: np.ndarray, path: Path, pool: int | None) -> np.ndarray:
    """Units [G, D] of an array [G, D], [D, h, w] or [1, D, h, w]; maps are averaged to pool x pool cells."""
    if not array.size:
        raise DataError(f"{path}: expected features, found an empty array {list(array.shape)}")
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3:
        cells = array if pool is None else adaptive_average(np.asarray(array, dtype=np.float32), pool)
        return np.ascontiguousarray(cells.reshape(len(cells), -1).T)
    if array.ndim == 2 and pool is None:
        return np.array(array)
    wanted = "[D, h, w] or [1, D, h, w] to pool" if pool else "[units, D], [D, h, w] or [1, D, h, w]"
    raise DataError(f"{path}: expected an array {wanted}, found {list(array.shape)}")


def adaptive_average(cells: np.ndarray, size: int) -> np.ndarray:
    """Average a map [D, h, w] to [D, size, size], as torch's AdaptiveAvgPool2d does."""
    for axis in (1, 2):
        edges = label_maps.edges(cells.shape[axis], size)
        cells = np.stack([cells.take(range(a, b), axis).mean(axis) for a, b in edges], axis)
    return cells


def pad(units: np.ndarray, count: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Units [G, D] -> [count, D] with zeros behind, and the mask [count] of the G valid ones."""
    if len(units) > count:
        raise DataError(f"{path}: expected at most max_units = {count} units, found {len(units)}")
    padded = np.zeros((count, units.shape[1]), units.dtype)
    padded[: len(units)] = units
    return padded, np.arange(count) < len(units)
