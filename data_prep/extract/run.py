"""The steps that every way of running an extraction shares: flags, plan, the work itself, the data set."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep import captions, coco_panoptic, command, join
from data_prep.builder import VERSION, write_dataset
from data_prep.counts import Found
from data_prep.extract import blocks, settings
from data_prep.extract.blocks import Block
from data_prep.extract.settings import Settings
from data_prep.progress import Progress
from data_prep.schema import DataError


@dataclass(frozen=True)
class Work:
    """An extraction: its settings and all of its blocks, whose files lie in `folder`."""

    settings: Settings
    folder: Path
    blocks: list[Block]
    found: Found

    def pending(self) -> list[Block]:
        """The blocks that are not done."""
        return [block for block in self.blocks if not block.path.is_file()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of an extraction."""
    join.add_arguments(parser)
    settings.add_arguments(parser)
    parser.add_argument("--batch_size", type=command.at_least(1), default=8, help="photographs at once")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    parser.add_argument(
        "--broken", choices=("skip", "fail"), default="skip", help="a photograph that cannot be read: skip it or fail"
    )


def prepare(args: argparse.Namespace) -> Work:
    """Read the captions and plan the blocks. Raises DataError, FileExistsError before any work is done."""
    target = args.out / args.name / VERSION
    if target.exists() and not args.overwrite:
        raise FileExistsError(f"data set {target} exists; choose another name or ask to overwrite it")
    chosen = settings.from_arguments(args)
    folder = args.out / f".{args.name}.extract"
    splits = captions.read(args.captions, args.split_lists, strict=args.on_bad_record == "fail")
    return Work(chosen, folder, blocks.plan(folder, chosen, splits), splits.found)


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
        blocks.extract(block, work.settings.images, extractor, args.batch_size, policy, progress.step)
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
