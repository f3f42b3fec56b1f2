"""Writes a data set from records and what other tools made of the same photographs, joined by image id."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from data_prep import captions, command, parts, schema
from data_prep.bad_records import Policy
from data_prep.builder import Files, Item, write_dataset
from data_prep.counts import Found
from data_prep.sources.base import Joined, Source
from shnet_jax.paths import to_paths


class Writing(TypedDict, total=False):
    """The options of `write_joined` that importers take as flags and pass on.

    source: how the data was made; "" for the importer's own words. sources: what is joined by image id.
    feature_dtype: what features are cast to, None keeps theirs. The others: see `builder.write_dataset` and `Joined`.
    """

    source: str
    sources: Sequence[Source]
    feature_dtype: str | None
    skip_absent: bool
    overwrite: bool
    on_bad_record: Policy


def write_joined(
    splits: Mapping[str, Iterable[Item]],
    name: str,
    out: Path,
    *,
    origin: str,
    found: Found,
    files: Files,
    metadata: Mapping[str, Any] | None = None,
    **writing: Unpack[Writing],
) -> Path:
    """Write a data set of the records of each split with the fields of its sources added; returns the version folder.

    origin: importer and name of what it reads, which the metadata say where `writing` has no source.
    """
    sources, policy = writing.get("sources", ()), writing.get("on_bad_record", "fail")
    dtype, skip_absent = writing.get("feature_dtype", "float16"), writing.get("skip_absent", False)
    joined = {field: file for part in sources for field, file in part.files.items()}
    known = {"source": writing.get("source") or f"data_prep.{origin}", **(metadata or {})}
    return write_dataset(
        out,
        name,
        {split: Joined(items, sources, split, dtype, skip_absent) for split, items in splits.items()},
        {**known, **{key: value for part in sources for key, value in part.metadata.items()}},
        files={split: {**joined, **files.get(split, {})} for split in splits},
        total=found.records,
        found=found,
        overwrite=writing.get("overwrite", False),
        on_bad_record=policy,
    )


def add_arguments(parser: argparse.ArgumentParser, captions_required: bool = True) -> None:
    """The flags of what starts from captions: where they are, and the data set to write."""
    captions.add_arguments(parser, captions_required)
    add_writing_arguments(parser)


def add_writing_arguments(parser: argparse.ArgumentParser, *dtypes: str) -> None:
    """The flags of the data set to write; dtypes: what --feature_dtype may say beside FEATURE_DTYPES."""
    command.add_writing_arguments(parser)
    choices = (*dtypes, *schema.FEATURE_DTYPES)
    parser.add_argument("--feature_dtype", choices=choices, default="float16", help="dtype that features are stored in")
    parser.add_argument("--source", default="", help="how the data was made, kept in the metadata")


def writing_options(args: argparse.Namespace, also: Collection[str] = ()) -> Writing:
    """The flags of `add_writing_arguments` and `parts.add_arguments`; also: see `parts.open_sources`."""
    return {
        "source": args.source,
        "sources": parts.open_sources(args, also),
        "feature_dtype": None if args.feature_dtype == "keep" else args.feature_dtype,
        "skip_absent": args.absent == "skip",
        "overwrite": args.overwrite,
        "on_bad_record": args.on_bad_record,
    }


def importer(module: str, kind: str, doc: str | None) -> Callable[..., int]:
    """The `main(argv)` of `shnet data MODULE`, which needs the flag --KIND of `parts`."""

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
        args.name,
        args.out,
        origin=f"{module} of {to_paths(getattr(args, kind))[0].name}",
        found=splits.found,
        files={split: {"captions": args.captions} for split in splits},
        **writing_options(args),
    )
    print(path)
    return 0
