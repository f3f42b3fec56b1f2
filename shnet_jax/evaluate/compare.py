"""Which way a gallery is ranked with a model's score, and exact against two-stage ranking in one table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from shnet_jax.data.batches import token_buckets
from shnet_jax.evaluate.blocks import PairScorer, make_programs, pair_scorer, ranks_of, score_matrix
from shnet_jax.evaluate.bootstrap import NAMES
from shnet_jax.evaluate.nearest import Found
from shnet_jax.evaluate.person import search_persons
from shnet_jax.evaluate.protocols import Ranker, Results
from shnet_jax.evaluate.rank import Ranks, ranks
from shnet_jax.evaluate.report import PERSON, heading
from shnet_jax.evaluate.two_stage import caption_candidates, two_stage_ranks
from shnet_jax.models.contract import RetrievalModel, has_static_score
from shnet_jax.observe.table import Table
from shnet_jax.types import Embedding

PersonSearch = Callable[[Embedding, Embedding, np.ndarray, np.ndarray], np.ndarray]
"""(images, captions, person in each image, person of each caption) -> what `person.search_persons` gives."""


@dataclasses.dataclass
class Effort:
    """What ranking took: pairs that the model's score was computed for, and seconds, compilation included."""

    pairs: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to rank a gallery.

    ranking: what the protocol card says of it, "": the usual, every pair by the model's score. effort: that of the last
    gallery. persons: the person search of such a ranking; None: by the score.
    """

    name: str
    ranker: Ranker
    effort: Effort
    ranking: str = ""
    persons: PersonSearch | None = None

    @property
    def exact(self) -> bool:
        """Whether every pair was ranked by the model's score."""
        return not self.ranking


class Rankings:
    """The ways to rank a gallery with one model's score; programs are compiled once for all variables.

    A static score streams through `rank.ranks`. A score that is a method (with parameters, or costly) is computed once
    for each pair, in blocks.
    """

    def __init__(self, model: RetrievalModel, config: FrozenConfigDict, mesh: Mesh):
        self._model, self._config, self._mesh = model, config, mesh
        self._programs = make_programs(model, mesh)

    def exact(self, variables: Mapping[str, Any], folder: Path | None = None) -> Way:
        """Every query against the whole gallery. folder: `blocks.open_folder`, for a score in blocks."""
        evaluation, scorer = self._config.eval, self._scorer(variables)

        def streamed(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranks:
            dtype = evaluation.score_dtype
            return ranks(images, texts, owner, self._model.score, evaluation.tile, self._mesh, dtype)

        def in_blocks(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranks:
            scores = score_matrix(images, texts, scorer, _of_fold(folder, images, fold))
            return ranks_of(scores, owner, evaluation.tile, self._mesh)

        return _timed("exact", streamed if has_static_score(self._model) else in_blocks)

    def two_stage(self, variables: Mapping[str, Any], folder: Path | None = None) -> Way:
        """The candidates of the global vectors, re-ranked; see `two_stage`. folder: as above."""
        k, scorer = self._config.eval.two_stage, self._scorer(variables)

        last: dict[tuple[int, int], Found] = {}  # candidates of the last gallery, by its size: scored once

        def ranker(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> tuple[Ranks, int]:
            found = two_stage_ranks(images, texts, owner, k, scorer, _of_fold(folder, images, fold))
            last.clear()
            last[len(images.vector), len(texts.vector)] = found.first
            return found.ranks, found.pairs

        def persons(images: Embedding, texts: Embedding, own: np.ndarray, theirs: np.ndarray) -> np.ndarray:
            first = last.get((len(images.vector), len(texts.vector)))
            if first is None:  # the last one was a fold
                first = caption_candidates(images, texts, k, scorer)
            return self._persons(images, texts, own, theirs, first)

        said = f"two stages: {k} candidates of each query by global vectors, re-ranked by the score; then as exact"
        return _timed(f"two-stage {k}", ranker, said, persons)

    def vectors(self) -> Way:
        """The global vectors alone."""

        def ranker(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> tuple[Ranks, int]:
            vectors = Embedding(images.vector), Embedding(texts.vector)
            return ranks(*vectors, owner, RetrievalModel.score, self._config.eval.tile, self._mesh), 0

        return _timed("global vectors", ranker, "by the product of global vectors alone", self._persons)

    def _persons(
        self, images: Embedding, texts: Embedding, own: np.ndarray, theirs: np.ndarray, first: Found | None = None
    ) -> np.ndarray:
        vectors = Embedding(images.vector), Embedding(texts.vector)
        tile = self._config.eval.tile
        return search_persons(*vectors, own, theirs, RetrievalModel.score, tile, self._mesh, first)

    def _scorer(self, variables: Mapping[str, Any]) -> PairScorer:
        config = self._config
        buckets = token_buckets(config.data)
        return pair_scorer(self._model, self._programs, variables["params"], self._mesh, config.eval.tile, buckets)


def _of_fold(folder: Path | None, images: Embedding, fold: int) -> Path | None:
    """The folder for the finished blocks of a gallery."""
    if folder is None:
        return None
    here = folder / f"{len(images.vector)}_images_{fold}"
    here.mkdir(exist_ok=True)
    return here


def _timed(name: str, ranker: Any, ranking: str = "", persons: PersonSearch | None = None) -> Way:
    """The way of a ranker; one that does not say how many pairs it scored, scored all."""
    effort = Effort()

    def timed(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranks:
        if fold == 0:
            effort.pairs, effort.seconds = 0, 0.0
        start = time.perf_counter()
        found = ranker(images, texts, owner, fold)
        effort.seconds += time.perf_counter() - start
        ranked, pairs = found if isinstance(found, tuple) else (found, len(images.vector) * len(texts.vector))
        effort.pairs += pairs
        return ranked

    return Way(name, timed, effort, ranking, persons)


def with_effort(results: Results, way: Way) -> Results:
    """Results whose card says how they were ranked and what that took."""
    spent = way.effort
    card: dict[str, Any] = {**results.card, "pairs_scored": spent.pairs, "ranking_seconds": round(spent.seconds, 1)}
    return dataclasses.replace(results, card=card | ({"ranking": way.ranking} if way.ranking else {}))


def comparison_table(arms: Mapping[str, Results]) -> Table:
    """Recalls of each way of ranking, pairs scored, seconds; speed-up against the last one."""
    arms = {name: arm for name, arm in arms.items() if "pairs_scored" in arm.card}
    columns = [*NAMES]
    columns += [name for name in PERSON if all(name in arm.metrics for arm in arms.values())]
    last = [*arms.values()][-1].card
    rows = []
    for name, arm in arms.items():
        pairs, seconds = int(arm.card["pairs_scored"]), float(arm.card["ranking_seconds"])
        speed = f"{float(last['ranking_seconds']) / seconds:.1f}" if seconds else ""
        recalls = [f"{arm.metrics[c]:.1f}" for c in columns]
        rows.append([name, *recalls, f"{pairs:,}", f"{seconds:.1f}", speed])
    headings = ["ranking", *map(heading, columns), "pairs scored", "seconds", "speed-up"]
    return Table("Exact ranking and ranking in two stages", headings, rows)
