"""Writes a data set from records and what other tools made of the same photographs, joined by image id."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep import captions, command, parts, schema
from data_prep.bad_records import Policy
from data_prep.builder import Files, Item, write_dataset
from data_prep.counts import Found
from data_prep.sources.base import Joined, Source
from shnet_jax.paths import to_path, to_paths


def write_joined(
    splits: Mapping[str, Iterable[Item]],
    sources: Sequence[Source],
    name: str,
    out: Path,
    *,
    metadata: Mapping[str, Any],
    found: Found,
    files: Files | None = None,
    feature_dtype: str | None = "float16",
    skip_absent: bool = False,
    overwrite: bool = False,
    on_bad_record: Policy = "fail",
) -> Path:
    """Write a data set of the records of each split with the fields of `sources` added; returns the version folder.

    See `builder.write_dataset` and `Joined` for the arguments; the metadata of the sources is added to `metadata`.
    """
    records = {split: Joined(items, sources, split, feature_dtype, skip_absent) for split, items in splits.items()}
    joined = {field: file for part in sources for field, file in part.files.items()}
    all_files = {split: {**joined, **(files or {}).get(split, {})} for split in splits}
    known = {**metadata, **{key: value for part in sources for key, value in part.metadata.items()}}
    return write_dataset(
        out,
        name,
        records,
        known,
        files=all_files,
        total=found.records,
        found=found,
        overwrite=overwrite,
        on_bad_record=on_bad_record,
    )


def add_arguments(parser: argparse.ArgumentParser, captions_required: bool = True) -> None:
    """The flags of what starts from captions: where they are, and the data set to write."""
    captions.add_arguments(parser, captions_required)
    parser.add_argument("--name", required=True, help="name of the data set")
    parser.add_argument("--out", type=to_path, required=True, help="folder that holds data sets")
    parser.add_argument(
        "--feature_dtype", choices=schema.FEATURE_DTYPES, default="float16", help="dtype that features are stored in"
    )
    parser.add_argument("--source", default="", help="how the data was made, kept in the metadata")
    command.add_writing_arguments(parser)


def importer(module: str, kind: str, doc: str | None) -> Callable[..., int]:
    """The `main(argv)` of `python -m data_prep.MODULE`, which needs the flag --KIND of `parts`."""

    @command.reports_errors
    def main(argv: Sequence[str] | None = None) -> int:
        return _run(module, kind, doc, argv)

    return main


def _run(module: str, kind: str, doc: str | None, argv: Sequence[str] | None) -> int:
    parser = command.parser(module, doc)
    add_arguments(parser)
    parts.add_arguments(parser, required=kind)
    args = parser.parse_args(argv)
    splits = captions.read(args.captions, args.split_lists, strict=args.on_bad_record == "fail")
    path = write_joined(
        {split: [item.record() for item in items] for split, items in splits.items()},
        parts.open_sources(args),
        args.name,
        args.out,
        metadata={"source": args.source or f"data_prep.{module} of {to_paths(getattr(args, kind))[0].name}"},
        found=splits.found,
        files={split: {"captions": args.captions} for split in splits},
        feature_dtype=args.feature_dtype,
        skip_absent=args.absent == "skip",
        overwrite=args.overwrite,
        on_bad_record=args.on_bad_record,
    )
    print(path)
    return 0
