"""Encodes the captions of a data set with a frozen text model: a copy of it that has caption_embeddings.

    shnet data encode_captions DATA_DIR --text_encoder=minilm --name=NAME --out=DATA_DIR [--pooling=mean|cls|last|model]

A BERT (minilm, sentence-transformers folders too) runs in JAX, any other model of transformers in PyTorch, which needs:
pip install -e '.[extract]'. A killed run goes on where it was. Records are linked, not copied, where the disk can.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import command
from data_prep.builder import VERSION, write_checksums
from data_prep.schema import DataError, refuse
from shnet_jax.data.checksums import CHECKSUMS
from shnet_jax.data.columns import ColumnWriter, column_description
from shnet_jax.data.records import DataSet, open_dataset
from shnet_jax.data.schema import VECTOR_DTYPES, dtype_of
from shnet_jax.interop.sentence_vectors import Description, SentenceEncoder, describe
from shnet_jax.observe.files import atomic_path, disk_faults, sole_writer
from shnet_jax.observe.progress import Progress
from shnet_jax.untrusted import read_object

FIELD = "caption_embeddings"
BLOCK = 4096
"""Captions of a block: a killed run loses at most what it did of one."""
_SLICE = 128  # captions between two looks at the clock
_SOURCE = "source.json"
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
    directory: Path, name: str, out: Path, described: Description, encode: Encode, *, dtype: str, overwrite: bool
) -> Path:
    """Writes the copy and returns its version folder, which appears only when whole.

    overwrite: replace a data set of that name; it may be the one whose captions are encoded.
    """
    dataset, target = open_dataset(directory), out / name / VERSION
    if target.exists() and not overwrite:
        raise FileExistsError(f"data set {target} exists; choose another name or ask to overwrite it")
    if FIELD in dataset.features and FIELD not in dataset.columns:
        raise DataError(f"{dataset.path}: has {FIELD} in its records already: import it again without")
    folder = out / f".{name}.encode_captions"
    with sole_writer(folder), disk_faults(folder):
        source = dataclasses.asdict(described) | {"dataset": str(dataset.path.resolve()), "dtype": dtype}
        _begin(folder, source)
        progress = Progress(_count(dataset), what=name, unit="captions")
        for split in dataset.splits:
            _encode_split(folder, dataset, split, encode, dtype, progress)
        progress.close()
        _assemble(folder, dataset, name, target, described)
    shutil.rmtree(folder)
    return target


def _begin(folder: Path, source: dict[str, Any]) -> None:
    """Starts a folder of blocks, or goes on with one of the same source."""
    path = folder / _SOURCE
    if path.is_file() and (stored := read_object(path)) != source:
        differ = ", ".join(f"{key}: {stored.get(key)!r} there, {source[key]!r} here" for key in source)
        raise DataError(f"{folder}: blocks of a run with other settings ({differ}); remove the folder to begin anew")
    (folder / "blocks").mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(source), encoding="utf-8")


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


def _encode_split(folder: Path, dataset: DataSet, split: str, encode: Encode, dtype: str, progress: Progress) -> None:
    """Encodes the blocks that are not done, each written whole or not at all."""
    for number, captions in enumerate(_blocks(dataset, split)):
        path = _block(folder, split, number)
        if path.is_file():
            _count_all(progress, captions)
        else:
            parts = []
            for start in range(0, len(captions), _SLICE):
                parts.append(encode(captions[start : start + _SLICE]))
                _count_all(progress, captions[start : start + _SLICE])
            vectors = np.concatenate(parts)
            refuse(
                not np.isfinite(vectors).all(), f"split {split!r}, block {number}", "finite vectors", "NaN or infinity"
            )
            cast = vectors.astype(dtype_of(dtype))
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, cast.view(np.uint16) if dtype == "bfloat16" else cast)


def _assemble(folder: Path, dataset: DataSet, name: str, target: Path, described: Description) -> None:
    """Links the files of the data set, writes the new columns, metadata and checksums, and moves all to its place."""
    whole = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir(parents=True)
    renamed = dataset.path.parent.name
    for path in sorted(dataset.path.iterdir()):
        if path.name in (CHECKSUMS, "metadata.json") or path.name.startswith(f"{FIELD}_"):
            continue
        link(path, whole / path.name.replace(f"{renamed}-", f"{name}-", 1))
    info = read_object(whole / "dataset_info.json")
    (whole / "dataset_info.json").unlink()  # a link: the original stays as it is
    (whole / "dataset_info.json").write_text(json.dumps(info | {"name": name}, indent=2), encoding="utf-8")
    columns: dict[str, Any] = {}
    for split in dataset.splits:
        writer = ColumnWriter(whole, FIELD, split)
        for number, _ in enumerate(_blocks(dataset, split)):
            rows = np.load(_block(folder, split, number), allow_pickle=False)
            rows = rows.view(dtype_of("bfloat16")) if rows.dtype == np.uint16 else rows
            writer.add(rows)
            columns = column_description({FIELD: rows})
        writer.close()
    kept = dict(dataset.metadata.get("columns", {})) | columns
    metadata = dict(dataset.metadata) | {"columns": kept, "text_encoder": dataclasses.asdict(described)}
    (whole / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    write_checksums(whole)
    replaced = target.with_name(f".{target.name}.replaced")
    if target.exists():
        target.rename(replaced)
    whole.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


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
    described, encode = chosen_encoder(args, args.batch_size)
    options = {"dtype": args.text_dtype, "overwrite": args.overwrite}
    print(encode_captions(args.directory, args.name, args.out, described, encode, **options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
