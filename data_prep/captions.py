"""Which sentences belong to which photograph, and in which split, from caption files of any format (`caption_files`).

The split is what the file says, what --captions=SPLIT=FILE says, or what --split_lists say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.bad_records import Bad
from data_prep.caption_files import Line, read_captions, split_name
from data_prep.counts import Found
from data_prep.files import read_lines
from data_prep.names import keys as keys
from data_prep.schema import DataError, Record, is_text
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
    """What was read of a photograph; split None until a line says."""

    split: str | None = None
    lines: list[Line] = field(default_factory=list)
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

    Raises DataError naming file and row when a file is of no known format, says nothing of splits, has a row that is no
    caption, puts an image into two splits or names one outside of the folder of photographs; FileNotFoundError when
    there is none.
    """
    lists = read_split_lists(split_lists) if split_lists else None
    groups: dict[str, _Group] = {}
    rows = 0
    for named, path in named_paths(captions):
        _check_file(path)
        row = None
        for line in read_captions(path):
            rows += line.row not in (row, -1)
            row = line.row
            if strict:
                _check(line, path)
            _add(groups.setdefault(line.file, _Group()), line, named, lists, path, captions)
    splits = _grouped(groups, captions)
    outside = [file for file, group in groups.items() if group.split == ""]
    without = [file for file, group in groups.items() if group.split != "" and not group.lines]
    left_out = {reason: names for reason, names in ((WITHOUT, without), (OUTSIDE, outside)) if names}
    splits.found = Found(rows, len(groups), sum(len(group.lines) for group in groups.values()), left_out)
    if not splits:
        why = "".join(f"; {len(names)} images {reason}" for reason, names in left_out.items())
        raise DataError(f"{captions}: expected captions, found none in {rows} rows{why}")
    if lists is not None:
        _note_unused(lists, groups)
    return splits


def _add(group: _Group, line: Line, named: str, lists: Mapping[str, str] | None, path: Path, captions: str) -> None:
    """Put a line into the group of its photograph."""
    if lists is not None:
        name = Path(line.file)
        split: str | None = lists.get(name.name, lists.get(name.stem, ""))
    else:
        split = named or (None if line.split is None else split_name(line.split))
    if not split and lists is None and not line.fault:
        raise DataError(f"{path}: image {line.file!r}: expected a split; give --captions=SPLIT=FILE or --split_lists")
    if split is not None and group.split not in (None, split):
        raise DataError(f"{captions}: image {line.file!r}: expected it in one split, found {group.split} and {split}")
    group.split = group.split if split is None else split
    if line.caption is not None:
        group.lines.append(line)
    if line.fault and not group.fault:
        group.fault = f"{path} row {line.row}: {line.fault}"


def _grouped(groups: Mapping[str, _Group], captions: str) -> Splits:
    splits = Splits()
    kept = {file: group for file, group in groups.items() if group.lines and group.split != ""}
    # COCO's folders say nothing, but a/1.jpg and b/1.jpg need them
    names_differ = len({Path(file).name for file in kept}) == len(kept)
    for file, group in kept.items():
        if group.split is None:
            raise DataError(f"{captions}: image {file!r}: expected a row that says its split; {group.fault}")
        image_id = Path(file).name if names_differ else file
        texts, numbers = (tuple(line.caption or "" for line in group.lines), [line.number for line in group.lines])
        ids = tuple(number for number in numbers if number is not None)
        splits.setdefault(group.split, []).append(Captioned(image_id, file, texts, ids, group.fault))
    return splits


def _check(line: Line, path: Path) -> None:
    """Raises DataError for what spoils the record of its image."""
    hint = "--on_bad_record=skip leaves such images out"
    if line.fault:
        raise DataError(f"{path} row {line.row}: {line.fault} (image {line.file!r}); {hint}")
    if line.caption is not None and not is_text(line.caption):
        what = f"text in UTF-8, found {line.caption!r:.80}" if line.caption else "a caption, found an empty one"
        raise DataError(f"{path} row {line.row}: image {line.file!r}: expected {what}; {hint}")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file, found none")


def read_split_lists(text: str) -> dict[str, str]:
    """The split of each name in the files of --split_lists. Raises DataError for a name in two splits."""
    lists: dict[str, str] = {}
    for split, path in named_paths(text):
        _check_file(path)
        if not split:
            raise DataError(f"--split_lists: expected SPLIT=FILE, found {path}")
        for name in read_lines(path):
            if lists.setdefault(name, split) != split:
                raise DataError(f"{path}: image {name!r}: expected it in one split, found it in {lists[name]} too")
    return lists


def _note_unused(lists: Mapping[str, str], groups: Mapping[str, _Group]) -> None:
    known = {name for file in groups for name in (Path(file).name, Path(file).stem)}
    unused = [name for name in lists if name not in known]
    if unused:
        print(
            f"note: --split_lists: {len(unused)} of {len(lists)} names have no captions, such as {unused[0]!r}",
            file=sys.stderr,
        )
