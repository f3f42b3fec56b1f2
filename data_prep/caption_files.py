"""Reads the rows of caption files of any format, each with its image, its captions and the split that it names.

Karpathy JSON (dataset_coco.json, dataset_flickr30k.json): images with `sentences` and `split`.
COCO captions JSON (captions_val2017.json): `images` and `annotations`.
JSON list of objects (BLIP, ALBEF, LAVIS), or JSONL: `image`, `caption` (text or a list of texts), perhaps `split`.
JSON or a .pt of torch.save (Oscar's and VinVL's SPLIT_captions.pt): image -> list of captions, or JSON of one.
Parquet (Hugging Face): the same as columns; the pictures themselves are not read.
Flickr token file (results_20130124.token, Flickr8k.token.txt): lines NAME.jpg#0<tab>sentence.
CSV, TSV, Flickr's results.csv (|), Kaggle's captions.txt: a header with an image column, one or more of captions, and
perhaps `split`. TSV and | are read as they are, without quoting, unless their header is quoted or every quotation mark
stands where a writer of CSV (pandas) puts it.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import torch_files
from data_prep.files import data_errors, read_json, text_lines
from data_prep.names import EXTENSIONS
from data_prep.parquet import open_parquet
from data_prep.places import ends, first_object, has_keys
from data_prep.rows import Columns, Row, columns, is_list, needed, parse
from data_prep.schema import DataError, is_text
from shnet_jax import untrusted

_DELIMITERS = ",\t;|"
_PARQUET_ROWS = 1024  # read at once
_TOKEN = re.compile(r"([^\t]+)#[0-9]+ *\t(.*)")  # the first tab counts: sentences have numbers and tabs too
_SPACED_TOKEN = re.compile(r"([^\t]+?)#[0-9]+ +(.*)")
_SEPARATOR = re.compile(r'"?sep=(.)"?')  # Excel's line above the header


def read_captions(path: Path) -> Iterator[Row]:
    """Rows of a file of any format.

    Raises DataError, naming file and row, for a file of which it is not clear what it holds, and for a row of which it
    is not clear which image it belongs to.
    """
    for row in _reader(path)(path):
        if not _is_below(row.file):
            raise DataError(
                f"{row.where}: expected the name of an image below the folder of photographs, found {row.file!r:.200}"
            )
        if not is_text(row.file):
            raise DataError(
                f"{row.where}: expected the name of an image in UTF-8, found {row.file!r:.200}; save the file as UTF-8"
            )
        yield row


class Kind(NamedTuple):
    """Format of a caption file, and whether the file assigns images to splits."""

    what: str
    says_split: bool


_FIRST_KEY = re.compile(r'\ufeff?\s*\{\s*"([^"]+)"\s*:\s*(?:\[\s*)?"')  # of text, or a list of it
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".pt", ".csv", ".tsv", ".txt", ".token")


def recognise(path: Path) -> Kind | None:
    """The kind of a caption file, None for another one; its ends or its first record are read.

    Raises DataError for a stand-in such as a git-LFS pointer.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return None
    with data_errors():
        untrusted.check_kind(path)
    if suffix == ".pt":
        return Kind("captions by image of torch.save", False) if torch_files.peek(path) == "captions" else None
    if suffix == ".json":
        text = ends(path)
        if has_keys(text, "images", "sentences", "split"):
            return Kind("captions in Karpathy's JSON", True)
        if has_keys(text, "images", "image_id", "caption"):
            return Kind("captions in COCO's JSON", False)
        known = columns(tuple(first_object(text)))
        if known.image is not None and known.captions:
            return Kind("captions in a JSON list", known.split is not None)
        match = _FIRST_KEY.match(text)
        by_image = match and Path(match[1]).suffix.lower() in EXTENSIONS
        return Kind("captions by image in JSON", False) if by_image else None
    try:
        row = next(read_captions(path), None)
    except DataError:
        return None
    return row and Kind(f"captions in {suffix[1:].upper()}", row.split is not None)


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    known: dict[str, Callable[[Path], Iterator[Row]]] = {".json": _json, ".parquet": _parquet, ".pt": _torch}
    known |= {".csv": _table, ".tsv": _table}
    if (suffix := path.suffix.lower()) in known:
        return known[suffix]
    first = _first_line(path)
    if suffix in (".jsonl", ".ndjson") and not first.startswith("["):
        return _json_lines
    if first.startswith(("{", "[")):
        return _json
    try:
        needed(tuple(_header(first)[1]), path)
    except DataError:
        return _tokens
    return _table


def _first_line(path: Path) -> str:
    return next((line.strip() for line in text_lines(path) if line.strip()), "")


@lru_cache(maxsize=64)  # captions of an image stand side by side
def _is_below(file: str) -> bool:
    path = Path(file)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


# ----------------------------------------------------------------------------------------------------------------- JSON


def _json(path: Path) -> Iterator[Row]:
    try:
        content = read_json(path)
    except DataError:
        first = _first_line(path)
        try:
            untrusted.parse_json(first, path)
        except ValueError:
            first = ""
        if not first.startswith("{"):
            raise
        yield from _json_lines(path)  # by another name
        return
    if isinstance(content, dict) and "images" not in content:
        texts = [text for value in content.values() for text in (value if isinstance(value, list) else [value])]
        if texts and not columns(tuple(content)).image and all(isinstance(text, str) for text in texts):
            yield from _by_image(content, path)
            return
        content = [content]  # JSONL of one line
    images = content.get("images") if isinstance(content, dict) else content
    if not isinstance(images, list) or not images:
        raise DataError(
            f"{path}: expected an object with a list `images` (Karpathy's or COCO's format) or a list of objects, "
            "found neither"
        )
    if not isinstance(content, dict) or "annotations" not in content:
        yield from _objects(enumerate(images), path)
        return
    try:
        yield from _coco(images, content["annotations"], path)
    except KeyError as error:
        raise DataError(f"{path}: expected the key {error.args[0]!r} in every entry, found one without") from error
    except (TypeError, AttributeError) as error:  # a list or a number where an object or text should be
        raise DataError(f"{path}: expected entries as COCO's files have them: {error}") from error


def _json_lines(path: Path) -> Iterator[Row]:
    with data_errors():
        rows = (
            (number, untrusted.parse_json(line, f"{path} row {number}"))
            for number, line in enumerate(text_lines(path), 1)
            if line.strip()
        )
        yield from _objects(rows, path)


def _objects(entries: Iterable[tuple[int, Any]], path: Path) -> Iterator[Row]:
    for row, entry in entries:
        where = f"{path} row {row}"
        if not isinstance(entry, dict):
            raise DataError(f"{where}: expected an object, found {type(entry).__name__}")
        needed(tuple(entry), where)
        yield parse(entry, where, blanks=True)


def _coco(images: Iterable[Mapping[str, Any]], annotations: Iterable[Mapping[str, Any]], path: Path) -> Iterator[Row]:
    files: dict[str, str] = {}
    for image in images:
        file = image["file_name"]
        if files.setdefault(str(image["id"]), file) != file:
            raise DataError(
                f"{path}: `images` gives id {image['id']!r:.80} to {files[str(image['id'])]!r} and {file!r}"
            )
    silent = dict.fromkeys(files)
    for row, annotation in enumerate(annotations):
        image_id = str(annotation["image_id"])
        if image_id not in files:
            raise DataError(
                f"{path} row {row}: annotation of image {annotation['image_id']!r:.80}, which `images` does not list"
            )
        silent.pop(image_id, None)
        values = {"image": files[image_id], "caption": annotation["caption"], "sentid": annotation.get("id")}
        yield parse(values, f"{path} row {row}", blanks=True)
    for image_id in silent:
        yield Row(files[image_id], (), where=f"{path}: `images`")


def _by_image(content: Mapping[Any, Any], path: Path) -> Iterator[Row]:
    for row, (image, sentences) in enumerate(content.items()):
        yield parse({"image": image, "caption": sentences}, f"{path} row {row}", blanks=True)


def _torch(path: Path) -> Iterator[Row]:
    yield from _by_image(torch_files.open_by_image(path)[1], path)


# -------------------------------------------------------------------------------------------------------------- Parquet


def _parquet(path: Path) -> Iterator[Row]:
    with open_parquet(path) as file:
        yield from _batches(file, path)


def _batches(file: Any, path: Path) -> Iterator[Row]:
    schema = file.schema_arrow
    # Hugging Face's `image` holds the pictures, {bytes, path}: its path counts where no other column names the image.
    pictures = {n for n in schema.names if re.match(r"(large_)?binary|struct<.*\bbytes:", str(schema.field(n).type))}
    known = columns(tuple(name for name in schema.names if name not in pictures))
    if not (known.image and known.captions):
        known = needed(tuple(schema.names), path)
    image = str(known.image)
    if image in pictures and "path:" not in str(schema.field(image).type):
        raise DataError(f"{path}: expected a column that names the image, found pictures alone")
    wanted = [name for name in (*known.captions, known.numbers, known.split, known.folder) if name not in (None, image)]
    batches = file.iter_batches(_PARQUET_ROWS, columns=[*wanted, f"{image}.path" if image in pictures else image])
    for row, values in enumerate(values for batch in batches for values in batch.to_pylist()):
        if image in pictures:
            values[image] = (values[image] or {}).get("path")
        yield parse(values, f"{path} row {row}", blanks=True)


# ----------------------------------------------------------------------------------------------------------------- text


def _tokens(path: Path) -> Iterator[Row]:
    for number, text in enumerate(text_lines(path), 1):
        if not text.strip():
            continue
        match = _TOKEN.fullmatch(text) or _SPACED_TOKEN.fullmatch(text)
        if match is None:
            raise DataError(
                f"{path} line {number}: expected NAME.jpg#NUMBER<tab>sentence, or a header above, found {text[:80]!r}"
            )
        yield parse({"image": match[1], "caption": match[2]}, f"{path} row {number}", blanks=True)


def _header(line: str, delimiter: str = "") -> tuple[str, list[str], bool]:
    """Delimiter, column names, each of them once, and whether cells may be quoted."""
    delimiter = delimiter or max(_DELIMITERS, key=line.count)
    quoted = delimiter in ",;" or line.lstrip().startswith('"')
    names = (
        next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), []) if quoted else line.split(delimiter)
    )
    return delimiter, [f"{name} {i}" if name in names[:i] else name for i, name in enumerate(names)], quoted


def _table(path: Path) -> Iterator[Row]:
    lines = ((number, line) for number, line in enumerate(text_lines(path), 1) if line.strip())
    _, first = next(lines, (1, ""))
    above = _SEPARATOR.fullmatch(first)
    if above:
        _, first = next(lines, (2, ""))
    delimiter, names, quoted = _header(first, above[1] if above else "")
    known = needed(tuple(names), path)
    quoted = quoted or _as_csv_writes(text_lines(path), delimiter)
    # A row of a wrong number of cells is the image's own fault where the image stands before what may be torn apart.
    image = names.index(str(known.image))
    image_first = image < min(map(names.index, known.captions))
    counted = next((place for place, name in enumerate(names) if name.strip() == "comment_number"), None)
    for number, cells in _quoted_rows(lines, delimiter, names, path) if quoted else _plain_rows(lines, delimiter):
        where = f"{path} row {number}"
        if len(cells) != len(names):
            cells = _mended(cells, names, known, delimiter, where) or cells
        if len(cells) != len(names):
            fault = f"expected {len(names)} columns as in the header, found {len(cells)}"
        elif counted is not None and not cells[counted].strip().isdecimal():
            fault = f"expected a whole number as {names[counted].strip()}, found {cells[counted]!r:.80}"
        else:
            yield parse(dict(zip(names, cells, strict=True)), where, blanks=True)
            continue
        alone = len(cells) <= image + 1
        name = (cells[0].split() or [""])[0] if alone else cells[image].strip()
        if not image_first or (alone and Path(name).suffix.lower() not in EXTENSIONS):
            raise DataError(f"{where}: {fault}")
        yield Row(name, (), where=where, fault=fault)  # and no telling which cell is the split


def _as_csv_writes(lines: Iterable[str], delimiter: str) -> bool:
    """Whether quotation marks are there, and all of them as Python's csv, and so pandas, quote cells that need it."""
    marked = [line for line in lines if '"' in line]
    text = io.StringIO()
    try:
        csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(
            csv.reader(marked, delimiter=delimiter, strict=True)
        )
    except csv.Error:
        return False
    return bool(marked) and text.getvalue().split("\n")[:-1] == marked


def _plain_rows(lines: Iterable[tuple[int, str]], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of the rows below the header; quotation marks are text."""
    for number, line in lines:
        if line.replace(delimiter, "").strip():
            yield number, line.split(delimiter)


def _quoted_rows(
    lines: Iterable[tuple[int, str]], delimiter: str, names: Sequence[str], path: Path
) -> Iterator[tuple[int, list[str]]]:
    """Rows of a table with quoted cells. Raises DataError where a quotation mark spans lines or is left open."""
    mend = 'a quotation mark inside of a quoted cell is written twice ("")'
    begun: list[int] = []  # numbers of the lines of a row

    def ended() -> Iterator[str]:
        for number, line in lines:
            begun.append(number)
            yield f"{line}\n"

    rows = csv.reader(ended(), delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        begun.clear()
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path} row {begun[0]}: expected cells that end where their quotes do: {error}; {mend}"
            ) from None
        broken = [place for place, cell in enumerate(cells) if "\n" in cell and not is_list(cell)]
        if broken:
            name = names[broken[0]] if broken[0] < len(names) else broken[0]
            raise DataError(
                f"{path} row {begun[0]}: column {name!r}: expected text of one line, found a quoted cell that ends "
                f"{begun[-1] - begun[0]} lines on; {mend}, and a line break of a caption becomes a space"
            )
        if any(cell.strip() for cell in cells):
            yield begun[0], cells


def _mended(cells: list[str], names: Sequence[str], known: Columns, delimiter: str, where: str) -> list[str] | None:
    """A row of Flickr's results.csv that lacks its second | (`1.jpg| 4   A dog .`), with it; None for any other."""
    last = len(names) - 1
    image_last = names.index(str(known.image)) >= last - 1
    if delimiter != "|" or len(cells) != last or known.captions != (names[-1],) or image_last:
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
