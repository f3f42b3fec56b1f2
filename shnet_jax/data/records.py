"""Finds and opens a data set on disk: the only code that knows where its files lie.

A data set is a TFDS version folder (array_record) as `data_prep` writes it; sets of other tools work when
their features have the same names; only the sidecar files are then missing.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError

from shnet_jax import storage
from shnet_jax.data import cache
from shnet_jax.data.checksums import check_files
from shnet_jax.data.columns import Column, parse_description
from shnet_jax.data.errors import DataError
from shnet_jax.data.index import REMEDY, Index, IndexBuilder, index_file, read_counts, read_index
from shnet_jax.data.schema import FIELDS, PER_CAPTION
from shnet_jax.paths import to_path
from shnet_jax.untrusted import read_object

SENTENCEPIECE = "sentencepiece.model"
_INFO, _FEATURES = "dataset_info.json", "features.json"
# Read when a set is opened, and compared with their checksums: damage need not be a fault in form.
_SMALL = (_INFO, _FEATURES, "metadata.json")

RENDERED = ("scenes", "people")
"""Data sets that data_prep renders itself."""

log = logging.getLogger(__name__)


class Feature(NamedTuple):
    """A field of one record: its `shape`, (None,) where it differs between records, and NumPy `dtype`."""

    shape: tuple[int | None, ...]
    dtype: np.dtype


def find_dataset(directory: str | Path) -> Path:
    """The version folder of a data set, given that folder, the one of its name, or one with only this set.

    Of a URL it is in the cache, and its shards come when they are read (data/cache.py).
    Raises FileNotFoundError, listing what is there, when there is none or more than one.
    """
    if storage.is_url(directory):
        return cache.fetch_description(str(directory))
    root = to_path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"data set folder {str(root)!r}: no such folder{_how_to_make(root)}")
    if (root / _INFO).is_file():
        return root
    for pattern in ("*", "*/*"):
        folders = sorted(
            path
            for path in root.glob(pattern)
            if (path / _INFO).is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
        )
        if len(folders) == 1:
            return folders[0]
        if folders:
            raise FileNotFoundError(f"data set folder {str(root)!r}: holds several: {', '.join(map(str, folders))}")
    entries = sorted(path.name for path in root.iterdir())
    raise FileNotFoundError(
        f"data set folder {str(root)!r}: no data set ({_INFO}) here or up to two folders below; "
        f"found {', '.join(entries[:20]) or 'nothing'}{_how_to_make(root)}"
    )


def _how_to_make(folder: Path) -> str:
    """The command that makes a data set that is not there: by its name a rendered one, else by an import."""
    if folder.name in RENDERED:
        return f"; make it: shnet data {folder.name} --out={folder.parent}"
    return "; make it: shnet data FOLDER says how features and captions there are imported"


@dataclass(frozen=True)
class DataSet:
    """A data set on disk; reading starts with `open_split`.

    path: its version folder.
    splits: records of each split.
    features: field -> shape and dtype as `open_split` gives them.
    num_classes: C of `categories`, `seg_semantic` and `seg_map` (C itself is void there); None when unknown.
    metadata: what the importer kept (`source`, `class_names`, `predicates`, ...).
    columns: the fields that lie beside the records (data/columns.py).
    """

    path: Path
    splits: Mapping[str, int]
    features: Mapping[str, Feature]
    num_classes: int | None
    metadata: Mapping[str, Any]
    columns: Mapping[str, Feature] = field(default_factory=dict)
    _indices: dict[str, Index] = field(default_factory=dict, init=False, repr=False, compare=False)

    def open_split(self, split: str, fields: Sequence[str]) -> RandomAccess:
        """See `open_split`."""
        self._check_split(split)
        missing = [field for field in fields if field not in self.features]
        if missing:
            raise ValueError(f"{self.path}: no field {', '.join(missing)}; it has {', '.join(self.features)}")
        return RandomAccess(self, split, tuple(fields))

    def image_ids(self, split: str) -> np.ndarray:
        """Image ids of a split in record order, unicode [N]."""
        return self.index(split).image_ids

    def caption_counts(self, split: str) -> np.ndarray:
        """Captions of each image of a split in record order, int32 [N]; of the index, no other part is read for it."""
        self._check_split(split)
        if split not in self._indices:
            counts = read_counts(self.path, split)
            if counts is not None and len(counts) == self.splits[split]:
                return counts
        return self.index(split).caption_counts

    def first_captions(self, split: str) -> np.ndarray:
        """First caption of each image of a split, int64 [N + 1]; the last entry is the number of captions."""
        return np.concatenate([[0], np.cumsum(self.caption_counts(split), dtype=np.int64)])

    def column(self, split: str, field: str) -> Column | None:
        """A field that lies beside the records, by rows of images or of captions; None for one in the records."""
        self._check_split(split)
        if field not in self.columns:
            return None
        shape, dtype = self.columns[field]
        of_captions = FIELDS[field].shape[:1] == (PER_CAPTION,)
        rows = int(self.caption_counts(split).sum()) if of_captions else self.splits[split]
        sizes = tuple(int(size) for size in (shape[1:] if of_captions else shape) if size is not None)
        return Column(self.path, field, split, rows, sizes, dtype)

    def captions(self, split: str) -> Iterator[list[str]]:
        """The captions of each image of a split in record order."""
        return self.index(split).all_captions()

    def identities(self, split: str) -> np.ndarray | None:
        """The person in each image of a split in record order, int64 [N]; None without the field `identity`."""
        persons = self.index(split).identities
        if persons is None and "identity" in self.features:
            persons = np.array([record["identity"] for record in self.open_split(split, ("identity",))], np.int64)
        return persons

    def index(self, split: str) -> Index:
        """Ids and captions of a split: its sidecar or, without one, what a pass over its records finds; kept.

        Raises ValueError for an unknown split, DataError for a sidecar that is damaged or of another number of records.
        """
        self._check_split(split)
        if split not in self._indices:
            self._indices[split] = self._read_index(split)
        return self._indices[split]

    def _read_index(self, split: str) -> Index:
        path, size = self.path / index_file(split), self.splits[split]
        index = read_index(self.path, split)
        if index is None:
            index = self._scan(split)
        if len(index) != size:
            raise DataError(f"{path}: expected {size} image ids, found {len(index)}; {REMEDY}", file=path.name)
        return index

    def _scan(self, split: str) -> Index:
        name, size = index_file(split), self.splits[split]
        log.info("%s: no captions in %s; scanning %d records", self.path, name, size)
        index = IndexBuilder()
        for record in self.open_split(split, ("image_id", "captions")):
            index.add(record["image_id"], record["captions"])
        return index.build()

    def check_captioned(self, split: str) -> None:
        """Raises ValueError, naming an image, unless every image of a split has a caption."""
        counts = self.caption_counts(split)
        if missing := int((counts == 0).sum()):
            name = str(self.image_ids(split)[int(np.argmin(counts))])
            raise ValueError(
                f"{self.path}: split {split!r}: {missing} of {len(counts)} images have no caption, as {name!r}: they "
                "are for shnet search, serve and page; training and evaluation need captions of every image"
            )

    def _check_split(self, split: str) -> None:
        if not self.splits:
            raise ValueError(
                f"{self.path} has the shapes of a data set, and no images: give one, --config.data.dir=DIR or "
                "shnet_jax.load(..., data_dir=DIR)"
            )
        if split not in self.splits:
            raise ValueError(
                f"{self.path}: no split {split!r}; it has {', '.join(self.splits)}. Name one of them: "
                "--config.data.train_split, data.val_split, eval.split, search.split"
            )


def open_dataset(directory: str | Path) -> DataSet:
    """The data set that `find_dataset` finds in `directory`.

    Raises DataError when a file that describes it is damaged.
    """
    path = find_dataset(directory)
    info = _builder(path).info
    metadata = dict(info.metadata.items()) if info.metadata is not None else {}
    features = {name: _feature(name, feature, metadata) for name, feature in sorted(info.features.items())}
    splits = {name: split.num_examples for name, split in info.splits.items() if name != "all"}
    columns = {
        name: Feature((None, *shape) if FIELDS[name].shape[:1] == (PER_CAPTION,) else shape, dtype)
        for name, (shape, dtype) in parse_description(metadata.get("columns", {}), path / "metadata.json").items()
    }
    features = dict(sorted((features | columns).items()))
    return DataSet(path, splits, features, metadata.get("num_classes"), metadata, columns)


def _check_names(path: Path) -> None:
    """Checks the names in a data set's description: TFDS imports modules and reads files that they name.

    Raises ValueError for modules outside TFDS, and files outside the folder: the set may be somebody else's.
    """
    if (path / _FEATURES).is_file():
        for key, value in _texts(read_object(path / _FEATURES)):
            if key in ("pythonClassName", "python_class_name", "type") and not value.startswith("tensorflow_datasets."):
                raise ValueError(f"{path / _FEATURES}: names {value!r:.200}, which is no part of tensorflow_datasets")
    info = read_object(path / _INFO)
    splits = info.get("splits", [])
    for part in (info, *(splits if isinstance(splits, list) else [])):
        for key in ("name", "filepathTemplate", "filepath_template"):
            place = part.get(key, "") if isinstance(part, dict) else None
            if not isinstance(place, str) or "/" in place or ".." in place:
                raise ValueError(f"{path / _INFO}: {key} {place!r:.200} is no name, or leads out of this folder")


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Every (key, text) at any depth of JSON values."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from ((key, item) for key, item in value.items() if isinstance(item, str))
            left += value.values()
        elif isinstance(value, list):
            left += value


def open_split(dataset_dir: str | Path, split: str, fields: Sequence[str]) -> RandomAccess:
    """The records of a split by number, with only `fields` decoded.

    Raises ValueError, listing what there is, for a split or field that the data set does not have.
    """
    return open_dataset(dataset_dir).open_split(split, fields)


def _builder(path: Path) -> tfds.core.DatasetBuilder:
    """TFDS's reader of a version folder, whose description is compared with its checksums first."""
    check_files(path, _SMALL)
    try:
        _check_names(path)
        builder = tfds.builder_from_directory(path)
        dict(builder.info.metadata or {})  # read only when asked for
        return builder
    # ImportError: a feature that needs TensorFlow
    except (ValueError, KeyError, TypeError, ImportError, ParseError) as error:
        raise DataError(f"{path}: expected {', '.join(_SMALL)} as TFDS writes them: {error}") from error


def _feature(name: str, feature: Any, metadata: Mapping[str, Any]) -> Feature:
    if name == "categories" and feature.np_dtype == np.uint8 and "num_classes" in metadata:
        return Feature((metadata["num_classes"],), np.dtype(bool))
    if name in ("captions", "image_id"):
        return Feature((None,) if name == "captions" else (), np.dtype(np.str_))
    return Feature(tuple(feature.shape), np.dtype(feature.np_dtype))


class RandomAccess:
    """Records of a split by number: the data source that grain and loops read.

    Values are NumPy with the stored dtype, read-only as they share the record's bytes; `captions` list[str],
    `image_id` str, `categories` bool [C]. Several threads may read at once; a pickle holds the path only.
    """

    def __init__(self, dataset: DataSet, split: str, fields: tuple[str, ...]):
        self.dataset, self.split, self.fields = dataset, split, fields

    @cached_property
    def _columns(self) -> dict[str, Column]:
        """The fields that lie beside the records."""
        columns = {name: self.dataset.column(self.split, name) for name in self.fields}
        return {name: column for name, column in columns.items() if column is not None}

    @cached_property
    def _first(self) -> np.ndarray:
        """`DataSet.first_captions` of the split."""
        return self.dataset.first_captions(self.split)

    def stack(self, numbers: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The records `numbers` with a leading axis, {field: [n, ...]}; of fields of one shape in all records."""
        numbers = np.asarray(numbers, np.int64)
        out = {name: column.take(numbers) for name, column in self._columns.items()}
        if len(out) < len(self.fields):
            rest = [name for name in self.fields if name not in out]
            read = [self._decoded(int(number)) for number in numbers]
            out |= {name: np.stack([record[name] for record in read]) for name in rest}
        return {name: out[name] for name in self.fields}

    @cached_property
    def _source(self) -> tuple[Any, tfds.features.FeaturesDict, Any]:
        """Undecoded records, the features to decode (data sources know no PartialDecoding), where the records lie."""
        builder = _builder(self.dataset.path)
        raw: Any
        if cache.is_cached(self.dataset.path):
            raw = _CachedRecords(builder.info.splits[self.split])
        else:
            raw = builder.as_data_source(self.split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        stored = [name for name in self.fields if name not in self.dataset.columns]
        features = tfds.features.FeaturesDict({name: builder.info.features[name] for name in stored})
        return raw, features, builder.info.splits[self.split]

    def __reduce__(self):
        return open_split, (self.dataset.path, self.split, self.fields)

    def __len__(self) -> int:
        return self.dataset.splits[self.split]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Record `number`. Raises DataError naming its shard and its place there when it is damaged."""
        record = {} if self.fields and len(self._columns) == len(self.fields) else self._decoded(number)
        for name, column in self._columns.items():
            if FIELDS[name].shape[:1] == (PER_CAPTION,):
                record[name] = column.block(*self._first[number : number + 2].tolist())
            else:
                record[name] = column.block(number, number + 1)[0]
        return record

    def _decoded(self, number: int) -> dict[str, Any]:
        """The fields of record `number` that do not lie beside the records."""
        raw, features, _ = self._source
        try:
            data = raw[number]
        except RuntimeError as error:  # array_record's: truncated, missing, or a chunk unlike its hash
            raise self._damaged(number, str(error)) from error
        if not data:  # what array_record gives beyond the end of a shard that was cut between two blocks
            raise self._damaged(number, "the end of the file")
        try:
            record = features.deserialize_example_np(data)
            missing = [name for name in self.fields if name not in self._columns and record.get(name) is None]
            if missing:
                raise self._damaged(number, f"none of the field {', '.join(missing)}")
            return self._plain(record)
        except (ValueError, TypeError, KeyError, DecodeError) as error:
            if isinstance(error, DataError):
                raise
            raise self._damaged(number, f"{type(error).__name__}: {error}") from error

    def _damaged(self, number: int, fault: str) -> DataError:
        split = self._source[2]
        ends = list(accumulate(split.shard_lengths))
        shard = bisect_right(ends, number)
        file = Path(split.filepaths[shard])
        place = number - (ends[shard - 1] if shard else 0)
        return DataError(
            f"{file}: record {place} of this file (split {self.split!r} row {number}): expected a record as it was "
            f"written, found: {fault}; `shnet data verify {self.dataset.path}` tells which files are damaged: "
            "copy them again, or import the set again",
            file=file.name,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def _plain(self, record: dict[str, Any]) -> dict[str, Any]:
        out = dict(record)
        if "image_id" in out:
            out["image_id"] = out["image_id"].decode()
        if "captions" in out:
            out["captions"] = [caption.decode() for caption in out["captions"]]
        if "categories" in out and out["categories"].dtype == np.uint8:
            out["categories"] = np.unpackbits(out["categories"], count=self.dataset.num_classes).astype(bool)
        return out


class _CachedRecords:
    """Undecoded records of a split whose shards are fetched when they are first read."""

    def __init__(self, split: tfds.core.SplitInfo):
        self._ends = list(accumulate(split.shard_lengths))
        self._shards = cache.Shards(
            [Path(path) for path in split.filepaths], lambda _, path: ArrayRecordReader(str(path))
        )

    def __getitem__(self, number: int) -> bytes:
        shard = bisect_right(self._ends, number)
        return self._shards[shard].read([number - (self._ends[shard - 1] if shard else 0)])[0]
