"""What rows of tables, and JSON objects of web data sets, say of images: names, captions, their numbers, splits."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.caption_files import listed_numbers, listed_texts, split_name
from data_prep.captions import OUTSIDE, WITHOUT, Captioned, Splits, read_split_lists
from data_prep.counts import Found
from data_prep.schema import DataError, is_text

# Names of columns on the Hugging Face Hub, in img2dataset and clip-retrieval; an earlier one counts before a later one.
FILES = ("filename", "file_name", "image_path", "key", "image_id", "img_id", "id")
CAPTIONS = ("caption", "captions", "sentences", "raw", "text", "txt")
NUMBERS = ("sentids", "sentid", "caption_ids", "caption_id")
SPLIT = "split"

_SPLITS = re.compile(r"(train|restval|val|valid|validation|dev|test)(?:[-_.0-9].*)?", re.IGNORECASE)


class Row(NamedTuple):
    """A row: the image's file, its captions with their numbers or (), the split or None, and its place for errors.

    fault: what spoils the record of the image, or "".
    """

    file: str
    captions: tuple[str, ...]
    numbers: tuple[int, ...]
    split: str | None
    where: str
    fault: str = ""


def column(names: Collection[str], wanted: Iterable[str]) -> str | None:
    """The first of the wanted columns that is there."""
    return next((name for name in wanted if name in names), None)


def parse(values: Mapping[str, Any], file: str, where: str) -> Row:
    """The row that the columns `values` make.

    Captions are text, a list of texts (also as JSON or Python prints it), or (lists of) objects with `raw` and perhaps
    `sentid`, as Karpathy's. Raises DataError naming `where` and the column.
    """
    name, split = column(values, CAPTIONS), values.get(SPLIT)
    captions, numbers = _texts(values[name], f"{where}: {name!r}") if name else ([], [])
    numbers_name = column(values, NUMBERS)
    if not numbers and numbers_name and values[numbers_name] is not None:
        given = values[numbers_name]
        given = listed_numbers(given) if isinstance(given, str) else given if isinstance(given, list) else [given]
        numbers = [_number(n, f"{where}: {numbers_name!r}") for n in given]
        if len(numbers) != len(captions):
            raise DataError(
                f"{where}: {numbers_name!r}: expected one for each of {len(captions)} captions, found {len(numbers)}"
            )
    if split is not None and not is_text(split):
        raise DataError(f"{where}: {SPLIT!r}: expected text, found {split!r:.80}")
    return Row(file, tuple(captions), tuple(numbers), split, where)


def row_or_fault(file: str, where: str, split: Any, make: Callable[..., Row], *args: Any) -> Row:
    """The row that `make` returns; its DataError becomes the fault of a row without captions, of `split` if a text."""
    try:
        return make(*args)
    except DataError as error:
        return Row(file, (), (), split if is_text(split) else None, where, str(error))


def _texts(value: Any, where: str) -> tuple[list[str], list[int]]:
    captions: list[str] = []
    numbers: list[int] = []
    if isinstance(value, str):
        value = listed_texts(value) or value
    for item in value if isinstance(value, list) else [value]:
        text = item["raw"] if isinstance(item, dict) and "raw" in item else item
        if text is None or text == "":
            continue
        if not isinstance(text, str) or not (text.isspace() or is_text(text)):
            raise DataError(f"{where}: expected text, a list of texts or of objects with `raw`, found {item!r:.80}")
        if caption := " ".join(text.split()):
            captions.append(caption)
            if isinstance(item, dict) and item.get("sentid") is not None:
                numbers.append(_number(item["sentid"], where))
    if numbers and len(numbers) != len(captions):
        raise DataError(f"{where}: expected a `sentid` for each of {len(captions)} captions, found {len(numbers)}")
    return captions, numbers


def _number(value: Any, where: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
        return int(value)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise DataError(f"{where}: expected a whole number of 64 bits, found {value!r:.80}")
    return value


def split_of_name(path: Path, root: Path) -> str | None:
    """The split that a file, or else a folder between it and `root`, is named after: train-00000.tar, test/0.tar."""
    parts = path.relative_to(root).parts if path != root else (path.name,)
    match = next((match for part in reversed(parts) if (match := _SPLITS.fullmatch(part))), None)
    return match[1].lower() if match else None


def gather(rows: Iterable[Row], split_lists: str | None, what: object, *, strict: bool = True) -> Splits:
    """The images of all rows by split, in their order; rows of one file become the captions of one image.

    split_lists: the flag of `captions.add_arguments`; images in none of the lists are left out, and so are those
    without captions; `found` of the result says both. what: the flag or folder, for messages.
    strict: a row with a fault is an error; else the fault is that of its image alone.

    Raises DataError for a row without a split, an image in two, and an image with and without numbers.
    """
    lists = read_split_lists(split_lists) if split_lists else None
    found: dict[str, tuple[str, Row]] = {}
    left_out: dict[str, str] = {}  # file -> why
    count = captions = 0
    for row in rows:
        count, captions = count + 1, captions + len(row.captions)
        name = Path(row.file)
        split = row.split if lists is None else lists.get(name.name, lists.get(name.stem))
        said = row.captions or row.fault
        if not said or (split is None and lists is not None):
            left_out.setdefault(row.file, OUTSIDE if said else WITHOUT)
            continue
        if row.fault and (strict or split is None):
            raise DataError(f"{row.fault}; --on_bad_record=skip leaves such records out" if strict else row.fault)
        if split is None:
            raise DataError(f"{row.where}: image {row.file!r}: expected a split; give --split=NAME or --split_lists")
        split = split_name(split)
        before, first = found.get(row.file, (split, None))
        if before != split:
            raise DataError(f"{row.where}: image {row.file!r}: expected it in one split, found {before} and {split}")
        if first is not None:
            fault = first.fault or row.fault
            if not fault and bool(first.numbers) != bool(row.numbers):
                raise DataError(f"{row.where}: image {row.file!r}: expected numbers of all captions, found some")
            row = first._replace(
                captions=first.captions + row.captions, numbers=first.numbers + row.numbers, fault=fault
            )
        found[row.file] = (split, row)
    if not found:
        raise DataError(f"{what}: expected images with captions, found none in {count} rows")
    reasons = {
        why: names
        for why in (WITHOUT, OUTSIDE)
        if (names := [file for file, reason in left_out.items() if reason == why and file not in found])
    }
    # Folders in names say nothing, but a/1.jpg and b/1.jpg need them.
    names_differ = len({Path(file).name for file in found}) == len(found)
    splits = Splits()
    for file, (split, row) in found.items():
        image_id = Path(file).name if names_differ else file
        splits.setdefault(split, []).append(Captioned(image_id, file, row.captions, row.numbers, row.fault))
    splits.found = Found(count, len(found) + sum(map(len, reasons.values())), captions, reasons)
    return splits
