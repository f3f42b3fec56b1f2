"""Files as torch.save writes them, opcode by opcode, so that a test can also write what torch never would."""

from __future__ import annotations

import argparse
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

KINDS = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
}


class Raw(bytes):
    """Opcodes to be put in as they are."""


def name(module: str, attribute: str) -> Raw:
    return Raw(f"c{module}\n{attribute}\n".encode())


class Writer:
    """Collects the storages of the arrays that it meets."""

    def __init__(self) -> None:
        self.data: list[bytes] = []

    def write(self, value: Any) -> bytes:
        match value:
            case Raw():
                return value
            case None:
                return b"N"
            case bool():
                return b"\x88" if value else b"\x89"
            case int():
                return b"\x8a\x08" + struct.pack("<q", value)
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
            case tuple():
                return b"(" + b"".join(map(self.write, value)) + b"t"
            case list():
                return b"](" + b"".join(map(self.write, value)) + b"e"
            case dict():
                start = name("collections", "OrderedDict") + b")R" if isinstance(value, OrderedDict) else b"}"
                return start + b"(" + b"".join(self.write(x) for item in value.items() for x in item) + b"u"
            case argparse.Namespace():
                return name("argparse", "Namespace") + b")\x81" + self.write(vars(value)) + b"b"
            case np.ndarray():
                return self.tensor(value)
        raise TypeError(f"not written here: {type(value)}")

    def tensor(self, array: np.ndarray, **changed: Any) -> Raw:
        """changed: kind, key, size, offset, shape, strides or storage that are not those of the array."""
        self.data.append(np.ascontiguousarray(array).tobytes())
        steps = tuple(s // array.itemsize for s in np.ascontiguousarray(array).strides)
        true = {"kind": KINDS[array.dtype], "key": str(len(self.data) - 1), "size": array.size, "offset": 0}
        t = true | {"shape": array.shape, "strides": steps[: array.ndim]} | changed
        storage = Raw(self.write(("storage", name("torch", t["kind"]), t["key"], "cuda:0", t["size"])) + b"Q")
        parts = (t.get("storage", storage), t["offset"], t["shape"], t["strides"], False, OrderedDict())
        return Raw(name("torch._utils", "_rebuild_tensor_v2") + self.write(parts) + b"R")


def attributes(module: str, attribute: str, items: dict, state: dict | None = None) -> Raw:
    """A dictionary of another class, as pickle writes it: items, then attributes, which EasyDict has once more."""
    writer = Writer()
    body = b"".join(writer.write(value) for item in items.items() for value in item)
    start = name(module, attribute) + b")\x81(" + body + b"u"
    return Raw(start + writer.write(items if state is None else state) + b"b")


def of_numpy(value: np.generic | np.ndarray) -> Raw:
    """A number or an array of NumPy as protocol 2 has it."""
    return Raw(pickle.dumps(value, 2)[2:-1])


def save(path: Path, value: Any, writer: Writer | None = None, root: str = "archive") -> Path:
    writer = writer or Writer()
    pickled = b"\x80\x02" + writer.write(value) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        for key, data in enumerate(writer.data):
            archive.writestr(f"{root}/data/{key}", data)
        archive.writestr(f"{root}/version", "3\n")
    return path
