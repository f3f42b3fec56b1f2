"""Re-ranking: global vectors find k candidates for each query, and the model's own score re-ranks them.

It serves any model whose score is more than the dot product of its vectors. With k the whole gallery, the ranks are
those of exact ranking. Items behind the candidates keep the order of the global vectors.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.evaluate.pair_scores import PairScorer, listed_scores
from shnet_jax.evaluate.ranks import Ranks, ranks
from shnet_jax.evaluate.tiles import take, vectors_of
from shnet_jax.evaluate.top_k import TopK, top_k
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Embedding, Score


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


@dataclasses.dataclass(frozen=True)
class Reranked:
    """A re-ranked gallery.

    pairs: how many were scored: a pair that is a candidate in both directions once.
    candidates: those of each caption, [t, k], in the order of the vectors, with the scores of the model.
    """

    ranks: Ranks
    pairs: int
    candidates: TopK


def rerank(
    images: Embedding, texts: Embedding, owner: np.ndarray, k: int, scorer: PairScorer, folder: Path | None = None
) -> Reranked:
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
    return Reranked(Ranks(i2t, t2i), len(pairs), TopK(pictures, caption_scores))


def caption_candidates(images: Embedding, texts: Embedding, k: int, scorer: PairScorer) -> TopK:
    """`Reranked.candidates` alone. Raises ValueError for NaN among the scores."""
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
