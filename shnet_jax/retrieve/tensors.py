"""Reads and writes safetensors files larger than memory, through a memory map.

The library's own writer takes whole arrays; here a file is laid out first and filled row by row. Any safetensors reader
opens the result. Layout: 8 bytes with the length of the header, the header (JSON, padded with spaces to 8 bytes), the
arrays one after the other, little endian.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

CODES = {
    "F32": np.dtype("<f4"),
    "BOOL": np.dtype(bool),
    "I64": np.dtype("<i8"),  # rows of a part
    "I8": np.dtype("i1"),  # codes of an index, as is U32
    "U32": np.dtype("<u4"),
    "F64": np.dtype("<f8"),  # of other tools, as are F16 and BF16
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: code for code, dtype in CODES.items()}
_LENGTH = 8


def create(path: Path, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, np.ndarray]:
    """Lays out a file of zeros, {name: (shape, dtype)}, of the types in CODES, and maps its arrays for writing."""
    header, offset = {}, 0
    for name, (shape, dtype) in arrays.items():
        size = int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": shape, "data_offsets": (offset, offset + size)}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little") + text)
        file.flush()
        # Really there: a full disk is an error here, and not a crash (SIGBUS) when the map is written to.
        os.posix_fallocate(file.fileno(), 0, _LENGTH + len(text) + offset)
    return _map(path, "r+")


def open_mapped(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, read-only and read when they are used. Raises ValueError for a file that is none."""
    return _map(path, "r")


def _map(path: Path, mode: Literal["r", "r+"]) -> dict[str, np.ndarray]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if not 0 < length <= size - _LENGTH:
            raise ValueError(f"{path}: no safetensors file, its header would have {length} of {size} bytes")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: no safetensors file, its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: no safetensors file, its header is no JSON object")
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(code), "shape": list(sides), "data_offsets": [int(start), int(end)]} if all(
                type(side) is int and side >= 0 for side in (*sides, start, end)
            ):
                dtype, shape = CODES.get(code), tuple(sides)
            case _:
                raise ValueError(f"{path}: no safetensors file, {name!r} is described by {entry!r:.200}")
        if dtype is None:
            raise ValueError(f"{path}: {name!r} is {code!r:.80}, expected {' or '.join(CODES)}")
        at = _LENGTH + length + start
        if end - start != math.prod(shape) * dtype.itemsize or _LENGTH + length + end > size:
            raise ValueError(f"{path}: {name!r} of shape {shape} does not fit into the file; was it copied whole?")
        arrays[name] = np.memmap(path, dtype, mode, at, shape) if end > start else np.zeros(shape, dtype)
    return arrays
