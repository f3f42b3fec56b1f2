"""Relevance judgements for COCO's test images beyond the five captions of each: ECCV Caption and Crisscrossed Captions.

The user has the files. Images are known by their COCO number, captions by their annotation number.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from shnet_jax.data.records import DataSet
from shnet_jax.evaluate.metrics import Relevant, relevant
from shnet_jax.untrusted import read_object

PACKAGE = "eccv_caption"
CXC_POSITIVE = {"image": 2.5, "caption": 3.0}  # ratings from here on are matches (Parekh et al., EACL 2021)


def judgements_folder(where: str) -> Path:
    """The folder of the judgements: `where` itself, or that of the installed package for "package".

    Raises FileNotFoundError when there is none.
    """
    if where != "package":
        folder = Path(where)
        if not folder.is_dir():
            raise FileNotFoundError(f"config.eval.eccv is {where!r}: no such folder (or 'package')")
        return folder
    spec = find_spec(PACKAGE)  # its data are read, its code is not run
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"config.eval.eccv is 'package', but {PACKAGE} is not installed: pip install {PACKAGE}")
    return Path(spec.submodule_search_locations[0]) / "data"


class CocoRows:
    """Rows of a split by COCO's numbers. Raises ValueError for a data set without caption_ids."""

    def __init__(self, dataset: DataSet, split: str):
        if "caption_ids" not in dataset.features:
            raise ValueError(
                f"{dataset.path}: no field caption_ids, by which these judgements know the captions; import the split "
                f"with a file {split}_capids.txt"
            )
        ids = dataset.open_split(split, ("caption_ids",))
        self.images = rows_of(np.array([coco_number(i) for i in dataset.image_ids(split)]), "image")
        self.captions = rows_of(np.concatenate([record["caption_ids"] for record in ids]), "caption")


def read_judgements(folder: Path, name: str, image_rows: Mapping[int, int], caption_rows: Mapping[int, int]) -> Any:
    """Reads (image to caption, caption to image) from {name}_image_to_caption.json and {name}_caption_to_image.json.

    Args:
      name: "eccv" or "cxc", as the package names its files: {query number: [numbers of relevant items]}.
      image_rows, caption_rows: number -> row in the gallery.

    A relevant item that is not in the gallery (the package has captions beyond the 25,000) counts as one that is never
    found, as in the package: it gets a row behind the last. Raises ValueError naming file and number for a query that
    the gallery does not have: the judgements are of all 5,000 test images.
    """
    return (
        _read(folder / f"{name}_image_to_caption.json", image_rows, caption_rows),
        _read(folder / f"{name}_caption_to_image.json", caption_rows, image_rows),
    )


def _read(path: Path, query_rows: Mapping[int, int], item_rows: Mapping[int, int]) -> Relevant:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected this file of judgements, found none")
    absent: dict[int, int] = {}
    pairs = []
    for query, items in read_object(path).items():
        try:
            number, judged = int(query), [int(item) for item in items]
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}: expected a number and the numbers of its relevant items, found {query!r:.40}: {items!r:.80}"
            ) from None
        row = _row(path, query_rows, number)
        for item in judged:
            known = item_rows.get(item)
            pairs.append((row, len(item_rows) + absent.setdefault(item, len(absent)) if known is None else known))
    if not pairs:
        raise ValueError(f"{path}: expected judgements of all queries, found none")
    return relevant(*np.array(pairs, np.int64).reshape(-1, 2).T)


def _row(path: Path, rows: Mapping[int, int], number: int) -> int:
    if number not in rows:
        raise ValueError(
            f"{path}: query {number} is not among the {len(rows)} in the split; these judgements need all 5,000 test "
            "images of COCO (Karpathy) and the annotation numbers of their captions"
        )
    return rows[number]


def coco_number(name: str) -> int:
    """Number in a COCO id: 391895 for "COCO_val2014_000000391895.jpg", 5142 for "COCO_val2014:sentid:5142"."""
    number = re.search(r"(\d+)(\.\w+)?$", name[-255:])  # longer than a file name, and the search takes for ever
    if number is None:
        raise ValueError(f"id {name!r}: expected COCO's number, alone or at the end of the name")
    return int(number[1])


def rows_of(numbers: np.ndarray, what: str) -> dict[int, int]:
    """Maps numbers to rows. Raises ValueError for a number that occurs twice."""
    rows = {int(number): row for row, number in enumerate(numbers)}
    if len(rows) < len(numbers):
        values, counts = np.unique(numbers, return_counts=True)
        raise ValueError(f"{what} {values[counts > 1][0]} occurs {counts.max()} times in the split; expected once")
    return rows


def read_ratings(path: Path, kind: str, rows: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of matching images (sis_*.csv) or captions (sts_*.csv) of Crisscrossed Captions, in both orders, [p] each.

    Columns image1, image2 (or caption1, caption2), agg_score, sampling_method; a rating of at least CXC_POSITIVE[kind]
    is a match. Raises ValueError naming file and line.
    """
    columns = [f"{kind}1", f"{kind}2", "agg_score"]
    query, item = [], []
    for number, line in _table(path):
        if number == 1:
            if line[:3] != columns:
                raise ValueError(f"{path} line 1: expected columns {', '.join(columns)}, found {', '.join(line)}")
            continue
        try:
            first, second = (coco_number(cell) for cell in line[:2])
            score = float(line[2])
            if not math.isfinite(score):
                raise ValueError(f"{line[2]!r} is no finite number")
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path} line {number}: expected two ids and a rating: {error}") from error
        if score < CXC_POSITIVE[kind]:
            continue
        for of in (first, second):
            if of not in rows:
                raise ValueError(f"{path} line {number}: {kind} {of} is not in the split")
        query += [rows[first], rows[second]]
        item += [rows[second], rows[first]]
    return np.array(query, np.int64), np.array(item, np.int64)


def _table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines of a CSV file with their numbers, the header as line 1 ([] for an empty file)."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            yield 1, next(reader, [])
            for line in reader:
                yield reader.line_num, line
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a table in UTF-8: {error}") from None
