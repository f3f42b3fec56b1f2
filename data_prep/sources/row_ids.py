"""Ids of the rows of a table of features: from a file beside it, or from texts in an HDF5 file."""

from __future__ import annotations

import json
import pickletools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.files import open_array, read_json, read_lines
from data_prep.schema import DataError, refuse

MAX_BYTES = 2**26  # of a file of ids; that of COCO has 2 MB
FAULTS = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, MemoryError, OverflowError),
    *(EOFError, AttributeError, SystemError),
)
"""Exceptions that h5py and pickletools raise for damaged files."""

_PATIENCE = 300  # seconds; those of COCO take one
_READ_TEXTS = """
import json, sys
import h5py
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**32, resource.getrlimit(resource.RLIMIT_AS)[1]))
except (ImportError, OSError, ValueError):  # not on every system
    pass
path, name, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
texts, size = [], 0
with h5py.File(path, "r") as file:
    for start in range(0, len(file[name]), 256):
        part = [text.decode("utf-8", "replace") for text in file[name][start : start + 256].reshape(-1)]
        texts += part
        size += sum(map(len, part))
        if size > most:
            sys.exit(f"more than {most} letters")
print(json.dumps(texts))
"""


def texts_in_hdf5(path: Path, name: str) -> list[str]:
    """The texts of variable length in a data set, which is h5py's form of lists of str.

    HDF5 never comes back from some damaged heaps of such texts, and may take any memory for others: a process of its
    own reads them, which can be ended.
    """
    command = [sys.executable, "-P", "-c", _READ_TEXTS, str(path), name, str(MAX_BYTES)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=True)
        return list(json.loads(done.stdout))
    except subprocess.SubprocessError as error:
        lines = (getattr(error, "stderr", None) or b"").decode("utf-8", "replace").split("\n")
        reason = next((line for line in reversed(lines) if line), f"no answer in {_PATIENCE} seconds")
        raise DataError(
            f"{path}: {name}: expected texts, cannot read them (damaged?): {reason:.200}; --hdf5_ids=FILE gives the ids"
        ) from None


def read_index(path: Path, rows: int) -> dict[str, int]:
    """Image name -> row of 0..rows-1, from JSON, text or a pickle; see `hdf5.Hdf5Features`. Raises DataError."""
    if path.suffix.lower() == ".json":
        content = read_json(path)
    elif path.suffix.lower() in (".pkl", ".pickle"):
        content = _pickled(path)
    elif path.suffix.lower() == ".npy":
        array = open_array(path)
        if array.dtype.kind not in "iuS":
            raise DataError(f"{path}: expected ids as whole numbers or bytes, found {array.dtype}; write them as JSON")
        content = [n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in array.reshape(-1).tolist()]
    else:
        content = read_lines(path)
    if isinstance(content, list):
        refuse(not all(type(name) in (str, int) for name in content), path, "a list of ids", "something else in it")
        return numbered(list(map(str, content)), rows, str(path))
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a list of ids or an object id: row, found {type(content).__name__}")
    names: dict[int, str] = {}
    for name, row in content.items():
        if type(row) is not int or not 0 <= row < rows:
            raise DataError(f"{path}: image {name!r:.80}: expected a row in 0..{rows - 1}, found {row!r:.80}")
        if names.setdefault(row, str(name)) != str(name):
            raise DataError(f"{path}: row {row}: expected one image, found {names[row]!r:.80} and {name!r:.80}")
    return {name: row for row, name in names.items()}


def numbered(names: Sequence[str], rows: int, where: str) -> dict[str, int]:
    """Name -> row, of names in the order of the rows."""
    refuse(len(names) != rows, where, f"{rows} ids, one a row of the features", len(names))
    numbered: dict[str, int] = {}
    for row, name in enumerate(names):
        if numbered.setdefault(name, row) != row:
            raise DataError(f"{where}: id {name!r:.80}: expected it once, found it in rows {numbered[name]} and {row}")
    return numbered


_MAKERS = {"DICT": dict, "EMPTY_DICT": dict, "LIST": list, "EMPTY_LIST": list}
_VALUES = frozenset(
    [
        *("INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    ]
)
_OTHERS = frozenset(
    [
        *("PROTO", "FRAME", "MARK", "STOP", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
        *("SETITEM", "SETITEMS", "APPEND", "APPENDS"),
    ]
)


def _pickled(path: Path) -> dict[Any, Any] | list[Any]:
    """A pickled dictionary or list of texts and whole numbers, from its opcodes alone: none is carried out."""
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path}: expected a pickle of ids of at most {MAX_BYTES} bytes, found none")
    values, makers = [], []
    try:
        for opcode, value, _ in pickletools.genops(path.read_bytes()):
            if opcode.name in _VALUES:
                values.append(value)
            elif opcode.name in _MAKERS:
                makers.append(_MAKERS[opcode.name])
            elif opcode.name not in _OTHERS:
                raise ValueError(f"it has the opcode {opcode.name}")
        if len(makers) != 1 or (makers[0] is dict and len(values) % 2):
            raise ValueError(f"it holds {len(makers)} lists and dictionaries")
    except FAULTS as error:
        raise DataError(
            f"{path}: expected a pickled dictionary id: row of texts and whole numbers, nothing else is read: {error}; "
            "write it as JSON and give --hdf5_ids=FILE.json"
        ) from None
    return dict(zip(values[::2], values[1::2], strict=True)) if makers[0] is dict else values
