"""Files of `torch.save` without torch, and without running anything that a file names (`torch_pickle.py`).

A checkpoint is a pickle beside raw arrays, which stay in the file until one is asked for. Both formats are read: the
zip archive of torch 1.6 and later, and the stream of pickles before it (torch/serialization.py).
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from shnet_jax.interop.torch_pickle import DTYPES, Storage, Tensor, Unpickler, brief, is_shape
from shnet_jax.untrusted import check_kind

MAX_PICKLE = 32 * 2**20
"""Largest pickle in bytes, without the arrays; that of a BERT with its optimiser is below 1 MB."""
MAX_ENTRIES = 300_000
"""Most entries of the archive: one for each array and a few more."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class _Place(NamedTuple):
    """Bytes of a storage in the file; its CRC-32 where the file has one."""

    offset: int
    size: int
    crc: int | None


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """Opened file of torch.save: its content, with `Tensor` for each tensor, `Array` for each NumPy array.

    argparse's Namespace is a types.SimpleNamespace, EasyDict and its like a dict, a number of NumPy one of Python.
    """

    path: Path
    content: Any
    _places: Mapping[str, _Place]
    _checked: set[str] = dataclasses.field(default_factory=set)

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, "r")

    def state(self, value: Any, what: str) -> dict[str, Tensor]:
        """The value as a state dict. Raises ValueError, which names the value by `what`, if it is none."""
        if isinstance(value, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in value.items()):
            return value
        raise ValueError(f"{self.path}: {what} is not a dict of tensors by their names")

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Shape of a tensor, whose bytes are not read. Raises ValueError when it does not lie in its storage."""
        self._place(tensor)
        return tuple(tensor.shape)

    def _place(self, tensor: Tensor) -> _Place:
        """Place of the storage that a tensor lies in. Raises ValueError when it does not."""
        storage, offset, shape, strides = tensor
        if not isinstance(storage, Storage):
            raise ValueError(f"{self.path}: a tensor has no storage but {brief(storage)}")
        dtype, place = DTYPES[storage.kind], self._places.get(storage.key)
        if place is None or place.size != storage.size * dtype.itemsize:
            actual = "no such entry" if place is None else f"{place.size} bytes"
            raise ValueError(f"{self.path}: storage {storage.key!r} should hold {storage.size} x {dtype}; {actual}")
        valid = all(map(is_shape, ((offset,), shape, strides))) and len(shape) == len(strides)
        count = math.prod(shape) if valid else 0
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if valid else 0
        if not valid or count > storage.size or (count and last >= storage.size):
            raise ValueError(f"{self.path}: a tensor of shape {brief(shape)} does not lie in its storage {storage}")
        return place

    def array(self, tensor: Tensor) -> np.ndarray:
        """Array of a tensor: read-only, memory-mapped; its checksum is verified at the first use.

        Raises ValueError when the tensor does not lie in its storage or the bytes are not those that were saved.
        """
        place = self._place(tensor)
        storage, offset, shape, strides = tensor
        dtype = DTYPES[storage.kind]
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        raw = self._bytes[place.offset : place.offset + place.size]
        if storage.key not in self._checked:
            if place.crc is not None and zlib.crc32(raw.data) != place.crc:
                raise ValueError(f"{self.path}: storage {storage.key!r}: wrong checksum, the file is damaged")
            self._checked.add(storage.key)
        steps = [s * dtype.itemsize for s in strides]
        return np.ndarray(shape, dtype, raw, offset * dtype.itemsize, steps)


def open_torch_file(path: str | Path, scale: int = 1) -> TorchFile:
    """Opens a file of `torch.save`; tensors are read later. scale: factor on the bounds, for a file of many tensors.

    Raises FileNotFoundError, and ValueError for a file that is cut off, damaged, of another kind, or that names
    anything that `torch_pickle` does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    check_kind(path)
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_START))
        if start == _LEGACY_START:
            return _open_legacy(path, file, scale)
        if not start.startswith(b"PK\x03\x04"):
            contents = "a tar archive of torch 0.1" if _is_tar(file) else "no file of torch.save"
            raise ValueError(f"{path}: {contents}; expected its zip archive or its stream of pickles (cut off?)")
        try:
            with zipfile.ZipFile(file) as archive:
                return _open_zip(path, file, archive.infolist(), scale)
        # Of a version that Python does not know, or with names in no alphabet: damaged as well.
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a whole zip archive (cut off?): {error}") from None


def _is_tar(file: BinaryIO) -> bool:
    file.seek(257)
    return file.read(5) == b"ustar"


def _open_zip(path: Path, file: BinaryIO, entries: list[zipfile.ZipInfo], scale: int) -> TorchFile:
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"{path}: {len(entries)} entries, more than {MAX_ENTRIES}")
    size, places = path.stat().st_size, {}
    for entry in entries:
        name = entry.filename
        if name in places or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"{path}: entry {name!r}: a name that torch.save does not write, or twice the same")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise ValueError(f"{path}: entry {name!r} is compressed or encrypted; torch.save does neither")
        offset = _data_offset(path, file, entry)
        if offset + entry.file_size > size:
            raise ValueError(f"{path}: entry {name!r} ends behind the end of the file")
        places[name] = _Place(offset, entry.file_size, entry.CRC)
    roots = [name.removesuffix("/data.pkl") for name in places if name.endswith("/data.pkl")]
    if len(roots) != 1 or "/" in roots[0]:
        raise ValueError(f"{path}: a zip archive without NAME/data.pkl: not written by torch.save")
    root = roots[0]

    def read(name: str, most: int) -> bytes:
        place = places[f"{root}/{name}"]
        if place.size > most:
            raise ValueError(f"{path}: {name} has {place.size} bytes, more than {most}")
        file.seek(place.offset)
        data = file.read(place.size)
        if zlib.crc32(data) != place.crc:
            raise ValueError(f"{path}: {name}: wrong checksum, the file is damaged")
        return data

    if f"{root}/byteorder" in places and read("byteorder", 16) != b"little":
        raise ValueError(f"{path}: saved on a machine of the other byte order")
    unpickler = Unpickler(path, io.BytesIO(read("data.pkl", scale * MAX_PICKLE)), scale=scale)
    content = unpickler.next()
    prefix = f"{root}/data/"
    data = {name.removeprefix(prefix): place for name, place in places.items() if name.startswith(prefix)}
    return TorchFile(path, content, data)


def _data_offset(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Offset of an entry's bytes: behind its own header, whose size the directory does not tell."""
    file.seek(max(entry.header_offset, 0))  # negative where the directory is damaged
    header = file.read(30)
    if entry.header_offset < 0 or len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path}: entry {entry.filename!r} has no header; the file is damaged")
    name, extra = struct.unpack("<2H", header[26:])
    return entry.header_offset + 30 + name + extra


def _open_legacy(path: Path, file: BinaryIO, scale: int) -> TorchFile:
    """Opens the legacy format: five pickles (magic number, version, machine, content, keys), then the storages."""
    file.seek(0)
    stream = io.BytesIO(file.read(scale * MAX_PICKLE))
    unpickler = Unpickler(path, stream, scale=scale)
    magic, version, machine = unpickler.next(), unpickler.next(), unpickler.next()
    if magic != _LEGACY_MAGIC or version != 1001 or not isinstance(machine, dict) or not machine.get("little_endian"):
        raise ValueError(f"{path}: not of the format's version 1001, or saved on a machine of the other byte order")
    content, keys = unpickler.next(), unpickler.next()
    if not isinstance(keys, list) or any(key not in unpickler.storages for key in keys if isinstance(key, str)):
        raise ValueError(f"{path}: the list of storages names some that no tensor uses")
    size, at, places = path.stat().st_size, stream.tell(), {}
    for key in keys:
        storage = unpickler.storages.get(key) if isinstance(key, str) else None
        file.seek(at)
        count = file.read(8)
        if storage is None or len(count) < 8 or int.from_bytes(count, "little") != storage.size:
            raise ValueError(f"{path}: storage {brief(key)} is not where it should be; the file is cut off or damaged")
        places[key] = _Place(at + 8, storage.size * DTYPES[storage.kind].itemsize, None)
        at = places[key].offset + places[key].size
        if at > size:
            raise ValueError(f"{path}: storage {key!r} ends behind the end of the file (cut off?)")
    return TorchFile(path, content, places)
