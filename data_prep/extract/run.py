"""The steps that every way of running an extraction shares: flags, plan, the work itself, the data set."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep import captions, coco_panoptic, command, join, rows
from data_prep.builder import VERSION, write_dataset
from data_prep.counts import Found
from data_prep.extract import blocks, settings, tables, tars
from data_prep.extract.blocks import Block
from data_prep.extract.images import Folder, Photographs
from data_prep.extract.settings import Settings
from data_prep.extract.tables import Tables
from data_prep.extract.tars import Tars
from data_prep.names import EXTENSIONS
from data_prep.places import Place, Recognised, look, missing, split_of
from data_prep.schema import DataError
from data_prep.sources.panoptic import is_label_map
from shnet_jax.observe.progress import Progress


@dataclass(frozen=True)
class Work:
    """An extraction: its settings, its photographs and all of its blocks, whose files lie in `folder`.

    built: the data set is there already, and what follows was interrupted.
    """

    settings: Settings
    photographs: Photographs
    folder: Path
    blocks: list[Block]
    found: Found
    built: bool = False

    @property
    def least_captions(self) -> int:
        """Captions that every record has: 1; 0 where there are photographs without."""
        return min(min(1, len(item.captions) or len(item.fault)) for block in self.blocks for item in block.items)

    def pending(self) -> list[Block]:
        """The blocks that are not done."""
        return [block for block in self.blocks if not block.path.is_file()]

    def begun(self) -> dict[str, str] | None:
        """The models of the blocks that are done, see `blocks.models`; None without any."""
        return next((blocks.models(block) for block in self.blocks if block.path.is_file()), None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of an extraction."""
    join.add_arguments(parser, captions_required=False)
    settings.add_arguments(parser)
    inside = parser.add_argument_group("without --captions: those inside of --images (tars, Parquet), or none")
    inside.add_argument(
        "--split",
        help=f"of images for which neither a column nor the name of a file tells; {UNCAPTIONED} without captions",
    )
    inside.add_argument("--caption_from", choices=("txt", "json"), help="of a tar whose KEY.txt and KEY.json differ")
    parser.add_argument("--batch_size", type=command.at_least(1), default=8, help="photographs at once")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    parser.add_argument(
        "--broken", choices=("skip", "fail"), default="skip", help="a photograph that cannot be read: skip it or fail"
    )


def open_photographs(path: Path, caption_from: str | None = None) -> Photographs:
    """Opens the photographs that --images names: a folder of them, or a tar, a Parquet file or a folder of such files.

    Raises DataError where there is no such thing; a folder counts as one of tars, then of Parquet files, when it has
    any, and no photographs beside them. Of Parquet files beside tars only those of img2dataset, 00000.parquet of
    00000.tar, are passed over.
    """
    if not path.exists():
        raise DataError(f"{path}: no such folder or file")
    if path.is_dir() and any(entry.suffix.lower() in EXTENSIONS for entry in path.iterdir()):
        return Folder(path)
    by_suffix: dict[str, list[Path]] = {suffix: [] for suffix in (".tar", ".parquet", *_PACKED)}
    photographs = False
    for entry in [path] if path.is_file() else path.rglob("*"):
        photographs = photographs or entry.suffix.lower() in EXTENSIONS
        if entry.suffix.lower() in by_suffix:
            by_suffix[entry.suffix.lower()].append(entry)
    tars, tables = (sorted(by_suffix[suffix], key=_by_number) for suffix in (".tar", ".parquet"))
    packed = [
        entry for suffix in _PACKED for entry in by_suffix[suffix] if suffix == ".tgz" or ".tar." in entry.name.lower()
    ]
    if packed and (tars or tables or not photographs):
        raise DataError(
            f"{packed[0]}: expected tars that are not compressed, found a compressed one; decompress it first"
        )
    if tars:
        described = {entry.with_suffix("") for entry in tars}
        if alone := [entry for entry in tables if entry.with_suffix("") not in described]:
            raise DataError(
                f"{path}: expected tars or Parquet files, found {tars[0].name} and {alone[0].name}; name one"
            )
        return Tars(tars, path, caption_from)
    if tables:
        return Tables(tables, path)
    if path.is_file():
        raise DataError(f"{path}: expected a folder of photographs, a .tar or a .parquet, found another file")
    return Folder(path)


_PACKED = (".tgz", ".gz", ".bz2", ".xz", ".zst")


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sort key by the numbers in names: 2.tar before 10.tar."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", str(path))]


MODELS = {"segmenter": "facebook/mask2former-swin-large-coco-panoptic", "backbone": "openai/clip-vit-large-patch14-336"}
"""Models that docs/data.md names; smaller ones, or folders, will do."""


def recognise(place: Place) -> Iterator[Recognised]:
    """Photographs, in a folder or in folders of it; tars and Parquet files of them, perhaps with their captions."""
    flags, extra = {"images": str(place.path), **MODELS}, "extract"
    photographs = [] if place.path.is_file() else place.of(*EXTENSIONS)
    photographs = photographs if any(map(_is_photograph, photographs[:1])) else []
    inner = [look(folder) for folder in place.folders[:_FOLDERS]] if not photographs and not place.files else []
    if photographs or (len(inner) > 1 and all(any(map(_is_photograph, one.files[:_FOLDERS])) for one in inner)):
        layout = f"{len(photographs)} photographs" if photographs else f"{len(inner)} folders of photographs"
        yield Recognised(layout, "extract", flags, extra=extra)
    elif files := place.of(".tar"):
        endings, split = tars.holds(files[0])
        if set(endings) & set(EXTENSIONS):
            captioned = bool(set(endings) & set(tars.TEXTS))
            split = split or rows.split_of_name(files[0], place.path)
            flags |= {"split": "train"} if captioned and not split else {}
            layout = f"{len(files)} tars with {', '.join(endings)}"
            yield Recognised(layout, "extract", flags, captions=not captioned, extra=extra)
    elif (files := place.of(".parquet")) and not missing("parquet") and (texts := tables.holds(files[0])) is not None:
        known = rows.columns(texts)
        captioned = bool(known.captions)
        told = known.split is not None or all(rows.split_of_name(file, place.path) for file in files)
        flags |= {"split": split_of(place.path) or "train"} if captioned and not told else {}
        layout = f"{len(files)} Parquet files with pictures{' and captions' if captioned else ''}"
        yield Recognised(layout, "extract", flags, captions=not captioned, extra=extra)


_FOLDERS = 100
UNCAPTIONED = "photos"
"""Split of photographs without captions, unless --split names another."""


def _is_photograph(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not (path.suffix.lower() == ".png" and is_label_map(path))


def prepare(args: argparse.Namespace, given: captions.Splits | None = None) -> Work:
    """Read the captions and plan the blocks. Raises DataError, FileExistsError before any work is done.

    given: the photographs with their captions, where these are known already.
    """
    target = args.out / args.name / VERSION
    folder = args.out / f".{args.name}.extract"
    encodes = bool(getattr(args, "text_encoder", ""))  # work that follows the data set
    built = encodes and target.exists() and blocks.is_built(folder)
    if target.exists() and not args.overwrite and not built:
        raise FileExistsError(f"data set {target} exists; give another --name, or --overwrite to replace it")
    chosen = settings.from_arguments(args)
    strict = args.on_bad_record == "fail"
    photographs = open_photographs(chosen.images, args.caption_from)
    if given is not None:
        splits = given
    elif args.captions:
        if misplaced := [f"--{name}" for name in ("split", "caption_from") if getattr(args, name)]:
            raise DataError(f"{' and '.join(misplaced)}: belongs to an extraction without --captions")
        splits = captions.read(args.captions, args.split_lists, strict=strict)
    else:
        splits = captions.gather(
            photographs.rows(args.split), args.split_lists, chosen.images, strict=strict, uncaptioned=UNCAPTIONED
        )
    return Work(chosen, photographs, folder, blocks.plan(folder, chosen, splits), splits.found, built)


def on_broken(policy: str) -> Callable[[str], None]:
    """Handler for photographs that cannot be read: called with name and reason, it raises or warns by `policy`."""

    def report(text: str) -> None:
        if policy == "fail":
            raise DataError(f"broken image {text}; --broken=skip leaves such images out")
        print(f"broken image, skipped: {text}", file=sys.stderr, flush=True)

    return report


def load_extractor(chosen: Settings, device: str) -> blocks.Extract:
    """The models. Raises DataError that says how to install what they need, or how to fetch one that is not here."""
    try:
        from data_prep.extract import hub

        for flag, name in (("--segmenter", chosen.segmenter), ("--backbone", chosen.backbone)):
            if name and not name.startswith(settings.TIMM):
                hub.require(flag, name)
        from data_prep.extract.fields import Extractor
    except ImportError as error:
        raise DataError(f"extraction needs PyTorch and transformers ({error}): pip install -e '.[extract]'") from error
    return Extractor(chosen, device)


def extract_here(work: Work, args: argparse.Namespace) -> None:
    """Do the blocks that are not done, in this process."""
    pending = work.pending()
    if not pending:
        return
    left, total = (sum(len(block.items) for block in group) for group in (pending, work.blocks))
    if left < total:
        print(f"extract: going on after {total - left} of {total} photographs", file=sys.stderr)
    extractor = load_extractor(work.settings, args.device)
    if (begun := work.begun()) is not None:
        blocks.check_models(work.folder, begun, extractor.models)
    progress = Progress(left, what="extract", unit="records")

    try:
        for block in pending:
            policy = on_broken(args.broken)
            blocks.extract(block, work.photographs, extractor, args.batch_size, policy, progress.count)
    except KeyboardInterrupt:
        done = total - sum(len(block.items) for block in work.pending())
        print(f"extract: {done} of {total} photographs are done; the same command goes on", file=sys.stderr)
        raise
    progress.close()


def build(work: Work, args: argparse.Namespace, *, keep_settings: bool = False) -> Path:
    """Write the data set from the blocks, all done, and delete them; returns the version folder.

    keep_settings: see `blocks.remove`. Raises DataError where machines of Beam had other models than others.
    """
    first = blocks.models(work.blocks[0])
    for block in work.blocks[1:]:
        blocks.check_models(work.folder, first, blocks.models(block))
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
    source_counts = replace(work.found, left_out=left_out)
    path = write_dataset(
        args.out,
        args.name,
        splits,
        metadata,
        total=source_counts.records,
        found=source_counts,
        overwrite=args.overwrite,
        on_bad_record=args.on_bad_record,
        least_captions=work.least_captions,
    )
    blocks.remove(work.folder, keep_settings=keep_settings)
    return path
