"""Ranking methods of a model: exactly by its score, by re-ranking candidates, or by the global vectors alone.

Re-ranking serves any model whose score is more than the dot product of its vectors. The global vectors, or other
vectors (`stage_one`), find k candidates for each query, and the model's own score re-ranks them. With k the whole
gallery, the ranks are those of exact ranking. Items behind the candidates keep the order of these vectors.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
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
from shnet_jax.evaluation.stage_one import GLOBAL_VECTORS, StageOne, make_stage_one
from shnet_jax.evaluation.tiles import check_no_nan, prefetch_one, take, tile_size
from shnet_jax.evaluation.top_k import NONE, TopK, top_k
from shnet_jax.models.contract import RetrievalModel, has_static_score
from shnet_jax.parallel.mapping import Mapped, map_specs, on_cpu
from shnet_jax.types import DATA, Array, Embedding, Score

CANDIDATE_BYTES = 64 * 2**20
"""Most bytes of candidates that a device is given at once."""

PAIRS_ON_CPU, PAIRS = 64, 4096
"""Pairs of candidates that a device scores at once: arrays of few on a CPU, few programs of many elsewhere."""


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
    stage_one: the vectors whose order the items behind the candidates keep.
    """

    name: str
    function: Callable[[Embedding, Embedding, np.ndarray, int], Ranked]
    description: str = ""
    candidates: Callable[[Embedding, Embedding], TopK | None] = lambda images, texts: None
    stage_one: StageOne = GLOBAL_VECTORS

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
        self._programs, self._tile = make_programs(model, mesh), tile_size(config.eval, mesh)
        self._stage_one = make_stage_one(config.eval, model.score, config.seed, mesh)

    def exact(self, variables: Mapping[str, Any], folder: Path | None = None) -> RankingMethod:
        """Exact ranking of every query against the whole gallery. folder: `pair_scores.open_folder`, for blocks."""
        evaluation, scorer = self._config.eval, self._scorer(variables)

        def streamed(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranked:
            dtype = evaluation.score_dtype
            ranked = ranks(images, texts, owner, self._model.score, self._tile, self._mesh, dtype)
            return Ranked(ranked, len(images.vector) * len(texts.vector))

        def in_blocks(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranked:
            scores = score_matrix(images, texts, scorer, _fold_folder(folder, images, fold))
            return Ranked(ranks_of(scores, owner, self._tile, self._mesh), scores.size)

        return RankingMethod("exact", streamed if has_static_score(self._model) else in_blocks)

    def rerank(self, variables: Mapping[str, Any], folder: Path | None = None) -> RankingMethod:
        """Re-ranking of the candidates of stage one; see `rerank`. folder: as for `exact`."""
        k, scorer, first = self._config.eval.two_stage, self._scorer(variables), self._stage_one

        def function(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranked:
            return rerank(images, texts, owner, k, scorer, _fold_folder(folder, images, fold), first)

        def of_captions(images: Embedding, texts: Embedding) -> TopK:
            return caption_candidates(images, texts, k, scorer, first)

        text = f"two stages: {k} candidates of each query by {first.description}, re-ranked by the score; then as exact"
        name = f"two-stage {k}" + (f" by {first.name}" if first.settings else "")
        return RankingMethod(name, function, text, of_captions, first)

    def vectors(self) -> list[RankingMethod]:
        """Ranking by the global vectors alone, and by the vectors of stage one where they are others."""
        return [self._by_vectors(one) for one in (GLOBAL_VECTORS, self._stage_one)][
            : 2 if self._stage_one.settings else 1
        ]

    def _by_vectors(self, first: StageOne) -> RankingMethod:
        def function(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranked:
            vectors = first(images, "images"), first(texts, "texts")
            return Ranked(ranks(*vectors, owner, RetrievalModel.score, self._tile, self._mesh), 0)

        return RankingMethod(first.name, function, f"by the product of {first.description} alone", stage_one=first)

    def _scorer(self, variables: Mapping[str, Any]) -> PairScorer:
        buckets = token_buckets(self._config.data)
        return pair_scorer(self._model, self._programs, variables["params"], self._mesh, self._tile, buckets)


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
    queries: Embedding, gallery: Embedding, items: np.ndarray, k: int, score: Score, mesh: Mesh
) -> TopK:
    """The k best of each query's candidates by the score; -1 and -inf behind the last one.

    items: [q, c] rows of the gallery, -1 for none. score, mesh: as for `top_k.top_k`, whose order and errors these are.
    """
    q, c = items.shape
    k = min(k, c)
    if not q:
        return TopK(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
    rows = np.sort(np.where(items < 0, NONE, items), axis=1)  # equal scores rank by the smaller row
    real = rows != NONE
    part = mesh.size * _queries_at_once(gallery, -(-q // mesh.size), c)
    sharding, program = NamedSharding(mesh, P(DATA)), _candidate_scores(score, mesh)

    def dispatch(start: int) -> tuple[slice, Array]:
        numbers = np.minimum(np.arange(start, start + part), q - 1)  # padding repeats the last query
        candidates = take(gallery, np.where(real[numbers], rows[numbers], 0))
        placed = jax.device_put(jax.tree.map(np.asarray, (take(queries, numbers), candidates)), sharding)
        return slice(start, min(start + part, q)), program(*placed)

    scores = np.empty((q, c), np.float32)
    for answered, on_devices in prefetch_one(map(dispatch, range(0, q, part))):
        scores[answered] = np.asarray(on_devices, np.float32)[: answered.stop - answered.start]
    check_no_nan(int((np.isnan(scores) & real).sum()), q, c)
    scores = np.where(real, scores, -np.inf) + np.float32(0)  # -0.0 and 0.0 are a tie
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    index = np.where(real, rows, -1).astype(np.int64)
    return TopK(np.take_along_axis(index, order, axis=1), np.take_along_axis(scores, order, axis=1))


def _queries_at_once(gallery: Embedding, q: int, candidates: int) -> int:
    """Queries of which a device holds all candidates: a power of two, so that a few programs serve all searches."""
    bytes_per_query = candidates * sum(leaf[:1].nbytes for leaf in jax.tree.leaves(gallery))
    fits = max(1, CANDIDATE_BYTES // bytes_per_query)
    return min(1 << (q - 1).bit_length(), 1 << (fits.bit_length() - 1))


@lru_cache(maxsize=8)
def _candidate_scores(score: Score, mesh: Mesh) -> Mapped:
    """The program (queries [m], their candidates [m, c], both split over the devices) -> scores [m, c]."""
    pairs = PAIRS_ON_CPU if on_cpu(mesh) else PAIRS

    def of_query(pair: tuple[Embedding, Embedding]) -> Array:
        query, candidates = pair
        return score(candidates, jax.tree.map(lambda a: a[None], query))[:, 0]

    def scores(queries: Embedding, candidates: Embedding) -> Array:
        m, c = candidates.vector.shape[:2]
        return jax.lax.map(of_query, (queries, candidates), batch_size=min(m, max(1, pairs // c)))

    return map_specs(scores, mesh, (P(DATA), P(DATA)), P(DATA))


def rerank_top_k(
    queries: Embedding,
    gallery: Embedding,
    k: int,
    count: int,
    score: Score,
    tile: int,
    mesh: Mesh,
    first: tuple[Embedding, Embedding],
) -> TopK:
    """`top_k.top_k` among the `count` candidates of each query, or k where that is more, which stage one finds.

    first: the vectors of stage one, of the queries and of the gallery.
    """
    nearest = top_k(*first, max(k, count), RetrievalModel.score, tile, mesh)
    return best_candidates(queries, gallery, nearest.index, k, score, mesh)


def rerank(
    images: Embedding,
    texts: Embedding,
    owner: np.ndarray,
    k: int,
    scorer: PairScorer,
    folder: Path | None = None,
    stage_one: StageOne = GLOBAL_VECTORS,
) -> Ranked:
    """Ranks a gallery by re-ranking k candidates of each query; the processes of a job share the work.

    owner: [t], the image of each caption. folder: for finished scores, see `pair_scores.listed_scores`. stage_one:
    finds the candidates.
    Raises ValueError for k below 1, and for NaN among the scores.
    """
    if k < 1:
        raise ValueError(f"config.eval.two_stage is {k}; at least 1 candidate is needed")
    vectors, dot = (stage_one(images, "images"), stage_one(texts, "texts")), RetrievalModel.score
    tile, mesh = scorer.tile, scorer.mesh
    by_vectors = ranks(*vectors, owner, dot, tile, mesh)
    captions = top_k(*vectors, k, dot, tile, mesh, shared=True).index
    pictures = top_k(*vectors[::-1], k, dot, tile, mesh, shared=True).index
    n, t = len(images.vector), len(texts.vector)
    image_pairs = np.arange(n)[:, None] * t + captions
    caption_pairs = pictures * t + np.arange(t)[:, None]
    pairs = np.unique(np.concatenate([image_pairs.ravel(), caption_pairs.ravel()]))
    scores = _scores(images, texts, pairs, scorer, folder)
    image_scores, caption_scores = (scores[np.searchsorted(pairs, p)] for p in (image_pairs, caption_pairs))
    i2t = _new_ranks(captions, image_scores, owner[captions] == np.arange(n)[:, None], by_vectors.i2t)
    t2i = _new_ranks(pictures, caption_scores, pictures == owner[:, None], by_vectors.t2i)
    return Ranked(Ranks(i2t, t2i), len(pairs), TopK(pictures, caption_scores))


def caption_candidates(
    images: Embedding, texts: Embedding, k: int, scorer: PairScorer, stage_one: StageOne = GLOBAL_VECTORS
) -> TopK:
    """`Ranked.candidates` alone. Raises ValueError for NaN among the scores."""
    vectors, t = (stage_one(texts, "texts"), stage_one(images, "images")), len(texts.vector)
    pictures = top_k(*vectors, k, RetrievalModel.score, scorer.tile, scorer.mesh, shared=True).index
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
