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
MAX_OPCODES = 2_000_000
"""Opcodes of one pickle, some 60 for each tensor; a second for each million."""
MAX_TUPLES = 20_000
"""Tuples in one pickle, four for each tensor: a key of a million tuples in one another ends Python without a word."""
MAX_HASHED = 1_000_000
"""Objects that are looked at to hash the keys of one pickle. Sixty tuples that each hold the one before twice are a key
of 2^60."""
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


class _OrderedDict:
    __slots__ = ()

    def __call__(self, items: Any = ()) -> collections.OrderedDict[str, Any]:
        pairs = list(items)  # Python 2 wrote them as an argument, Python 3 puts them in one by one
        if not all(isinstance(pair, list | tuple) and pair and isinstance(pair[0], str) for pair in pairs):
            raise pickle.UnpicklingError("an OrderedDict is made of something else than names and values")
        return collections.OrderedDict(pairs)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _OrderedDict(),
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
        tuples = hashed = 0
        sizes = _Sizes()
        for number, (opcode, value, _) in enumerate(pickletools.genops(self._stream)):
            if opcode.name not in _OPCODES:
                raise pickle.UnpicklingError(
                    f"its pickle has the opcode {opcode.name}, which torch.save does not write"
                )
            if opcode.name in ("BINPUT", "LONG_BINPUT") and int(value or 0) > number:
                raise pickle.UnpicklingError("its pickle asks for more memory than it has objects")
            tuples += opcode.name.startswith("TUPLE")
            hashed += sizes.step(opcode.name, value)
            for what, found, most in (
                ("opcodes", number, MAX_OPCODES),
                ("tuples", tuples, MAX_TUPLES),
                ("objects in its keys", hashed, MAX_HASHED),
            ):
                if found > most:
                    raise pickle.UnpicklingError(f"its pickle has more than {most} {what}")


class _Sizes:
    """Does what opcodes do, with the size of each object in its place: how many are met when it is hashed.

    A list or a dictionary has size 1, as it has no hash. Raises IndexError or KeyError where an unpickler fails.
    """

    def __init__(self) -> None:
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[int, int] = {}

    def step(self, name: str, value: Any) -> int:
        """One opcode with its argument; -> the size of what is hashed by it."""
        stack = self._stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[value] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[value])
            case "TUPLE":
                stack.append(1 + sum(self._to_mark()))
            case "APPENDS":
                self._to_mark()
            case "SETITEMS":
                return sum(size for size in self._to_mark()[::2] if size > 1)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(1 + sum(stack.pop() for _ in range(int(name[-1]))))
            case "APPEND" | "BUILD":
                stack.pop()
            case "SETITEM":
                stack.pop()
                return stack.pop()
            case "REDUCE" | "NEWOBJ":
                size = stack.pop()
                stack[-1] = 1 + size
            case "BINPERSID":
                stack[-1] = 1
            case "STACK_GLOBAL":
                stack.pop()
                stack[-1] = 1
            case _:
                stack.append(1)
        return 0

    def _to_mark(self) -> list[int]:
        """Takes what lies above the last mark off the stack."""
        start = self._marks.pop()
        above = self._stack[start:]
        del self._stack[start:]
        return above


_FAULTS = (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, OverflowError)


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
