"""Reads the plain files that importers share: arrays and lines of text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.schema import DataError


def open_array(path: Path) -> np.ndarray:
    """The array of a .npy file, memory-mapped."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path}: expected a .npy array of numbers: {error}") from error


def read_lines(path: Path) -> list[str]:
    """Stripped lines of a UTF-8 text file; an empty line is an error that names its number."""
    if not path.is_file():
        raise DataError(f"{path}: expected this file, found none")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text: {error}") from error
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line:
            raise DataError(f"{path} line {number}: expected text, found an empty line")
    return lines
