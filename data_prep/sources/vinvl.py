"""Regions from the TSV files of VinVL and Oscar (github.com/microsoft/Oscar, microsoft/scene_graph_benchmark).

Three kinds of lines: `features.tsv` has id, number of boxes and features in base64; SPLIT.feature.tsv has id and JSON
{"num_boxes", "features"}; predictions.tsv of the benchmark has id and JSON {"objects": [{"rect", "feature"}]}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from data_prep.files import data_errors
from data_prep.names import Absent
from data_prep.places import SAMPLE, Place, Recognised, listed
from data_prep.schema import DataError, Record, refuse
from data_prep.sources.bottom_up import BOM, check_lines, decode, first_whole, lines_by_image
from data_prep.sources.detections import Detections, Reading, described
from shnet_jax.untrusted import MAX_IMAGE_BYTES, parse_json, read_object

Geometry = Literal["drop", "keep"]
GEOMETRIES: tuple[Geometry, ...] = get_args(Geometry)
"""Whether the last six of VinVL's 2,054 numbers stay in the features; the boxes are made of them in both cases."""
_WIDTH, _PLACE = 2054, 6
_NUMBERED = ("features.tsv", "predictions.tsv")  # whose lines imageid2idx.json numbers


def split_geometry(features: np.ndarray, geometry: Geometry | None, where: str) -> dict[str, np.ndarray]:
    """Features [K, 2054] as `features` [K, 2048] and `norm_bb` [K, 4]; of another width they are all features.

    The last six numbers are x1 y1 x2 y2 and width and height of a region, in shares of the image. geometry: "drop", as
    is the default, takes them out of the features, "keep" leaves them there.

    Raises DataError when these are not such numbers, or there is no geometry to drop or keep.
    """
    if features.ndim != 2 or features.shape[1] != _WIDTH:
        if geometry is not None:
            raise DataError(
                f"{where}: expected [K, {_WIDTH}], whose last {_PLACE} numbers are a region's place, found "
                f"{list(features.shape)}; leave --geometry out"
            )
        return {"features": features}
    place = features[:, -_PLACE:].astype(np.float64)
    sides = np.sort(place[:, 2:4] - place[:, :2], axis=1)
    if not (np.abs(sides - np.sort(place[:, 4:], axis=1)) < 5e-3).all():  # of float16, or of width - 1
        raise DataError(
            f"{where}: expected x1 y1 x2 y2 width height in shares of the image as the last {_PLACE} of {_WIDTH} "
            f"numbers, found {place[0].round(3).tolist()}"
        )
    return {"features": features if geometry == "keep" else features[:, :-_PLACE], "norm_bb": place[:, :4]}


class _Place(NamedTuple):
    """Position of the line of an image; name: the image's, as the index has it."""

    path: Path
    offset: int
    name: str


class Rows:
    """The lines of TSV files by the image in their first cell.

    Where lines begin stands in NAME.lineidx, and which is whose in imageid2idx.json beside features.tsv; without these
    the file is read once.
    """

    def __init__(self, paths: Sequence[Path]):
        places = ((name, _Place(path, offset, name)) for path in paths for name, offset in _offsets(path))
        self._places = lines_by_image(", ".join(map(str, paths)), places)

    def need(self, image_id: str) -> Iterator[tuple[list[bytes], str]]:
        """Cells of each line of an image, and where it is. Raises Absent, DataError for a line of another image."""
        for path, offset, name in self._places.need(image_id, "its line"):
            where = f"{path}, byte {offset}"
            with path.open("rb") as file:
                file.seek(offset)
                cells = file.readline().rstrip(b"\r\n").split(b"\t")
            if cells[0].removeprefix(BOM).strip() != name.encode("utf-8", "replace"):
                raise DataError(
                    f"{where}: expected the line of {name!r}, found that of {cells[0][:80]!r}; the .lineidx or "
                    "imageid2idx.json beside it is of another file, remove it"
                )
            yield cells, where


def _offsets(path: Path) -> Iterator[tuple[str, int]]:
    """Image and first byte of each line."""
    check_lines(path)
    index, ids = path.with_suffix(".lineidx"), path.with_name("imageid2idx.json")
    with path.open("rb") as file:
        if not index.is_file():
            offset = 0
            for line in file:
                if line.strip():
                    yield _name(line[:_NAME]), offset
                offset += len(line)
            return
        offsets = _line_index(index, path)
        if path.name in _NUMBERED and ids.is_file():
            with data_errors():
                rows = read_object(ids)
            for name, row in rows.items():
                if type(row) is not int or not 0 <= row < len(offsets):
                    raise DataError(
                        f"{ids}: image {name!r:.80}: expected a line 0..{len(offsets) - 1}, found {row!r:.40}"
                    )
                yield name, offsets[row]
            return
        for offset in offsets:
            file.seek(offset)
            yield _name(file.readline(_NAME)), offset


_NAME = 300  # bytes of a line in which the image's name ends


def _name(line: bytes) -> str:
    return line.partition(b"\t")[0].removeprefix(BOM).decode("utf-8", "replace").strip()


def _line_index(index: Path, path: Path) -> list[int]:
    """The numbers in a .lineidx. Raises DataError when they are not places in the file."""
    try:
        offsets = [int(line) for line in index.read_text("ascii").split("\n") if line.strip()]
    except ValueError as error:
        raise DataError(f"{index}: expected the first byte of each line as numbers: {error}") from None
    size = path.stat().st_size
    if not offsets or min(offsets) < 0 or max(offsets) >= size:
        farthest = f"{max(offsets)}" if offsets else "none"
        raise DataError(
            f"{index}: expected places below {size}, the bytes of {path.name}, found {farthest}: one is cut off, or "
            "they do not belong together"
        )
    with path.open("rb") as file:
        for offset in filter(None, offsets):
            file.seek(offset - 1)
            if file.read(1) != b"\n":
                raise DataError(f"{index}: expected the first byte of a line of {path.name}, found {offset}; remove it")
        file.seek(max(offsets))
        file.readline()
        if file.readline().strip():
            raise DataError(f"{index}: expected all lines of {path.name}, found the last at {max(offsets)}; remove it")
    return offsets


@dataclass(frozen=True)
class Vinvl(Detections):
    """regions and boxes from TSV files, with `labels` also box_scores and box_classes.

    paths: files, or folders with features.tsv. geometry: see `split_geometry`. labels: the file of that detector's
    objects, predictions.tsv or SPLIT.label.tsv: its classes become numbers in the order of their names, which are kept
    in the metadata.
    """

    paths: Sequence[Path]
    reading: Reading
    geometry: Geometry | None = None
    labels: Path | None = None

    def __post_init__(self) -> None:
        """Raises DataError when a file is missing, or an index beside it is of another file."""
        _ = self._rows, self._objects

    @property
    def where(self) -> str:
        """The files, for error messages."""
        return ", ".join(map(str, self.paths))

    @property
    def files(self) -> Mapping[str, str]:
        """Files that each field comes from."""
        labels = dict.fromkeys(("box_classes", "box_scores"), str(self.labels)) if self.labels else {}
        return {**super().files, **labels}

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The names of the detector's classes."""
        return {"box_class_names": list(self._classes)} if self.labels else {}

    @cached_property
    def _rows(self) -> Rows:
        return Rows([path / "features.tsv" if path.is_dir() else path for path in self.paths])

    @cached_property
    def _objects(self) -> Rows | None:
        return Rows([self.labels]) if self.labels else None

    @cached_property
    def _classes(self) -> dict[str, int]:
        """Number of each class that the labels name."""
        assert self.labels is not None
        names: set[str] = set()
        with self.labels.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.labels} line {number}"
                names |= {
                    _class(entry, where)
                    for entry in _objects(_json_cell(line.rstrip(b"\r\n").split(b"\t"), where), where)
                }
        return {name: number for number, name in enumerate(sorted(names))}

    def read(self, image_id: str) -> Record:
        """regions [K, D], boxes [K, 4] in 0..1, box_scores [K], box_classes [K]."""
        lines = ((f"{row[1]} is taken, not the broken line", row) for row in self._rows.need(image_id))
        return first_whole(image_id, lines, lambda line: self._record(image_id, *line))

    def _record(self, image_id: str, cells: Sequence[bytes], where: str) -> Record:
        arrays = parse(cells, where, self.geometry)
        return self.reading.record(image_id, arrays | self._labels(image_id, arrays), where)

    def _labels(self, image_id: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Pixel boxes, scores and classes of an image's regions, whose place the features say too."""
        if self._objects is None:
            return {}
        try:
            cells, where = next(self._objects.need(image_id))
        except Absent as error:
            raise DataError(str(error)) from None  # the image is there, and has no labels
        content = _json_cell(cells, where)
        entries = _objects(content, where)
        labelled = _of_objects(content, where)
        place = arrays.get("norm_bb")
        if place is not None and "boxes" in labelled and labelled["boxes"].shape == place.shape:
            ends = labelled["boxes"][:, 2:].max(0) / place[:, 2:].max(
                0
            )  # the image's size, where the file does not say it
            sides = [labelled.get(side, end) for side, end in zip(("image_w", "image_h"), ends, strict=True)]
            if not (np.abs(labelled["boxes"] / np.array(sides * 2) - place) < 0.02).all():
                raise DataError(f"{where}: expected the objects of the features' regions, found boxes elsewhere")
        return labelled | {"objects_id": np.array([self._classes[_class(entry, where)] for entry in entries])}


def parse(cells: Sequence[bytes], where: str, geometry: Geometry | None) -> dict[str, np.ndarray]:
    """The arrays of a line by the names of `detections`. Raises DataError naming `where` and the column."""
    if len(cells) == 3:
        try:
            count = int(cells[1])
        except ValueError:
            raise DataError(f"{where}: expected the number of boxes in column 2, found {cells[1][:40]!r}") from None
        return split_geometry(_features(cells[2], count, where), geometry, where)
    if len(cells) != 2:
        hint = "; --bottom_up reads 6 or 10" if len(cells) in (6, 10) else ""
        raise DataError(
            f"{where}: expected id, number of boxes and features, or id and JSON, found {len(cells)} columns{hint}"
        )
    content = _json_cell(cells, where)
    if isinstance(content, dict) and "features" in content:
        cell, boxes = content["features"], content.get("num_boxes")
        boxes = int(boxes) if isinstance(boxes, str) and boxes.isdecimal() and len(boxes) < 10 else boxes
        if not isinstance(cell, str) or type(boxes) is not int:
            kinds = {name: type(value).__name__ for name, value in content.items()}
            raise DataError(f"{where}: expected num_boxes and features in base64, found {kinds!r:.200}")
        return split_geometry(_features(cell.encode("utf-8", "replace"), boxes, where), geometry, where)
    entries = _objects(content, where)
    rows = [row for entry in entries if isinstance(row := entry.get("feature"), str)]
    if not rows or len(rows) < len(entries):
        raise DataError(
            f"{where}: expected the key 'features', or 'feature' of each object, found "
            f"{described(entries[0]) if entries else 'no objects'}"
        )
    stacked = [decode(row.encode("utf-8", "replace"), np.float32, 1, where, "feature") for row in rows]
    if len({row.shape for row in stacked}) > 1:
        raise DataError(f"{where}: expected features of one width, found {sorted({row.size for row in stacked})}")
    return _of_objects(content, where) | split_geometry(np.concatenate(stacked), geometry, where)


def _features(cell: bytes, count: int, where: str) -> np.ndarray:
    refuse(count < 1, where, "boxes", count)
    return decode(cell, np.float32, count, where, "features")


def _json_cell(cells: Sequence[bytes], where: str) -> Any:
    """Parsed JSON of the second cell of a line."""
    refuse(len(cells) != 2, where, "id and JSON", f"{len(cells)} columns")
    with data_errors():
        return parse_json(cells[1], where)


def _objects(content: Any, where: str) -> list[dict[str, Any]]:
    """The objects of an image: a list, or `objects` in an object."""
    entries = content.get("objects") if isinstance(content, dict) else content
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        kind = described(content) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{where}: expected a list of objects, or {{'objects': [...]}}, found {kind}")
    return entries


def _class(entry: Mapping[str, Any], where: str) -> str:
    if not isinstance(name := entry.get("class"), str):
        raise DataError(f"{where}: expected the class of each object, found {name!r:.40}")
    return name


def _of_objects(content: Any, where: str) -> dict[str, np.ndarray]:
    """Pixel boxes, scores and the image's size, as far as objects have them."""
    entries = _objects(content, where)
    arrays: dict[str, np.ndarray] = {}
    for name, ours, shape in (("rect", "boxes", (len(entries), 4)), ("conf", "conf", (len(entries),))):
        values = [entry.get(name) for entry in entries]
        if any(value is not None for value in values):
            arrays[ours] = _numbers(values, shape, f"{where}: {name!r}")
    for side in ("image_w", "image_h") if isinstance(content, dict) else ():
        if side in content:
            arrays[side] = _numbers(content[side], (), f"{where}: {side!r}")
    return arrays


def _numbers(values: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    try:
        array = np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        array = None
    if array is None or array.shape != shape:
        raise DataError(f"{where}: expected numbers {list(shape)}, found {values!r:.80}")
    return array


def recognise(place: Place) -> Iterator[Recognised]:
    """TSV files of these lines; where there is one, with the file of its labels."""
    files, labels = [], []
    for file in place.of(".tsv"):
        for cells in _first(file, 1):
            try:
                if len(cells) == 2 and all({"class", "rect"} <= set(o) for o in _objects(_json_cell(cells, ""), "")):
                    labels.append(file)
            except DataError:
                pass  # no objects, which features need not have
            try:
                parse(cells, "", None)
            except DataError:
                continue  # another kind of TSV
            files.append(file)
    if files:
        flags = {"vinvl": listed(files)}
        if len(files) == len(labels) == 1:
            flags["vinvl_labels"] = str(labels[0])

        def read(reading: Reading) -> Iterator[Record]:
            for cells in _first(files[0], SAMPLE):
                where = f"{files[0]}, image {cells[0].decode('utf-8', 'replace')!r}"
                yield reading.record("", parse(cells, where, None), where)

        yield Recognised(f"VinVL's lines in {', '.join(file.name for file in files)}", "from_vinvl", flags, read=read)


def _first(path: Path, count: int) -> Iterator[list[bytes]]:
    """The cells of the first lines."""
    with path.open("rb") as file:
        for line in islice(iter(lambda: file.readline(MAX_IMAGE_BYTES), b""), count):
            yield line.removeprefix(BOM).rstrip(b"\r\n").split(b"\t")
