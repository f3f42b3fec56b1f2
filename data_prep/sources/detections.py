"""The record of an image from what a detector's file has for it, the same for every container of such arrays."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_prep.notes import note
from data_prep.schema import DataError, Record, refuse
from data_prep.sources.base import Source
from data_prep.sources.boxes import HEIGHTS, WIDTHS, Form, Size, Sizes, shares, size
from data_prep.sources.units import Layout, as_units, padded

FEATURES = ("x", "feat", "feature", "features", "image_features", "feats")
BOXES = ("bbox", "boxes", "image_bb")
SHARES = ("norm_bb", "spatial_features")
COUNTS = ("num_bbox", "num_boxes")
CLASSES = ("objects_id", "obj_id", "classes")
SCORES = ("objects_conf", "obj_conf", "conf", "scores")
PROBABILITIES = "cls_prob"
GRIDS = "grids"
PAIR = "size"
NAMES = (*FEATURES, *BOXES, *SHARES, *COUNTS, *CLASSES, *SCORES, *WIDTHS, *HEIGHTS, PROBABILITIES, GRIDS, PAIR)
"""Names of the arrays read for an image. Others, such as attributes and masks, are ignored, with a note."""
_PLAIN = ("image_id", "img_id", "id", "feature_path", "keys", "__keys__")  # their loss is none
FIELDS = ("regions", "region_mask", "boxes", "box_classes", "box_scores", "grid", "grid_mask")
_VISUAL_GENOME = 1601  # classes of bottom-up attention with the background, which is the first


@dataclass(frozen=True)
class Reading:
    """Options for reading the arrays of an image.

    field: "regions" or "grid", what `features` are; None: regions, or a grid where they are a map.
    layout, pool: see `units.as_units`. form: what boxes without a unit in their name are.
    sizes: of images whose file does not say them. size_order: of `size`; DLCT writes (height, width).
    max_regions, max_cells: pad to this many and add a mask.
    """

    field: str | None = None
    layout: Layout | None = None
    pool: int | None = None
    form: Form = "pixels"
    sizes: Sizes | None = None
    size_order: str = "hw"
    max_regions: int | None = None
    max_cells: int | None = None

    def record(self, image_id: str, arrays: Mapping[str, np.ndarray], where: str) -> Record:
        """The fields of an image from arrays with names of NAMES. Raises DataError naming `where` and the array."""
        out: Record = {}
        if GRIDS in arrays:
            out |= self._grid(arrays[GRIDS], f"{where}: {GRIDS}")
        name = the_one(arrays, FEATURES, where)
        if name is None:
            return out
        features = arrays[name]
        field = self.field or ("grid" if _is_map(features) else "regions")
        if field == "grid":
            refuse(GRIDS in arrays, where, "one grid", f"{name!r} and {GRIDS!r}; --features_as=regions")
            return self._grid(features, f"{where}: {name}")
        regions: Record = {"regions": as_units(features, f"{where}: {name}", None, self.layout)}
        there = len(regions["regions"])
        count = _count(arrays, regions["regions"], where)
        regions |= self._boxes(image_id, arrays, there, count, where) | _labels(arrays, where)
        for part, value in regions.items():
            refuse(len(value) not in (there, count), f"{where}: field {part!r}", f"{there}, one a region", len(value))
        return out | padded({part: value[:count] for part, value in regions.items()}, self.max_regions, where)

    def _grid(self, array: np.ndarray, where: str) -> Record:
        return padded({"grid": as_units(array, where, self.pool, self.layout)}, self.max_cells, where)

    def _boxes(self, image_id: str, arrays: Mapping[str, np.ndarray], there: int, count: int, where: str) -> Record:
        """boxes [count, 4], of arrays that have as many rows as there are regions, padding included."""
        name = _first(arrays, (*SHARES, *BOXES))
        if name is None or self.form == "none":
            return {}
        boxes = arrays[name]
        if boxes.ndim == 3 and len(boxes) == 1:
            boxes = boxes[0]
        if self.layout == "chw" and boxes.ndim == 2 and boxes.shape[1] == there:
            boxes = boxes.T
        where = f"{where}: {name}"
        if name in SHARES:
            return {"boxes": shares(boxes[:count, :4] if boxes.ndim == 2 else boxes, None, "shares", where)}
        return {"boxes": shares(boxes[:count], self._size(image_id, arrays, where), self.form, where)}

    def _size(self, image_id: str, arrays: Mapping[str, np.ndarray], where: str) -> Size | None:
        sides = [_first(arrays, names) for names in (WIDTHS, HEIGHTS)]
        if sides[0] is not None and sides[1] is not None:
            return size(arrays[sides[0]], arrays[sides[1]], where)
        if PAIR in arrays:
            pair = np.asarray(arrays[PAIR]).reshape(-1)
            refuse(len(pair) != 2, f"{where}: {PAIR}", "2 numbers", list(np.shape(arrays[PAIR])))
            width, height = pair if self.size_order == "wh" else pair[::-1]
            return size(width, height, f"{where}: {PAIR}")
        return self.sizes.find(image_id) if self.sizes is not None else None


DEFAULT = Reading()


class Detections(Source, Protocol):
    """A source of FIELDS, all of them from the same files."""

    @property
    def where(self) -> str:
        """The files, for error messages."""

    @property
    def files(self) -> Mapping[str, str]:
        """Files that each field comes from."""
        return dict.fromkeys(FIELDS, self.where)


def _first(arrays: Mapping[str, np.ndarray], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in arrays), None)


def the_one(names: Collection[str], wanted: Sequence[str], where: str) -> str | None:
    """The one of the wanted names that is there, None without any. Raises DataError for two."""
    present = [name for name in wanted if name in names]
    refuse(len(present) > 1, where, "features under one name", f"{' and '.join(present)}; rename the others")
    return present[0] if present else None


def note_unread(names: Iterable[str], known: Collection[str], where: object) -> None:
    """Note what a file has of an image that is not read."""
    if unread := sorted({*map(str, names)} - {*known, *_PLAIN}):
        note(f"not read: {described(unread)}", where)


def _is_map(array: np.ndarray) -> bool:
    """Whether an array has more than one axis of cells: [D, h, w] or [1, h, w, D], not [1, K, D] or [K, D, 1, 1]."""
    shape = list(array.shape)
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return len(shape) > 2


def _count(arrays: Mapping[str, np.ndarray], regions: np.ndarray, where: str) -> int:
    """Number of real regions among [K, D]; those behind are padding, as are zeros where no number is given."""
    name = _first(arrays, COUNTS)
    if name is None:
        used = np.flatnonzero(regions.any(1))
        count = int(used[-1]) + 1 if len(used) else len(regions)
        if count < len(regions):
            note("regions of zeros behind the others are taken as padding", where)
        return count
    count = int(np.asarray(arrays[name]).reshape(-1)[0]) if np.size(arrays[name]) == 1 else 0
    if not 1 <= count <= len(regions):
        expected = f"1..{len(regions)}, the number of regions"
        raise DataError(f"{where}: {name}: expected {expected}, found {arrays[name]!r:.80}")
    if regions[count:].any():
        note(f"regions behind the number in {name} are left out", where)
    return count


def _labels(arrays: Mapping[str, np.ndarray], where: str) -> Record:
    """box_classes [K] and box_scores [K] from classes and scores, or from the probabilities of Visual Genome."""
    out: Record = {}
    for field, names in (("box_classes", CLASSES), ("box_scores", SCORES)):
        name = _first(arrays, names)
        if name is None:
            continue
        if max(shape := np.shape(arrays[name]), default=1) == np.size(arrays[name]):  # [K], [K, 1], [1, K]
            out[field] = np.reshape(arrays[name], -1)
        else:
            note(f"not read: {name} {list(shape)[1:]} of each region, expected one number", where)
    if not out and PROBABILITIES in arrays:
        probabilities = arrays[PROBABILITIES]
        if probabilities.ndim == 2 and probabilities.shape[1] == _VISUAL_GENOME:
            return {"box_classes": probabilities[:, 1:].argmax(1), "box_scores": probabilities[:, 1:].max(1)}
        widths = list(np.shape(probabilities))[1:]
        note(f"not read: {PROBABILITIES} {widths} of each region, expected {_VISUAL_GENOME}", where)
    return out


def described(value: Any) -> str:
    """The names in a container, for an error."""
    names = sorted(map(str, value))
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
