"""Regions from the TSV files of bottom-up attention (Anderson et al., CVPR 2018) and of LXMERT's extraction."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.names import Names
from data_prep.schema import DataError, Record
from data_prep.sources.base import Absent
from data_prep.sources.units import pad

# Columns of github.com/peteanderson80/bottom-up-attention (tools/generate_tsv.py) and github.com/airsplay/lxmert.
COLUMNS = (
    ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
    (
        *("img_id", "img_h", "img_w", "objects_id", "objects_conf"),
        *("attrs_id", "attrs_conf", "num_boxes", "boxes", "features"),
    ),
)


@dataclass(frozen=True)
class BottomUp:
    """regions and boxes, with LXMERT's columns also box_classes and box_scores, from one or more TSV.

    A first pass notes where the line of each image begins (the files of COCO have tens of GB); of an image that occurs
    twice the first line counts. max_regions: pad to this many and add region_mask (adaptive files: 10 to 100 boxes).
    """

    paths: Sequence[Path]
    max_regions: int | None = None

    @property
    def files(self) -> Mapping[str, str]:
        """Where its fields come from."""
        names = ("regions", "region_mask", "boxes", "box_classes", "box_scores")
        return dict.fromkeys(names, ", ".join(map(str, self.paths)))

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Nothing: the detector's 1600 classes of Visual Genome have no names in the file."""
        return {}

    @cached_property
    def _places(self) -> Names[tuple[Path, int]]:
        """File and offset of the line of each image."""
        places: Names[tuple[Path, int]] = Names(self.files["regions"])
        for path in self.paths:
            if not path.is_file():
                raise DataError(f"{path}: no such file")
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    image_id = line[:200].partition(b"\t")[0].decode("utf-8", "replace").strip()
                    if image_id not in (COLUMNS[0][0], COLUMNS[1][0]) and image_id not in places:  # a header
                        places.add(image_id, (path, offset))
                    offset += len(line)
        return places

    def read(self, image_id: str) -> Record:
        """regions [K, D] float32, boxes [K, 4] in 0..1, ..."""
        place = self._places.find(image_id)
        if place is None:
            raise Absent(f"{self.files['regions']}: image {image_id!r}: expected its line, found none")
        path, offset = place
        with path.open("rb") as file:
            file.seek(offset)
            record = parse(file.readline(), f"{path}, byte {offset}")
        if self.max_regions is None:
            return record
        out: Record = {}
        for name, value in record.items():
            rows, mask = pad(value.reshape(len(value), -1), self.max_regions, path)
            out[name] = rows.reshape(-1, *value.shape[1:])
            out["region_mask"] = mask
        return out


def parse(line: bytes, where: str) -> Record:
    """The fields of one line; raises DataError naming `where` and the column."""
    cells = line.rstrip(b"\r\n").split(b"\t")
    names = next((columns for columns in COLUMNS if len(columns) == len(cells)), None)
    if names is None:
        raise DataError(f"{where}: expected {' or '.join(str(len(c)) for c in COLUMNS)} columns, found {len(cells)}")
    row = dict(zip(names, cells, strict=True))
    try:
        width, height = (int(row.get(long, row.get(short, b""))) for long, short in _SIZES)
        count = int(row["num_boxes"])
    except ValueError as error:
        raise DataError(f"{where}: expected whole numbers as width, height and num_boxes: {error}") from error
    if min(width, height, count) < 1 or max(width, height) > _MAX_SIDE:
        raise DataError(f"{where}: expected an image and boxes, found {width} x {height} with {count}")
    boxes = _floats(row["boxes"], count, where, "boxes")
    if boxes.shape[1] != 4:
        raise DataError(f"{where}: column 'boxes': expected 4 numbers a box, found {boxes.shape[1]}")
    record: Record = {
        "regions": _floats(row["features"], count, where, "features"),
        "boxes": boxes / np.array([width, height, width, height], np.float32),
    }
    if "objects_id" in row:
        record["box_classes"] = _decode(row["objects_id"], np.int64, count, where, "objects_id")[:, 0]
        record["box_scores"] = _decode(row["objects_conf"], np.float32, count, where, "objects_conf")[:, 0]
    return record


_SIZES = (("image_w", "img_w"), ("image_h", "img_h"))
_MAX_SIDE = 2**24  # pixels; float32 counts up to there


def _floats(cell: bytes, count: int, where: str, column: str) -> np.ndarray:
    return _decode(cell, np.float32, count, where, column)


def _decode(cell: bytes, dtype: type, count: int, where: str, column: str) -> np.ndarray:
    """A cell of base64 as [count, n]."""
    try:
        data = base64.b64decode(cell, validate=True)
    except binascii.Error as error:
        raise DataError(f"{where}: column {column!r}: expected base64: {error}") from error
    if not data or len(data) % (count * np.dtype(dtype).itemsize):
        expected = f"a multiple of {count} {np.dtype(dtype).name} (one a box)"
        raise DataError(f"{where}: column {column!r}: expected {expected}, found {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(count, -1)
