"""Says whether a data set is usable: counts, values, duplicates, checksums, as a table for a human.

    shnet data verify DATA_DIR [--sample=N]

Exit status 0 when it is usable (there may be notes), 1 when it is not.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep import command, schema
from data_prep.bad_records import SKIPPED
from data_prep.schema import DataError
from data_prep.sources.units import narrow
from shnet_jax.data.checksums import CHECKSUMS, read_checksums, sha256
from shnet_jax.data.index import Index, index_file, read_index
from shnet_jax.data.records import SENTENCEPIECE, DataSet, open_dataset
from shnet_jax.data.schema import MASKS
from shnet_jax.data.tokenise import sentence_piece
from shnet_jax.observe.progress import Progress
from shnet_jax.observe.table import Table
from shnet_jax.paths import to_path
from shnet_jax.untrusted import inside

_SHOWN = 10  # problems of one kind that are printed


@dataclass
class Values:
    """Running statistics of a field."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    least: float = np.inf
    most: float = -np.inf
    zeros: int = 0

    def add(self, array: np.ndarray) -> None:
        """Count the values of one record in."""
        values = np.asarray(array, dtype=np.float64)
        if values.size:
            self.count += values.size
            self.total += float(values.sum())
            self.squares += float(np.square(values).sum())
            self.least = min(self.least, float(values.min()))
            self.most = max(self.most, float(values.max()))
            self.zeros += int(values.size - np.count_nonzero(values))

    @property
    def mean(self) -> float:
        """Mean of all values."""
        return self.total / self.count if self.count else np.nan

    @property
    def std(self) -> float:
        """Population standard deviation of all values."""
        return max(self.squares / self.count - self.mean**2, 0.0) ** 0.5 if self.count else np.nan

    @property
    def zero_share(self) -> float:
        """Share of zeros, 0..1."""
        return self.zeros / self.count if self.count else np.nan


@dataclass
class Report:
    """Findings about a data set. problems make a set unusable, notes do not."""

    dataset: DataSet
    read: dict[str, int] = field(default_factory=dict)
    captions: dict[str, np.ndarray] = field(default_factory=dict)  # of each image
    values: dict[str, Values] = field(default_factory=lambda: defaultdict(Values))
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(directory: str | Path, sample: int | None = None) -> Report:
    """Check a data set.

    Args:
      directory: as for `find_dataset`.
      sample: records of each split that are read, evenly spaced; None reads all.

    Raises:
      FileNotFoundError: no data set there.
    """
    report = Report(open_dataset(directory))
    _check_fields(report)
    _check_files(report)
    indices = {} if report.problems else _indices(report)
    if not report.problems:  # a damaged shard cannot be read
        _check_records(report, indices, sample)
        _check_ids(report, indices)
    return report


def _check_fields(report: Report) -> None:
    dataset = report.dataset
    missing = [name for name in ("image_id", "captions") if name not in dataset.features]
    if not any(name in dataset.features for name in schema.VISUAL_FIELDS):
        missing.append(" or ".join(schema.VISUAL_FIELDS))
    report.problems += [f"missing field: {name}" for name in missing]
    for name in MASKS:
        shape = dataset.features[name][0] if name in dataset.features else ()
        units, width = (size or 0 for size in shape) if len(shape) == 2 else (0, 0)
        if narrow(units, width):
            hint = "were its axes mixed up? --layout of the importers says how they lie"
            report.notes.append(f"field {name}: {units} units of width {width}: {hint}")
    unknown = set(dataset.features) - {*schema.FIELDS, *schema.TEXT_FIELDS}
    report.notes += [f"unknown field, ignored: {name}" for name in sorted(unknown)]
    if not dataset.splits:
        report.problems.append("no split")
    if "seg_map" in dataset.features and dataset.num_classes is None:
        report.notes.append("seg_map without num_classes in the metadata: its class ids are not checked")


def _check_files(report: Report) -> None:
    folder = report.dataset.path
    sums = read_checksums(folder)
    if not (folder / SENTENCEPIECE).is_file():
        report.notes.append(f"no {SENTENCEPIECE}")
    elif SENTENCEPIECE not in sums:
        try:
            sentence_piece(folder / SENTENCEPIECE)
        except ValueError as error:
            report.problems.append(str(error))
    if not sums:
        report.notes.append(f"no {CHECKSUMS}: files not compared")
    if (folder / SKIPPED).is_file():
        report.notes.append(f"{SKIPPED}: lists bad records that the import left out")
    for name, expected in sums.items():
        try:
            file = inside(folder, name)
        except ValueError as error:
            report.problems.append(str(error))
            continue
        if not file.is_file():
            report.problems.append(f"{name}: missing, listed in {CHECKSUMS}")
        elif (actual := sha256(file)) != expected:
            report.problems.append(f"{name}: expected sha256 {expected}, found {actual}")


def _indices(report: Report) -> dict[str, Index]:
    """The index of each split, from its sidecar or a pass over the records."""
    indices = {}
    for split in report.dataset.splits:
        try:
            if read_index(report.dataset.path, split) is None:
                report.notes.append(f"no captions in {index_file(split)}: found by reading the records")
            indices[split] = report.dataset.index(split)
        except ValueError as error:
            report.problems.append(str(error))
    return indices


def _check_records(report: Report, indices: Mapping[str, Index], sample: int | None) -> None:
    dataset = report.dataset
    fields = [name for name in (*schema.TEXT_FIELDS, *schema.FIELDS) if name in dataset.features]
    hashes: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    rows = {
        split: np.unique(np.linspace(0, size - 1, min(sample or size, size)).astype(int)).tolist()
        for split, size in dataset.splits.items()
    }
    progress = Progress(sum(map(len, rows.values())), what="verify", unit="records")
    for split, index in indices.items():
        records = dataset.open_split(split, fields)
        for row in rows[split]:
            progress.count()
            try:
                record = records[row]
            except DataError as error:
                report.problems.append(str(error))
                continue
            where = f"split {split!r} row {row} (image {record['image_id']!r})"
            report.problems += _differences(record, index, row, f"{where}: {index_file(split)}")
            try:
                schema.check_record(record, where, least_captions=0)
            except DataError as error:
                report.problems.append(str(error))
                continue
            _measure(report, record, where)
            hashes[_hash(record)].append((split, record["image_id"]))
        report.read[split], report.captions[split] = len(rows[split]), index.caption_counts
    for name, values in report.values.items():
        if values.count > 1 and values.least == values.most and not name.endswith("_mask"):
            report.notes.append(f"field {name}: every value is {values.least:g}")
    report.notes += [
        "identical visual fields: " + ", ".join(f"{split} {image_id}" for split, image_id in same)
        for same in hashes.values()
        if len(same) > 1 and len({image_id for _, image_id in same}) > 1
    ]


def _differences(record: schema.Record, index: Index, row: int, place: str) -> list[str]:
    expected = {"image_id": record["image_id"], "captions": record["captions"]}
    indexed = {"image_id": str(index.image_ids[row]), "captions": index.captions(row)}
    return [
        f"{place}: field {name!r}: expected {expected[name]!r}, found {indexed[name]!r}"
        for name in expected
        if expected[name] != indexed[name]
    ]


def _measure(report: Report, record: schema.Record, where: str) -> None:
    for name in schema.FIELDS:
        if name in record:
            report.values[name].add(record[name])
    report.notes += [
        f"{where}: field {name!r}: all zero"
        for name in ("regions", "grid", "image_embedding")
        if name in record and not record[name].any()
    ]


def _hash(record: schema.Record) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in schema.VISUAL_FIELDS:
        if name in record:
            digest.update(np.ascontiguousarray(record[name]).tobytes())
    return digest.digest()


def _check_ids(report: Report, indices: Mapping[str, Index]) -> None:
    splits: dict[str, list[str]] = defaultdict(list)
    for split, index in indices.items():
        for image_id in index.image_ids.tolist():
            splits[image_id].append(split)
    shared: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for image_id, found_in in splits.items():
        if len(found_in) > 1:
            shared[tuple(found_in)].append(image_id)
    for split, index in indices.items():
        if without := int((index.caption_counts == 0).sum()):
            text = f"split {split}: {without} of {len(index)} images have no caption: they are searched, not trained on"
            report.notes.append(text)
    captioned = [split for split, index in indices.items() if index.caption_counts.any()]
    if flags := schema.split_flags(captioned):
        report.notes.append(f"splits are called otherwise than train, val and test: name them by {' '.join(flags)}")
    for names, same in shared.items():
        line = f"{len(same)} images in {' and '.join(names)}, such as {same[0]!r}"
        serious = len(set(names)) < len(names) or schema.leaks(*names)
        (report.problems if serious else report.notes).append(line)


def text(report: Report) -> str:
    """The report as a human reads it."""
    dataset = report.dataset
    splits = []
    for split, size in dataset.splits.items():
        counts = report.captions.get(split)
        span = ("?", "?") if counts is None else (str(counts.sum()), f"{counts.min()}..{counts.max()}")
        splits.append((split, str(size), str(report.read.get(split, 0)), *span))
    fields = []
    for name in (*schema.TEXT_FIELDS, *schema.FIELDS):
        if name not in dataset.features:
            continue
        shape, dtype = dataset.features[name]
        cells = (name, ",".join("n" if s is None else str(s) for s in shape) or "-", _dtype_name(dtype))
        values = report.values.get(name)
        if values is None:
            fields.append((*cells, *"-----"))
        else:
            numbers = (values.mean, values.std, values.least, values.most)
            fields.append((*cells, *(f"{number:.4g}" for number in numbers), f"{100 * values.zero_share:.1f}%"))
    known = "" if dataset.num_classes is None else f"classes: {dataset.num_classes}   "
    parts = [
        f"{dataset.path}",
        f"{known}source: {dataset.metadata.get('source', '?')}",
        Table("Splits", ("split", "records", "read", "captions", "an image"), splits).plain(),
        Table("Fields", ("field", "shape", "dtype", "mean", "std", "min", "max", "zeros"), fields).plain(),
        _listed("note", report.notes),
        _listed("problem", report.problems),
        f"not usable: {len(report.problems)} problems" if report.problems else "usable",
    ]
    return "\n\n".join(part for part in parts if part)


def _dtype_name(dtype: np.dtype) -> str:
    return "text" if dtype.kind == "U" else dtype.name


def _listed(kind: str, lines: Sequence[str]) -> str:
    shown = [f"{kind}: {line}" for line in lines[:_SHOWN]]
    if len(lines) > _SHOWN:
        shown.append(f"{kind}: and {len(lines) - _SHOWN} more")
    return "\n".join(shown)


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("verify", __doc__)
    parser.add_argument("directory", type=to_path, help="a data set, or a folder that holds only one")
    parser.add_argument("--sample", type=command.at_least(1), help="records of each split that are read; default: all")
    args = parser.parse_args(argv)
    report = verify(args.directory, args.sample)
    print(text(report))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
