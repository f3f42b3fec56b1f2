"""Reads the lines of caption files of any format, each with its image and the split that the file puts it into.

Karpathy JSON (dataset_coco.json, dataset_flickr30k.json): images with `sentences` and `split`.
COCO captions JSON (captions_val2017.json): `images` and `annotations`.
JSON list of objects (BLIP, ALBEF, LAVIS), or JSONL: `image`, `caption` (text or a list of texts), perhaps `split`.
Parquet (Hugging Face): the same as columns; the pictures themselves are not read.
A .pt of torch.save (Oscar's and VinVL's SPLIT_captions.pt): image -> list of captions, or JSON of one.
Flickr token file (results_20130124.token, Flickr8k.token.txt): lines NAME.jpg#0<tab>sentence.
CSV, TSV, Flickr's results.csv (|), Kaggle's captions.txt: a header with an image column, one or more of captions, and
perhaps `split`. TSV and | are read as they are, without quoting, unless their header is quoted.
"""

from __future__ import annotations

import ast
import csv
import io
import math
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import torch_files
from data_prep.files import data_errors, read_json, text_lines
from data_prep.names import EXTENSIONS
from data_prep.parquet import open_parquet
from data_prep.places import ends, first_object, has_keys
from data_prep.schema import DataError
from shnet_jax import foreign

IMAGE_COLUMNS = (
    *("image", "image_id", "image_name", "filename", "file_name", "file"),
    *("image_path", "img_path", "filepath", "file_path", "path", "img", "img_name", "img_id"),
)
CAPTION_COLUMNS = ("caption", "comment", "sentence", "raw")
"""Also in the plural, and numbered: caption_1, caption_2, ..."""
ID_COLUMNS = ("sentids", "sentid")
_DELIMITERS = ",\t;|"
_NUMBERS = range(-(2**63), 2**63)  # of captions; they are stored as int64
_PARQUET_ROWS = 1024  # read at once
_TOKEN = re.compile(r"([^\t]+)#[0-9]+ *\t(.*)")  # the first tab counts: sentences have numbers and tabs too
_SPACED_TOKEN = re.compile(r"([^\t]+?)#[0-9]+ +(.*)")


class Line(NamedTuple):
    """One caption as a file has it.

    row: where: of a text file the line, of a list in JSON the place from 0. caption: None for an image without any.
    split: None where the file does not say. fault: of a row that is torn, so that its caption is not known.
    """

    row: int
    file: str
    caption: str | None
    split: str | None = None
    number: int | None = None
    fault: str = ""


def read_captions(path: Path) -> Iterator[Line]:
    """Captions of a file of any format; in each, runs of white space are one space.

    Raises DataError, naming file and row, for a file or a row of which it is not clear what it holds.
    """
    for line in _reader(path)(path):
        yield _checked(line, path)


class Kind(NamedTuple):
    """What a caption file is, and whether it says the splits."""

    what: str
    says_split: bool


SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".pt", ".csv", ".tsv", ".txt", ".token")


def recognise(path: Path) -> Kind | None:
    """The kind of a caption file, None for another one; its ends or its first record are read.

    Raises DataError for a stand-in such as a git-LFS pointer.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return None
    with data_errors():
        foreign.check_kind(path)
    if suffix == ".pt":
        return Kind("captions by image of torch.save", False) if torch_files.peek(path) == "captions" else None
    if suffix == ".json":
        text = ends(path)
        if has_keys(text, "images", "sentences", "split"):
            return Kind("captions in Karpathy's JSON", True)
        if has_keys(text, "images", "image_id", "caption"):
            return Kind("captions in COCO's JSON", False)
        try:
            columns = _columns(tuple(first_object(text)), path)
        except DataError:
            return None
        return Kind("captions in a JSON list", columns.split is not None)
    try:
        line = next(read_captions(path), None)
    except DataError:
        return None
    return line and Kind(f"captions in {suffix[1:].upper()}", line.split is not None)


def split_name(text: str) -> str:
    """The split that a file means: without blanks around, in lower case; restval (Karpathy) is train."""
    name = text.strip().lower()
    return "train" if name == "restval" else name


def _reader(path: Path) -> Callable[[Path], Iterator[Line]]:
    known: dict[str, Callable[[Path], Iterator[Line]]] = {
        ".json": _json,
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".parquet": _parquet,
        ".pt": _torch,
    }
    known |= {".csv": _table, ".tsv": _table}
    if (suffix := path.suffix.lower()) in known:
        return known[suffix]
    first = next((line for line in text_lines(path) if line.strip()), "")
    if first.lstrip().startswith(("{", "[")):
        return _json
    try:
        _columns(tuple(_header(first)[1]), path)
    except DataError:
        return _tokens
    return _table


def _checked(line: Line, path: Path) -> Line:
    file, caption, split, number = line.file, line.caption, line.split, line.number
    where = f"{path} row {line.row}"
    if not isinstance(file, str) or not _is_below(file):
        raise DataError(
            f"{path}: expected the name of an image below the folder of photographs, found {file!r:.200} in row "
            f"{line.row}"
        )
    if not isinstance(caption, str | None) or not isinstance(split, str | None):
        raise DataError(
            f"{where}: image {file!r}: expected text as caption and split, found {caption!r:.80}, {split!r:.80}"
        )
    if number is not None and (type(number) is not int or number not in _NUMBERS):
        raise DataError(
            f"{where}: image {file!r}: expected a whole number of 64 bits as caption id, found {number!r:.80}"
        )
    return line if caption is None else line._replace(caption=" ".join(caption.split()))


@lru_cache(maxsize=64)  # captions of an image stand side by side
def _is_below(file: str) -> bool:
    path = Path(file)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


# ----------------------------------------------------------------------------------------------------- rows and columns


class _Columns(NamedTuple):
    """Places of the columns that count in a row, or of the keys in an object."""

    image: int
    captions: tuple[int, ...]
    ids: int | None
    split: int | None


@lru_cache(maxsize=64)
def _columns(names: tuple[str, ...], where: object) -> _Columns:
    """Raises DataError when the column of images or of captions is missing."""
    known = [name.strip().lower() for name in names]
    image = next((known.index(name) for name in IMAGE_COLUMNS if name in known), None)
    captions: tuple[int, ...] = ()
    for kind in CAPTION_COLUMNS:
        captions = captions or tuple(i for i, name in enumerate(known) if re.fullmatch(rf"{kind}s?[ _-]?[0-9]*", name))
    if image is None or not captions:
        wanted = " or ".join(IMAGE_COLUMNS if image is None else CAPTION_COLUMNS)
        raise DataError(f"{where}: expected a column named {wanted}, found {', '.join(names):.200}")
    ids = next((known.index(name) for name in ID_COLUMNS if name in known), None)
    return _Columns(image, captions, ids, known.index("split") if "split" in known else None)


def _lines(values: Sequence[Any], columns: _Columns, row: int, path: Path) -> Iterator[Line]:
    """The captions of a row; a cell may be a text, a list of texts, or missing."""
    file, split = _name(values[columns.image]), None if columns.split is None else values[columns.split]
    captions = [text for place in columns.captions for text in _listed(values[place])]
    if len(columns.captions) > 1:  # an image with fewer leaves cells empty
        captions = [text for text in captions if text != "" and not (isinstance(text, str) and text.isspace())]
    if columns.ids is None:
        ids = [None] * len(captions)
    else:
        given = values[columns.ids]
        ids = [_number(n) for n in (listed_numbers(given) if isinstance(given, str) else _listed(given))]
    if len(ids) != len(captions):
        raise DataError(f"{path} row {row}: image {file!r}: expected {len(captions)} caption ids, found {len(ids)}")
    if not captions:
        yield Line(row, file, None, split)
    for text, number in zip(captions, ids, strict=True):
        yield Line(row, file, text, split, number)


def _listed(value: Any) -> list[Any]:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str):
        value = listed_texts(value) or value
    return value if isinstance(value, list) else [value]


def _name(value: Any) -> Any:
    """The name of an image; numbers may stand for it."""
    if isinstance(value, float) and value.is_integer():  # as of a column that lacks values in other rows
        return str(int(value))
    return str(value) if type(value) is int else value


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value.strip()) else value


# ----------------------------------------------------------------------------------------------------------------- JSON


def _json(path: Path) -> Iterator[Line]:
    try:
        content = read_json(path)
    except DataError:
        first = next((line for line in text_lines(path) if line.strip()), "")
        try:
            foreign.parse_json(first, path)
        except ValueError:
            first = ""
        if not first.lstrip().startswith("{"):
            raise
        yield from _json_lines(path)  # by another name
        return
    if isinstance(content, dict) and "images" not in content:  # JSONL of one line
        content = [content]
    if isinstance(content, list) and content:
        yield from _objects(enumerate(content), path)
        return
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise DataError(
            f"{path}: expected an object with a list `images` (Karpathy's or COCO's format) or a list of objects, "
            "found neither"
        )
    try:
        yield from _coco(content, path) if "annotations" in content else _karpathy(images)
    except KeyError as error:
        raise DataError(f"{path}: expected the key {error.args[0]!r} in every entry, found one without") from error
    except (TypeError, AttributeError) as error:  # a list or a number where an object or text should be
        raise DataError(f"{path}: expected entries as Karpathy's or COCO's files have them: {error}") from error


def _json_lines(path: Path) -> Iterator[Line]:
    with data_errors():
        rows = (
            (number, foreign.parse_json(line, f"{path} row {number}"))
            for number, line in enumerate(text_lines(path), 1)
            if line.strip()
        )
        yield from _objects(rows, path)


def _objects(entries: Iterable[tuple[int, Any]], path: Path) -> Iterator[Line]:
    for row, entry in entries:
        if not isinstance(entry, dict):
            raise DataError(f"{path} row {row}: expected an object, found {type(entry).__name__}")
        try:
            columns = _columns(tuple(entry), path)
        except DataError as error:
            raise DataError(f"{error}, in row {row}") from None
        yield from _lines(list(entry.values()), columns, row, path)


def _karpathy(images: Iterable[dict[str, Any]]) -> Iterator[Line]:
    for row, image in enumerate(images):
        split = image["split"]
        file = "/".join(part for part in (image.get("filepath", ""), image["filename"]) if part)
        if not image["sentences"]:
            yield Line(row, file, None, split)
        for sentence in image["sentences"]:
            yield Line(row, file, sentence["raw"], split, sentence.get("sentid"))


def _coco(content: dict[str, Any], path: Path) -> Iterator[Line]:
    files = {image["id"]: image["file_name"] for image in content["images"]}
    silent = dict.fromkeys(files)
    for row, annotation in enumerate(content["annotations"]):
        image = annotation["image_id"]
        if image not in files:
            raise DataError(f"{path}: annotation of image {image!r:.80}, which `images` does not list")
        silent.pop(image, None)
        yield Line(row, files[image], annotation["caption"], None, annotation.get("id"))
    for image in silent:
        yield Line(-1, files[image], None)


# -------------------------------------------------------------------------------------------------------------- Parquet


def _parquet(path: Path) -> Iterator[Line]:
    with open_parquet(path) as file:
        yield from _batches(file, path)


def _torch(path: Path) -> Iterator[Line]:
    for row, file, caption in torch_files.read_captions(path):
        yield Line(row, file, caption)


def _batches(file: Any, path: Path) -> Iterator[Line]:
    schema = file.schema_arrow
    # Hugging Face's `image` holds the pictures, {bytes, path}: its path counts where no other column names the image.
    pictures = {name for name in schema.names if str(schema.field(name).type).startswith(("struct", "binary"))}
    try:
        columns = _columns(tuple("" if name in pictures else name for name in schema.names), path)
    except DataError:
        columns = _columns(tuple(schema.names), path)
    image = schema.names[columns.image]
    if image in pictures and "path:" not in str(schema.field(image).type):
        raise DataError(f"{path}: expected a column that names the image, found pictures alone")
    wanted = [schema.names[place] for place in {*columns.captions, columns.ids, columns.split} - {None}]
    row = 0
    for batch in file.iter_batches(_PARQUET_ROWS, columns=[*wanted, f"{image}.path" if image in pictures else image]):
        for record in batch.to_pylist():
            if image in pictures:
                record[image] = (record[image] or {}).get("path")
            yield from _lines([record.get(name) for name in schema.names], columns, row, path)
            row += 1


# ----------------------------------------------------------------------------------------------------------------- text


def _tokens(path: Path) -> Iterator[Line]:
    for row, text in enumerate(text_lines(path), 1):
        if not text.strip():
            continue
        match = _TOKEN.fullmatch(text) or _SPACED_TOKEN.fullmatch(text)
        if match is None:
            raise DataError(
                f"{path} line {row}: expected NAME.jpg#NUMBER<tab>sentence, or a header above, found {text[:80]!r}"
            )
        yield Line(row, match[1].strip(), match[2])


def _header(line: str) -> tuple[str, list[str], bool]:
    """Delimiter, column names, and whether cells may be quoted."""
    delimiter = max(_DELIMITERS, key=line.count)
    quoted = delimiter in ",;" or line.lstrip().startswith('"')
    names = (
        next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), []) if quoted else line.split(delimiter)
    )
    return delimiter, names, quoted


def _table(path: Path) -> Iterator[Line]:
    lines = text_lines(path)
    first = next(lines, "")
    delimiter, names, quoted = _header(first)
    columns = _columns(tuple(names), path)
    # A row of a wrong number of cells is the image's own fault where the image stands before what may be torn apart.
    image_first = columns.image < min(columns.captions)
    counted = next((place for place, name in enumerate(names) if name.strip() == "comment_number"), None)
    lists: bool | None = None  # whether captions are lists of sentences; the first row decides
    for row, cells in _quoted_rows(lines, delimiter, names, path) if quoted else _plain_rows(lines, delimiter):
        if len(cells) != len(names):
            cells = _mended(cells, names, columns, delimiter, f"{path} row {row}") or cells
        if len(cells) != len(names):
            fault = f"expected {len(names)} columns as in the header, found {len(cells)}"
        elif counted is not None and not cells[counted].strip().isdecimal():
            fault = f"expected a whole number as {names[counted].strip()}, found {cells[counted]!r:.80}"
        else:
            fault = ""
        if fault:
            alone = len(cells) <= columns.image + 1
            name = (cells[0].split() or [""])[0] if alone else cells[columns.image].strip()
            if not image_first or (alone and Path(name).suffix.lower() not in EXTENSIONS):
                raise DataError(f"{path} row {row}: {fault}")
            yield Line(row, name, "", fault=fault)  # and no telling which cell is the split
            continue
        values: list[Any] = list(cells)
        values[columns.image] = cells[columns.image].strip()
        for place in columns.captions:
            found_list = listed_texts(cells[place])
            if lists is None and cells[place].strip():
                lists = bool(found_list)
            if lists and (found_list is not None or not cells[place].strip()):
                values[place] = found_list or []
            elif lists or found_list:
                one, other = ("a list of sentences", "a sentence")[:: 1 if lists else -1]
                raise DataError(f"{path} row {row}: expected {one} as in the rows before, found {other}")
        yield from _lines(values, columns, row, path)


def _plain_rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of the rows below the header; quotation marks are text."""
    for number, line in enumerate(lines, 2):
        if line.replace(delimiter, "").strip():
            yield number, line.split(delimiter)


def _quoted_rows(
    lines: Iterable[str], delimiter: str, names: Sequence[str], path: Path
) -> Iterator[tuple[int, list[str]]]:
    """The same of a table with quoted cells. Raises DataError where a quotation mark spans lines or is left open."""
    mend = 'a quotation mark inside of a quoted cell is written twice ("")'
    rows = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        number = rows.line_num + 2  # of the line that the row begins in
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path} row {number}: expected cells that end where their quotes do: {error}; {mend}"
            ) from None
        broken = [place for place, cell in enumerate(cells) if "\n" in cell and listed_texts(cell) is None]
        if broken:
            name = names[broken[0]] if broken[0] < len(names) else broken[0]
            raise DataError(
                f"{path} row {number}: column {name!r}: expected text of one line, found a quoted cell that ends "
                f"{rows.line_num + 1 - number} lines on; {mend}, and a line break of a caption becomes a space"
            )
        if any(cell.strip() for cell in cells):
            yield number, cells


def _mended(cells: list[str], names: Sequence[str], columns: _Columns, delimiter: str, where: str) -> list[str] | None:
    """A row of Flickr's results.csv that lacks its second | (`1.jpg| 4   A dog .`), with it; None for any other."""
    last = len(names) - 1
    if delimiter != "|" or len(cells) != last or columns.captions != (last,) or columns.image >= last - 1:
        return None
    match = re.fullmatch(r"\s*([0-9]+)\s+(\S.*)", cells[-1])
    if match is None:
        return None
    print(
        f"note: {where}: the last | is missing; read {match[1]} as {names[-2].strip()}, {match[2]!r:.80} as "
        f"{names[-1].strip()}",
        file=sys.stderr,
    )
    return [*cells[:-1], match[1], match[2]]


def listed_texts(cell: str) -> list[str] | None:
    """The texts of a cell that is a list, in JSON or as Python or NumPy prints it; None for any other."""
    cell = cell.strip()
    if not (cell.startswith("[") and cell.endswith("]")):
        return None
    try:
        found = foreign.parse_json(cell, "")
    except ValueError:
        found = _printed(cell)
    return found if isinstance(found, list) and all(isinstance(text, str) for text in found) else None


def _printed(cell: str) -> list[str] | None:
    """The texts that Python's repr wrote; NumPy leaves commas out, which Python would read as one text."""
    texts = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(cell).readline):
            if token.type == tokenize.STRING:
                texts.append(ast.literal_eval(token.string))
            elif token.string.strip() not in ("", "[", "]", ","):
                return None
    except (SyntaxError, ValueError, tokenize.TokenError, MemoryError, RecursionError):
        return None
    return texts


def listed_numbers(cell: str) -> list[Any]:
    """Whole numbers of a cell: one, or a list of them."""
    return [part for part in re.split(r"[\s,]+", cell.strip().strip("[]()").replace("'", "").replace('"', "")) if part]
