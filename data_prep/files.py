"""Reads the plain files that importers share: arrays and lines of text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.schema import DataError, is_text, refuse
from shnet_jax import untrusted
from shnet_jax.retrieve import tensors


def open_array(path: Path) -> np.ndarray:
    """The array of a .npy file, or the only tensor of a .safetensors file, memory-mapped.

    Raises DataError for anything else, and for a file that is cut off.
    """
    with data_errors():
        if path.suffix != ".safetensors":
            return untrusted.open_npy(path)
        untrusted.check_kind(path)
        arrays = tensors.open_mapped(path)
    refuse(len(arrays) != 1, path, "one tensor", ", ".join(sorted(arrays)) or "none")
    return next(iter(arrays.values()))


@contextmanager
def data_errors() -> Iterator[None]:
    """Faults of `untrusted` as DataError."""
    try:
        yield
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from error


def read_json(path: Path) -> Any:
    """Parsed contents of a JSON file. Raises DataError naming the file."""
    with data_errors():
        return untrusted.read_json(path)


def inside(folder: Path, name: str) -> Path:
    """The path of a file that has to lie in `folder`. Raises DataError for a name that leads out of it."""
    with data_errors():
        return untrusted.inside(folder, name)


def check_file(path: Path) -> None:
    """Raises DataError, which says what lies there, unless this is a file, and one that is no stand-in for another."""
    if not path.is_file():
        raise DataError(f"{path}: no such file{', it is a folder' if path.is_dir() else ''}")
    with data_errors():
        untrusted.check_kind(path)


def check_folder(folder: Path, *suffixes: str) -> None:
    """Raises DataError, which says what lies there, unless a file of one of these endings is in or below a folder."""
    wanted = " or ".join(f"ID{suffix}" for suffix in suffixes)
    if not folder.is_dir():
        fault = "no such folder, it is a file" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {fault}; expected one with {wanted} of each image")
    if not any(path.suffix in suffixes for path in folder.rglob("*")):
        kinds = Counter("folder" if path.is_dir() else path.suffix or "no ending" for path in folder.iterdir())
        listed = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common(4)) or "nothing"
        raise DataError(f"{folder}: expected {wanted} of each image, found {listed}; see: shnet data {folder}")


def read_label_map(path: Path, mode: str | None = None) -> np.ndarray:
    """The pixels of a PNG of labels as they are stored, [H, W] or [H, W, 3]; see `untrusted.read_label_map`.

    Raises DataError for a file that is none.
    """
    try:
        with data_errors():
            return np.asarray(untrusted.read_label_map(path, mode))
    except FileNotFoundError:
        raise DataError(f"{path}: expected a label map as PNG, found no such file") from None


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file in UTF-8, UTF-16 or UTF-32, with or without a mark, and without their ends: LF or CR LF.

    A CR elsewhere becomes a space; other separators (U+2028, U+0085, FF) are text. What is not UTF-8 becomes half of a
    surrogate pair, which text never has. Raises DataError for what is no text.
    """
    refuse(not path.is_file(), path, "this file", "none")
    with data_errors():
        untrusted.check_kind(path)
    with path.open("rb") as binary:
        start = binary.read(4)
    for magic, kind in ((b"\x1f\x8b", "a gzip file"), (b"PK\x03\x04", "a zip archive"), (b"PAR1", "a Parquet file")):
        refuse(start.startswith(magic), path, "text", kind)
    encoding = json.detect_encoding(start).replace("utf-8-sig", "utf-8")  # its mark is removed below
    try:
        with path.open(encoding=encoding, errors="surrogateescape", newline="\n") as file:
            for number, line in enumerate(file):
                if number == 0 and not line.endswith("\n") and "\r" in line.rstrip("\r"):
                    raise DataError(f"{path}: expected lines that end in LF or CR LF, found a file with CR alone")
                # Files put together by cat have marks inside.
                yield line.removesuffix("\n").removesuffix("\r").lstrip("\ufeff").replace("\r", " ")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected {encoding.upper()}, as it begins (cut off?): {error}") from None


def read_lines(path: Path, *, strict: bool = True) -> list[str]:
    """Stripped lines of a text file, see `text_lines`; an empty line, or one not in UTF-8, is an error with its number.

    Without `strict` such lines are kept: no record may have them, so each spoils its own alone.
    """
    lines = [line.strip() for line in text_lines(path)]
    while lines and lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines if strict else (), 1):
        if not line:
            raise DataError(f"{path} line {number}: expected text, found an empty line")
        if not line.isprintable() and not is_text(line):
            raise DataError(f"{path} line {number}: expected visible UTF-8 text, found {line[:80]!r}")
    return lines
