"""Which way a gallery is ranked with a model's score, and exact against two-stage ranking in one table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from shnet_jax.data.batches import token_buckets
from shnet_jax.evaluate.blocks import PairScorer, make_programs, pair_scorer, ranks_of, score_matrix
from shnet_jax.evaluate.protocols import Ranker, Results
from shnet_jax.evaluate.rank import Ranks, ranks
from shnet_jax.evaluate.report import ARROWS, markdown
from shnet_jax.evaluate.two_stage import two_stage_ranks
from shnet_jax.models.contract import RetrievalModel, has_static_score
from shnet_jax.types import Embedding


@dataclasses.dataclass
class Effort:
    """What ranking took: pairs that the model's score was computed for, and seconds, compilation included."""

    pairs: int = 0
    seconds: float = 0.0


class Rankings:
    """The ways to rank a gallery with one model's score; programs are compiled once for all variables.

    A static score streams through `rank.ranks`. A score that is a method (with parameters, or costly) is computed once
    for each pair, in blocks.
    """

    def __init__(self, model: RetrievalModel, config: FrozenConfigDict, mesh: Mesh):
        self._model, self._config, self._mesh = model, config, mesh
        self._programs = make_programs(model, mesh)

    def exact(self, variables: Mapping[str, Any], effort: Effort, folder: Path | None = None) -> Ranker:
        """Every query against the whole gallery. folder: `blocks.open_folder`, for a score in blocks."""
        evaluation, scorer = self._config.eval, self._scorer(variables)

        def streamed(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranks:
            dtype = evaluation.score_dtype
            return ranks(images, texts, owner, self._model.score, evaluation.tile, self._mesh, dtype)

        def in_blocks(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranks:
            here = None if folder is None else folder / f"fold_{fold}"
            if here is not None:
                here.mkdir(exist_ok=True)
            scores = score_matrix(images, texts, scorer, here)
            return ranks_of(scores, owner, evaluation.tile, self._mesh)

        return _timed(streamed if has_static_score(self._model) else in_blocks, effort)

    def two_stage(self, variables: Mapping[str, Any], effort: Effort) -> Ranker:
        """The candidates of the global vectors, re-ranked; see `two_stage`."""
        k, scorer = self._config.eval.two_stage, self._scorer(variables)

        def ranker(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> tuple[Ranks, int]:
            return two_stage_ranks(images, texts, owner, k, scorer)

        return _timed(ranker, effort)

    def vectors(self, effort: Effort) -> Ranker:
        """The global vectors alone."""

        def ranker(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> tuple[Ranks, int]:
            vectors = Embedding(images.vector), Embedding(texts.vector)
            return ranks(*vectors, owner, RetrievalModel.score, self._config.eval.tile, self._mesh), 0

        return _timed(ranker, effort)

    def _scorer(self, variables: Mapping[str, Any]) -> PairScorer:
        config = self._config
        buckets = token_buckets(config.data)
        return pair_scorer(self._model, self._programs, variables["params"], self._mesh, config.eval.tile, buckets)


def _timed(ranker: Any, effort: Effort) -> Ranker:
    """The ranker with its effort added up; one that does not say how many pairs it scored, scored all."""

    def timed(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranks:
        start = time.perf_counter()
        found = ranker(images, texts, owner, fold)
        effort.seconds += time.perf_counter() - start
        ranked, pairs = found if isinstance(found, tuple) else (found, len(images.vector) * len(texts.vector))
        effort.pairs += pairs
        return ranked

    return timed


def with_effort(results: Results, effort: Effort, ranking: str | None = None) -> Results:
    """Results whose card says how they were ranked and what that took."""
    card: dict[str, Any] = {**results.card, "pairs_scored": effort.pairs, "ranking_seconds": round(effort.seconds, 1)}
    return dataclasses.replace(results, card=card | ({"ranking": ranking} if ranking else {}))


def comparison_table(arms: Mapping[str, Results]) -> str:
    """Markdown: recalls of each way of ranking, pairs scored, seconds; speed-up against the first one."""
    columns = [f"{d}_r{k}" for d in ARROWS for k in (1, 5, 10)]
    headings = [f"{ARROWS[c[:3]]} R@{c[5:]}" for c in columns]
    first = next(iter(arms.values())).card
    rows = []
    for name, arm in arms.items():
        pairs, seconds = int(arm.card["pairs_scored"]), float(arm.card["ranking_seconds"])
        speed = f"{float(first['ranking_seconds']) / seconds:.1f}" if seconds else ""
        recalls = [f"{arm.metrics[c]:.1f}" for c in (*columns, "rsum")]
        rows.append([name, *recalls, f"{pairs:,}", f"{seconds:.1f}", speed])
    return markdown(["ranking", *headings, "rSum", "pairs scored", "seconds", "speed-up"], rows)
