"""Reads Parquet files row by row, in bounded memory; pyarrow is imported when there is one to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.files import data_errors
from data_prep.schema import DataError, refuse
from shnet_jax import untrusted

_BATCH = 256  # rows of texts and numbers


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; faults of the file inside of the block are DataErrors that name it."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install -e '.[parquet]'") from error
    refuse(not path.is_file(), path, "a Parquet file", "none")
    with data_errors():
        untrusted.check_kind(path)
    # One name: a reader may still be open when the process ends and the names of this module are gone.
    faults = (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError)
    try:
        # Without a buffer of its own a reader takes a whole column of a row group at once.
        with parquet.ParquetFile(path, buffer_size=1 << 16, pre_buffer=False) as file:
            yield file
    except faults as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected a Parquet file (cut off?): {' '.join(str(error).split())}") from error


def rows(path: Path, columns: Sequence[str], first: int = 0, batch: int = _BATCH) -> Iterator[dict[str, Any]]:
    """The rows from number `first` on, with some of their columns, as Python values."""
    with open_parquet(path) as file:
        groups: list[int] = []
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if groups or first < count:
                groups.append(group)
            else:
                first -= count
        if not groups:
            return
        at = 0
        batches = file.iter_batches(batch_size=batch, row_groups=groups, columns=list(columns), use_threads=False)
        for part in batches:
            if at + len(part) > first:
                yield from part.slice(max(0, first - at)).to_pylist()
            at += len(part)
