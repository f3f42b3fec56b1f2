"""Reads the caption files of the field: which sentences belong to which photograph, and in which split.

Karpathy JSON (dataset_coco.json, dataset_flickr30k.json): images with `sentences` and `split`; restval counts as train.
COCO captions JSON (captions_val2017.json): `images` and `annotations`; the split is named beside the file.
Flickr token file (results_20130124.token, Flickr8k.token.txt): lines NAME.jpg#0<tab>sentence.
CSV, TSV and Flickr's results.csv (|): a header with an image column, a caption column and perhaps `split`.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data_prep.files import read_json, read_lines
from data_prep.names import keys as keys
from data_prep.schema import DataError, Record

IMAGE_COLUMNS = ("image", "image_id", "image_name", "filename", "file_name", "file")
CAPTION_COLUMNS = ("caption", "comment", "sentence", "raw")
_DELIMITERS = ",\t;|"
_NUMBERS = range(-(2**63), 2**63)  # of captions; they are stored as int64


@dataclass(frozen=True)
class Captioned:
    """A photograph and its sentences. file: path below the folder of photographs. caption_ids: as captions, or ()."""

    image_id: str
    file: str
    captions: tuple[str, ...]
    caption_ids: tuple[int, ...] = ()

    def record(self) -> Record:
        """The text fields of its record."""
        record: Record = {"image_id": self.image_id, "captions": list(self.captions)}
        if self.caption_ids:
            record["caption_ids"] = np.array(self.caption_ids, np.int64)
        return record


Splits = dict[str, list[Captioned]]


class _Line(NamedTuple):
    """One caption as a file has it; split None where the file does not say."""

    file: str
    caption: str
    split: str | None = None
    number: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say where captions come from."""
    parser.add_argument(
        "--captions",
        required=True,
        help="FILE (Karpathy JSON, or CSV with a split column), or SPLIT=FILE,SPLIT=FILE,...; "
        "COCO captions JSON, Flickr tokens, CSV",
    )
    parser.add_argument(
        "--split_lists",
        help="SPLIT=FILE,...: image names a line (Flickr_8k.trainImages.txt) that put captions into splits",
    )


def read(captions: str, split_lists: str | None = None, *, strict: bool = True) -> Splits:
    """Photographs by split, in the order of the files; see `add_arguments` for the two flags.

    Without `strict` an empty caption is kept, and spoils the record of its photograph.

    Raises DataError naming file and row when a file is of no known format, says nothing of splits, has an empty
    caption, puts an image into two splits or names one outside of the folder of photographs; FileNotFoundError when
    there is none.
    """
    lines: list[tuple[str, _Line]] = []
    lists = _split_lists(split_lists) if split_lists else None
    for split, path in _named_files(captions):
        for line in _lines(path, strict):
            lines.append((_split(line, split, lists, path), line))
    found: dict[str, tuple[str, list[_Line]]] = {}
    for split, line in lines:
        if not split:  # in none of the lists
            continue
        before, group = found.setdefault(line.file, (split, []))
        if before != split:
            raise DataError(f"{captions}: image {line.file!r}: expected it in one split, found {before} and {split}")
        group.append(line)
    splits: Splits = {}
    # COCO's folders say nothing, but a/1.jpg and b/1.jpg need them
    names_differ = len({Path(file).name for file in found}) == len(found)
    for file, (split, group) in found.items():
        ids = tuple(line.number for line in group if line.number is not None)
        image_id = Path(file).name if names_differ else file
        item = Captioned(image_id, file, tuple(line.caption for line in group), ids)
        splits.setdefault(split, []).append(item)
    if not splits:
        raise DataError(f"{captions}: expected captions, found none")
    return splits


def _named_files(text: str) -> Iterator[tuple[str, Path]]:
    for entry in text.split(","):
        split, _, name = entry.rpartition("=")
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a file, found none")
        yield split, path


def _split_lists(text: str) -> dict[str, str]:
    lists: dict[str, str] = {}
    for split, path in _named_files(text):
        if not split:
            raise DataError(f"--split_lists: expected SPLIT=FILE, found {path}")
        for name in read_lines(path):
            if lists.setdefault(name, split) != split:
                raise DataError(f"{path}: image {name!r}: expected it in one split, found it in {lists[name]} too")
    return lists


def _split(line: _Line, named: str, lists: dict[str, str] | None, path: Path) -> str:
    if lists is not None:
        name = Path(line.file)
        return lists.get(name.name, lists.get(name.stem, ""))
    split = named or line.split
    if not split:
        raise DataError(f"{path}: image {line.file!r}: expected a split; give --captions=SPLIT=FILE or --split_lists")
    return split


def _lines(path: Path, strict: bool) -> Iterator[_Line]:
    """Captions of a file of any format; each is stripped and its runs of blanks are one."""
    reader = {".json": _json, ".csv": _csv, ".tsv": _csv}.get(path.suffix.lower(), _token)
    for line in reader(path):
        _check(line, path)
        caption = " ".join(line.caption.split())
        if strict and not caption:
            raise DataError(f"{path}: image {line.file!r}: expected a caption, found an empty one")
        yield line._replace(caption=caption)


def _check(line: _Line, path: Path) -> None:
    file, caption, split, number = line
    if not isinstance(file, str) or not _is_below(file):
        raise DataError(f"{path}: expected the name of an image below the folder of photographs, found {file!r:.200}")
    if not isinstance(caption, str) or not isinstance(split, str | None):
        raise DataError(
            f"{path}: image {file!r}: expected text as caption and split, found {caption!r:.80}, {split!r:.80}"
        )
    if number is not None and (type(number) is not int or number not in _NUMBERS):
        raise DataError(
            f"{path}: image {file!r}: expected a whole number of 64 bits as caption id, found {number!r:.80}"
        )


@lru_cache(maxsize=64)  # captions of an image stand side by side
def _is_below(file: str) -> bool:
    path = Path(file)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def _json(path: Path) -> Iterator[_Line]:
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise DataError(f"{path}: expected an object with a list `images` (Karpathy's or COCO's format), found none")
    try:
        yield from _coco(content, path) if "annotations" in content else _karpathy(images)
    except KeyError as error:
        raise DataError(f"{path}: expected the key {error.args[0]!r} in every entry, found one without") from error
    except (TypeError, AttributeError) as error:  # a list or a number where an object or text should be
        raise DataError(f"{path}: expected entries as Karpathy's or COCO's files have them: {error}") from error


def _karpathy(images: Iterable[dict[str, Any]]) -> Iterator[_Line]:
    for image in images:
        split = "train" if image["split"] == "restval" else image["split"]
        file = "/".join(part for part in (image.get("filepath", ""), image["filename"]) if part)
        for sentence in image["sentences"]:
            yield _Line(file, sentence["raw"], split, sentence.get("sentid"))


def _coco(content: dict[str, Any], path: Path) -> Iterator[_Line]:
    files = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["image_id"] not in files:
            raise DataError(f"{path}: annotation of image {annotation['image_id']!r:.80}, which `images` does not list")
        yield _Line(files[annotation["image_id"]], annotation["caption"], None, annotation.get("id"))


def _token(path: Path) -> Iterator[_Line]:
    for row, text in enumerate(read_lines(path), 1):
        match = re.fullmatch(r"(.+)#\d+\s+(.*)", text)
        if match is None:
            raise DataError(f"{path} line {row}: expected NAME.jpg#NUMBER<tab>sentence, found {text[:80]!r}")
        yield _Line(match[1], match[2])


def _csv(path: Path) -> Iterator[_Line]:
    try:
        yield from _rows(path)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a table in UTF-8: {error}") from error


def _rows(path: Path) -> Iterator[_Line]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        delimiter = max(_DELIMITERS, key=header.count)
        file.seek(0)
        # Flickr's results.csv (|) writes quotation marks as they are.
        quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
        rows = csv.reader(file, delimiter=delimiter, quoting=quoting, skipinitialspace=True)
        names = [name.strip().lower() for name in next(rows, [])]
        image, caption = (_column(names, wanted, path) for wanted in (IMAGE_COLUMNS, CAPTION_COLUMNS))
        split = names.index("split") if "split" in names else None
        for number, row in enumerate(rows, 2):
            if not row:
                continue
            if len(row) != len(names):
                raise DataError(
                    f"{path} row {number}: expected {len(names)} columns as in the header, found {len(row)}"
                )
            yield _Line(row[image].strip(), row[caption], None if split is None else row[split].strip())


def _column(names: Sequence[str], wanted: Sequence[str], path: Path) -> int:
    for name in wanted:
        if name in names:
            return names.index(name)
    raise DataError(f"{path}: expected a column named {' or '.join(wanted)}, found {', '.join(names)}")
