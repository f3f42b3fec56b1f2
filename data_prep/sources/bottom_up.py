"""Regions from the TSV files of bottom-up attention (Anderson et al., CVPR 2018) and of LXMERT's extraction."""

from __future__ import annotations

import base64
import binascii
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from data_prep.files import check_file
from data_prep.names import Names
from data_prep.places import SAMPLE, Place, Recognised, listed
from data_prep.schema import DataError, Record, refuse
from data_prep.sources import boxes as box_units
from data_prep.sources.base import Source
from data_prep.sources.units import padded
from shnet_jax.untrusted import kind_of

# Columns of github.com/peteanderson80/bottom-up-attention (tools/generate_tsv.py) and github.com/airsplay/lxmert.
COLUMNS = (
    ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
    (
        *("img_id", "img_h", "img_w", "objects_id", "objects_conf"),
        *("attrs_id", "attrs_conf", "num_boxes", "boxes", "features"),
    ),
)
_IDS, _WIDTHS, _HEIGHTS = ("image_id", "img_id"), ("image_w", "img_w"), ("image_h", "img_h")
_NAMES = frozenset((*COLUMNS[0], *COLUMNS[1]))
BOM = b"\xef\xbb\xbf"
_DIGITS = 12  # more than the number of boxes has
_LONG = 2000  # bytes that no header has; the lines of images have some hundred thousand
_NEEDED = (_IDS, _WIDTHS, _HEIGHTS, ("num_boxes",), ("boxes",), ("features",))


T = TypeVar("T")


class _Line(NamedTuple):
    """Position of a line; columns: those of the header above it, None without a header."""

    path: Path
    offset: int
    columns: tuple[str, ...] | None

    def read(self) -> bytes:
        """Its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.readline()


@dataclass(frozen=True)
class BottomUp(Source):
    """regions and boxes, with LXMERT's columns also box_classes and box_scores, from one or more TSV.

    A header says which column is which, in any order; without one the number of columns does. A first pass notes where
    the line of each image begins (the files of COCO have tens of GB); of an image that occurs twice the first whole
    line counts, and that is said.
    max_regions: pad to this many and add region_mask (adaptive files: 10 to 100 boxes). form: what the boxes are.
    """

    paths: Sequence[Path]
    max_regions: int | None = None
    form: box_units.Form = "pixels"

    @property
    def files(self) -> Mapping[str, str]:
        """Files that each field comes from."""
        names = ("regions", "region_mask", "boxes", "box_classes", "box_scores")
        return dict.fromkeys(names, ", ".join(map(str, self.paths)))

    @cached_property
    def _places(self) -> Names[list[_Line]]:
        """The lines of each image, in the order of the files."""
        return lines_by_image(self.files["regions"], (line for path in self.paths for line in _lines(path)))

    def read(self, image_id: str) -> Record:
        """regions [K, D] float32, boxes [K, 4] in 0..1, ..."""
        places = self._places.need(image_id, "its line")
        lines = ((f"its line at byte {line.offset} is taken, not the broken one", line) for line in places)
        return first_whole(image_id, lines, self._record)

    def _record(self, line: _Line) -> Record:
        where = f"{line.path}, byte {line.offset}"
        return padded(parse(line.read(), where, line.columns, self.form), self.max_regions, where)


def lines_by_image(where: str, lines: Iterable[tuple[str, T]]) -> Names[list[T]]:
    """The lines of each image, in the order of the files. Says so where images have more than one."""
    by_image: dict[str, list[T]] = {}
    for image_id, line in lines:
        by_image.setdefault(image_id, []).append(line)
    names: Names[list[T]] = Names(where)
    for image_id, of_image in by_image.items():
        names.add(image_id, of_image)
    if repeated := [image_id for image_id, of_image in by_image.items() if len(of_image) > 1]:
        shown = f"{len(repeated)} images have more than one line, such as {repeated[0]!r:.80}"
        print(f"{where}: {shown}; the first whole one of each is taken", file=sys.stderr)
    return names


def first_whole(image_id: str, lines: Iterable[tuple[str, T]], parse_line: Callable[[T], Record]) -> Record:
    """The record of the first line of an image that can be parsed; says so where others were broken.

    lines: at least one, each with the words that say that it is taken.
    Raises the DataError of the first where all are broken.
    """
    faults: list[DataError] = []
    for taken, line in lines:
        try:
            record = parse_line(line)
        except DataError as error:
            faults.append(error)
            continue
        for fault in faults:
            print(f"image {image_id!r}: {taken}: {fault}", file=sys.stderr)
        return record
    raise faults[0]


def _lines(path: Path) -> Iterator[tuple[str, _Line]]:
    """The image of each line of a file and where it is. Raises DataError for a file or header of another kind."""
    check_lines(path)
    columns, offset = None, 0
    with path.open("rb") as file:
        for line in file:
            start, offset = offset, offset + len(line)
            if not start:
                line = line.removeprefix(BOM)
            if len(line) < _LONG and (names := _words(line)):
                if _NAMES & set(names) or (not start and len(names) > 1 and not any(map(str.isdecimal, names))):
                    columns = _header(names, f"{path}, byte {start}")
                    continue
            elif not line.strip():
                continue
            before = next((i for i, name in enumerate(columns or ()) if name in _IDS), 0)
            cells = line.split(b"\t", before + 1) if before else [line[:200].partition(b"\t")[0]]
            if before < len(cells):
                yield cells[before][:200].decode("utf-8", "replace").strip(), _Line(path, start, columns)


def check_lines(path: Path) -> None:
    """Raises DataError, which says what it is, unless a file begins with a line of text with tabs."""
    check_file(path)
    with path.open("rb") as file:
        start = file.read(_LONG)
    if b"\0" in start[:200] or b"\t" not in start:
        raise DataError(f"{path}: expected lines of text with tabs{kind_of(start[:200]) or f', found {start[:40]!r}'}")


def _words(line: bytes) -> tuple[str, ...]:
    """The cells of a line in lower case, each cut to the length of a name; () for a blank line."""
    cells = tuple(cell.strip()[:40].decode("utf-8", "replace").lower() for cell in line.split(b"\t"))
    return cells if any(cells) else ()


def _header(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The names of a header. Raises DataError unless they are known, each once, and all that is needed is there."""
    unknown = [name for name in names if name not in _NAMES]
    missing = [" or ".join(wanted) for wanted in _NEEDED if sum(name in wanted for name in names) != 1]
    if unknown or missing or len(set(names)) < len(names):
        contents = f"the names {', '.join(map(repr, unknown))}" if unknown else f"not one column {', '.join(missing)}"
        raise DataError(
            f"{where}: expected a header of {', '.join(COLUMNS[0])} or {', '.join(COLUMNS[1])} in any order, found "
            f"{contents:.200}; rename the columns"
        )
    return names


def parse(
    line: bytes, where: str, columns: tuple[str, ...] | None = None, form: box_units.Form | None = None
) -> Record:
    """The fields of one line.

    columns: the names of its cells, None when their number says them. form: what the boxes are; None: pixels, which are
    divided by the image's size and not looked at.
    Raises DataError naming `where` and the column.
    """
    cells = line.removeprefix(BOM).rstrip(b"\r\n").split(b"\t")
    names = columns or next((names for names in COLUMNS if len(names) == len(cells)), None)
    if names is None or len(names) != len(cells):
        expected = len(columns) if columns else " or ".join(str(len(names)) for names in COLUMNS)
        raise DataError(f"{where}: expected {expected} columns, found {len(cells)}")
    row = dict(zip(names, cells, strict=True))
    wide, high = (next(row[name] for name in names if name in row) for names in (_WIDTHS, _HEIGHTS))
    width, height = box_units.size(wide, high, where)
    number = row["num_boxes"].strip()[:_DIGITS].decode("utf-8", "replace")
    count = int(number) if number.isdecimal() and len(number) < _DIGITS else 0
    refuse(count < 1, where, "an image and boxes", f"{width} x {height} with {number}")
    corners = _floats(row["boxes"], count, where, "boxes")
    refuse(corners.shape[1] != 4, f"{where}: column 'boxes'", "4 numbers a box", corners.shape[1])
    record: Record = {"regions": _floats(row["features"], count, where, "features")}
    if form is None:
        record["boxes"] = corners / np.array([width, height, width, height], np.float32)
    elif form != "none":
        record["boxes"] = box_units.shares(corners, (width, height), form, f"{where}: column 'boxes'")
    if "objects_id" in row and "objects_conf" in row:
        record["box_classes"] = decode(row["objects_id"], np.int64, count, where, "objects_id")[:, 0]
        record["box_scores"] = decode(row["objects_conf"], np.float32, count, where, "objects_conf")[:, 0]
    return record


def _floats(cell: bytes, count: int, where: str, column: str) -> np.ndarray:
    return decode(cell, np.float32, count, where, column)


def decode(cell: bytes, dtype: type, count: int, where: str, column: str) -> np.ndarray:
    """A cell of base64 as [count, n]; also as Python writes bytes, b'...', which some tools did."""
    if cell.startswith(b"b'"):
        cell = cell[2:].removesuffix(b"'")
    try:
        data = base64.b64decode(cell, validate=True)
    except binascii.Error as error:
        raise DataError(f"{where}: column {column!r}: expected base64: {error}") from error
    if not data or len(data) % (count * np.dtype(dtype).itemsize):
        expected = f"a multiple of {count} {np.dtype(dtype).name} (one a box)"
        raise DataError(f"{where}: column {column!r}: expected {expected}, found {len(data)} bytes")
    array: np.ndarray = np.frombuffer(data, dtype).reshape(count, -1)
    if dtype is np.float32 and (other := _other_floats(array)):
        guess = f"what looks like {other}; write it as float32"
        raise DataError(f"{where}: column {column!r}: expected float32, found {guess}")
    return array


_ENOUGH = 1024  # numbers that tell of which floats they are
_LARGE = 1e10  # no feature is as large; a word of a float64 often is


def _other_floats(array: np.ndarray) -> str:
    """Float type of an array that is not float32: only the width tells it, twice or half.

    The low halves of float64 are any float32, also huge ones, or all zero where their numbers were float16. The low
    halves of float32 are any float16, NaN among a thousand; those of numbers that were float16 once have 8 values.
    """
    if array.shape[1] % 2 == 0 and array.size >= 64:
        low, wide = array[:, ::2], array.view(np.float64)
        odd = not (np.abs(low) < _LARGE).mean() > 0.9 or (not low.any() and array.any())
        if odd and (np.abs(wide) < _LARGE).all():
            return "float64"
    low = array.view(np.float16)[:, ::2]
    if low.size >= _ENOUGH and np.isfinite(low).all() and len(np.unique(low)) > 32:
        return "float16"
    return ""


def recognise(place: Place) -> Iterator[Recognised]:
    """TSV files of these columns."""
    files = [file for file in place.of(".tsv") if _is_known(file)]
    if files:

        def read(reading: Any) -> Iterator[Record]:
            for name, line in islice(_lines(files[0]), SAMPLE):
                yield parse(line.read(), f"{line.path}, image {name!r}", line.columns, reading.form)

        contents = f"regions by line in {', '.join(file.name for file in files)}"
        yield Recognised(contents, "from_bottom_up", {"bottom_up": listed(files)}, read=read)


def _is_known(path: Path) -> bool:
    """Whether the first line is a header of COLUMNS, or has as many cells and numbers where they belong."""
    with path.open("rb") as file:
        line = file.readline(_LONG * 100)
    names = _words(line[:_LONG])
    if {"boxes", "features"} <= set(names):
        return True
    return len(names) in map(len, COLUMNS) and all(name.isdecimal() for name in names[1:3])
