"""Writes any importer's records as one TFDS data set (array_record, no TensorFlow); in memory only ids grow with it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from data_prep import notes, schema, vocabulary
from data_prep.bad_records import FIRST, SKIPPED, Bad, BadRecords, Policy
from data_prep.counts import Found, Stored, summary
from data_prep.schema import DataError, Record, refuse
from shnet_jax.data.checksums import CHECKSUMS, sha256
from shnet_jax.data.columns import ColumnWriter, column_description
from shnet_jax.data.index import Index, IndexBuilder, write_index
from shnet_jax.data.records import SENTENCEPIECE, open_dataset
from shnet_jax.data.schema import COLUMNS, PER_CAPTION
from shnet_jax.observe.files import disk_faults, sole_writer
from shnet_jax.observe.progress import Progress

VERSION = "1.0.0"
SHARD_BYTES = 512 << 20  # large enough for sequential reads, small enough to copy and to spread over hosts
_CHUNK = 64  # records handed to TFDS at once: it rewrites its small metadata files each time

Files = Mapping[str, Mapping[str, str]]
Item = Record | Bad


def write_dataset(
    out: str | Path,
    name: str,
    splits: Mapping[str, Iterable[Item]],
    metadata: Mapping[str, Any],
    *,
    files: Files | None = None,
    total: int | None = None,
    found: Found | None = None,
    overwrite: bool = False,
    on_bad_record: Policy = "fail",
    least_captions: int = 1,
) -> Path:
    """Write `out/name/1.0.0/` and return that folder. It appears only when whole.

    Args:
      out: folder that holds data sets.
      name: name of the data set: letters, digits and underscores.
      splits: records of each split, read once, in order; the order is kept. A Bad in the place of a record says why
        there is none.
      metadata: JSON values: `source` (how the data was made), `class_names`, `predicates`, ...;
        `num_classes` is added.
      files: split -> field -> file it came from, for error messages.
      total: records of all splits together, if known: the progress lines then tell the time left.
      found: what the files hold that the records were made from; what became of it is said at the end.
      overwrite: replace an existing data set of that name.
      on_bad_record: "skip" leaves bad records out and lists them in skipped.json; "fail" raises for the first.
      least_captions: captions that every record has to have; 0 for photographs that are only searched.

    Raises:
      DataError: a record is not as it has to be, an image_id occurs twice in a split or in `train*` and another split,
        a split is empty, more than half of one is to be left out.
      FileExistsError: the data set exists and `overwrite` is False.
      FolderInUse: another process is writing it.
    """
    check_names(name, splits)
    target = Path(out) / name / VERSION
    if target.exists() and not overwrite:
        raise FileExistsError(f"data set {target} exists; give another --name, or --overwrite to replace it")
    bad = BadRecords(on_bad_record)
    with (
        sole_writer(target.parent),
        disk_faults(target.parent, RuntimeError),  # of array_record
        whole_or_nothing(target) as folder,
    ):
        progress = Progress(total, what=name, unit="records")
        writer = _Writer(folder, name, dict(metadata), files or {}, progress, bad, least_captions)
        indices = {split: writer.write(split, records) for split, records in splits.items()}
        progress.close()
        learn = [indices["train"]] if "train" in indices else list(indices.values())
        captions = chain.from_iterable(index.all_captions() for index in learn)
        if any(len(index.ends) for index in learn):
            vocabulary.train(chain.from_iterable(captions), folder / SENTENCEPIECE)
        bad.write(folder)
        write_checksums(folder)
    listed = f"; the bad ones are listed in {target / SKIPPED}" if bad else ""
    notes.report()
    print(f"{name}: {summary(found, writer.stored)}{listed}", file=sys.stderr)
    return target


def made_before(target: Path, source: str) -> bool:
    """Whether the data set `target` is there already, made as `source` says.

    Raises FileExistsError when it was made otherwise.
    """
    if not target.exists():
        return False
    made_as = open_dataset(target).metadata.get("source")
    if made_as != source:
        raise FileExistsError(
            f"{target} exists and was made otherwise: expected {source}, found {made_as}; "
            "remove it or choose another --name"
        )
    print(f"{target} exists and was made with these settings", file=sys.stderr)
    return True


def check_names(name: str, splits: Mapping[str, Any]) -> None:
    """Raises DataError for a name of a data set or of a split that a data set cannot have, and without splits."""
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
        raise DataError(f"data set name {name!r}: expected a letter, then letters, digits or underscores")
    refuse(not splits, f"data set {name!r}", "at least one split", "none")
    for split in splits:
        if not re.fullmatch(r"\w+", split, re.ASCII) or split == "all":
            raise DataError(f"split name {split!r}: expected letters, digits or underscores, and not 'all'")


@contextmanager
def whole_or_nothing(target: Path) -> Iterator[Path]:
    """Yields a hidden sibling folder that becomes `target` when the block succeeds, else is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.incomplete")
    if folder.exists():  # left by a run that was killed
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield folder
        if target.exists():
            replaced = target.with_name(f".{target.name}.replaced")
            target.rename(replaced)
            folder.rename(target)
            shutil.rmtree(replaced)
        else:
            folder.rename(target)
    finally:
        if folder.exists():
            shutil.rmtree(folder)


def _of_captions(name: str) -> bool:
    """Whether a field has a row for each caption of an image."""
    return schema.FIELDS[name].shape[:1] == (PER_CAPTION,)


class _Columns:
    """The fields of a split that become columns, while its records are written."""

    def __init__(self, folder: Path, split: str):
        self._folder, self._split = folder, split
        self._writers: dict[str, ColumnWriter] = {}

    def take_out(self, records: list[Record]) -> list[Record]:
        """Writes the columns' fields of these records; returns the records without them."""
        for name in COLUMNS:
            if records and name in records[0]:
                if name not in self._writers:
                    self._writers[name] = ColumnWriter(self._folder, name, self._split)
                join = np.concatenate if _of_captions(name) else np.stack
                self._writers[name].add(join([record[name] for record in records]))
        return [{name: value for name, value in record.items() if name not in COLUMNS} for record in records]

    def close(self) -> None:
        """Completes the files."""
        for writer in self._writers.values():
            writer.close()


class _Writer:
    """Writer of splits: the first record decides features and shard size; the rest must be like it."""

    def __init__(
        self,
        folder: Path,
        name: str,
        metadata: dict[str, Any],
        files: Files,
        progress: Progress,
        bad: BadRecords,
        least_captions: int,
    ):
        self._folder, self._name, self._metadata, self._files = folder, name, metadata, files
        self._progress, self._bad, self._least_captions = progress, bad, least_captions
        self._first: schema.Signature | None = None
        self._rows: dict[str, dict[str, int]] = {}  # split -> image id -> row
        self._tfds: tfds.core.SequentialWriter | None = None
        self.stored: dict[str, Stored] = {}

    def write(self, split: str, items: Iterable[Item]) -> Index:
        """Write a split and its sidecar."""
        rows = self._rows[split] = {}
        index = IndexBuilder(self._folder.parent)
        columns = _Columns(self._folder, split)
        chunk: list[Record] = []
        count = absent = captions = 0
        for row, item in enumerate(items):
            count = row + 1
            if isinstance(item, Bad) and item.asked:
                self._progress.count(left_out=True)
                absent += 1
                continue
            try:
                record = self._checked(item, split, row)
            except DataError as error:
                self._bad.add(error, split, row, item.image_id if isinstance(item, Bad) else item.get("image_id"))
                self._progress.count(left_out=True)
                if count == FIRST and not rows:
                    self._bad.check_split(split, count)
                continue
            identity = record.get("identity")
            index.add(record["image_id"], record["captions"], None if identity is None else int(identity))
            if self._tfds is None:
                self._first = schema.signature(record)
                self._tfds = self._open(record)
            if not rows:
                self._tfds.initialize_splits([split])
            rows[record["image_id"]] = row
            captions += len(record["captions"])
            chunk.append(schema.stored(record))
            if len(chunk) == _CHUNK:
                self._tfds.add_examples({split: columns.take_out(chunk)})
                chunk = []
            self._progress.count()
        self._bad.check_split(split, count)
        self.stored[split] = Stored(len(rows), captions, count - absent - len(rows), absent)
        refuse(not rows, f"split {split!r}", "at least one record", "none")
        assert self._tfds is not None  # set by the first record
        self._tfds.add_examples({split: columns.take_out(chunk)})
        self._tfds.close_splits([split])
        columns.close()
        built = index.build()
        write_index(self._folder, split, built)
        return built

    def _checked(self, item: Item, split: str, row: int) -> Record:
        """The record, if it may be written. Raises DataError when it may not."""
        if isinstance(item, Bad):
            raise item.error
        record = schema.close_void(item)
        where = f"split {split!r} row {row} (image {record.get('image_id')!r})"
        files = self._files.get(split, {})
        schema.check_record(record, where, files, least_captions=self._least_captions)
        if self._first is not None:
            schema.check_like(record, self._first, where, files)
        schema.check_predicates(record, self._metadata.get("predicates"), where, files)
        schema.check_new(record, self._rows[split], where, files)
        for other, rows in self._rows.items():
            if other != split and schema.leaks(other, split):
                schema.check_new(record, rows, where, files, other)
        return record

    def _open(self, record: Record) -> tfds.core.SequentialWriter:
        classes = schema.num_classes(record)
        if classes is not None:
            self._metadata["num_classes"] = classes
        names = self._metadata.get("class_names")
        if names is not None and classes is not None and len(names) != classes:
            raise DataError(f"metadata 'class_names': expected {classes} names, found {len(names)}")
        columns = {name: record[name] for name in COLUMNS if name in record}
        if columns:
            rows = {name: value if _of_captions(name) else value[None] for name, value in columns.items()}
            self._metadata["columns"] = column_description(rows)
        record = {name: value for name, value in record.items() if name not in columns}
        features = schema.features(record)
        size = len(features.serialize_example(schema.stored(record)))
        # A DatasetInfo without a builder class: nothing has to be importable to write or to read the set.
        identity = DatasetIdentity(
            name=self._name,
            version=tfds.core.Version(VERSION),
            data_dir=str(self._folder),
            module_name="data_prep.builder",
        )
        info = tfds.core.DatasetInfo(
            builder=identity,
            description=str(self._metadata.get("source", "")),
            features=features,
            metadata=tfds.core.MetadataDict(self._metadata),
            disable_shuffling=True,
        )
        writer = tfds.core.SequentialWriter(
            info, max_examples_per_shard=max(1, SHARD_BYTES // size), file_format="array_record"
        )
        writer._serializer = _SortedSerializer(features.get_serialized_info())  # TFDS has no public way to choose it
        return writer


class _SortedSerializer(ExampleSerializer):
    """Writes the fields of a record in sorted order, so that the same records give the same files in every process."""

    def serialize_example(self, example: Any) -> bytes:
        return self.get_tf_example(example).SerializeToString(deterministic=True)


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file of the version folder into its checksums.json."""
    sums = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != CHECKSUMS}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")
