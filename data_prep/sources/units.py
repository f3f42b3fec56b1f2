"""Region and grid features kept as one file an image: .npy, or the .pth of grid-feats-vqa."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from data_prep import label_maps
from data_prep.files import check_folder, open_array
from data_prep.names import FileNames, is_number
from data_prep.places import SAMPLE, Place, Recognised, split_of
from data_prep.schema import DataError, Record, refuse
from data_prep.sources.base import Source
from data_prep.torch_files import peek
from shnet_jax.data.schema import MASKS
from shnet_jax.interop.torch_file import open_torch_file
from shnet_jax.interop.torch_pickle import Tensor
from shnet_jax.untrusted import MAX_IMAGE_BYTES

Layout = Literal["hwc", "chw"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
"""Positions of the channels: last, as in Keras and JAX, or first, as in PyTorch."""
_SUFFIXES = (".npy", ".pth", ".pt")
_WIDTH, _STEP = 64, 16  # the least width of published features, and of what widths are multiples; see `refusal`


@dataclass(frozen=True)
class UnitFiles(Source):
    """Features of each image from ID.npy or ID.pth in a folder.

    field: "grid" or "regions".
    max_units: pad every image to this many units and add a mask; None when all have the same number.
    pool: average a feature map to pool x pool cells first; None keeps its cells.
    layout: see `as_units`.
    """

    folder: Path
    field: str
    max_units: int | None = None
    pool: int | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        """Raises DataError when there is no such folder, or nothing to read in it."""
        check_folder(self.folder, *_SUFFIXES)

    @property
    def files(self) -> Mapping[str, str]:
        """Files that each field comes from."""
        return dict.fromkeys((self.field, MASKS[self.field]), f"{self.folder}/ID.npy")

    @cached_property
    def _features(self) -> FileNames:
        return FileNames(self.folder, _SUFFIXES)

    def read(self, image_id: str) -> Record:
        """The features [units, D] and, with max_units, their mask."""
        path = self._features.need(image_id, "a file ID.npy")
        return padded({self.field: as_units(open_units(path), path, self.pool, self.layout)}, self.max_units, path)


def recognise(place: Place) -> Iterator[Recognised]:
    """A folder of ID.npy, ID.pth or ID.pt, each with the features of an image."""
    if files := unit_files(place):
        contents = f"{len(files)} files ID{files[0].suffix}, the first of shape {list(open_units(files[0]).shape)}"
        yield Recognised(
            contents,
            "from_grid_feats",
            {"grids": str(place.path)},
            read=partial(first_units, files, "grid"),
        )


def first_units(files: Sequence[Path], field: str, reading: Any) -> Iterator[Record]:
    """The field of some images, as a `detections.Reading` says."""
    for file in files[:SAMPLE]:
        yield {field: as_units(open_units(file), file, reading.pool, reading.layout)}


def unit_files(place: Place) -> list[Path]:
    """The files with the features of an image each. Raises DataError for arrays of all images together."""
    files = [file for file in place.files if file.suffix in _SUFFIXES]
    if not files or place.path.is_file() or any(file.name.endswith("_caps.txt") for file in place.files):
        return []
    name, _, kind = place.path.name.rpartition("_")
    if kind in ("box", "fc") and place.path.with_name(f"{name}_att").is_dir():  # read with these, or of no use
        return []
    first = files[0]
    if first.suffix != ".npy":
        return files if peek(first) == "tensor" else []
    array = open_array(first)
    if array.ndim < 2 or array.dtype.kind not in "fiu":
        return []
    if array.nbytes > MAX_IMAGE_BYTES or (not is_number(first.stem) and (len(files) == 1 or split_of(first))):
        raise DataError(
            f"{first}: {array.dtype} {list(array.shape)} looks like an array of all images; data_prep.from_scan reads "
            "it as SPLIT_ims.npy beside SPLIT_caps.txt and SPLIT_ids.txt"
        )
    return files


def open_units(path: Path) -> np.ndarray:
    """The features in a file ID.npy, ID.pth or ID.pt."""
    return open_array(path) if path.suffix == ".npy" else _read_pth(path)


def _read_pth(path: Path) -> np.ndarray:
    """The one tensor in a .pth file, read without torch and without running anything that it names."""
    try:
        file = open_torch_file(path)
        if not isinstance(file.content, Tensor):
            raise DataError(f"{path}: expected a tensor saved by PyTorch, found {type(file.content).__name__}")
        return file.array(file.content)
    except ValueError as error:
        raise DataError(str(error)) from error


def as_units(array: np.ndarray, where: object, pool: int | None = None, layout: Layout | None = None) -> np.ndarray:
    """Units [G, D] of one image from an array of any layout in use; raises DataError naming `where`.

    array: [G, D], [D, G], [D, h, w] or [h, w, D], also with axes of length 1 before or behind. A map's cells become
    units row by row, averaged to pool x pool first.
    layout: "hwc", channels last, or "chw", channels first. Without it [G, D] and [D, h, w] are taken where their shape
    can hardly be another one (`refusal`).
    """
    shape = list(array.shape)
    refuse(not array.size, where, "features", f"an empty array {shape}")
    while array.ndim > 2 and len(array) == 1:  # a batch of one
        array = array[0]
    if array.ndim == 4 and array.shape[2:] == (1, 1):  # regions [K, D, 1, 1] as a pooling leaves them
        array = array[:, :, 0, 0]
    if array.ndim == 3 and array.shape[2] == 1 and layout is None:
        array = array[:, :, 0] if array.shape[1] > 1 else array[:, :, 0].T
    if array.ndim not in (2, 3) or (array.ndim == 2 and pool is not None):
        wanted = "a map [D, h, w] or [h, w, D] to pool" if pool else "[units, D], [D, h, w] or [h, w, D]"
        raise DataError(f"{where}: expected an array of one image, {wanted}, found {shape}")
    if layout is None and (reason := refusal(array.shape)):
        raise DataError(f"{where}: {reason}, found {shape}")
    if array.ndim == 2:
        return np.array(array.T if layout == "chw" else array)
    cells = np.moveaxis(array, 2, 0) if layout == "hwc" else array
    if pool is not None:
        cells = adaptive_average(np.asarray(cells, dtype=np.float32), pool)
    return np.ascontiguousarray(cells.reshape(len(cells), -1).T)


def refusal(shape: Sequence[int]) -> str:
    """Why an array of this shape cannot be taken for [G, D] or [D, h, w] without being told so; "" when it can.

    Published features have 64 numbers or more, a multiple of 16; images have ten to some thousand units, seldom a
    multiple of 16. So [2048, 36] is hardly 2,048 units of width 36, nor is [7, 7, 256] a map of 7 channels. [D, h, w]
    is clear when D is the longest axis. Where no axis is as long as a width, as in examples made by hand, the
    documented layout is taken unless the last axis stands out.
    """
    flags = "--layout=hwc says channels last, --layout=chw channels first"
    if len(shape) == 2:
        units, width = shape
        if units > width and units >= _WIDTH and units % _STEP == 0:
            return f"expected [units, D], this may be [D, units]; {flags}"
        return ""
    channels, height, width = shape
    if height >= _WIDTH and height > max(channels, width) and height % _STEP == 0:
        return "expected a map [D, h, w] or [h, w, D], this has its longest axis between the others; move it"
    if channels > max(height, width) and (channels % _STEP == 0 or width % _STEP):
        return ""
    stands_out = width >= 2 * max(channels, height) or channels == height < width
    if width < _STEP and not stands_out:
        return ""
    likely = "looks like [h, w, D]" if width > max(channels, height) else "may as well be [h, w, D]"
    return f"expected a map [D, h, w], this {likely}; {flags}"


def narrow(units: int, width: int) -> bool:
    """Whether stored features [units, width] are less wide than any published ones: their axes were likely mixed up."""
    return units > width and (width < _STEP or bool(refusal((units, width))))


def adaptive_average(cells: np.ndarray, size: int) -> np.ndarray:
    """Average a map [D, h, w] to [D, size, size], as torch's AdaptiveAvgPool2d does."""
    for axis in (1, 2):
        edges = label_maps.edges(cells.shape[axis], size)
        cells = np.stack([cells.take(range(a, b), axis).mean(axis) for a, b in edges], axis)
    return cells


def padded(record: Record, count: int | None, where: object) -> Record:
    """The fields of K units each, regions or a grid first, padded to `count` units and with their mask; None: as is."""
    if count is None:
        return record
    out: Record = {}
    for name, value in record.items():
        rows, mask = pad(value.reshape(len(value), -1), count, where)
        out[name] = rows.reshape(-1, *value.shape[1:])
        out[MASKS.get(name, MASKS["regions"])] = mask
    return out


def pad(units: np.ndarray, count: int, where: object) -> tuple[np.ndarray, np.ndarray]:
    """Units [G, D] -> [count, D] with zeros behind, and the mask [count] of the G valid ones."""
    refuse(len(units) > count, where, f"at most max_units = {count} units", len(units))
    out = np.zeros((count, units.shape[1]), units.dtype)
    out[: len(units)] = units
    return out, np.arange(count) < len(units)
