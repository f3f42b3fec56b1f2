"""Metrics beyond recall, on the whole gallery: hubness, ECCV Caption, Crisscrossed Captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.data.records import DataSet
from shnet_jax.evaluate.ensemble import Embedded, MeanScore
from shnet_jax.evaluate.judgements import CocoRows, judgements_folder, read_judgements, read_ratings
from shnet_jax.evaluate.metrics import (
    CUTS,
    Metrics,
    Relevant,
    hits,
    hubness,
    precision_at_r,
    recall_at,
    relevant,
)
from shnet_jax.evaluate.tiles import Items, ItemScore, size
from shnet_jax.evaluate.top_k import BothTopK, top_k_both
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Array, Embedding

WITHIN = "images with images, captions with captions: by the product of global vectors"
OCCURRENCE = 10  # k of the k-occurrence


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
    """Values by name, {} when nothing is asked for.

    hubness_i2t, hubness_t2i: skewness of how often captions (images) are among the first 10 of an image (caption).
    eccv_i2t_map_at_r, _rprecision, _r1 and the same for t2i: ECCV Caption, percent.
    cxc_i2t_r1, _r5, _r10, the same for t2i: Crisscrossed Captions, percent; for i2i and t2t where ratings are given,
      by the product of global vectors (`WITHIN`).
    """
    metrics: Metrics = {}
    if extra.between or extra.hubness:
        most = max([OCCURRENCE, CUTS[-1], *(side.most for sides in extra.between.values() for side in sides)])
        top = top_k_both(embedded.images, embedded.texts, embedded.score, most, tile, mesh)
        if extra.hubness:
            metrics |= {
                "hubness_i2t": hubness(top.i2t.index[:, :OCCURRENCE], size(embedded.texts)),
                "hubness_t2i": hubness(top.t2i.index[:, :OCCURRENCE], size(embedded.images)),
            }
        for name, sides in extra.between.items():
            metrics |= _judged(name, top, sides)
    for direction, pairs in extra.within.items():
        items = embedded.images if direction == "i2i" else embedded.texts
        values = recall_at(hits(top_within(items, embedded.score, CUTS[-1], tile, mesh), pairs))
        metrics |= {f"cxc_{direction}_{name}": value for name, value in values.items()}
    return metrics


def _judged(judgements: str, top: BothTopK, sides: tuple[Relevant, Relevant]) -> Metrics:
    metrics: Metrics = {}
    for direction, lists, pairs in zip(("i2t", "t2i"), top, sides, strict=True):
        hit = hits(lists.index, pairs)
        values = precision_at_r(hit, pairs.counts) if judgements == "eccv" else recall_at(hit)
        metrics |= {f"{judgements}_{direction}_{name}": value for name, value in values.items()}
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
    return top_k_both(numbered, numbered, _Others(product), k, tile, mesh).i2t.index


@dataclasses.dataclass(frozen=True)
class _Others:
    """A score of (items, their numbers) that is 0 for an item with itself; equal ones share compiled programs."""

    score: ItemScore

    def __call__(self, queries: Any, others: Any) -> Array:
        same = queries[1][:, None] == others[1][None, :]
        return jnp.where(same, 0.0, self.score(queries[0], others[0]))
