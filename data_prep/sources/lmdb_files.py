"""Regions from LMDB files: those of UNITER (npz or msgpack values), of ViLBERT and of MMF (pickled dictionaries).

Keys are the names of images, values one record each (github.com/ChenRocks/UNITER, scripts/convert_imgdir.py;
facebookresearch/vilbert-multi-task, script/convert_to_lmdb.py; facebookresearch/mmf, tools/scripts/features).
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from data_prep.files import data_errors, read_json
from data_prep.names import Names
from data_prep.places import SAMPLE, Place, Recognised, missing
from data_prep.schema import DataError, Record, refuse
from data_prep.sources.bottom_up import decode
from data_prep.sources.detections import COUNTS, Detections, Reading, described, note_unread
from shnet_jax.interop import torch_pickle
from shnet_jax.untrusted import MAX_IMAGE_BYTES, check_kind, parse_npz

_LISTS = (b"keys", b"__keys__")  # the key of the list of keys
_MAGIC = 0xBEEFC0DE
_NBB = re.compile(r"(?:feat|nbb)_(th[^/]*?)(?:_compressed)?(?:\.json)?")
_ARRAYS = (
    *((name, name) for name in ("features", "norm_bb", "boxes", "bbox", "conf", "cls_prob")),
    ("objects_id", "objects"),
)
_SIZES = (("image_w", "image_w"), ("image_w", "image_width"), ("image_h", "image_h"), ("image_h", "image_height"))
_NPZ = ("features", "norm_bb", "conf")  # what is read; soft_labels, which are larger than the features, are not


@dataclass(frozen=True)
class Lmdb(Detections):
    """regions, boxes where the records have them, box_scores and box_classes, from one environment of LMDB.

    path: the folder with data.mdb, or the file.

    A damaged file can end the process in the C library: what its first pages say is checked, and its length, but not
    the inner pages.
    """

    path: Path
    reading: Reading

    def __post_init__(self) -> None:
        """Raises DataError when this is no such file, or nothing is in it."""
        refuse(not len(self._keys), self.path, "a record for each image", "none")

    @property
    def where(self) -> str:
        """The files, for error messages."""
        return str(self.path)

    @cached_property
    def _transaction(self) -> Any:
        """One for all reads; nothing is written and no lock is taken, so the folder may be read-only."""
        try:
            import lmdb
        except ImportError:
            raise DataError("reading LMDB needs lmdb: pip install -e '.[lmdb]'") from None
        _check_file(_data_file(self.path))
        try:
            env = lmdb.open(
                str(self.path), readonly=True, lock=False, readahead=False, create=False, subdir=self.path.is_dir()
            )
            return env.begin()
        except lmdb.Error as error:
            raise DataError(f"{self.path}: expected an LMDB file: {error}") from None

    @cached_property
    def _keys(self) -> Names[bytes]:
        """The key of each image, found by its name without .npz."""
        cursor = self._transaction.cursor()
        import lmdb

        names: Names[bytes] = Names(self.path)
        try:
            for key in cursor.iternext(keys=True, values=False):
                if key in _LISTS:
                    continue
                names.add(key.decode("utf-8", "replace").removesuffix(".npz"), key)
        except lmdb.Error as error:
            raise DataError(f"{self.path}: expected a whole LMDB file: {error}") from None
        return names

    @cached_property
    def _counts(self) -> Mapping[str, int]:
        """Number of regions that UNITER reads of each image, from nbb_*.json beside the folder; {} without it."""
        match = _NBB.fullmatch(self.path.name)
        path = self.path.parent / f"nbb_{match[1]}.json" if match else None
        if path is None or not path.is_file():
            return {}
        counts = read_json(path)
        if not isinstance(counts, dict) or not all(type(n) is int and n > 0 for n in counts.values()):
            raise DataError(f"{path}: expected an object of name: number of regions")
        return counts

    def read(self, image_id: str) -> Record:
        """regions [K, D], boxes [K, 4] in 0..1, box_scores [K], box_classes [K]."""
        return self._record(image_id, self._keys.need(image_id, "its record"))

    def first(self, count: int) -> Iterator[Record]:
        """The records of some images."""
        return (self._record("", key) for key in islice(self._keys, count))

    def holds(self) -> str:
        """Names of the fields in the first record. Raises DataError for a record of another kind."""
        return ", ".join(self._arrays(next(iter(self._keys)))[0])

    def _record(self, image_id: str, key: bytes) -> Record:
        arrays, where = self._arrays(key)
        return self.reading.record(image_id, arrays, where)

    def _arrays(self, key: bytes) -> tuple[dict[str, np.ndarray], str]:
        """The arrays of a record, and where it is."""
        import lmdb

        where = f"{self.path}, key {key.decode('utf-8', 'replace')!r}"
        try:
            value = self._transaction.get(key)
        except lmdb.Error as error:
            raise DataError(f"{where}: expected a whole LMDB file: {error}") from None
        if value is None:
            raise DataError(f"{where}: expected the value of this key, found none: the file is damaged")
        arrays = arrays_of(parse_value(value, where), where)
        if (count := self._counts.get(key.decode("utf-8", "replace"))) is not None:
            arrays["num_boxes"] = np.asarray(count)
        return arrays, where


def recognise(place: Place) -> Iterator[Recognised]:
    """A folder with data.mdb, or a file of that kind."""
    data = next(iter(place.of("data.mdb", ".lmdb", ".mdb")), None)
    if data is None:
        return
    path = data if place.path.is_file() or data.name != "data.mdb" else place.path
    flags = {"lmdb": str(path)}
    if missing("lmdb"):
        _check_file(data)
        yield Recognised("LMDB", "from_lmdb", flags, extra="lmdb")
    else:
        holds = Lmdb(path, Reading()).holds()
        yield Recognised(
            f"LMDB, a record an image with {holds}",
            "from_lmdb",
            flags,
            extra="lmdb",
            read=lambda reading: Lmdb(path, reading).first(SAMPLE),
        )


def _data_file(path: Path) -> Path:
    """The file of an environment. Raises DataError for another file or folder, with what lies there."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    data = path / "data.mdb"
    if not data.is_file():
        inner = sorted(str(file.parent.name) for file in path.glob("*/data.mdb"))
        held = f"the folders {', '.join(inner)}; give one of them" if inner else "no such file"
        raise DataError(f"{path}: expected data.mdb of LMDB, found {held}")
    return data


def _check_file(path: Path) -> None:
    """Raises DataError unless both first pages are LMDB's and the file is as long as they say.

    A file that is cut off is mapped into memory beyond its end, and the process would die as it reads there.
    """
    with data_errors():
        check_kind(path)
    with path.open("rb") as file:
        first = file.read(152)
        if len(first) < 152 or struct.unpack_from("<I", first, 16)[0] != _MAGIC:
            raise DataError(f"{path}: expected an LMDB file, found other bytes (cut off, or of a big-endian machine?)")
        page = struct.unpack_from("<I", first, 40)[0]
        if not 256 <= page <= 2**16 or page & (page - 1):
            raise DataError(f"{path}: expected pages of 256 to 65536 bytes, found {page}: the file is damaged")
        file.seek(page)
        second = file.read(152)
        if len(second) < 152 or struct.unpack_from("<I", second, 16)[0] != _MAGIC:
            raise DataError(f"{path}: expected a second page of LMDB's, found other bytes (cut off?)")
    last = max((struct.unpack_from("<QQ", meta, 136) for meta in (first, second)), key=lambda pair: pair[1])[0]
    size = path.stat().st_size
    if (last + 1) * page > size:
        raise DataError(
            f"{path}: expected {(last + 1) * page} bytes, found {size}: the file is cut off; copy it again, or write "
            "it anew with mdb_copy -c"
        )


def parse_value(value: bytes, where: str) -> Mapping[str, Any]:
    """The record in a value: an .npz, msgpack with NumPy's arrays, or a pickle. Nothing that it names is run.

    Raises DataError naming `where` for anything else, and for arrays of Python objects.
    """
    with data_errors():
        if value.startswith(b"PK"):
            return parse_npz(io.BytesIO(value), where, _NPZ, MAX_IMAGE_BYTES)
        if value[:1] == b"\x80" and value[1:2] in (b"\2", b"\3", b"\4", b"\5"):
            content = torch_pickle.loads(value, where, "record")
        elif value[:1] and (0x80 < value[0] < 0x90 or value[0] in (0xDE, 0xDF)):
            content = _msgpack(value, where)
        else:
            kinds = {b"(": "a pickle of protocol 0", b"}": "a pickle of protocol 1", b"\x93NUMPY": "a .npy array"}
            kinds |= {b"\x04\x22\x4d\x18": "LZ4 (UNITER's texts?)", b"\xff\xd8": "a JPEG", b"\x89PNG": "a PNG"}
            contents = next((kind for magic, kind in kinds.items() if value.startswith(magic)), f"{value[:8]!r}")
            raise DataError(f"{where}: expected a value of npz, msgpack or pickle (protocol 2 to 5), found {contents}")
    if not isinstance(content, dict):
        raise DataError(f"{where}: expected a dictionary, found {type(content).__name__}")
    return {_text(key): v.value if isinstance(v, torch_pickle.Array) else v for key, v in content.items()}


def _msgpack(value: bytes, where: str) -> Any:
    try:
        return msgpack.unpackb(value, object_hook=_of_numpy, raw=True)  # old ones write arrays as texts
    except (ValueError, TypeError, RecursionError) as error:  # msgpack's own are ValueErrors
        raise DataError(f"{where}: expected msgpack with arrays of numbers: {error}") from None


def _of_numpy(content: dict[Any, Any]) -> Any:
    """An array or number as msgpack-numpy writes it; its own decoder loads pickles."""
    entry = {_text(key): value for key, value in content.items()}
    if "nd" not in entry:
        return content
    array = torch_pickle.array_of(_text(entry.get("type")), entry.get("shape", ()), entry.get("data"))
    return array if entry["nd"] else array.item()


def _text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def arrays_of(record: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """The arrays of a record of UNITER, ViLBERT or MMF, by the names of `detections`; what else it has is left out.

    MMF notes in num_boxes how many regions are sure, and reads all: so do we.
    """
    if record.get("features") is None:
        raise DataError(f"{where}: expected the key 'features', found {described(record)}")
    note_unread(record, (*(name for _, name in (*_ARRAYS, *_SIZES)), *COUNTS), where)
    arrays = {ours: _array(record, name, where) for ours, name in _ARRAYS if record.get(name) is not None} | {
        ours: np.asarray(record[name]) for ours, name in _SIZES if record.get(name) is not None
    }
    if (likely := arrays.pop("cls_prob", None)) is not None:
        refuse(likely.ndim != 2 or not likely.size, f"{where}: 'cls_prob'", "numbers [K, classes]", list(likely.shape))
        arrays = {"conf": likely.max(1), "objects_id": likely.argmax(1)} | arrays
    return arrays


def _array(record: Mapping[str, Any], name: str, where: str) -> np.ndarray:
    """An array of numbers of at least one axis; in base64, float32, one row a box."""
    value = record[name]
    if isinstance(value, bytes | str):
        count = record.get("num_boxes")
        if type(count) is not int or count < 1:
            raise DataError(f"{where}: expected num_boxes with {name!r} in base64, found {count!r:.80}")
        cell = value if isinstance(value, bytes) else value.encode("latin-1", "replace")
        return decode(cell, np.float32, count, where, name)
    if not isinstance(value, np.ndarray) or value.ndim == 0 or value.dtype.kind not in "biuf":
        contents = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise DataError(f"{where}: {name!r}: expected an array of numbers, or base64 of float32, found {contents}")
    return value
