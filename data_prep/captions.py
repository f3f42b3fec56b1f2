"""Captions and split of each photograph, from caption files of any format (`caption_files`).

The split is what the file says, what --captions=SPLIT=FILE says, or what --split_lists say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep import caption_files
from data_prep.bad_records import Bad
from data_prep.counts import Found
from data_prep.files import read_lines
from data_prep.names import Names
from data_prep.names import keys as keys
from data_prep.rows import Row, split_name
from data_prep.schema import DataError, Record, is_text, refuse
from shnet_jax.paths import named_paths

WITHOUT, OUTSIDE = "without captions", "in no split list"  # why an image is left out


@dataclass(frozen=True)
class Captioned:
    """A photograph and its sentences.

    file: path below the folder of photographs. caption_ids: as captions, or (). fault: what spoils its record, or "".
    """

    image_id: str
    file: str
    captions: tuple[str, ...]
    caption_ids: tuple[int, ...] = ()
    fault: str = ""

    def record(self) -> Record | Bad:
        """The text fields of its record."""
        if self.fault:
            return Bad(self.image_id, DataError(self.fault, file=self.fault.partition(" row ")[0], field="captions"))
        record: Record = {"image_id": self.image_id, "captions": list(self.captions)}
        if self.caption_ids:
            record["caption_ids"] = np.array(self.caption_ids, np.int64)
        return record


class Splits(dict[str, list[Captioned]]):
    """Photographs by split. found: what the files hold, also of that which is in no split."""

    found: Found


@dataclass
class _Group:
    """Rows read for one photograph; `split` is None until a row names one, "" if no split list does."""

    split: str | None = None
    captions: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    fault: str = ""


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The flags that say where captions come from."""
    parser.add_argument(
        "--captions",
        required=required,
        help="FILE (which says the splits), or SPLIT=FILE,SPLIT=FILE,...: JSON of Karpathy, COCO, BLIP; JSONL, "
        "Parquet, Flickr tokens, CSV, TSV",
    )
    parser.add_argument(
        "--split_lists",
        help="SPLIT=FILE,...: image names a line (Flickr_8k.trainImages.txt) that put captions into splits",
    )


def read(captions: str, split_lists: str | None = None, *, strict: bool = True) -> Splits:
    """Photographs by split, in the order of the files; see `add_arguments` for the two flags.

    Without `strict` a row that is no caption (an empty one, a wrong number of cells) spoils the record of its
    photograph alone.

    Raises DataError naming file and row when a file is of no known format, says nothing of splits or another split than
    the flag, has a row that is no caption, puts an image into two splits or names one outside of the folder of
    photographs; FileNotFoundError when there is none.
    """
    return gather(
        file_rows(captions, split_lists is not None), split_lists, captions, strict=strict, flag="--captions=SPLIT=FILE"
    )


def file_rows(captions: str, listed: bool = False) -> Iterator[Row]:
    """The rows of all files of --captions; `listed` says that split lists count, not what the rows say."""
    for split, path in named_paths(captions):
        _check_file(path)
        for row in caption_files.read_captions(path):
            if split and row.split and not listed and split_name(row.split) != split:
                raise DataError(
                    f"{row.where}: image {row.file!r}: expected split {split}, as --captions={split}=... says, found "
                    f"{row.split!r}; --captions={path} takes the splits from the file"
                )
            yield row._replace(split=split) if split else row


def gather(
    rows: Iterable[Row],
    split_lists: str | None,
    source: object,
    *,
    strict: bool = True,
    flag: str = "--split=NAME",
    uncaptioned: str = "",
) -> Splits:
    """The images of all rows by split, in their order; rows of one image become its captions.

    split_lists: the flag of `add_arguments`; images in none of the lists are left out, and so are those without
    captions; `found` of the result says both. source: the flag or folder of the rows, and flag: the one that would say
    the split, for messages. strict: see `read`. uncaptioned: where no row has a caption, all images are kept, in this
    split unless a row names another; "": that is an error.

    Raises DataError as `read`.
    """
    lists = _SplitLists(split_lists) if split_lists else None
    groups: dict[str, _Group] = {}
    count = 0
    for row in rows:
        count += 1
        if strict:
            _check(row)
        if row.file not in groups:
            groups[row.file] = _Group(None if lists is None else lists.split(row.file))
        _add(groups[row.file], row, None if lists else flag)
    kept = {file: group for file, group in groups.items() if (group.captions or group.fault) and group.split != ""}
    if uncaptioned and not kept and not any(group.captions for group in groups.values()):
        kept = {file: group for file, group in groups.items() if group.split != ""}
        for group in kept.values():
            group.split = group.split or uncaptioned
    outside = [file for file, group in groups.items() if group.split == ""]
    without = [file for file, group in groups.items() if group.split != "" and file not in kept]
    left_out = {reason: names for reason, names in ((WITHOUT, without), (OUTSIDE, outside)) if names}
    if not kept:
        why = "".join(f"; {len(names)} images {reason}" for reason, names in left_out.items())
        raise DataError(f"{source}: expected captions, found none in {count} rows{why}")
    if lists is not None:
        lists.note_unused()
    splits = Splits()
    splits.found = Found(count, len(groups), sum(len(group.captions) for group in groups.values()), left_out)
    # COCO's folders say nothing, but a/1.jpg and b/1.jpg need them
    names_differ = len({Path(file).name for file in kept}) == len(kept)
    for file, group in kept.items():
        if group.split is None:
            raise DataError(f"{source}: image {file!r}: expected a row that says its split; {group.fault}")
        image_id = Path(file).name if names_differ else file
        item = Captioned(image_id, file, tuple(group.captions), tuple(group.numbers), group.fault)
        splits.setdefault(group.split, []).append(item)
    return splits


def _add(group: _Group, row: Row, flag: str | None) -> None:
    """Put a row into the group of its photograph; flag: that says splits, None where split lists do."""
    split = split_name(row.split or "") or None
    if flag is not None:
        if split is None and row.captions:
            raise DataError(f"{row.where}: image {row.file!r}: expected a split; give {flag} or --split_lists")
        if split is not None and group.split not in (None, split):
            raise DataError(
                f"{row.where}: image {row.file!r}: expected it in one split, found {group.split} and {split}"
            )
        group.split = split or group.split
    fault = row.fault
    if group.captions and row.captions and bool(group.numbers) != bool(row.numbers):
        fault = "expected caption ids of all captions of an image, or of none"
    group.captions += row.captions
    group.numbers += row.numbers
    if fault and not group.fault:
        group.fault = f"{row.where}: {fault}"


def _check(row: Row) -> None:
    """Raises DataError for what spoils the record of its image."""
    hint = "--on_bad_record=skip leaves such images out"
    if row.fault:
        raise DataError(f"{row.where}: image {row.file!r}: {row.fault}; {hint}")
    for caption in row.captions:
        if not is_text(caption):
            contents = f"visible text in UTF-8, found {caption!r:.80}" if caption else "a caption, found an empty one"
            raise DataError(f"{row.where}: image {row.file!r}: expected {contents}; {hint}")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'none'}")


class _SplitLists:
    """The files of --split_lists. An image may have its extension, or COCO's number, in one place alone."""

    def __init__(self, text: str):
        """Raises DataError for a name in two splits."""
        splits: dict[str, str] = {}
        self._names: Names[tuple[str, str]] = Names("--split_lists")
        for split, path in named_paths(text):
            _check_file(path)
            refuse(not split, "--split_lists", "SPLIT=FILE", path)
            for line in read_lines(path):
                name = re.sub(r"#[0-9]+$", "", line)  # of a caption, as in files of tokens
                if name in splits and splits[name] != split:
                    raise DataError(f"{path}: image {name!r}: expected it in one split, found it in {splits[name]} too")
                if name not in splits:
                    splits[name] = split
                    self._names.add(name, (name, split))
        self._unused = dict.fromkeys(splits)
        self._total = len(splits)

    def split(self, file: str) -> str:
        """The split of an image, "" without one. Raises DataError where two entries fit equally well."""
        name, split = self._names.find(file) or self._names.find(Path(file).name) or ("", "")
        self._unused.pop(name, None)
        return split

    def note_unused(self) -> None:
        """Say which names no image has."""
        if self._unused:
            print(
                f"note: --split_lists: {len(self._unused)} of {self._total} names have no captions, such as "
                f"{next(iter(self._unused))!r}",
                file=sys.stderr,
            )
