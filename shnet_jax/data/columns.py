"""Columns: vectors of a split as memory-mapped .npy files beside its records, a row an image or a caption.

FIELD_SPLIT-NNNNN.npy holds consecutive rows of one field, [rows, ...] in C order; bfloat16 stands there as uint16, as
.npy has no such dtype. A record takes some 50 microseconds to decode, a row of a column the time to copy it, and a
batch is gathered at once. Reading is by row numbers; nothing read stays in memory.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shnet_jax.data import cache
from shnet_jax.data.errors import DataError
from shnet_jax.data.schema import COLUMNS, dtype_of
from shnet_jax.untrusted import MAX_IMAGE_BYTES

SHARD_BYTES = 1 << 30
"""Maximal bytes of a file, unless a single row is larger."""
_HEADER = "vectors as data_prep writes them"


def column_file(field: str, split: str, shard: int) -> str:
    """Name of a file of a column."""
    return f"{field}_{split}-{shard:05d}.npy"


def rows_per_shard(row_bytes: int) -> int:
    """Rows of every file of a column but the last."""
    return max(1, SHARD_BYTES // row_bytes)


def _stored(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.uint16) if dtype.name == "bfloat16" else dtype


class ColumnWriter:
    """Appends rows to the files of one column of a split; holds nothing."""

    def __init__(self, folder: Path, field: str, split: str):
        self._folder, self._field, self._split = folder, field, split
        self._file: BinaryIO | None = None
        self._shard, self._rows = 0, 0  # of the open file
        self._like: np.ndarray | None = None

    def add(self, rows: np.ndarray) -> None:
        """Appends rows [n, ...], all of one shape and dtype."""
        rows = np.ascontiguousarray(rows)
        self._like = rows[:0]
        per_shard = rows_per_shard(max(1, rows[:1].nbytes))
        while len(rows):
            if self._file is None:
                self._open()
            assert self._file is not None
            part, rows = rows[: per_shard - self._rows], rows[per_shard - self._rows :]
            self._file.write(part.view(_stored(part.dtype)).tobytes())
            self._rows += len(part)
            if self._rows == per_shard:
                self.close()

    def close(self) -> None:
        """Completes the file that is open: its header says how many rows it has."""
        if self._file is not None:
            self._file.seek(0)
            self._head(self._rows)  # NumPy leaves room for any number of rows
            self._file.close()
            self._file, self._shard, self._rows = None, self._shard + 1, 0

    def _open(self) -> None:
        self._file = (self._folder / column_file(self._field, self._split, self._shard)).open("w+b")
        self._head(0)

    def _head(self, rows: int) -> None:
        assert self._like is not None and self._file is not None
        descr = np.lib.format.dtype_to_descr(_stored(self._like.dtype))
        header = {"descr": descr, "fortran_order": False, "shape": (rows, *self._like.shape[1:])}
        np.lib.format.write_array_header_1_0(self._file, header)


@dataclass(frozen=True)
class Column:
    """One column of a split, opened when rows are read.

    rows: how many it has to have. shape, dtype: of a row.
    """

    folder: Path
    field: str
    split: str
    rows: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.rows

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def _maps(self) -> Sequence[tuple[mmap.mmap, np.ndarray]] | cache.Shards[tuple[mmap.mmap, np.ndarray]]:
        per_shard = rows_per_shard(self._row_bytes)
        counts = [min(per_shard, self.rows - start) for start in range(0, self.rows, per_shard)]
        if cache.is_cached(self.folder):
            paths = [self.folder / column_file(self.field, self.split, shard) for shard in range(len(counts))]
            return cache.Shards(paths, lambda shard, _: self._map(shard, counts[shard]))
        return [self._map(shard, count) for shard, count in enumerate(counts)]

    def _map(self, shard: int, rows: int) -> tuple[mmap.mmap, np.ndarray]:
        path = self.folder / column_file(self.field, self.split, shard)
        wanted = (rows, *self.shape), _stored(self.dtype)
        try:
            with path.open("rb") as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError("another version of the format")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                start = file.tell()
                if (shape, dtype) != wanted or fortran:
                    raise ValueError(f"{dtype} {list(shape)}")
                if path.stat().st_size != start + rows * self._row_bytes:
                    raise ValueError(f"{path.stat().st_size} bytes; was it copied whole?")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: expected {_HEADER}, {wanted[1]} {list(wanted[0])}, found: {error}; copy the file again, or "
                "import the set again",
                file=path.name,
            ) from None
        array = np.frombuffer(mapped, wanted[1], offset=start).reshape(wanted[0])
        return mapped, array

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Copies of rows [n] by number, [n, ...]; files are read in order."""
        rows = np.asarray(rows, np.int64)
        order = np.argsort(rows, kind="stable")
        per_shard, maps = rows_per_shard(self._row_bytes), self._maps  # opening a file compares it with the shape
        out = np.empty((len(rows), *self.shape), _stored(self.dtype))
        bounds = np.searchsorted(rows[order], np.arange(len(maps) + 1) * per_shard)
        for shard in range(len(maps)):
            place = order[bounds[shard] : bounds[shard + 1]]
            if len(place):
                mapped, array = maps[shard]
                out[place] = array[rows[place] - shard * per_shard]
                mapped.madvise(mmap.MADV_DONTNEED)  # otherwise all pages read would count as memory of this process
        return out.view(self.dtype)

    def block(self, start: int, stop: int) -> np.ndarray:
        """Copies of consecutive rows, [stop - start, ...]."""
        return self.take(np.arange(start, stop))


def column_description(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Shape and dtype of a row of each column, as the metadata of a data set keep them; arrays: rows [n, ...]."""
    return {name: {"shape": list(rows.shape[1:]), "dtype": rows.dtype.name} for name, rows in arrays.items()}


def parse_description(value: Any, where: object) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of a row of each column, from metadata. Raises DataError for a malformed description."""
    columns = {}
    for name, entry in (value if isinstance(value, dict) else {"": value}).items():
        match entry:
            case {"shape": list(shape), "dtype": str(dtype)} if (
                name in COLUMNS
                and all(type(size) is int and size > 0 for size in shape)
                and dtype in ("float16", "bfloat16", "float32", "bool")
                and math.prod(shape) * dtype_of(dtype).itemsize <= MAX_IMAGE_BYTES
            ):
                columns[name] = tuple(shape), dtype_of(dtype)
            case _:
                raise DataError(
                    f"{where}: columns: expected shape and dtype of {' or '.join(COLUMNS)}, a row of at most "
                    f"{MAX_IMAGE_BYTES} bytes, found {name!r:.80}: {entry!r:.200}"
                )
    return columns
