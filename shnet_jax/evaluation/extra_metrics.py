"""Metrics beyond recall, on the whole gallery: hubness, ECCV Caption, Crisscrossed Captions.

The judgements of COCO's test images are files that the user has. Images are known by their COCO number, captions by
their annotation number.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.data.records import DataSet
from shnet_jax.evaluation.ensemble import Embedded, MeanScore
from shnet_jax.evaluation.metrics import (
    CUTS,
    DIRECTIONS,
    Metrics,
    Relevant,
    hits,
    hubness,
    precision_at_r,
    recall_at,
    relevant,
)
from shnet_jax.evaluation.tiles import Items, ItemScore, size
from shnet_jax.evaluation.top_k import top_k_both
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Array, Embedding
from shnet_jax.untrusted import read_object

WITHIN = "images with images, captions with captions: by the product of global vectors"
OCCURRENCE = 10  # k of the k-occurrence
PACKAGE = "eccv_caption"
CXC_POSITIVE = {"image": 2.5, "caption": 3.0}  # ratings from here on are matches (Parekh et al., EACL 2021)


@dataclasses.dataclass(frozen=True)
class ExtraMetrics:
    """Metrics that config.eval asks for beyond recall, with the judgements read.

    between: name -> relevant captions of images, relevant images of captions. within: "i2i" and "t2t" -> the same of
    images to images and of captions to captions; both empty without.
    """

    hubness: bool
    between: Mapping[str, tuple[Relevant, Relevant]]
    within: Mapping[str, Relevant]


NO_EXTRA_METRICS = ExtraMetrics(hubness=False, between={}, within={})
"""No metrics beyond recall."""


def read_extra_metrics(dataset: DataSet, split: str, evaluation: ConfigDict) -> ExtraMetrics:
    """Reads the judgements that config.eval names, before anything is encoded.

    Raises ValueError or FileNotFoundError when a file is missing or does not fit the split.
    """
    between: dict[str, tuple[Relevant, Relevant]] = {}
    within: dict[str, Relevant] = {}
    if evaluation.eccv or evaluation.cxc:
        rows = CocoRows(dataset, split)
        if evaluation.eccv:
            folder = judgements_folder(evaluation.eccv)
            between = {name: read_judgements(folder, name, rows.images, rows.captions) for name in ("eccv", "cxc")}
        if evaluation.cxc:
            ratings, name = Path(evaluation.cxc), "val" if split.startswith(("val", "dev")) else "test"
            counts = dataset.caption_counts(split)
            siblings = sibling_captions(np.repeat(np.arange(len(counts)), counts))
            query, item = read_ratings(ratings / f"sts_{name}.csv", "caption", rows.captions)
            within = {
                "i2i": relevant(*read_ratings(ratings / f"sis_{name}.csv", "image", rows.images)),
                "t2t": relevant(np.append(query, siblings[0]), np.append(item, siblings[1])),
            }
    return ExtraMetrics(evaluation.hubness, between, within)


def extra_metrics(embedded: Embedded, extra: ExtraMetrics, tile: int, mesh: Mesh) -> Metrics:
    """Values by name, {} when nothing is asked for; the processes of a job share the work.

    hubness_i2t, hubness_t2i: skewness of how often captions (images) are among the first 10 of an image (caption).
    eccv_i2t_map_at_r, _rprecision, _r1 and the same for t2i: ECCV Caption, percent.
    cxc_i2t_r1, _r5, _r10, the same for t2i: Crisscrossed Captions, percent; for i2i and t2t where ratings are given,
      by the product of global vectors (`WITHIN`).
    """
    metrics: Metrics = {}
    if extra.between or extra.hubness:
        most = max([OCCURRENCE, CUTS[-1], *(side.most for sides in extra.between.values() for side in sides)])
        top = top_k_both(embedded.images, embedded.texts, embedded.score, most, tile, mesh, shared=True)
        if extra.hubness:
            metrics |= {
                "hubness_i2t": hubness(top.i2t.index[:, :OCCURRENCE], size(embedded.texts)),
                "hubness_t2i": hubness(top.t2i.index[:, :OCCURRENCE], size(embedded.images)),
            }
        for name, sides in extra.between.items():
            for direction, lists, pairs in zip(DIRECTIONS, top, sides, strict=True):
                hit = hits(lists.index, pairs)
                values = precision_at_r(hit, pairs.counts) if name == "eccv" else recall_at(hit)
                metrics |= {f"{name}_{direction}_{metric}": value for metric, value in values.items()}
    for direction, pairs in extra.within.items():
        items = embedded.images if direction == "i2i" else embedded.texts
        values = recall_at(hits(top_within(items, embedded.score, CUTS[-1], tile, mesh), pairs))
        metrics |= {f"cxc_{direction}_{name}": value for name, value in values.items()}
    return metrics


def sibling_captions(caption_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All ordered pairs of different captions of the same image, [p] each."""
    order = np.argsort(caption_image, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(caption_image[order])) + 1)
    pairs = np.concatenate([np.stack(np.meshgrid(g, g, indexing="ij"), -1).reshape(-1, 2) for g in groups])
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return pairs[:, 0], pairs[:, 1]


def top_within(items: Items, score: ItemScore, k: int, tile: int, mesh: Mesh) -> np.ndarray:
    """Top-k [m, k] of m items for each of them, by the dot product of their global vectors.

    A score of sets, or of regions and words, is of an image and a caption; of an ensemble the mean is over its members'
    products, weighted as its scores are. An item scores 0 with itself, as in the code of VSE-infinity, so it is not the
    first of its own list.
    """
    vectors = jax.tree.map(lambda e: Embedding(e.vector), items, is_leaf=lambda e: isinstance(e, Embedding))
    product: ItemScore = RetrievalModel.score
    if isinstance(score, MeanScore):
        product = dataclasses.replace(score, scores=(RetrievalModel.score,) * len(score.scores))
    numbered = (vectors, np.arange(size(vectors), dtype=np.int32))
    return top_k_both(numbered, numbered, _Others(product), k, tile, mesh, shared=True).i2t.index


@dataclasses.dataclass(frozen=True)
class _Others:
    """A score of (items, their numbers) that is 0 for an item with itself; equal ones share compiled programs."""

    score: ItemScore

    def __call__(self, queries: Any, others: Any) -> Array:
        same = queries[1][:, None] == others[1][None, :]
        return jnp.where(same, 0.0, self.score(queries[0], others[0]))


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
        self.images = _row_by_number(np.array([coco_number(i) for i in dataset.image_ids(split)]), "image")
        self.captions = _row_by_number(np.concatenate([record["caption_ids"] for record in ids]), "caption")


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
    rows, pairs = dict(item_rows), []
    for query, items in read_object(path).items():
        try:
            number, judged = int(query), [int(item) for item in items]
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}: expected a number and the numbers of its relevant items, found {query!r:.40}: {items!r:.80}"
            ) from None
        if number not in query_rows:
            raise ValueError(
                f"{path}: query {number} is not among the {len(query_rows)} in the split; these judgements need all "
                "5,000 test images of COCO (Karpathy) and the annotation numbers of their captions"
            )
        pairs += [(query_rows[number], rows.setdefault(item, len(rows))) for item in judged]
    if not pairs:
        raise ValueError(f"{path}: expected judgements of all queries, found none")
    return relevant(*np.array(pairs, np.int64).reshape(-1, 2).T)


def coco_number(name: str) -> int:
    """Number in a COCO id: 391895 for "COCO_val2014_000000391895.jpg", 5142 for "COCO_val2014:sentid:5142"."""
    number = re.search(r"(\d+)(\.\w+)?$", name[-255:])  # longer than a file name, and the search takes for ever
    if number is None:
        raise ValueError(f"id {name!r}: expected COCO's number, alone or at the end of the name")
    return int(number[1])


def _row_by_number(numbers: np.ndarray, kind: str) -> dict[int, int]:
    """Maps the numbers of a split's images or captions to rows. Raises ValueError for a number that occurs twice."""
    rows = {int(number): row for row, number in enumerate(numbers)}
    if len(rows) < len(numbers):
        values, counts = np.unique(numbers, return_counts=True)
        raise ValueError(f"{kind} {values[counts > 1][0]} occurs {counts.max()} times in the split; expected once")
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
        if absent := [rated for rated in (first, second) if rated not in rows]:
            raise ValueError(f"{path} line {number}: {kind} {absent[0]} is not in the split")
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
