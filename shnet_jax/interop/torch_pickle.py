"""Pickles of numbers, texts, tensors and NumPy arrays, loaded without running anything that they name.

A pickle is a small program that may call any function by its name. Here its opcodes are looked through before one is
carried out, and of all names only those in `_allowed` are known; they stand for objects that can do nothing. Such
pickles lie in the files of `torch.save` and in the values of LMDB files.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import re
import reprlib
import types
from collections.abc import Mapping
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

# What pickle protocols 2 to 5 write for such values; not those that make classes by other ways than the names below,
# and none that could take more memory than the file. BINSTRING is a text or the bytes of an array in Python 2.
_WRITTEN = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "BINBYTES SHORT_BINBYTES BYTEARRAY8 BINSTRING SHORT_BINSTRING "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
)
MAX_OPCODES = 1_000_000
"""Most opcodes of one pickle, some 60 for each tensor; they take a second and less than 0.5 GB."""
MAX_KEY = 1000
"""Most objects in one key: hashing a key of a million nested tuples crashes Python."""
MAX_LOOKED = 1_000_000
"""Most objects visited to hash keys or to pass arguments, and most that are copied. Sixty tuples that each
hold the one before twice are a key of 2^60, and a list that is written once can be an argument in every other byte."""
_OPCODES = frozenset(_WRITTEN.split())
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_BYTES = "utf-8", "surrogateescape"  # how a BINSTRING becomes a text that can be made bytes again


class Storage(NamedTuple):
    """Storage of a tensor: the name of its type in DTYPES, its key in the file and its number of elements."""

    kind: str
    key: str
    size: int


class Tensor(NamedTuple):
    """A tensor that is still in the file; offset and strides are in elements of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Fixed:
    """Base of the objects that names in a pickle stand for: a pickle cannot set their attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes what a name stands for")


class _RebuildTensor(_Fixed):
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        return Tensor(storage, offset, shape, strides)


class _RebuildParameter(_Fixed):
    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


class _StateDict(collections.OrderedDict[str, Any]):
    def __setstate__(self, state: Any) -> None:
        """Ignores torch's version metadata of a state dict."""


class Attributes(dict[str, Any]):
    """Dictionary whose items were attributes too, as those of EasyDict."""

    def __init__(self, *arguments: Any):
        if arguments:
            raise pickle.UnpicklingError("a dictionary is made of something else than its items")
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Ignores the attributes, which repeat the items or are internals of the class."""


def array_of(code: Any, shape: Any, data: Any, fortran: bool = False) -> np.ndarray:
    """Read-only array of `shape` in `data`. code: as `dtype.str` has it, '<f4'.

    Raises ValueError for all but numbers (no Python objects, records, texts) and bytes that are more or less.
    """
    if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
        raise ValueError(f"an array of {reprlib.repr(code)}, but only integers, floats and booleans are loaded")
    dtype = np.dtype(code)
    whole = isinstance(shape, tuple | list) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
        found = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise ValueError(f"an array of {dtype} {reprlib.repr(shape)} has {found}")
    flat = np.frombuffer(data, dtype) if data else np.zeros(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


class Dtype:
    """NumPy dtype by its code ('f4') and byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        match state:
            case (3, "<" | ">" | "=" | "|" as order, None, None, None, int(), int(), int()):
                self.order = order
            case _:  # records, subarrays, dates
                raise pickle.UnpicklingError(f"a dtype is described by {reprlib.repr(state)}")


class _Copies:
    """Budget of copies into new objects: the same few bytes can ask for a copy again and again."""

    def __init__(self, most: int, what: str) -> None:
        self._left, self._most, self._what = most, most, what

    def spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise pickle.UnpicklingError(f"it copies more than {self._most} {self._what}")


def _to_bytes(data: bytes | str, copies: _Copies) -> bytes:
    """Converts to bytes; a text is that of a BINSTRING."""
    if isinstance(data, bytes):
        return data
    copies.spend(len(data))
    return data.encode(*_BYTES)


class Array:
    """NumPy array that a pickle first creates and then fills. value: read-only; None until filled."""

    __slots__ = ("_copies", "value")

    def __init__(self, copies: _Copies):
        self._copies = copies
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        match state:
            case (1, tuple(shape), Dtype(code=str(code), order=order), bool(fortran), bytes() | str() as data):
                self.value = array_of(order + code, shape, _to_bytes(data, self._copies), fortran)
            case _:
                raise pickle.UnpicklingError(f"an array is described by {reprlib.repr(state)}")


class _MakeDtype(_Fixed):
    __slots__ = ()

    def __call__(self, code: Any, *_: Any) -> Dtype:
        return Dtype(code)


class _MakeArray(_Fixed):
    __slots__ = ("_copies",)

    def __init__(self, copies: _Copies):
        self._copies = copies

    def __call__(self, kind: Any, *_: Any) -> Array:
        if kind != "ndarray":
            raise pickle.UnpicklingError(f"an array is of the class {reprlib.repr(kind)}")
        return Array(self._copies)


class _Scalar(_Fixed):
    """Converts a NumPy scalar, number or text, to the Python value."""

    __slots__ = ("_copies",)

    def __init__(self, copies: _Copies):
        self._copies = copies

    def __call__(self, dtype: Any, data: Any) -> Any:
        if not isinstance(dtype, Dtype) or not isinstance(dtype.code, str) or not isinstance(data, bytes | str):
            raise pickle.UnpicklingError(f"a number is described by {reprlib.repr((dtype, data))}")
        data = _to_bytes(data, self._copies)
        if re.fullmatch(f"U{len(data) // 4}", dtype.code):
            self._copies.spend(len(data))
            return data.decode("utf-32-be" if dtype.order == ">" else "utf-32-le").rstrip("\0")
        return array_of(dtype.order + dtype.code, (), data).item()


class _Encode(_Fixed):
    """Stands for `codecs.encode` and `bytes`, by which protocol 2 writes bytes: a text in Latin-1."""

    __slots__ = ("_copies",)

    def __init__(self, copies: _Copies):
        self._copies = copies

    def __call__(self, text: Any = "", codec: Any = "latin1") -> bytes:
        if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("bytes are written in another way than as Latin-1")
        self._copies.spend(len(text))
        return text.encode("latin-1")


class _FromBuffer(_Fixed):
    """Builds an array of numbers as protocol 5 writes it."""

    __slots__ = ("_copies",)

    def __init__(self, copies: _Copies):
        self._copies = copies

    def __call__(self, data: Any, dtype: Any, shape: Any, order: Any) -> Array:
        array = Array(self._copies)
        if not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
            raise pickle.UnpicklingError("an array has no bytes")
        self._copies.spend(len(data))
        array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
        return array


class _Device(_Fixed):
    """Converts a device to its name: cuda:0."""

    __slots__ = ()

    def __call__(self, *parts: Any) -> str:
        if not all(type(part) in (str, int) for part in parts):
            raise pickle.UnpicklingError(f"a device is described by {reprlib.repr(parts)}")
        return ":".join(map(str, parts))


class _DefaultDict(_Fixed):
    __slots__ = ()

    def __call__(self, *_: Any) -> dict[Any, Any]:
        return {}


class _OrderedDict(_Fixed):
    __slots__ = ("_copies",)

    def __init__(self, copies: _Copies):
        self._copies = copies

    def __call__(self, items: Any = ()) -> _StateDict:
        # Python 2 wrote the items as an argument, Python 3 puts them in one by one.
        if not isinstance(items, list | tuple):
            raise pickle.UnpicklingError("an OrderedDict is made of something else than names and values")
        self._copies.spend(len(items))
        if not all(isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str) for item in items):
            raise pickle.UnpicklingError("an OrderedDict is made of something else than names and values")
        return _StateDict(items)


def _namespace(copies: _Copies) -> type[types.SimpleNamespace]:
    class Namespace(types.SimpleNamespace):
        def __setstate__(self, state: Any) -> None:
            if not isinstance(state, dict) or not all(type(n) is str and not n.startswith("__") for n in state):
                raise pickle.UnpicklingError("a Namespace is made of something else than names and values")
            copies.spend(len(state))
            vars(self).update(state)

    return Namespace


def _allowed(size: int) -> Mapping[tuple[str, str], Any]:
    """Allow-list for one pickle of `size` bytes: the names that it may use, and the objects that stand for them."""
    copies, in_bytes = _Copies(MAX_LOOKED, "objects"), _Copies(size, "bytes")
    encode = _Encode(in_bytes)
    return {
        ("collections", "OrderedDict"): _OrderedDict(copies),
        ("collections", "defaultdict"): _DefaultDict(),
        **{(module, name): name for module in ("__builtin__", "builtins") for name in ("dict", "float", "int", "list")},
        ("argparse", "Namespace"): _namespace(copies),
        **dict.fromkeys((("easydict", "EasyDict"), ("yacs.config", "CfgNode"), ("addict.addict", "Dict")), Attributes),
        ("torch", "device"): _Device(),
        ("torch._utils", "_rebuild_tensor"): _RebuildTensor(),
        ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
        ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
        **{("torch", kind): kind for kind in DTYPES},
        ("_codecs", "encode"): encode,
        ("__builtin__", "bytes"): encode,
        ("numpy", "ndarray"): "ndarray",
        ("numpy", "dtype"): _MakeDtype(),
        **dict.fromkeys(((f"numpy.{core}.multiarray", "_reconstruct") for core in _CORES), _MakeArray(in_bytes)),
        **dict.fromkeys(((f"numpy.{core}.multiarray", "scalar") for core in _CORES), _Scalar(in_bytes)),
        **dict.fromkeys(((f"numpy.{core}.numeric", "_frombuffer") for core in _CORES), _FromBuffer(in_bytes)),
    }


_CORES = ("core", "_core")  # of NumPy 1 and 2


class Unpickler:
    """Loads one object after the other from `stream`; `storages` are those named so far.

    where: of the stream, for messages. what: it should be, for messages. scale: times the usual bounds, for a stream of
    many objects.
    """

    def __init__(self, where: object, stream: io.BytesIO, what: str = "checkpoint", scale: int = 1):
        self._where, self._stream, self._what, self._scale = where, stream, what, scale
        self.storages: dict[str, Storage] = {}

    def next(self) -> Any:
        """Loads the next object. Raises ValueError for one that is cut off, or that uses an unknown name or opcode."""
        start = self._stream.tell()
        try:
            self._look_through()
            end = self._stream.tell()
            self._stream.seek(start)
            found = _Restricted(self._stream.read(end - start), self.storages).load()
        except _FAULTS as error:
            # Whatever the bytes are, only these can come of them.
            raise ValueError(f"{self._where}: not a {self._what} that can be read safely: {error}") from None
        self._stream.seek(end)
        return found

    def _look_through(self) -> None:
        looked = 0
        most_opcodes, most_looked = self._scale * MAX_OPCODES, self._scale * MAX_LOOKED
        sizes = _Sizes()
        for number, (opcode, value, _) in enumerate(pickletools.genops(self._stream)):
            if opcode.name not in _OPCODES:
                raise pickle.UnpicklingError(
                    f"its pickle has the opcode {opcode.name}, which torch.save and pickle protocols 2 to 5 do not "
                    "write for numbers, texts and arrays"
                )
            if opcode.name in ("BINPUT", "LONG_BINPUT") and int(value or 0) > number:
                raise pickle.UnpicklingError("its pickle asks for more memory than it has objects")
            looked += sizes.step(opcode.name, value)
            if number > most_opcodes:
                raise pickle.UnpicklingError(f"its pickle has more than {most_opcodes} opcodes")
            if looked > most_looked:
                raise pickle.UnpicklingError(
                    f"its pickle has more than {most_looked} objects in its keys and arguments"
                )
            if sizes.key > MAX_KEY:
                raise pickle.UnpicklingError(f"its pickle has more than {MAX_KEY} objects in a key")


def loads(data: bytes, where: object, what: str) -> Any:
    """Loads the object in `data`. Raises ValueError as `Unpickler.next`, also for trailing bytes."""
    stream = io.BytesIO(data)
    found = Unpickler(where, stream, what).next()
    if rest := len(data) - stream.tell():
        raise ValueError(f"{where}: not a {what} that can be read safely: {rest} bytes behind its pickle")
    return found


class _Sizes:
    """Does what opcodes do, with the size of each object in its place: how many are met when it is looked through.

    A list or a dictionary has size 1: it has no hash. Raises IndexError or KeyError where an unpickler fails.
    """

    def __init__(self) -> None:
        self.key = 0  # size of the largest key so far
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[int, int] = {}

    def step(self, name: str, value: Any) -> int:
        """Applies one opcode with its argument; returns the number of objects that it visits."""
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
                keys = [size for size in self._to_mark()[::2] if size > 1]
                self.key = max(self.key, *keys) if keys else self.key
                return sum(keys)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(1 + sum(stack.pop() for _ in range(int(name[-1]))))
            case "APPEND" | "BUILD":
                stack.pop()
            case "SETITEM":
                stack.pop()
                self.key = max(self.key, stack[-1])
                return stack.pop()
            case "REDUCE" | "NEWOBJ":
                size = stack.pop()
                stack[-1] = 1 + size
                return size
            case "BINPERSID":
                stack[-1] = 1
            case "STACK_GLOBAL":
                stack.pop()
                stack[-1] = 1
            case _:
                stack.append(1)
        return 0

    def _to_mark(self) -> list[int]:
        """Pops the objects above the last mark off the stack."""
        start = self._marks.pop()
        above = self._stack[start:]
        del self._stack[start:]
        return above


_FAULTS = (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, OverflowError)


class _Restricted(pickle.Unpickler):
    def __init__(self, data: bytes, storages: dict[str, Storage]):
        super().__init__(io.BytesIO(data), encoding=_BYTES[0], errors=_BYTES[1])
        self._storages, self._allowed = storages, _allowed(len(data))

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            needed = "save it again as tensors, arrays, numbers, texts, lists and dictionaries"
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded; {needed}") from None

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
