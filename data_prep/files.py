"""Reads the plain files that importers share: arrays and lines of text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.schema import DataError, is_text


def open_array(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path}: expected a .npy array of numbers: {error}") from error


def read_lines(path: Path, *, strict: bool = True) -> list[str]:
    """Stripped lines of a UTF-8 text file; an empty line, or one of other bytes, is an error that names its number.

    Without `strict` such lines are kept: no record may have them, so each spoils its own alone.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected this file, found none")
    # what is not UTF-8 becomes half of a surrogate pair, which text never has
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")]
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines if strict else (), 1):
        if not line:
            raise DataError(f"{path} line {number}: expected text, found an empty line")
        if not line.isprintable() and not is_text(line):
            raise DataError(f"{path} line {number}: expected UTF-8 text, found {line[:80]!r}")
    return lines
