"""Photographs and captions in Parquet files, as on the Hugging Face Hub and by img2dataset's `parquet` format."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from data_prep import parquet, rows
from data_prep.extract.images import BrokenImage, ByName, broken_images
from data_prep.rows import Row
from data_prep.schema import DataError, is_text
from shnet_jax import untrusted

PICTURES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
_BATCH = 8  # rows with photographs that are held at once
_NEAR = 256  # rows that are passed over rather than begun anew


class _Columns(NamedTuple):
    """The columns of a file: of the bytes of a picture, of its path or None, of names, and of what `rows` reads."""

    data: str
    path: str | None
    name: str | None
    texts: tuple[str, ...]


class Tables:
    """The photographs of Parquet files, by the names in a column, in `image.path`, or by their row."""

    def __init__(self, paths: Sequence[Path], root: Path):
        """root: of the files' own names. Raises DataError for files that have no column of pictures or are damaged."""
        self._root, self._paths = root, list(paths)
        self._columns = [_columns(path) for path in self._paths]
        self._places: ByName[tuple[int, int]] = ByName(root)  # file and row, the first of a name that comes again
        self._again: dict[tuple[int, int], tuple[int, int]] = {}  # file and row of the others, and of the first
        self._lock = threading.Lock()
        self._reader: tuple[int, int, Iterator[dict[str, Any]]] | None = None  # file, next row
        for number, _ in enumerate(self._paths):
            for row, (file, _) in enumerate(self._named(number, ())):
                if (first := self._places.add(file, (number, row))) != (number, row):
                    self._again[number, row] = first

    def _named(self, number: int, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and values of each row of a file."""
        path, known = self._paths[number], self._columns[number]
        wanted = known.name or known.path
        # A row without any column to read is still a row.
        chosen = dict.fromkeys([*([wanted] if wanted else []), *columns]) or {known.data: None}
        for row, values in enumerate(parquet.rows(path, list(chosen))):
            file: Any = values.get(known.name) if known.name else None
            if known.path and not known.name:
                file = (values[known.path.partition(".")[0]] or {}).get("path")
            file = str(file) if type(file) is int else file
            if wanted is None or (file is None and not known.name):
                file = f"{path.relative_to(self._root).with_suffix('') if path != self._root else path.stem}-{row}"
            if not is_text(file):
                raise DataError(f"{path} row {row}: {wanted!r}: expected the name of an image, found {file!r:.200}")
            yield file, values

    def place(self, file: str) -> str:
        """Location of a photograph; see `images.Photographs`."""
        entry = self._places.find(file)
        return f"{self._root}/{file}" if entry is None else f"{self._paths[entry[0]]} row {entry[1]}/{file}"

    def load(self, file: str) -> Image.Image:
        """Decoded photograph; see `images.Photographs`."""
        entry, place = self._places.find(file), self.place(file)
        if entry is None:
            raise BrokenImage(f"{place}: no such row")
        data = self._data(*entry)
        if not data:
            raise BrokenImage(f"{place}: no bytes of a picture, only its path or nothing")
        if len(data) > untrusted.MAX_PICTURE_BYTES:
            raise BrokenImage(f"{place}: {len(data)} bytes, more than {untrusted.MAX_PICTURE_BYTES}")
        with broken_images():
            return untrusted.parse_picture(data, place)

    def _data(self, number: int, row: int) -> bytes | None:
        """The bytes in a row. Rows are read in order, so one that lies before the last begins anew."""
        with self._lock:
            column = self._columns[number].data
            if self._reader is None or self._reader[0] != number or not 0 <= row - self._reader[1] < _NEAR:
                self._reader = (number, row, parquet.rows(self._paths[number], [column], row, _BATCH))
            _, at, values = self._reader
            cells = next(itertools.islice(values, row - at, None), None)
            if cells is None:
                raise DataError(
                    f"{self._paths[number]} row {row}: {column!r}: expected a picture, found the column's end"
                )
            self._reader = (number, row + 1, values)
        return _bytes_in(cells, column)

    def _check_repeated(self) -> None:
        """Raises DataError where rows of one name have different pictures. Reads them only where a name comes again."""
        digests: dict[tuple[int, int], bytes] = {}
        shared = {*self._again, *self._again.values()}
        for number in sorted({number for number, _ in shared}):
            path, column = self._paths[number], self._columns[number].data
            for row, values in enumerate(parquet.rows(path, [column], 0, _BATCH)):
                if (number, row) in shared and (data := _bytes_in(values, column)):
                    first, digest = self._again.get((number, row), (number, row)), hashlib.sha256(data).digest()
                    if digests.setdefault(first, digest) != digest:
                        raise DataError(
                            f"{path} row {row}: {column!r}: expected the picture of {self._paths[first[0]]} row "
                            f"{first[1]}, as both have one name, found another; give each picture a name in a column "
                            f"{' or '.join(rows.KEYS[1:4])}"
                        )

    def rows(self, split: str | None) -> Iterator[Row]:
        """Captions beside the photographs. Raises DataError also where rows of one name have different pictures."""
        for number, (path, known) in enumerate(zip(self._paths, self._columns, strict=True)):
            if not rows.columns(known.texts).captions:
                with parquet.open_parquet(path) as file:
                    names = ", ".join(file.schema_arrow.names)
                wanted = " or ".join(rows.CAPTIONS)
                raise DataError(f"{path}: expected a column {wanted}, found {names}; give --captions")
            other = split or rows.split_of_name(path, self._root)
            for count, (image, values) in enumerate(self._named(number, known.texts)):
                row = rows.parse(values, f"{path} row {count}", image)
                yield row if row.split else row._replace(split=other)
        self._check_repeated()  # last, as it may take long


def _bytes_in(values: dict[str, Any], column: str) -> bytes | None:
    name, _, inner = column.partition(".")
    return (values[name] or {}).get(inner) if inner else values[name]


def holds(path: Path) -> tuple[str, ...] | None:
    """The columns beside the pictures that a file says captions, numbers and splits in; None without pictures."""
    try:
        return _columns(path).texts
    except DataError:
        return None


def _columns(path: Path) -> _Columns:
    with parquet.open_parquet(path) as file:
        kinds = {field.name: field.type for field in file.schema_arrow}
    paths = {name: _bytes_of(name, kind) for name, kind in kinds.items()}
    pictures = [name for name, data in paths.items() if data]
    picture = next((name for name in PICTURES if name in pictures), pictures[0] if len(pictures) == 1 else None)
    if picture is None:
        raise DataError(f"{path}: expected a column of pictures (image, jpg, ...), found {', '.join(kinds)}")
    data = paths[picture]
    has_path = data != picture and any(field.name == "path" for field in kinds[picture])
    known = rows.columns(tuple(name for name in kinds if name not in pictures), rows.KEYS)
    return _Columns(
        data,
        f"{picture}.path" if has_path else None,
        known.image,
        tuple(name for name in (*known.captions, known.numbers, known.split) if name),
    )


def _bytes_of(name: str, kind: Any) -> str:
    """The path of the bytes in a column, "" when it has none: binary, or the Hub's struct of `bytes` and `path`."""
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind):
        return name
    is_image = types.is_struct(kind) and any(field.name == "bytes" for field in kind)
    return f"{name}.bytes" if is_image else ""
