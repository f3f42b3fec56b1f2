"""The pickles inside a file of `torch.save`, loaded without running anything that they name.

A pickle is a small program that may call any function by its name. Here its opcodes are looked through before one is
carried out, and of all names only those in ALLOWED are known; they stand for objects that can do nothing.
"""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import reprlib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

# What torch.save writes with pickle protocols 2 to 5; not those that make classes by other ways than the names below,
# and none that could take more memory than the file.
_WRITTEN = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
)
MAX_TUPLES = 20_000
"""Tuples in one pickle, four for each tensor: a key of a million tuples in one another ends Python without a word."""
_OPCODES = frozenset(_WRITTEN.split())


class Storage(NamedTuple):
    """Where a tensor's numbers lie: the name of their type in DTYPES, the key in the file and how many they are."""

    kind: str
    key: str
    size: int


class Tensor(NamedTuple):
    """A tensor that is still in the file; offset and strides are in elements of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# Objects without attributes: a pickle can set attributes of whatever it has in hand.
class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        return Tensor(storage, offset, shape, strides)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): types.SimpleNamespace,
    ("torch._utils", "_rebuild_tensor"): _RebuildTensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
} | {("torch", kind): kind for kind in DTYPES}
"""All that a pickle may name, and what it gets instead."""


class Unpickler:
    """Loads one object after the other from `stream`; `storages` are those named so far. path: for messages."""

    def __init__(self, path: Path, stream: io.BytesIO):
        self._path, self._stream = path, stream
        self.storages: dict[str, Storage] = {}

    def next(self) -> Any:
        """The next object. Raises ValueError for one that is cut off, or names or does what is not known here."""
        start = self._stream.tell()
        try:
            self._look_through()
            end = self._stream.tell()
            self._stream.seek(start)
            found = _Restricted(io.BytesIO(self._stream.read(end - start)), self.storages).load()
        except _FAULTS as error:
            # Whatever the bytes are, only these can come of them.
            raise ValueError(f"{self._path}: not a checkpoint that can be read safely: {error}") from None
        self._stream.seek(end)
        return found

    def _look_through(self) -> None:
        tuples = 0
        for number, (opcode, value, _) in enumerate(pickletools.genops(self._stream)):
            if opcode.name not in _OPCODES:
                raise pickle.UnpicklingError(
                    f"its pickle has the opcode {opcode.name}, which torch.save does not write"
                )
            if opcode.name in ("BINPUT", "LONG_BINPUT") and int(value or 0) > number:
                raise pickle.UnpicklingError("its pickle asks for more memory than it has objects")
            tuples += opcode.name.startswith("TUPLE")
            if tuples > MAX_TUPLES:
                raise pickle.UnpicklingError(f"its pickle has more than {MAX_TUPLES} tuples")


_FAULTS = (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError)


class _Restricted(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, storages: dict[str, Storage]):
        super().__init__(stream)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded") from None

    def persistent_load(self, pid: Any) -> Storage:
        # The last of six is a view on another storage, which no torch has written since 0.4.
        match pid:
            case ("storage", str(kind), str(key), str(), int(size)) if kind in DTYPES and size >= 0:
                storage = Storage(kind, key, size)
            case ("storage", str(kind), str(key), str(), int(size), None) if kind in DTYPES and size >= 0:
                storage = Storage(kind, key, size)
            case _:
                raise pickle.UnpicklingError(f"a storage is described by {reprlib.repr(pid)}")
        if self._storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"storage {key!r} is described in two ways")
        return storage
