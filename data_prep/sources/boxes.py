"""Boxes of other tools as the schema has them, x1 y1 x2 y2 in shares of the image, and the sizes that this needs."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from data_prep.files import check_file, data_errors, read_json, text_lines
from data_prep.names import Names
from data_prep.notes import note
from data_prep.rows import IMAGES
from data_prep.schema import DataError, refuse
from shnet_jax.untrusted import parse_json

Form = Literal["pixels", "pixels_xywh", "shares", "shares_xywh", "none"]
FORMS: tuple[Form, ...] = get_args(Form)
"""Corners (x1 y1 x2 y2) or x, y, width and height, in pixels or in shares of the image; none: boxes are left out."""
MAX_SIDE = 2**24
"""Pixels of a side; float32 counts up to there."""
WIDTHS = ("image_w", "img_w", "width", "widths", "w")
HEIGHTS = ("image_h", "img_h", "height", "heights", "h")

Size = tuple[int, int]  # width, height


def shares(boxes: np.ndarray, size: Size | None, form: Form, where: str) -> np.ndarray:
    """Boxes [K, 4] as x1 y1 x2 y2 in 0..1, float32.

    size: width and height in pixels; shares need none. Corners that lie at most a pixel outside of the image are moved
    to its border: detectors round, and count the last pixel as W - 1 or W.

    Raises DataError naming `where` and the flag to give when the numbers are not what `form` says.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        turned = " (--layout=chw for [4, K])" if boxes.ndim == 2 and len(boxes) == 4 else ""
        raise DataError(f"{where}: expected boxes [K, 4], found {list(boxes.shape)}{turned}", field="boxes")
    boxes = boxes.astype(np.float64)
    if not np.isfinite(boxes).all():
        raise DataError(f"{where}: expected finite boxes, found {boxes[~np.isfinite(boxes).all(1)][0].tolist()}")
    if form.endswith("_xywh"):
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    slack = 1e-3
    if form.startswith("pixels"):
        if size is None:
            raise DataError(
                f"{where}: expected the image's size for boxes in pixels, found none; --sizes=FILE gives it, "
                "--boxes=shares says that they are in 0..1, --boxes=none leaves them out",
                field="boxes",
            )
        if boxes.max(initial=0) <= 1 and (boxes[:, 2:] > boxes[:, :2]).all(1).any():  # all in one pixel
            raise DataError(
                f"{where}: expected boxes in pixels of an image of {size[0]} x {size[1]}, found none beyond "
                f"{boxes.max(initial=0):g}; --boxes=shares says that they are in 0..1 already",
                field="boxes",
            )
        boxes = boxes / np.tile(size, 2)
        slack = 1 / min(size) + 1e-3
    _check(boxes, slack, form, size, where)
    if boxes.min(initial=0) < -1e-3 or boxes.max(initial=1) > 1 + 1e-3:
        note("boxes that end up to a pixel outside of their image are moved to its border", where)
    return np.clip(boxes, 0, 1).astype(np.float32)


def _check(boxes: np.ndarray, slack: float, form: Form, size: Size | None, where: str) -> None:
    unit, image = ("shares", "the image") if size is None else ("pixels", f"an image of {size[0]} x {size[1]}")
    swapped = (boxes[:, :2] > boxes[:, 2:]).any(1)
    if swapped.any():
        row = int(np.argmax(swapped))
        hint = "" if form.endswith("_xywh") else f"; --boxes={form}_xywh says that the last two are width and height"
        raise DataError(
            f"{where}: expected x1 <= x2 and y1 <= y2, found box {row} the other way round{hint}", field="boxes"
        )
    outside = ((boxes < -slack) | (boxes > 1 + slack)).any(1)
    if outside.any():
        row = int(np.argmax(outside))
        corners = (boxes[row] * (np.tile(size, 2) if size else 1)).round(3).tolist()
        hint = "; --boxes=pixels says that they are in pixels" if size is None else ""
        if size and (boxes * np.tile(size, 2) <= np.tile(size[::-1], 2) + 1).all():
            hint = "; are width and height exchanged?"
        raise DataError(
            f"{where}: expected boxes in {unit} of {image}, found {corners} as box {row}{hint}", field="boxes"
        )


def size(width: Any, height: Any, where: str) -> Size:
    """Width and height in pixels of numbers, texts or arrays of one number. Raises DataError naming `where`."""
    sides = []
    for value in (width, height):
        try:
            number = float(np.asarray(value).reshape(-1)[0]) if np.size(value) == 1 else np.nan
        except (TypeError, ValueError):
            number = np.nan
        if not (1 <= number <= MAX_SIDE and number == int(number)):
            raise DataError(f"{where}: expected whole pixels as width and height, found {width!r:.40} x {height!r:.40}")
        sides.append(int(number))
    return sides[0], sides[1]


class Sizes:
    """Width and height of images, by their names or numbers, from a file.

    Read are COCO's JSON (`images`), a list of such entries (Visual Genome's image_data.json), an object of
    name: [width, height] or name: {"width": ..., "height": ...}, CSV or TSV with a header, and SPLIT.hw.tsv.
    """

    def __init__(self, path: Path):
        check_file(path)
        self._path = path
        self._sizes: Names[Size] = Names(path)
        entries = self._json() if path.suffix.lower() == ".json" else self._table()
        seen: dict[str, Size] = {}
        for names, width, height in entries:
            sides = size(width, height, f"{path}: image {names[0]!r:.80}")
            for name in names:
                if seen.setdefault(name, sides) != sides:
                    raise DataError(f"{path}: image {name!r:.80}: expected one size, found {seen[name]} and {sides}")
                if seen[name] is sides:
                    self._sizes.add(name, sides)
        refuse(not len(self._sizes), path, "width and height of each image", "none")

    def find(self, image_id: str) -> Size | None:
        """Width and height of an image; None when the file does not know it."""
        return self._sizes.find(image_id)

    def _json(self) -> Iterator[tuple[list[str], Any, Any]]:
        content = read_json(self._path)
        if isinstance(content, dict) and isinstance(content.get("images"), list):
            content = content["images"]
        if isinstance(content, dict):
            for name, value in content.items():
                pair = value if isinstance(value, list) and len(value) == 2 else self._pair(value)
                yield [name], *pair
        elif isinstance(content, list):
            for entry in content:
                pair = self._pair(entry)
                names = [str(entry[key]) for key in ("file_name", "filename", "image_id", "id") if key in entry]
                if not names:
                    raise DataError(f"{self._path}: expected file_name, image_id or id, found {', '.join(entry):.200}")
                yield names, *pair
        else:
            raise DataError(f"{self._path}: expected a list or an object of sizes, found {type(content).__name__}")

    def _pair(self, entry: Any) -> tuple[Any, Any]:
        if not isinstance(entry, Mapping):
            raise DataError(f"{self._path}: expected width and height of each image, found {entry!r:.80}")
        sides = [next((entry[key] for key in keys if key in entry), None) for keys in (WIDTHS, HEIGHTS)]
        if None in sides:
            raise DataError(f"{self._path}: expected the keys width and height, found {', '.join(entry):.200}")
        return sides[0], sides[1]

    def _benchmark(self, lines: Iterable[str]) -> Iterator[tuple[list[str], Any, Any]]:
        """The lines of SPLIT.hw.tsv of microsoft/scene_graph_benchmark: name, [{"height": ..., "width": ...}]."""
        for number, line in enumerate(lines, 1):
            name, _, cell = line.partition("\t")
            with data_errors():
                entries = parse_json(cell, f"{self._path} line {number}")
            if not isinstance(entries, list) or len(entries) != 1:
                raise DataError(f"{self._path} line {number}: expected a list of one size, found {cell.strip()!r:.80}")
            yield [name.strip()], *self._pair(entries[0])

    def _table(self) -> Iterator[tuple[list[str], Any, Any]]:
        first = next(text_lines(self._path), "")
        delimiter = "\t" if "\t" in first else ","
        if first.partition("\t")[2].lstrip().startswith("[{"):
            yield from self._benchmark(text_lines(self._path))
            return
        rows = csv.DictReader(text_lines(self._path), delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            for row in rows:
                entry = {str(key).strip().lower(): value for key, value in row.items()}
                name = next((entry[key] for key in (*IMAGES, "id") if entry.get(key)), None)
                if name is None:
                    raise DataError(f"{self._path}: expected a column image or id, found {', '.join(entry):.200}")
                yield [name.strip()], *self._pair(entry)
        except csv.Error as error:
            raise DataError(f"{self._path}: expected a table in UTF-8 with a header: {error}") from None
