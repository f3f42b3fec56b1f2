"""Restricted reader of pickles: numbers, texts, containers, tensors and NumPy arrays, without running what they name.

A pickle is a program for a stack machine that can call any function. `Unpickler` is such a machine in Python with an
allow-list of opcodes and of names; each name stands for a function of this file. Nothing is imported, no attribute is
set, and no more is allocated than a small multiple of the bytes read. Such pickles lie in the files of `torch.save` and
in LMDB values.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import pickletools
import re
import reprlib
import types
from collections.abc import Callable
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
MAX_STEPS = 1_000_000
"""Most steps of one pickle, which take some seconds and less than 0.5 GB. Each opcode is one (some 60 for each tensor),
and so is each item and each 64 bytes of the arguments of a call: what is written once can be copied many times."""
MAX_AXES = 64
"""Most axes of an array, as in NumPy 2."""

_ENCODING = "utf-8", "surrogateescape"  # of BINSTRING, by which Python 2 writes texts and the bytes of arrays
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUSHED = (  # opcodes that push their argument as it is; BINUNICODE8 and BINBYTES8 are for more than 4 GB
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BYTEARRAY8"),
)
_FAULTS = (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, OverflowError)


class _Brief(reprlib.Repr):
    """Short text of a value in time that does not depend on the value: the class of what reprlib would ask for all."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2

    def repr_instance(self, x: Any, level: int) -> str:
        return repr(x) if isinstance(x, float | bool | None) else f"<{type(x).__name__}>"


brief = _Brief().repr


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


@dataclasses.dataclass(eq=False)
class Array:
    """NumPy array that a pickle first creates and then fills. value: read-only; None until filled."""

    value: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class Dtype:
    """NumPy dtype by its code ('f4') and byte order."""

    code: Any
    order: str = "="


def array_of(code: Any, shape: Any, data: Any, fortran: bool = False) -> np.ndarray:
    """Read-only array of `shape` in `data`. code: as `dtype.str` has it, '<f4'.

    Raises ValueError for all but numbers (no Python objects, records, texts) and bytes that are more or less.
    """
    if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
        raise ValueError(f"an array of {brief(code)}, but only integers, floats and booleans are loaded")
    dtype = np.dtype(code)
    if not is_shape(shape) or not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
        size = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise ValueError(f"an array of {dtype} {brief(shape)} has {size}")
    flat = np.frombuffer(data, dtype) if data else np.zeros(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def is_shape(shape: Any) -> bool:
    """Whether `shape` can be the shape of an array: at most MAX_AXES whole numbers of at least 0."""
    return isinstance(shape, tuple | list) and len(shape) <= MAX_AXES and all(type(n) is int and n >= 0 for n in shape)


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
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}
        self._left = self._most = self._scale * MAX_STEPS
        try:
            for opcode, argument, _ in pickletools.genops(self._stream):
                self._spend(1)
                if opcode.name in _PUSHED:
                    self._stack.append(argument)
                else:
                    self._execute(opcode.name, argument)
            return self._stack.pop()
        except _FAULTS as error:  # all that malformed bytes can raise
            raise ValueError(f"{self._where}: not a {self._what} that can be read safely: {error}") from None

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise pickle.UnpicklingError(f"its pickle takes more than {self._most} steps")

    def _spend_on(self, *arguments: Any) -> None:
        """Counts what a call or a key may copy or look at: the items of containers and the bytes of texts."""
        for argument in arguments:
            if isinstance(argument, tuple | list | dict):
                self._spend(len(argument))
            elif isinstance(argument, str | bytes | bytearray):
                self._spend(len(argument) // 64)

    def _execute(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "BINPUT" | "LONG_BINPUT":
                if argument > self._stream.tell():
                    raise pickle.UnpicklingError("its pickle asks for more memory than it has objects")
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "MARK":
                self._outer.append(stack)
                self._stack = []
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(values)))
            case "TUPLE":
                self._to_mark().append(tuple(stack))
            case "APPEND":
                value = stack.pop()
                _extend(stack[-1], [value])
            case "APPENDS":
                _extend(self._to_mark()[-1], stack)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._update(stack[-1], [key], [value])
            case "SETITEMS":
                self._update(self._to_mark()[-1], stack[::2], stack[1::2])
            case "GLOBAL":
                stack.append(_allowed(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_allowed(module, attribute))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(self._call(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                self._build(stack[-1], state)
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument.encode("latin-1").decode(*_ENCODING))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _ if name not in ("PROTO", "FRAME", "STOP"):
                raise pickle.UnpicklingError(
                    f"its pickle has the opcode {name}, which torch.save and pickle protocols 2 to 5 do not write for "
                    "numbers, texts and arrays"
                )

    def _to_mark(self) -> list[Any]:
        """Makes the stack below the last mark the stack again, and returns it."""
        self._stack = self._outer.pop()
        return self._stack

    def _call(self, function: Any, arguments: Any) -> Any:
        if not callable(function) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError(f"it calls {brief(function)}")
        self._spend_on(arguments, *arguments)
        return function(*arguments)

    def _update(self, target: Any, keys: list[Any], values: list[Any]) -> None:
        if not isinstance(target, dict):
            raise pickle.UnpicklingError(f"it sets items of an object of the kind {type(target).__name__}")
        for key, value in zip(keys, values, strict=True):
            self._spend_on(key)
            if not all(map(_is_key, key if type(key) is tuple else (key,))):
                raise pickle.UnpicklingError(
                    f"a key of a dictionary is {brief(key)}; expected a text, a number or a tuple of them"
                )
            target[key] = value

    def _build(self, target: Any, state: Any) -> None:
        self._spend_on(state, *(state if isinstance(state, tuple) else ()))
        match target, state:
            case dict(), _:
                pass  # attributes of an EasyDict repeat its items, torch's version metadata of a state dict has no use
            case types.SimpleNamespace(), dict() if all(type(n) is str and not n.startswith("__") for n in state):
                vars(target).update(state)
            case Dtype(), (3, "<" | ">" | "=" | "|" as order, None, None, None, int(), int(), int()):
                target.order = order
            case Array(), (1, tuple(shape), Dtype(code=str(code), order=order), bool(fortran), bytes() | str() as data):
                target.value = array_of(order + code, shape, _to_bytes(data), fortran)
            case ((Dtype() | Array() | types.SimpleNamespace()), _):
                kind = {Array: "an array", Dtype: "a dtype"}.get(type(target), "a Namespace")
                raise pickle.UnpicklingError(f"{kind} is described by {brief(state)}")
            case _:
                raise pickle.UnpicklingError("it changes what a name stands for")

    def _storage(self, description: Any) -> Storage:
        match description:  # the last of six is a view on another storage, which no torch has written since 0.4
            case ("storage", str(kind), str(key), str(), int(size), *view) if (
                kind in DTYPES and size >= 0 and view in ([], [None])
            ):
                storage = Storage(kind, key, size)
            case _:
                raise pickle.UnpicklingError(f"a storage is described by {brief(description)}")
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError(f"storage {brief(key)} is described in two ways")
        return storage


def loads(data: bytes, where: object, what: str) -> Any:
    """Loads the object in `data`. Raises ValueError as `Unpickler.next`, also for trailing bytes."""
    stream = io.BytesIO(data)
    value = Unpickler(where, stream, what).next()
    if rest := len(data) - stream.tell():
        raise ValueError(f"{where}: not a {what} that can be read safely: {rest} bytes behind its pickle")
    return value


def _extend(target: Any, values: list[Any]) -> None:
    if not isinstance(target, list):
        raise pickle.UnpicklingError(f"it appends to an object of the kind {type(target).__name__}")
    target.extend(values)


def _is_key(value: Any) -> bool:
    """Whether a value is hashed in constant time, and differently from others: an int is hashed modulo 2^61 - 1."""
    return type(value) in (str, bytes, float, bool, type(None)) or (type(value) is int and abs(value) < 2**61 - 1)


def _to_bytes(data: bytes | str) -> bytes:
    """Converts the text of a BINSTRING to bytes."""
    return data.encode(*_ENCODING) if isinstance(data, str) else data


# --------------------------------------------------------------------------------- what the names of a pickle stand for


def _ordered_dict(items: Any = ()) -> dict[str, Any]:
    """Makes an ordered dictionary: Python 2 wrote the items as an argument, Python 3 puts them in one by one."""
    if not isinstance(items, list | tuple) or not all(
        isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str) for item in items
    ):
        raise pickle.UnpicklingError("an OrderedDict is made of something else than names and values")
    return dict(items)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    return Tensor(storage, offset, shape, strides)


def _device(*parts: Any) -> str:
    """Name of a device: cuda:0."""
    if not all(type(part) in (str, int) for part in parts):
        raise pickle.UnpicklingError(f"a device is described by {brief(parts)}")
    return ":".join(map(str, parts))


def _empty_array(kind: Any, *_: Any) -> Array:
    if kind != "ndarray":
        raise pickle.UnpicklingError(f"an array is of the class {brief(kind)}")
    return Array()


def _array_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    """Builds an array of numbers as protocol 5 writes it."""
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, Dtype) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array has no bytes")
    return Array(array_of(dtype.order + dtype.code, shape, bytes(data), order == "F"))


def _scalar(dtype: Any, data: Any) -> Any:
    """Converts a NumPy scalar, number or text, to the Python value."""
    if not isinstance(dtype, Dtype) or not isinstance(dtype.code, str) or not isinstance(data, bytes | str):
        raise pickle.UnpicklingError(f"a number is described by {brief((dtype, data))}")
    data = _to_bytes(data)
    if dtype.code == f"U{len(data) // 4}":
        return data.decode("utf-32-be" if dtype.order == ">" else "utf-32-le").rstrip("\0")
    return array_of(dtype.order + dtype.code, (), data).item()


def _latin_1(text: Any = "", codec: Any = "latin1") -> bytes:
    """Stands for `codecs.encode` and `bytes`, by which protocol 2 writes bytes: a text in Latin-1."""
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes are written in another way than as Latin-1")
    return text.encode("latin-1")


_ALLOWED: dict[str, Callable[..., Any] | str] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda *factory: {},
    **dict.fromkeys(("easydict.EasyDict", "yacs.config.CfgNode", "addict.addict.Dict"), lambda: {}),
    "argparse.Namespace": lambda: types.SimpleNamespace(),
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "_codecs.encode": _latin_1,
    "__builtin__.bytes": _latin_1,
    "numpy.dtype": lambda code, *_: Dtype(code),
    **{f"numpy.{core}.multiarray._reconstruct": _empty_array for core in ("core", "_core")},  # of NumPy 1 and 2
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array_from_buffer for core in ("core", "_core")},
    # Only passed as arguments.
    "numpy.ndarray": "ndarray",
    **{f"torch.{kind}": kind for kind in DTYPES},
    **{f"{module}.{kind}": kind for module in ("__builtin__", "builtins") for kind in ("dict", "float", "int", "list")},
}


def _allowed(module: Any, attribute: Any) -> Callable[..., Any] | str:
    """Function or text that stands for a name in a pickle. Raises UnpicklingError for a name that is not allowed."""
    name = f"{module}.{attribute}" if isinstance(module, str) and isinstance(attribute, str) else ""
    if name not in _ALLOWED:
        raise pickle.UnpicklingError(
            f"it names {ascii(name)[1:-1]:.200}, which is not loaded; save it again as tensors, arrays, numbers, "
            "texts, lists and dictionaries"
        )
    return _ALLOWED[name]
