"""checksums.json: the SHA-256 of every file of a data set, so that damaged files are recognised."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from shnet_jax.data.errors import DataError
from shnet_jax.untrusted import read_object

CHECKSUMS = "checksums.json"
ADVICE = (
    f"; the file, or its line of {CHECKSUMS}, is damaged or was changed: copy the data set again, or import it again; "
    f"if the change was meant, remove {CHECKSUMS}"
)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checksums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 as written; {} for a data set without checksums.json (of another tool).

    Raises DataError when the file is damaged.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        sums = read_object(path)
    except ValueError as error:
        raise DataError(f"{error}{ADVICE}", file=path.name) from None
    if not all(isinstance(value, str) for value in sums.values()):
        raise DataError(f"{path}: expected an object of SHA-256 by file name, found something else{ADVICE}")
    return sums


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Compares small files of a data set with their checksums, where it has any.

    Raises DataError naming the first that is missing or differs.
    """
    sums = read_checksums(folder)
    for name in names:
        if name not in sums:
            continue
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: expected this file, which {CHECKSUMS} lists, found none{ADVICE}")
        digest = sha256(folder / name)
        if digest != sums[name]:
            raise DataError(f"{folder / name}: expected sha256 {sums[name]}, found {digest}{ADVICE}", file=name)
