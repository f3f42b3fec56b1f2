"""Features of many images in HDF5 files, read image by image with h5py (`pip install -e '.[hdf5]'`)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from data_prep.files import check_file
from data_prep.names import Names
from data_prep.places import SAMPLE, Place, Recognised, listed, look, split_of
from data_prep.schema import DataError, Record, refuse
from data_prep.sources import detections, row_ids
from data_prep.sources.detections import FEATURES, GRIDS, NAMES, PAIR, Detections, Reading, described
from data_prep.sources.row_ids import FAULTS, read_index
from shnet_jax.untrusted import MAX_IMAGE_BYTES, kind_of

IDS = ("image_id", "image_ids", "img_ids", "img_id", "ids")
ENDS = "pos_boxes"
LAYOUTS = (
    "image_features [N, K, D], or image_features [sum of K, D] with pos_boxes [N, 2], and the ids in a sidecar "
    "(--hdf5_ids); image_id [N] and features [N, K, D]; ID_features or ID_grids of each image; ID/features"
)
_PROBES = 200  # images whose boxes say in which order a size is
_ONCE = (
    *detections.WIDTHS,
    *detections.HEIGHTS,
    *detections.COUNTS,
    PAIR,
)  # there is one an image, also of regions in a row


@contextmanager
def _faults_of(where: str, reason: str = "damaged?") -> Iterator[None]:
    """Context in which errors of h5py become DataError."""
    try:
        yield
    except DataError:
        raise
    except FAULTS as error:
        raise DataError(f"{where}: cannot be read ({reason}): {error}") from None


class _Entry(NamedTuple):
    """The file of an image, and its row there or the start of its data sets' names."""

    file: int
    place: int | str


@dataclass(frozen=True)
class Hdf5Features(Detections):
    """Regions and boxes, or a grid, of each image from one or more HDF5 files, in the layouts that are LAYOUTS.

    Written by github.com/hengyuan-hu/bottom-up-attention-vqa (rows) and its adaptive form in jnhwkim/ban-vqa, by
    aimagelab/meshed-memory-transformer, luo3300612/image-captioning-DLCT and zhangxuying1004/RSTNet (data sets by id),
    batra-mlp-lab/visdial-challenge-starter-pytorch (ids as rows), j-min/VL-T5 (groups by id).

    ids: files of the ids of the rows, one for each file that needs one: JSON, text or .npy, a list in the order of the
    rows, or an object id: row as JSON or as a pickle of text and whole numbers, of which nothing is run. Default:
    NAME_imgid2idx.json or .pkl beside NAME.hdf5.

    Files stay open. No link, reference, virtual or external data set is followed, of data of variable length only ids
    are read (`row_ids`), and nothing that would take more memory than the features of an image may.
    """

    paths: Sequence[Path]
    ids: Sequence[Path] = ()
    reading: Reading = detections.DEFAULT

    def __post_init__(self) -> None:
        """Raises DataError when a file is missing or has none of the layouts."""
        if len(self.ids) not in (0, len(self.paths)):
            raise DataError(f"--hdf5_ids: expected one file for each of {len(self.paths)}, found {len(self.ids)}")
        self._entries  # noqa: B018

    def __getstate__(self) -> dict[str, Any]:
        """Without the open files."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def where(self) -> str:
        """The files, for error messages."""
        return ", ".join(map(str, self.paths))

    @cached_property
    def _files(self) -> list[_File]:
        return [_File(path) for path in self.paths]

    @cached_property
    def _entries(self) -> Names[_Entry]:
        """Image name -> where it is."""
        entries: Names[_Entry] = Names(self.where)
        for number, file in enumerate(self._files):
            places: Mapping[str, int | str]
            if file.has_rows:
                places = self._rows(number)
            else:
                places = {image_id: prefix for prefix, image_id in file.prefixes.items()}
                self._check_order(file)
            for image_id, place in places.items():
                if image_id in entries:
                    raise DataError(f"{file.path}: image {image_id!r:.80}: expected it in one file, found it in two")
                entries.add(image_id, _Entry(number, place))
        return entries

    def _rows(self, number: int) -> dict[str, int]:
        """Image name -> row of a file."""
        file = self._files[number]
        if self.ids:
            return read_index(self.ids[number], file.rows)
        names = file.ids()
        if names is not None:
            return row_ids.numbered(names, file.rows, str(file.path))
        if beside := file.sidecar():
            return read_index(beside, file.rows)
        raise DataError(
            f"{file.path}: expected the ids of its {file.rows} rows in {' or '.join(IDS)} or "
            f"{file.path.stem}_imgid2idx.json, found neither; --hdf5_ids=FILE names a list or an object id: row"
        )

    def _check_order(self, file: _File) -> None:
        """Raises DataError where sizes are not in the order that is expected, as the boxes of some images tell."""
        if self.reading.form != "pixels":
            return
        prefixes = list(file.prefixes)
        for prefix in prefixes[:: math.ceil(len(prefixes) / _PROBES)]:
            arrays = file.members(prefix, ("boxes", PAIR))
            if PAIR not in arrays:
                return
            boxes, pair = arrays.get("boxes", np.zeros(0)), arrays[PAIR]
            if pair.size != 2 or boxes.ndim != 2 or not boxes.size or boxes.shape[1] != 4:
                continue
            height, width = pair.reshape(-1) if self.reading.size_order == "hw" else pair.reshape(-1)[::-1]
            ends = boxes[:, 2:].max(0)
            if (ends > (width + 1, height + 1)).any() and (ends <= (height + 1, width + 1)).all():
                other = "hw" if self.reading.size_order == "wh" else "wh"
                raise DataError(
                    f"{file.path}: image {file.prefixes[prefix]!r:.80}: expected boxes within {width:g} x {height:g}, "
                    f"found one that ends at {ends.tolist()}; --size_order={other} exchanges the two numbers of a size"
                )

    def read(self, image_id: str) -> Record:
        """regions [K, D] and boxes [K, 4] in 0..1, or grid [G, D], or both."""
        return self._record(image_id, self._entries.need(image_id, "its features"))

    def first(self, count: int) -> Iterator[Record]:
        """The records of some images."""
        return (self._record("", entry) for entry in islice(self._entries, count))

    def _record(self, image_id: str, entry: _Entry) -> Record:
        file = self._files[entry.file]
        arrays = file.row(entry.place) if isinstance(entry.place, int) else file.members(entry.place)
        where = f"{file.path}, {f'row {entry.place}' if isinstance(entry.place, int) else entry.place}"
        return self.reading.record(image_id, arrays, where)


class _File:
    """An HDF5 file that somebody else wrote.

    prefixes: of a file with data sets by id, what stands before their names -> the id: ID_ of ID_features.
    has_rows: the file has a row of each data set for each image instead.
    """

    def __init__(self, path: Path):
        self.path = path
        check_file(path)
        with path.open("rb") as file:
            start = file.read(256)
        try:
            self._file = h5py.File(path, "r")
            names = frozenset(name for name in self._file if isinstance(name, str))  # bytes are no name of an image
        except FAULTS as error:
            contents = "" if start.startswith(b"\x89HDF") else kind_of(start)
            raise DataError(f"{path}: expected an HDF5 file{contents} (cut off?): {error}") from None
        self._features = detections.the_one(names, FEATURES, str(path)) or ""
        self.has_rows = bool(self._features)
        self._names = names if self.has_rows else frozenset()
        self.prefixes = {} if self.has_rows else dict(self._prefixes(sorted(names)))
        if not self.has_rows and not self.prefixes:
            raise DataError(f"{path}: expected {LAYOUTS}; found {described(names)}")
        detections.note_unread(self._names or self._first_members(names), (*NAMES, *IDS, ENDS), path)

    def __str__(self) -> str:
        """Layout of the file in words, the same for all files that are read as one."""
        if self.has_rows:
            return described(sorted(self._names))
        endings = {prefix[-1] for prefix in self.prefixes}
        prefix = next(iter(self.prefixes))
        inner = [name for name in NAMES if self._kind(prefix + name) == "dataset"] if endings & {"_", "/"} else []
        return " and ".join(f"ID{prefix[-1]}{name}" for name in inner) or "a data set ID of each image"

    # ------------------------------------------------------------------------------------------------- a row an image

    @cached_property
    def rows(self) -> int:
        """Images of a file with rows."""
        return self._lengths[0]

    @cached_property
    def _lengths(self) -> tuple[int, int]:
        """Rows of what there is once an image, and of what there is once a region or again an image."""
        features = self._set(self._features).shape[0]
        return (len(self._ends) if ENDS in self._names else features), features

    def ids(self) -> list[str] | None:
        """The names of the rows, None when the file has none."""
        name = next((name for name in IDS if name in self._names), None)
        if name is None:
            return None
        if self._set(name, texts=True).dtype.kind == "O":
            return row_ids.texts_in_hdf5(self.path, name)
        values = self._read(name, texts=True).reshape(-1)
        refuse(values.dtype.kind not in "iuS", f"{self.path}: {name}", "texts or whole numbers", values.dtype)
        return [
            value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values.tolist()
        ]

    def sidecar(self) -> Path | None:
        """The file beside it with the ids of its rows, by its published name."""
        names = (f"{self.path.stem}_imgid2idx.{ending}" for ending in ("json", "pkl"))
        return next((path for name in names if (path := self.path.with_name(name)).is_file()), None)

    @property
    def needs_ids(self) -> bool:
        """Whether the ids of its rows have to be given."""
        try:
            return self.has_rows and self.ids() is None and self.sidecar() is None
        except DataError:  # texts that are damaged
            return True

    def row(self, row: int) -> dict[str, np.ndarray]:
        """The arrays of an image."""
        images, regions = self._lengths
        place: int | slice = row
        if ENDS in self._names:
            start, end = (int(n) for n in self._ends[row])
            if not 0 <= start < end <= regions:
                raise DataError(
                    f"{self.path}: {ENDS} row {row}: expected a range in 0..{regions}, found {start}..{end}"
                )
            place = slice(start, end)
        arrays = {self._features: self._read(self._features, place)}
        for name in NAMES:
            if name in self._names and name not in FEATURES:
                once = name in _ONCE
                if self._set(name).shape[:1] == (images if once else regions,):
                    arrays[name] = self._read(name, row if once else place)
                else:
                    expected, shape = images if once else regions, list(self._set(name).shape)
                    raise DataError(f"{self.path}: {name}: expected {expected} rows as of the features, found {shape}")
        return arrays

    @cached_property
    def _ends(self) -> np.ndarray:
        places = self._read(ENDS)
        if places.ndim != 2 or places.shape[1] != 2 or places.dtype.kind not in "iu":
            raise DataError(f"{self.path}: {ENDS}: expected whole numbers [N, 2], found {places.dtype} {places.shape}")
        order = np.argsort(places[:, 0], kind="stable")
        gaps = places[order[1:], 0].astype(np.int64) - places[order[:-1], 1].astype(np.int64)
        if gaps.size and (gaps == 1).all():
            raise DataError(
                f"{self.path}: {ENDS}: expected the end behind the last region, found the last; add 1 to ends"
            )
        if len(order) and places[order[0], 0] == 1:
            raise DataError(f"{self.path}: {ENDS}: expected the first region to be number 0, found none before 1")
        if (gaps < 0).any():
            first = np.argmax(gaps < 0)
            pair = [f"row {row} with {places[row].tolist()}" for row in order[first : first + 2]]
            raise DataError(f"{self.path}: {ENDS}: expected start and end of each image, found {' and '.join(pair)}")
        return places

    # ------------------------------------------------------------------------------------------ data sets of one image

    def _prefixes(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """ID_ of ID_features or ID_grids, else ID/ of a group ID with features, else ID of a data set of features."""
        endings = tuple(f"_{name}" for name in (*FEATURES, GRIDS))
        if named := [name for name in names if name.endswith(endings)]:
            for name in named:
                image_id = name.rpartition("_")[0] if not name.endswith("_image_features") else name[:-15]
                yield f"{image_id}_", image_id
        else:
            for name in names:
                if self._kind(name) == "dataset":
                    yield name, name
                elif any(self._kind(f"{name}/{inner}") == "dataset" for inner in (*FEATURES, GRIDS)):
                    yield f"{name}/", name

    def _first_members(self, names: Collection[str]) -> list[str]:
        """The names of all that the first image has."""
        prefix = next(iter(self.prefixes))
        if not prefix.endswith("/"):  # of data sets that are called ID, none belongs to another
            return [name.removeprefix(prefix) for name in names if prefix[-1] == "_" and name.startswith(prefix)]
        with _faults_of(f"{self.path}: {prefix}"):
            return [name for name in self._file[prefix] if isinstance(name, str)]

    def members(self, prefix: str, only: Sequence[str] = NAMES) -> dict[str, np.ndarray]:
        """The arrays of an image whose names begin with `prefix`, by the rest of these."""
        if not prefix.endswith(("_", "/")):
            return {"features": self._read(prefix)} if "features" in only else {}
        return {name: self._read(prefix + name) for name in only if self._kind(prefix + name) == "dataset"}

    # ------------------------------------------------------------------------------------------------- what is believed

    def _kind(self, name: str) -> str:
        """Kind of object under a name: "dataset", "group", or "" for nothing. Raises DataError for a link."""
        where, item = f"{self.path}: {name}", self._file
        with _faults_of(where):
            for part in name.split("/"):
                link = item.get(part, getlink=True) if isinstance(item, h5py.Group) else None
                if link is None:
                    return ""
                refuse(not isinstance(link, h5py.HardLink), where, "data", "a link, which is not followed")
                item = item[part]
        return "group" if isinstance(item, h5py.Group) else "dataset" if isinstance(item, h5py.Dataset) else ""

    def _set(self, name: str, *, texts: bool = False) -> Any:
        """A data set of numbers that lies in the file. Raises DataError for any other."""
        if (dataset := self._sets.get(name)) is not None:
            return dataset
        where, kind = f"{self.path}: {name}", self._kind(name)
        refuse(kind != "dataset", where, "a data set", f"a {kind}" if kind else "none")
        with _faults_of(where):
            dataset = self._file[name]
            dtype, shape, chunks = dataset.dtype, dataset.shape, dataset.chunks
            elsewhere = dataset.is_virtual or dataset.external
            stored = dataset.id.get_storage_size()
        refuse(elsewhere, where, "its numbers in this file", "a virtual or external data set")
        variable = texts and dtype.kind == "O" and h5py.check_string_dtype(dtype) is not None
        if not variable and dtype.kind not in ("fiubS" if texts else "fiub"):
            raise DataError(f"{where}: expected numbers{' or texts' if texts else ''}, found {dtype}")
        if shape is None or not 0 <= len(shape) <= 5:
            raise DataError(f"{where}: expected an array, found {'nothing' if shape is None else list(shape)}")
        if chunks is not None and math.prod(chunks) * dtype.itemsize > MAX_IMAGE_BYTES:
            raise DataError(f"{where}: its chunks {list(chunks)} have more than {MAX_IMAGE_BYTES} bytes; h5repack it")
        if chunks is None and stored < math.prod(shape) * dtype.itemsize:
            found_bytes = f"{stored} bytes (was the file not written to its end?)"
            raise DataError(f"{where}: expected {dtype} {list(shape)}, found {found_bytes}")
        if self.has_rows:
            refuse(not shape, where, "a row for each image", "one number")
            self._sets[name] = dataset
        return dataset

    @cached_property
    def _sets(self) -> dict[str, Any]:
        """Data sets of a file with rows, which stay open."""
        return {}

    def _read(self, name: str, place: int | slice | None = None, *, texts: bool = False) -> np.ndarray:
        """A data set, or some of its rows, within the bytes that an image may have."""
        dataset = self._set(name, texts=texts)
        where = f"{self.path}: {name}"
        shape = dataset.shape
        if isinstance(place, slice):
            shape = (place.stop - place.start, *shape[1:])
        elif place is not None:
            shape = shape[1:]
        if math.prod(shape) * dataset.dtype.itemsize > MAX_IMAGE_BYTES:
            raise DataError(f"{where}: {dataset.dtype} {list(shape)} has more than {MAX_IMAGE_BYTES} bytes of an image")
        with _faults_of(where, "damaged, or compressed by a filter that is not installed?"):
            return np.asarray(dataset[() if place is None else place])


def recognise(place: Place) -> Iterator[Recognised]:
    """HDF5 files, those of one layout together."""
    layouts: dict[str, list[_File]] = {}
    for path in place.of(".hdf5", ".h5", ".hdf"):
        file = _File(path)
        layouts.setdefault(str(file), []).append(file)
    for layout, files in layouts.items():
        paths = [file.path for file in files]
        ids = [_ids_beside(file) for file in files] if any(file.needs_ids for file in files) else []
        known = [path for path in ids if path]
        lacks = len(known) < len(ids)
        wanted = "the ids of the rows: --hdf5_ids=FILE, a list or an object id: row, one file for each HDF5"

        def read(reading: Reading, paths: list[Path] = paths, known: list[Path] = known) -> Iterator[Record]:
            return Hdf5Features(paths, known, reading).first(SAMPLE)

        yield Recognised(
            f"HDF5 with {layout} in {', '.join(path.name for path in paths)}",
            "from_hdf5",
            {"hdf5": listed(paths)} | ({"hdf5_ids": listed(known)} if ids and not lacks else {}),
            extra="hdf5",
            read=None if lacks else read,
            lacks=(wanted,) if lacks else (),
        )


def _ids_beside(file: _File) -> Path | None:
    """The file in its folder that holds as many ids as there are rows, first one of the same split."""
    files = [
        path for path in look(file.path.parent).of(".json", ".txt", ".npy", ".pkl", ".pickle") if "id" in path.stem
    ]
    for path in sorted(files, key=lambda path: split_of(path) != split_of(file.path)):
        if path.stat().st_size <= row_ids.MAX_BYTES:
            try:
                read_index(path, file.rows)
            except DataError:
                continue  # ids of another file, or something else
            return path
    return None
