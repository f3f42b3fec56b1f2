"""The steps that every way of running an extraction shares: flags, plan, the work itself, the data set."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep import captions, coco_panoptic, command, join
from data_prep.builder import VERSION, write_dataset
from data_prep.counts import Found
from data_prep.extract import blocks, settings
from data_prep.extract.blocks import Block
from data_prep.extract.images import Folder, Photographs
from data_prep.extract.settings import Settings
from data_prep.extract.tables import Tables
from data_prep.extract.tars import Tars
from data_prep.names import EXTENSIONS
from data_prep.progress import Progress
from data_prep.schema import DataError


@dataclass(frozen=True)
class Work:
    """An extraction: its settings, its photographs and all of its blocks, whose files lie in `folder`."""

    settings: Settings
    photographs: Photographs
    folder: Path
    blocks: list[Block]
    found: Found

    def pending(self) -> list[Block]:
        """The blocks that are not done."""
        return [block for block in self.blocks if not block.path.is_file()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of an extraction."""
    join.add_arguments(parser, captions_required=False)
    settings.add_arguments(parser)
    inside = parser.add_argument_group("captions inside of --images (tars, Parquet), without --captions")
    inside.add_argument("--split", help="of images for which neither a column nor the name of a file tells")
    inside.add_argument("--caption_from", choices=("txt", "json"), help="of a tar whose KEY.txt and KEY.json differ")
    parser.add_argument("--batch_size", type=command.at_least(1), default=8, help="photographs at once")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    parser.add_argument(
        "--broken", choices=("skip", "fail"), default="skip", help="a photograph that cannot be read: skip it or fail"
    )


def open_photographs(path: Path, caption_from: str | None = None) -> Photographs:
    """What --images names: a folder of photographs, or a tar, a Parquet file or a folder of them.

    Raises DataError where there is no such thing; a folder counts as one of tars, then of Parquet files, when it has
    any, and no photographs beside them.
    """
    if path.is_file():
        found = {path.suffix.lower(): [path]}
    elif path.is_dir():
        found = {suffix: sorted(path.rglob(f"*{suffix}"), key=_by_number) for suffix in (".tar", ".parquet")}
        if any(entry.suffix.lower() in EXTENSIONS for entry in path.iterdir()):
            found = {}
    else:
        raise DataError(f"{path}: no such folder or file")
    if found.get(".tar"):
        return Tars(found[".tar"], path, caption_from)
    if found.get(".parquet"):
        return Tables(found[".parquet"], path)
    if path.is_file():
        raise DataError(f"{path}: expected a folder of photographs, a .tar or a .parquet, found another file")
    return Folder(path)


def _by_number(path: Path) -> list[tuple[int, str]]:
    """2.tar before 10.tar."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", str(path))]


def prepare(args: argparse.Namespace) -> Work:
    """Read the captions and plan the blocks. Raises DataError, FileExistsError before any work is done."""
    target = args.out / args.name / VERSION
    if target.exists() and not args.overwrite:
        raise FileExistsError(f"data set {target} exists; choose another name or ask to overwrite it")
    chosen = settings.from_arguments(args)
    folder = args.out / f".{args.name}.extract"
    strict = args.on_bad_record == "fail"
    photographs = open_photographs(chosen.images, args.caption_from)
    if args.captions:
        if given := [f"--{name}" for name in ("split", "caption_from") if getattr(args, name)]:
            raise DataError(f"{' and '.join(given)}: belongs to captions inside of --images, not to --captions")
        splits = captions.read(args.captions, args.split_lists, strict=strict)
    else:
        splits = captions.gather(photographs.rows(args.split), args.split_lists, chosen.images, strict=strict)
    return Work(chosen, photographs, folder, blocks.plan(folder, chosen, splits), splits.found)


def on_broken(policy: str) -> Callable[[str], None]:
    """What to do with the name and reason of a photograph that cannot be read."""

    def report(text: str) -> None:
        if policy == "fail":
            raise DataError(f"broken image {text}; --broken=skip leaves such images out")
        print(f"broken image, skipped: {text}", file=sys.stderr, flush=True)

    return report


def load_extractor(chosen: Settings, device: str) -> blocks.Extract:
    """The models. Raises DataError that says how to install what they need."""
    try:
        from data_prep.extract.fields import Extractor
    except ImportError as error:
        raise DataError(f"extraction needs PyTorch and transformers ({error}): pip install -e '.[extract]'") from error
    return Extractor(chosen, device)


def extract_here(work: Work, args: argparse.Namespace) -> None:
    """Do the blocks that are not done, in this process."""
    pending = work.pending()
    if not pending:
        return
    left, total = (sum(len(block.items) for block in some) for some in (pending, work.blocks))
    if left < total:
        print(f"extract: going on after {total - left} of {total} photographs", file=sys.stderr)
    extractor = load_extractor(work.settings, args.device)
    progress = Progress("extract", left)

    for block in pending:
        policy = on_broken(args.broken)
        blocks.extract(block, work.photographs, extractor, args.batch_size, policy, progress.step)
    progress.close()


def build(work: Work, args: argparse.Namespace) -> Path:
    """Write the data set from the blocks, all done, and delete them; returns the version folder."""
    skipped = blocks.skipped(work.blocks)
    if skipped:
        print(
            f"extract: left out {len(skipped)} photographs that cannot be read: {', '.join(skipped)}", file=sys.stderr
        )
    chosen = work.settings
    models = " and ".join(name for name in (chosen.segmenter, chosen.backbone) if name)
    metadata = {"source": args.source or f"data_prep.extract with {models}", "skipped": skipped}
    if chosen.segmenter:
        metadata["class_names"] = list(coco_panoptic.NAMES)
    splits = {
        split: blocks.records(list(group), chosen.feature_dtype)
        for split, group in itertools.groupby(work.blocks, lambda block: block.split)
    }
    left_out = {**work.found.left_out, **({"broken photographs": skipped} if skipped else {})}
    found = replace(work.found, left_out=left_out)
    path = write_dataset(
        args.out,
        args.name,
        splits,
        metadata,
        total=found.records,
        found=found,
        overwrite=args.overwrite,
        on_bad_record=args.on_bad_record,
    )
    blocks.remove(work.folder)
    return path
