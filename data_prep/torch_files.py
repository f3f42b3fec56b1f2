"""Dictionaries by image that `torch.save` wrote, as Oscar's retrieval has its features and captions."""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any

from data_prep.files import check_file, data_errors
from data_prep.schema import DataError
from shnet_jax.interop.torch_file import TorchFile, open_torch_file

_SCALE = 10
"""Times the usual bounds on a pickle: COCO has 123,287 images, each a tensor, and 616,767 captions."""


def open_by_image(path: Path) -> tuple[TorchFile, dict[Any, Any]]:
    """A file and its dictionary by image. Raises DataError for another value, or other keys."""
    check_file(path)
    with data_errors():
        file = open_torch_file(path, _SCALE)
    if not isinstance(file.content, dict) or not file.content or not all(type(k) in (int, str) for k in file.content):
        raise DataError(f"{path}: expected a dictionary by image, found {described(file.content)}")
    return file, file.content


_START = 2**16  # bytes of a pickle that are looked at
_SILENT = frozenset(["PROTO", "FRAME", "MARK", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"])


def peek(path: Path) -> str:
    """Kind of contents of a torch.save file, told from the first opcodes of its pickle without executing any.

    "tensor"; "tensors" or "captions" by image; "" for anything else.
    """
    codes: list[tuple[str, Any]] = []
    try:
        with path.open("rb") as file:
            stream = io.BytesIO(file.read(_START))
            if stream.getvalue().startswith(b"PK"):
                with zipfile.ZipFile(file) as archive:
                    name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                    with archive.open(name) as member:
                        stream = io.BytesIO(member.read(_START))
            else:
                for _ in range(3):  # magic number, version, machine
                    list(pickletools.genops(stream))
        for code, value, _ in pickletools.genops(stream):
            if code.name not in _SILENT:
                codes.append((code.name, value))
            if len(codes) == 3:
                break
    except (ValueError, LookupError, StopIteration, OSError, RuntimeError, zipfile.BadZipFile):
        pass  # cut off here, or another kind of file
    if codes and "_rebuild_tensor" in str(codes[0][1]):
        return "tensor"
    if len(codes) < 3 or codes[0][0] != "EMPTY_DICT" or str(codes[1][1]).endswith((".weight", ".bias")):
        return ""
    kind, value = codes[2]
    if kind == "GLOBAL":
        return "tensors" if "_rebuild_tensor" in value or "_reconstruct" in value else ""
    return "captions" if kind in ("EMPTY_LIST", "EMPTY_TUPLE", "BINUNICODE", "SHORT_BINUNICODE") else ""


def described(value: Any) -> str:
    """Short description of a value in a file, for an error message."""
    if not isinstance(value, dict) or not value:
        return f"an empty {type(value).__name__}" if value in ({}, [], ()) else type(value).__name__
    names = [str(key)[:40] for key in list(value)[:6]]
    return f"a dictionary of {', '.join(names)}{', ...' if len(value) > len(names) else ''}"
