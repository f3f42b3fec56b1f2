"""Ranking methods of a model: exactly by its score, by re-ranking candidates, or by the global vectors alone.

Re-ranking serves any model whose score is more than the dot product of its vectors. The global vectors find k
candidates for each query, and the model's own score re-ranks them. With k the whole gallery, the ranks are those of
exact ranking. Items behind the candidates keep the order of the global vectors.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.data.batches import token_buckets
from shnet_jax.evaluation.pair_scores import (
    PairScorer,
    listed_scores,
    make_programs,
    pair_scorer,
    ranks_of,
    score_matrix,
)
from shnet_jax.evaluation.ranks import Ranks, ranks
from shnet_jax.evaluation.tiles import take, vectors_of
from shnet_jax.evaluation.top_k import TopK, top_k
from shnet_jax.models.contract import RetrievalModel, has_static_score
from shnet_jax.types import Embedding, Score


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A ranked gallery and what ranking it took.

    pairs: how many the model's score was computed for; a pair that is a candidate in both directions counts once.
    candidates: the images that each caption re-ranked, [t, k], in the order of the vectors, with the scores of the
      model; None for other methods.
    seconds: compilation included.
    """

    ranks: Ranks
    pairs: int
    candidates: TopK | None = None
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class RankingMethod:
    """A way to rank a gallery; it keeps nothing between calls.

    function: (images, captions, image of each caption, number of the fold) -> Ranked.
    description: for the protocol card; "": the usual, every pair by the model's score.
    candidates: (images, captions) -> `Ranked.candidates` alone.
    """

    name: str
    function: Callable[[Embedding, Embedding, np.ndarray, int], Ranked]
    description: str = ""
    candidates: Callable[[Embedding, Embedding], TopK | None] = lambda images, texts: None

    @property
    def exact(self) -> bool:
        """Whether every pair is ranked by the model's score."""
        return not self.description

    def rank(self, images: Embedding, texts: Embedding, owner: np.ndarray, fold: int = 0) -> Ranked:
        """Ranks a gallery and takes the time."""
        start = time.perf_counter()
        ranked = self.function(images, texts, owner, fold)
        return dataclasses.replace(ranked, seconds=time.perf_counter() - start)


class RankingMethods:
    """The ranking methods of one model; programs are compiled once for all variables.

    A static score streams through `ranks.ranks`. A score that is a method (with parameters, or costly) is computed once
    for each pair, in blocks.
    """

    def __init__(self, model: RetrievalModel, config: FrozenConfigDict, mesh: Mesh):
        self._model, self._config, self._mesh = model, config, mesh
        self._programs = make_programs(model, mesh)

    def exact(self, variables: Mapping[str, Any], folder: Path | None = None) -> RankingMethod:
        """Exact ranking of every query against the whole gallery. folder: `pair_scores.open_folder`, for blocks."""
        evaluation, scorer = self._config.eval, self._scorer(variables)

        def streamed(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranked:
            dtype = evaluation.score_dtype
            ranked = ranks(images, texts, owner, self._model.score, evaluation.tile, self._mesh, dtype)
            return Ranked(ranked, len(images.vector) * len(texts.vector))

        def in_blocks(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranked:
            scores = score_matrix(images, texts, scorer, _fold_folder(folder, images, fold))
            return Ranked(ranks_of(scores, owner, evaluation.tile, self._mesh), scores.size)

        return RankingMethod("exact", streamed if has_static_score(self._model) else in_blocks)

    def rerank(self, variables: Mapping[str, Any], folder: Path | None = None) -> RankingMethod:
        """Re-ranking of the candidates of the global vectors; see `rerank`. folder: as for `exact`."""
        k, scorer = self._config.eval.two_stage, self._scorer(variables)

        def function(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranked:
            return rerank(images, texts, owner, k, scorer, _fold_folder(folder, images, fold))

        text = f"two stages: {k} candidates of each query by global vectors, re-ranked by the score; then as exact"
        return RankingMethod(
            f"two-stage {k}", function, text, lambda images, texts: caption_candidates(images, texts, k, scorer)
        )

    def vectors(self) -> RankingMethod:
        """Ranking by the global vectors alone."""

        def function(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranked:
            vectors = vectors_of(images), vectors_of(texts)
            return Ranked(ranks(*vectors, owner, RetrievalModel.score, self._config.eval.tile, self._mesh), 0)

        return RankingMethod("global vectors", function, "by the product of global vectors alone")

    def _scorer(self, variables: Mapping[str, Any]) -> PairScorer:
        tile, buckets = self._config.eval.tile, token_buckets(self._config.data)
        return pair_scorer(self._model, self._programs, variables["params"], self._mesh, tile, buckets)


def _fold_folder(folder: Path | None, images: Embedding, fold: int) -> Path | None:
    """The folder for the finished blocks of a fold."""
    if folder is None:
        return None
    of_fold = folder / f"{len(images.vector)}_images_{fold}"
    of_fold.mkdir(exist_ok=True)
    return of_fold


def candidates(evaluation: ConfigDict | FrozenConfigDict) -> int:
    """Number of candidates of a query where config.eval re-ranks and does nothing else; 0: every pair is scored.

    Raises ValueError for numbers below 0, and where nothing would be ranked.
    """
    if evaluation.two_stage < 0:
        raise ValueError(f"config.eval.two_stage is {evaluation.two_stage}; it is a number of candidates, or 0")
    if not (evaluation.exact or evaluation.two_stage):
        raise ValueError(
            "config.eval.exact is False, which needs config.eval.two_stage candidates: nothing else is ranked"
        )
    return 0 if evaluation.exact else evaluation.two_stage


def best_candidates(
    queries: Embedding, gallery: Embedding, items: np.ndarray, k: int, score: Score, tile: int, mesh: Mesh
) -> TopK:
    """The k best of each query's candidates by the score; -1 and -inf behind the last one.

    items: [q, c] rows of the gallery, -1 for none. The other arguments, order and errors are those of `top_k.top_k`.
    """
    k = min(k, items.shape[1])
    index, values = np.full((len(items), k), -1, np.int64), np.full((len(items), k), -np.inf, np.float32)
    for query, candidate_rows in enumerate(items):
        rows = np.sort(candidate_rows[candidate_rows >= 0])  # equal scores rank by the smaller row
        if len(rows):
            best = top_k(take(queries, np.array([query])), take(gallery, rows), k, score, tile, mesh)
            places = best.index.shape[1]
            index[query, :places], values[query, :places] = rows[best.index[0]], best.score[0]
    return TopK(index, values)


def rerank_top_k(
    queries: Embedding, gallery: Embedding, k: int, count: int, score: Score, tile: int, mesh: Mesh
) -> TopK:
    """`top_k.top_k` among the `count` candidates of each query, or k where that is more, which its vector finds."""
    nearest = top_k(vectors_of(queries), vectors_of(gallery), max(k, count), RetrievalModel.score, tile, mesh)
    return best_candidates(queries, gallery, nearest.index, k, score, tile, mesh)


def rerank(
    images: Embedding, texts: Embedding, owner: np.ndarray, k: int, scorer: PairScorer, folder: Path | None = None
) -> Ranked:
    """Ranks a gallery by re-ranking k candidates of each query.

    owner: [t], the image of each caption. folder: for finished scores, see `pair_scores.listed_scores`.
    Raises ValueError for k below 1, and for NaN among the scores.
    """
    if k < 1:
        raise ValueError(f"config.eval.two_stage is {k}; at least 1 candidate is needed")
    vectors, dot, tile, mesh = (vectors_of(images), vectors_of(texts)), RetrievalModel.score, scorer.tile, scorer.mesh
    by_vectors = ranks(*vectors, owner, dot, tile, mesh)
    captions = top_k(*vectors, k, dot, tile, mesh).index
    pictures = top_k(*vectors[::-1], k, dot, tile, mesh).index
    n, t = len(images.vector), len(texts.vector)
    image_pairs = np.arange(n)[:, None] * t + captions
    caption_pairs = pictures * t + np.arange(t)[:, None]
    pairs = np.unique(np.concatenate([image_pairs.ravel(), caption_pairs.ravel()]))
    scores = _scores(images, texts, pairs, scorer, folder)
    image_scores, caption_scores = (scores[np.searchsorted(pairs, p)] for p in (image_pairs, caption_pairs))
    i2t = _new_ranks(captions, image_scores, owner[captions] == np.arange(n)[:, None], by_vectors.i2t)
    t2i = _new_ranks(pictures, caption_scores, pictures == owner[:, None], by_vectors.t2i)
    return Ranked(Ranks(i2t, t2i), len(pairs), TopK(pictures, caption_scores))


def caption_candidates(images: Embedding, texts: Embedding, k: int, scorer: PairScorer) -> TopK:
    """`Ranked.candidates` alone. Raises ValueError for NaN among the scores."""
    vectors, t = (vectors_of(texts), vectors_of(images)), len(texts.vector)
    pictures = top_k(*vectors, k, RetrievalModel.score, scorer.tile, scorer.mesh).index
    scores = _scores(images, texts, (pictures * t + np.arange(t)[:, None]).ravel(), scorer)
    return TopK(pictures, scores.reshape(pictures.shape))


def _scores(
    images: Embedding, texts: Embedding, pairs: np.ndarray, scorer: PairScorer, folder: Path | None = None
) -> np.ndarray:
    """Scores [p] of pairs, numbered image * t + caption."""
    t = len(texts.vector)
    scores = listed_scores(images, texts, pairs // t, pairs % t, scorer, folder)
    if nans := int(np.isnan(scores).sum()):
        raise ValueError(f"{nans} of {len(pairs)} scores of candidates are NaN, so nothing can be ranked")
    return scores


def _new_ranks(items: np.ndarray, scores: np.ndarray, match: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Rank [q] of the best-ranked match among the candidates `items` [q, k]; `otherwise` where none is a candidate."""
    best = np.where(match, scores, -np.inf).max(axis=1, keepdims=True)
    last = np.iinfo(np.int64).max
    first = np.where(match & (scores == best), items, last).min(axis=1, keepdims=True)
    before = (scores > best) | ((scores == best) & (items < first))
    return np.where(match.any(axis=1), before.sum(axis=1), otherwise)
