"""Encodes the captions of a data set with a frozen text model: a copy of it that has caption_embeddings.

    shnet data encode_captions DATA_DIR --text_encoder=minilm --name=NAME --out=DATA_DIR [--pooling=mean|cls|last|model]

A BERT (minilm, sentence-transformers folders too) runs in JAX, any other model of transformers in PyTorch, which needs:
pip install -e '.[extract]'. A killed run goes on where it was. Records are linked, not copied, where the disk can.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import command
from data_prep.builder import VERSION, check_names, whole_or_nothing, write_checksums
from data_prep.files import open_array
from data_prep.schema import DataError, refuse
from shnet_jax.data.checksums import CHECKSUMS
from shnet_jax.data.columns import ColumnWriter, column_description
from shnet_jax.data.records import DataSet, open_dataset
from shnet_jax.data.schema import VECTOR_DTYPES, dtype_of
from shnet_jax.interop.sentence_vectors import Description, SentenceEncoder, describe
from shnet_jax.observe.files import atomic_path, disk_faults, sole_writer, write_json
from shnet_jax.observe.progress import Progress
from shnet_jax.untrusted import read_object

FIELD = "caption_embeddings"
BLOCK = 4096
"""Captions of a block: a killed run loses at most what it did of one."""
_SLICE = 128  # captions between two looks at the clock, unless a batch has more
_SOURCE, _INFO = "source.json", "dataset_info.json"
_POOLINGS = ("mean", "cls", "last", "model")

Encode = Callable[[Sequence[str]], np.ndarray]


def open_encoder(name: str, pooling: str, max_tokens: int, device: str, batch_size: int) -> tuple[Description, Encode]:
    """A text model and what its vectors depend on: in JAX where it is a BERT that we have, else in PyTorch.

    Raises DataError for a model that is not there or not followed, and without the packages that it needs.
    """
    try:
        if pooling in ("", "mean", "cls"):
            try:
                described = describe(name, pooling, max_tokens)
                return described, SentenceEncoder(described, batch_size).encode
            except (FileNotFoundError, ValueError) as error:
                if name == "minilm":
                    raise
                print(f"{name} in PyTorch: {error}", file=sys.stderr)
        try:
            from data_prep.extract.texts import TextModel
        except ImportError as error:
            raise DataError(f"{name} needs PyTorch and transformers ({error}): pip install -e '.[extract]'") from error
        model = TextModel(name, pooling, max_tokens, device, batch_size)
        return model.description, model.encode
    except (FileNotFoundError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(str(error)) from error


def encode_captions(
    directory: Path,
    name: str,
    out: Path,
    described: Description,
    encode: Encode,
    *,
    dtype: str,
    overwrite: bool,
    batch_size: int = 32,
) -> Path:
    """Writes the copy and returns its version folder, which appears only when whole.

    overwrite: replace a data set of that name; it may be the one whose captions are encoded.
    batch_size: captions that `encode` takes at once.
    """
    dataset, target = open_dataset(directory), out / name / VERSION
    check_names(name, dataset.splits)
    if target.exists() and not overwrite:
        raise FileExistsError(f"data set {target} exists; give another --name, or --overwrite to replace it")
    if FIELD in dataset.features and FIELD not in dataset.columns:
        raise DataError(f"{dataset.path}: has {FIELD} in its records already: import it again without")
    folder = out / f".{name}.encode_captions"
    with sole_writer(folder), disk_faults(folder):
        _begin(folder, dataclasses.asdict(described) | {"dtype": dtype, "captions": _digest(dataset)})
        progress = Progress(_count(dataset), what=name, unit="captions")
        for split in dataset.splits:
            _encode_split(folder, dataset, split, encode, dtype, progress, max(_SLICE, batch_size))
        progress.close()
        with sole_writer(target.parent), whole_or_nothing(target) as staging:
            _assemble(folder, dataset, name, staging, described)
    shutil.rmtree(folder)
    return target


def _begin(folder: Path, source: dict[str, Any]) -> None:
    """Starts a folder of blocks, or goes on with one of the same source."""
    path = folder / _SOURCE
    if path.is_file():
        try:
            stored = read_object(path)
        except ValueError as error:
            raise DataError(f"{error}; remove the folder {folder} to begin anew") from None
        pairs = {key: (stored.get(key), value) for key, value in source.items() if stored.get(key) != value}
        differ = ", ".join(f"{key}: {there!r} there, {here!r} here" for key, (there, here) in pairs.items())
        if differ:
            raise DataError(
                f"{folder}: blocks of a run with other settings ({differ}); remove the folder to begin anew"
            )
    else:
        write_json(path, source)
    (folder / "blocks").mkdir(exist_ok=True)


def _digest(dataset: DataSet) -> str:
    """SHA-256 of all captions in order, which the blocks belong to wherever the data set lies."""
    digest = hashlib.sha256(str(BLOCK).encode())
    for split in dataset.splits:
        for captions in _blocks(dataset, split):
            digest.update(json.dumps([split, captions]).encode())
    return digest.hexdigest()


def _count(dataset: DataSet) -> int:
    return sum(int(dataset.caption_counts(split).sum()) for split in dataset.splits)


def _blocks(dataset: DataSet, split: str) -> Iterator[list[str]]:
    """The captions of a split, BLOCK at a time."""
    waiting: list[str] = []
    for captions in dataset.captions(split):
        waiting += captions
        while len(waiting) >= BLOCK:
            yield waiting[:BLOCK]
            waiting = waiting[BLOCK:]
    if waiting:
        yield waiting


def _block(folder: Path, split: str, number: int) -> Path:
    return folder / "blocks" / f"{split}-{number:07d}.npy"


def _count_all(progress: Progress, captions: Sequence[str]) -> None:
    for _ in captions:
        progress.count()


def _encode_split(
    folder: Path, dataset: DataSet, split: str, encode: Encode, dtype: str, progress: Progress, most: int
) -> None:
    """Encodes the blocks that are not done, each written whole or not at all. most: captions handed over at once."""
    for number, captions in enumerate(_blocks(dataset, split)):
        path = _block(folder, split, number)
        if path.is_file():
            _count_all(progress, captions)
        else:
            parts = []
            for start in range(0, len(captions), most):
                parts.append(encode(captions[start : start + most]))
                _count_all(progress, captions[start : start + most])
            vectors = np.concatenate(parts)
            with np.errstate(over="ignore"):  # refused below
                cast = vectors.astype(dtype_of(dtype))
            if not np.isfinite(cast.astype(np.float32)).all():
                wider = "; --text_dtype=float32 holds them" if np.isfinite(vectors).all() else ""
                raise DataError(
                    f"split {split!r}, block {number}: expected finite vectors, found NaN or infinity in {dtype}{wider}"
                )
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, cast.view(np.uint16) if dtype == "bfloat16" else cast)


def _assemble(folder: Path, dataset: DataSet, name: str, staging: Path, described: Description) -> None:
    """Links the files of the data set into the folder `staging`, writes new columns, metadata and checksums there.

    Raises DataError for a copy that cannot be read.
    """
    info = read_object(dataset.path / _INFO)
    before = f"{info['name']}-"  # TFDS finds records by the name of the data set, not of its folder
    for path in sorted(dataset.path.iterdir()):
        if path.name in (CHECKSUMS, _INFO, "metadata.json") or path.name.startswith(f"{FIELD}_"):
            continue
        renamed = path.name.startswith(before)
        link(path, staging / (f"{name}-{path.name.removeprefix(before)}" if renamed else path.name))
    write_json(staging / _INFO, info | {"name": name})
    columns: dict[str, Any] = {}
    for split in dataset.splits:
        writer = ColumnWriter(staging, FIELD, split)
        for number, captions in enumerate(_blocks(dataset, split)):
            path = _block(folder, split, number)
            rows = open_array(path)
            refuse(len(rows) != len(captions), path, f"{len(captions)} rows, one a caption", len(rows))
            rows = rows.view(dtype_of("bfloat16")) if rows.dtype == np.uint16 else rows
            writer.add(rows)
            columns = column_description({FIELD: rows})
        writer.close()
    kept = dict(dataset.metadata.get("columns", {})) | columns
    metadata = dict(dataset.metadata) | {"columns": kept, "text_encoder": dataclasses.asdict(described)}
    write_json(staging / "metadata.json", metadata)
    write_checksums(staging)
    _check_copy(dataset, staging)


def _check_copy(dataset: DataSet, staging: Path) -> None:
    """Reads the first and the last record of each split. Raises DataError where they are not those of the original."""
    copy = open_dataset(staging)
    refuse(copy.splits != dataset.splits, staging, dict(dataset.splits), dict(copy.splits))
    for split, count in copy.splits.items():
        fields = ("image_id", "captions")
        old, new = dataset.open_split(split, fields), copy.open_split(split, (*fields, FIELD))
        for number in {0, count - 1} if count else ():
            try:
                record = new[number]
            except (ValueError, OSError) as error:
                raise DataError(f"{staging}: the copy cannot be read: {error}") from error
            same = all(record[name] == old[number][name] for name in fields)
            refuse(not same, f"{staging}: split {split!r}, record {number}", "that of the original", record["image_id"])


def link(source: Path, target: Path) -> None:
    """Another name of a file, or a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def add_encoder_arguments(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """The flags that choose a text model."""
    name = "minilm, a folder or the name of a transformers model: encodes the captions"
    parser.add_argument("--text_encoder", required=required, default="", help=name)
    parser.add_argument("--pooling", choices=_POOLINGS, default="", help="of it; default: as its folder says, or kind")
    parser.add_argument("--max_tokens", type=command.at_least(3), default=0, help="longer captions are cut")
    parser.add_argument("--text_encoder_sha256", default="", help="of its weights: an error where they are others")
    parser.add_argument("--text_dtype", choices=VECTOR_DTYPES, default="float16", help="that its vectors are stored in")


def chosen_encoder(args: argparse.Namespace, batch_size: int = 32) -> tuple[Description, Encode]:
    """The text model that the flags of `add_encoder_arguments` and `--device` choose; says its SHA-256."""
    described, encode = open_encoder(args.text_encoder, args.pooling, args.max_tokens, args.device, batch_size)
    sha, wanted = described.sha256, args.text_encoder_sha256.lower()
    refuse(wanted and wanted != sha, f"{described.encoder}: sha256 of its weights", wanted, sha)
    print(f"{described.encoder}: {described.pooling} pooling, sha256 of its weights {sha}", file=sys.stderr)
    return described, encode


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("encode_captions", __doc__)
    parser.add_argument("directory", type=Path, help="the data set")
    add_encoder_arguments(parser, required=True)
    parser.add_argument("--batch_size", type=command.at_least(1), default=32, help="captions at once")
    parser.add_argument("--device", default="", help="of PyTorch; default: a GPU if there is one")
    parser.add_argument("--name", required=True, help="name of the data set to write")
    parser.add_argument("--out", type=Path, required=True, help="folder that holds data sets")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set of that name")
    args: argparse.Namespace = parser.parse_args(argv)
    check_names(args.name, {"train": ()})  # before a model is loaded
    batch_size = min(args.batch_size, BLOCK)  # no more come together; JAX fills up smaller batches
    described, encode = chosen_encoder(args, batch_size)
    options = {"dtype": args.text_dtype, "overwrite": args.overwrite, "batch_size": batch_size}
    print(encode_captions(args.directory, args.name, args.out, described, encode, **options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
