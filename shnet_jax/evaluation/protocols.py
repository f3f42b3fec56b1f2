"""Named evaluation protocols: which gallery is ranked, and the protocol card that documents it beside the metrics."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from shnet_jax.evaluation.bootstrap import Interval
from shnet_jax.evaluation.metrics import (
    CUTS,
    Metrics,
    QueryRanks,
    chance,
    mean,
    person_chance,
    person_metrics,
    recall_line,
    recalls,
)
from shnet_jax.evaluation.person_search import search_persons
from shnet_jax.evaluation.ranking_methods import Ranked, RankingMethod
from shnet_jax.evaluation.ranks import check_captions, ranks
from shnet_jax.evaluation.tiles import Items, ItemScore, size, take
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.observe import html
from shnet_jax.types import DIRECTIONS, Embedding

TIE_RULE = "rank = items that score strictly higher + items that score the same and have a smaller index"
UNKNOWN = "not stated"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The data, checkpoint and settings behind embeddings, as far as the caller knows; part of the protocol card."""

    dataset: str = UNKNOWN
    split: str = UNKNOWN
    checkpoint_step: int | str = UNKNOWN
    parameters: str = UNKNOWN  # "trained" | "running average (decay 0.999)"
    dtype: str = UNKNOWN  # operands of the model's matrix products
    selected_on: str = UNKNOWN  # split that chose the checkpoint; "none" for the last one
    devices: int | str = UNKNOWN  # how many encoded the gallery
    ensemble: str = "no, a single model"
    notes: str = "none"  # on fields of the data set that the model can do without


@dataclasses.dataclass(frozen=True)
class Results:
    """Metrics of a gallery.

    metrics: see `metrics.Metrics`; those of each fold, those of chance, and the protocol card beside them.
    queries: the rank of each query; None where only the metrics are known.
    extra: further metrics of the whole gallery by name, see `extra_metrics.extra_metrics`.
    intervals: of each recall, see `bootstrap.recall_intervals`.
    """

    metrics: Metrics
    folds: tuple[Metrics, ...]
    chance: Metrics
    card: dict[str, str | int]
    queries: QueryRanks | None = None
    extra: Metrics = dataclasses.field(default_factory=dict)
    intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        """The recalls in one line."""
        return f"Results({self.card.get('split', UNKNOWN)}: {recall_line(self.metrics)})"

    def _repr_html_(self) -> str:
        """The recalls beside those of chance, as a table for notebooks."""
        columns = [*(f"{side}_r{cut}" for side in DIRECTIONS for cut in CUTS), "rsum"]
        heading = ["", *(f"{name} R@{cut}" for name in DIRECTIONS.values() for cut in CUTS), "rSum"]
        split = str(self.card.get("split", UNKNOWN))
        rows = [
            [name, *(f"{metrics[column]:.1f}" for column in columns)]
            for name, metrics in ((split, self.metrics), ("chance", self.chance))
        ]
        return html.table(heading, rows)


def count_folds(protocol: str) -> int:
    """Folds of the gallery: 1 of "whole", k of "folds<k>", consecutive blocks of images of equal size (5: COCO 1K)."""
    match = re.fullmatch(r"whole|folds([1-9]\d*)", protocol)
    if match is None:
        raise ValueError(f'unknown protocol {protocol!r}: expected "whole" or "folds<k>" such as "folds5"')
    return int(match[1] or 1)


def evaluate(
    images: Items,
    texts: Items,
    caption_image: np.ndarray,
    score: ItemScore,
    protocol: str = "whole",
    provenance: Provenance | None = None,
    tile: int = 512,
    mesh: Mesh | None = None,
    score_dtype: str = "float32",
    method: RankingMethod | None = None,
    image_person: np.ndarray | None = None,
) -> Results:
    """Ranks a gallery by a named protocol (see `count_folds`).

    Several processes call it together, each with a mesh of its own devices, and share the work of `ranks.ranks`.

    Args:
      images, texts, caption_image, score, tile, mesh, score_dtype: as for `ranks.ranks`.
      method: ranks the gallery instead of `ranks.ranks`.
      image_person: [n] integers, persons for the metrics of a person search in the whole gallery; None: no search.

    Raises:
      ValueError: as `ranks.ranks`, and folds of unequal size.
    """
    folds, n, t = count_folds(protocol), size(images), size(texts)
    owner = check_captions(caption_image, n, t)
    if n % folds:
        raise ValueError(f"protocol {protocol}: {n} images do not divide into {folds} folds of equal size")
    metrics, chance_metrics = [], []
    queries = QueryRanks(np.empty(n, np.int64), np.empty(t, np.int64), owner)
    ranked: list[Ranked] = []
    for fold, (rows, captions) in enumerate(_folds(owner, n, folds)):
        fold_owner = owner[captions] - rows[0]
        # The whole gallery is not copied: it may be gigabytes.
        sides = (images, texts) if folds == 1 else (take(images, rows), take(texts, captions))
        if method is None:
            ranked += [Ranked(ranks(*sides, fold_owner, score, tile, mesh, score_dtype), 0)]
        else:
            ranked += [method.rank(*sides, fold_owner, fold)]
        queries.i2t[rows], queries.t2i[captions] = ranked[-1].ranks.i2t, ranked[-1].ranks.t2i
        metrics.append(recalls(ranked[-1].ranks))
        chance_metrics.append(chance(np.bincount(fold_owner)))
    card = _card(protocol, provenance or Provenance(), images, n, t)
    if method is not None:
        card |= {"pairs_scored": sum(r.pairs for r in ranked)}
        card |= {"ranking_seconds": round(sum(r.seconds for r in ranked), 1)}  # type: ignore[dict-item]
        card |= {"ranking": method.description} if method.description else {}
    results = Results(mean(metrics), tuple(metrics), mean(chance_metrics), card, queries)
    if image_person is None:
        return results
    persons = image_person, image_person[owner]
    if method is None or method.exact:
        scores = search_persons(images, texts, *persons, score, tile, mesh)
    else:
        candidates = ranked[0].candidates if folds == 1 else method.candidates(images, texts)
        vectors = method.stage_one(images, "images"), method.stage_one(texts, "texts")
        scores = search_persons(*vectors, *persons, RetrievalModel.score, tile, mesh, candidates)
    return _with_persons(results, queries, *persons, scores)


def _with_persons(
    results: Results, queries: QueryRanks, image_person: np.ndarray, caption_person: np.ndarray, scores: np.ndarray
) -> Results:
    """Results with the metrics of a person search. scores: [t, 5], see `person_search.search_persons`."""
    people = f"{len(np.unique(image_person))}; any image of the caption's person is relevant"
    return dataclasses.replace(
        results,
        metrics=results.metrics | person_metrics(scores),
        queries=dataclasses.replace(queries, image_person=image_person, person_scores=scores),
        chance=results.chance | person_chance(image_person, caption_person),
        card=results.card | {"persons": people},
    )


def _folds(owner: np.ndarray, n: int, folds: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and captions of each fold."""
    for rows in np.split(np.arange(n), folds):
        yield rows, np.flatnonzero((owner >= rows[0]) & (owner <= rows[-1]))


def _card(protocol: str, provenance: Provenance, images: Items, n: int, t: int) -> dict[str, str | int]:
    folds = count_folds(protocol)
    members = jax.tree.leaves(images, is_leaf=lambda item: isinstance(item, Embedding))  # several of an ensemble
    vectors: list[Any] = [getattr(member, "vector", member) for member in members]
    gallery = (
        f"all {n} images and {t} captions together"
        if folds == 1
        else f"mean over {folds} consecutive galleries of {n // folds} images with their captions"
    )
    device = jax.devices()[0]
    return {
        "protocol": protocol,
        **dataclasses.asdict(provenance),
        "images": n,
        "captions": t,
        "folds": folds,
        "gallery": gallery,
        "ranking": "each image once; image to text counts the best-ranked own caption",
        "ties": TIE_RULE,
        "median_rank": "floor(median of 0-based ranks) + 1",
        "embedding_size": ", ".join(str(each.shape[-1]) for each in vectors),
        "embedding_dtype": str(vectors[0].dtype),
        "device": f"{device.device_kind} ({device.platform})",
        "jax": jax.__version__,
        "flax": version("flax"),
    }
