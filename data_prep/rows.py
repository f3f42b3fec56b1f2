"""Names, captions, ids and splits of images, parsed from rows of tables or JSON objects of any file."""

from __future__ import annotations

import ast
import io
import math
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.schema import DataError
from shnet_jax import untrusted

IMAGES = (
    *("image", "filename", "file_name", "image_name", "file", "image_path", "img_path", "filepath", "file_path"),
    *("path", "img", "img_name", "image_id", "img_id"),
)
"""Columns that name images; an earlier one counts before a later one."""
KEYS = (*IMAGES[:-2], "key", *IMAGES[-2:], "id")
"""Columns that name images in web data sets, as of img2dataset and clip-retrieval."""
CAPTIONS = ("caption", "comment", "sentence", "raw", "text", "txt")
"""Columns of captions, also in the plural, and numbered: caption_1, caption_2, ..."""
NUMBERS = ("sentids", "sentid", "caption_ids", "caption_id")
SPLIT, FOLDER = "split", "filepath"

_SPLITS = re.compile(r"(train|restval|val|valid|validation|dev|test)(?:[-_.0-9].*)?", re.IGNORECASE)
_INT64 = range(-(2**63), 2**63)
_IN_LISTS = {
    "[",
    "]",
    "(",
    ")",
    "{",
    "}",
    ",",
    "array",
    "dtype",
    "=",
    "object",
    "<",
    "list",
    "",
}  # as NumPy prints them


class Row(NamedTuple):
    """A row of a file.

    file: the image. captions: with blank ones as "". numbers: of the captions, or (). split: None where the row does
    not say. where: file and row, for errors. fault: why the captions are not known, or "".
    """

    file: str
    captions: tuple[str, ...]
    numbers: tuple[int, ...] = ()
    split: str | None = None
    where: str = ""
    fault: str = ""


class Columns(NamedTuple):
    """The names of the columns that count, None or () where there are none."""

    image: str | None
    captions: tuple[str, ...]
    numbers: str | None
    split: str | None
    folder: str | None


@lru_cache(maxsize=64)
def columns(names: tuple[str, ...], images: tuple[str, ...] = IMAGES) -> Columns:
    """Recognised columns among `names`, in any case and with blanks around or in place of _."""
    known: dict[str, str] = {}
    for name in names:
        known.setdefault(re.sub(r"[ _-]+", "_", name.strip().lower()), name)

    def first(wanted: Iterable[str]) -> str | None:
        return next((known[name] for name in wanted if name in known), None)

    patterns = (re.compile(rf"{kind}s?_?[0-9]*") for kind in CAPTIONS)
    numbered = ([given for name, given in known.items() if pattern.fullmatch(name)] for pattern in patterns)
    captions = tuple(next(filter(None, numbered), ()))
    return Columns(first(images), captions, first(NUMBERS), first([SPLIT]), first([FOLDER]))


def needed(names: tuple[str, ...], where: object, images: tuple[str, ...] = IMAGES) -> Columns:
    """Recognised columns, as `columns`. Raises DataError when that of images or of captions is missing."""
    known = columns(names, images)
    if known.image is None or not known.captions:
        wanted = " or ".join(CAPTIONS if known.image else images)
        raise DataError(f"{where}: expected a column named {wanted}, found {', '.join(names):.200}")
    return known


def parse(values: Mapping[str, Any], where: str, file: str | None = None, *, blanks: bool = False) -> Row:
    """The row that the columns `values` make; `file` is its image where no column names it.

    Captions are text, lists of it, or objects with `raw` and perhaps `sentid`, as Karpathy's; in text, too, as JSON,
    Python, NumPy and pandas print lists. Runs of white space become one space. What else is found is the row's `fault`.
    blanks: keep captions without text, which spoil their image; else they are as good as none.

    Raises DataError for an image that is not named by text or a number.
    """
    known = columns(tuple(values))
    name = _image(values, known, where) if file is None else file
    split = values[known.split] if known.split and not missing(values[known.split]) else None
    sentences: list[tuple[str, int | None]] = []
    column = str(known.split)
    try:
        if not isinstance(split, str | None):
            raise ValueError(f"expected text, found {split!r:.80}")
        for column in known.captions:
            sentences += _sentences(values[column])
        numbers = [number for _, number in sentences if number is not None]
        if not numbers and sentences and known.numbers:
            column = known.numbers
            numbers = _numbers(values[column])
        if numbers and len(numbers) != len(sentences):
            raise ValueError(f"expected a caption id for each of {len(sentences)} captions, found {len(numbers)}")
    except (ValueError, RecursionError) as error:
        nested = "expected sentences, found lists that are nested too deeply"
        fault = f"{column!r}: {nested if isinstance(error, RecursionError) else error}"
        return Row(name, (), (), split if isinstance(split, str) else None, where, fault)
    keep = [place for place, (text, _) in enumerate(sentences) if text or (blanks and len(known.captions) == 1)]
    captions = tuple(sentences[place][0] for place in keep)
    return Row(name, captions, tuple(numbers[place] for place in keep if numbers), split, where)


def _image(values: Mapping[str, Any], known: Columns, where: str) -> str:
    """The name of an image; a number may stand for it. Karpathy's `filepath` is the folder of `filename`."""
    value = values[known.image] if known.image else None
    if isinstance(value, float) and value.is_integer():  # as of a column that lacks values in other rows
        value = int(value)
    if type(value) is not int and not isinstance(value, str):
        raise DataError(f"{where}: expected the name of an image, found {value!r:.80}")
    name = str(value).strip().replace("\\", "/")  # of Windows
    if name.endswith(".0") and name[:-2].isdecimal():  # of pandas
        name = name[:-2]
    folder = values[known.folder] if known.folder and "filename" in str(known.image).lower() else None
    if not isinstance(folder, str) or not folder or Path(folder).is_absolute():
        return name
    return folder if Path(folder).name == name else f"{folder}/{name}"


def missing(value: Any) -> bool:
    """Whether a cell is empty: null, or NaN as pandas and its JSON have it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _sentences(value: Any) -> Iterator[tuple[str, int | None]]:
    """The captions in a cell, each with its id. Raises ValueError for a cell that holds other things."""
    if missing(value):
        return
    listed = _listed(value) if isinstance(value, str) else value
    if isinstance(listed, dict) and (names := columns(tuple(map(str, listed))).captions):
        number = listed.get("sentid")
        for text, inner in _sentences(listed[names[0]]):
            yield text, inner if number is None else _number(number)
    elif isinstance(listed, list):
        for item in listed:
            yield from _sentences("" if missing(item) else item)
    elif isinstance(value, str):
        yield " ".join(value.split()), None
    else:
        raise ValueError(f"expected text, a list of texts or of objects with `raw`, found {value!r:.80}")


def is_list(text: str) -> bool:
    """Whether a text is a list in print."""
    try:
        return isinstance(_listed(text), list)
    except ValueError:
        return False


def _listed(text: str) -> Any:
    """The list or object that a text is in print; None for any other. Raises ValueError for half of one."""
    text = text.strip()
    if not text.startswith(("[", "{", "(", "array(")):
        return None
    for read in (lambda: untrusted.parse_json(text, ""), lambda: _printed(text), lambda: ast.literal_eval(text)):
        try:
            if isinstance(content := read(), list | dict):
                return content
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    if re.match(r"\[\s*[bfru]?[\"'\[{(]", text):
        raise ValueError(f"expected a list of sentences that is whole, found {text!r:.80}")
    return None


def _printed(text: str) -> list[str] | None:
    """The texts that Python's repr wrote; NumPy leaves commas out, which Python would read as one text."""
    texts = []
    try:
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
        for token in tokens:
            if token.string == "dtype":  # of NumPy, behind the texts
                break
            if token.type == tokenize.STRING:
                texts.append(ast.literal_eval(token.string))
            elif token.string in ("None", "nan"):
                texts.append("")
            elif token.string not in _IN_LISTS:
                return None
    except tokenize.TokenError:
        return None
    complete = all(isinstance(item, str) for item in texts) and tokens[-1].string in "])}"
    return texts if complete and (text[0] != "(" or "," in (token.string for token in tokens)) else None


def _numbers(value: Any) -> list[int]:
    """The whole numbers of a cell: one, or a list of them. Raises ValueError for a cell that holds other things."""
    if missing(value):
        return []
    if isinstance(value, str):
        value = [part for part in re.split(r"[\s,]+", re.sub(r"[\[\]()'\"]", "", value)) if part]
    return [_number(number) for number in (value if isinstance(value, list) else [value])]


def _number(value: Any) -> int:
    if type(value) is int and value in _INT64:
        return value
    match = re.fullmatch(r"(-?[0-9]{1,19})(?:\.0)?", str(value).strip())
    if isinstance(value, bool) or match is None or int(match[1]) not in _INT64:
        raise ValueError(f"expected a whole number of 64 bits as caption id, found {value!r:.80}")
    return int(match[1])


def split_name(text: str) -> str:
    """The split that a file means: without blanks around, in lower case; restval (Karpathy) is train."""
    name = text.strip().lower()
    return "train" if name == "restval" else name


def split_of_name(path: Path, root: Path) -> str | None:
    """The split that a file, or else a folder between it and `root`, is named after: train-00000.tar, test/0.tar."""
    parts = path.relative_to(root).parts if path != root else (path.name,)
    match = next((match for part in reversed(parts) if (match := _SPLITS.fullmatch(part))), None)
    return match[1].lower() if match else None
