"""Retrieval in two stages: global vectors find each query's k candidates, the model's own score re-ranks them.

For any model whose score is more than the dot product of its vectors. With k the whole gallery the ranks are those of
exact ranking; the items behind the candidates keep the order of the global vectors.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.evaluate.blocks import PairScorer
from shnet_jax.evaluate.lists import listed_scores
from shnet_jax.evaluate.nearest import Found, top_k
from shnet_jax.evaluate.rank import Ranks, ranks
from shnet_jax.evaluate.tiles import take
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Embedding, Score


def candidates(evaluation: ConfigDict | FrozenConfigDict) -> int:
    """How many candidates a query has where config.eval ranks in two stages and in no other way; 0: all are scored.

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
    queries: Embedding, gallery: Embedding, found: np.ndarray, k: int, score: Score, tile: int, mesh: Mesh
) -> Found:
    """The k best of each query's candidates by the score; -1 and -inf behind the last one.

    found: [q, c] rows of the gallery, -1 for none. The other arguments, order and errors are those of `nearest.top_k`.
    """
    k = min(k, found.shape[1])
    index, values = np.full((len(found), k), -1, np.int64), np.full((len(found), k), -np.inf, np.float32)
    for query, own in enumerate(found):
        rows = np.sort(own[own >= 0])  # equal scores rank by the smaller row
        if len(rows):
            best = top_k(take(queries, np.array([query])), take(gallery, rows), k, score, tile, mesh)
            places = best.index.shape[1]
            index[query, :places], values[query, :places] = rows[best.index[0]], best.score[0]
    return Found(index, values)


def two_stage_top_k(
    queries: Embedding, gallery: Embedding, k: int, count: int, score: Score, tile: int, mesh: Mesh
) -> Found:
    """`nearest.top_k` among the `count` candidates of each query, or k where that is more, which its vector finds."""
    vectors = Embedding(queries.vector), Embedding(gallery.vector)
    found = top_k(*vectors, max(k, count), RetrievalModel.score, tile, mesh).index
    return best_candidates(queries, gallery, found, k, score, tile, mesh)


@dataclasses.dataclass(frozen=True)
class Staged:
    """A gallery ranked in two stages.

    pairs: how many were scored: a pair that is a candidate in both directions once.
    first: the candidates of each caption, [t, k], in the order of the vectors, and what they score.
    """

    ranks: Ranks
    pairs: int
    first: Found


def two_stage_ranks(
    images: Embedding, texts: Embedding, owner: np.ndarray, k: int, scorer: PairScorer, folder: Path | None = None
) -> Staged:
    """Ranks a gallery.

    owner: [t], the image of each caption. folder: for what is scored, see `lists.listed_scores`.
    Raises ValueError for k below 1, and for NaN among the scores.
    """
    if k < 1:
        raise ValueError(f"config.eval.two_stage is {k}; at least 1 candidate is needed")
    own, others, how = (
        Embedding(images.vector),
        Embedding(texts.vector),
        (RetrievalModel.score, scorer.tile, scorer.mesh),
    )
    whole = ranks(own, others, owner, *how)
    captions, pictures = top_k(own, others, k, *how).index, top_k(others, own, k, *how).index
    n, t = len(images.vector), len(texts.vector)
    by_image = np.arange(n)[:, None] * t + captions
    by_text = pictures * t + np.arange(t)[:, None]
    pairs = np.unique(np.concatenate([by_image.ravel(), by_text.ravel()]))
    scores = _scores(images, texts, pairs, scorer, folder)

    def of(keys: np.ndarray) -> np.ndarray:
        return scores[np.searchsorted(pairs, keys)]

    i2t = _reranked(captions, of(by_image), owner[captions] == np.arange(n)[:, None], whole.i2t)
    t2i = _reranked(pictures, of(by_text), pictures == owner[:, None], whole.t2i)
    return Staged(Ranks(i2t, t2i), len(pairs), Found(pictures, of(by_text)))


def caption_candidates(images: Embedding, texts: Embedding, k: int, scorer: PairScorer) -> Found:
    """`Staged.first` alone. Raises ValueError for NaN among the scores."""
    vectors, t = (Embedding(texts.vector), Embedding(images.vector)), len(texts.vector)
    found = top_k(*vectors, k, RetrievalModel.score, scorer.tile, scorer.mesh).index
    scores = _scores(images, texts, (found * t + np.arange(t)[:, None]).ravel(), scorer)
    return Found(found, scores.reshape(found.shape))


def _scores(
    images: Embedding, texts: Embedding, pairs: np.ndarray, scorer: PairScorer, folder: Path | None = None
) -> np.ndarray:
    """Scores [p] of pairs, numbered image * t + caption."""
    t = len(texts.vector)
    scores = listed_scores(images, texts, pairs // t, pairs % t, scorer, folder)
    if nans := int(np.isnan(scores).sum()):
        raise ValueError(f"{nans} of {len(pairs)} scores of candidates are NaN, so nothing can be ranked")
    return scores


def _reranked(items: np.ndarray, scores: np.ndarray, match: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """[q] rank of the best-ranked match among the candidates `items` [q, k]; `otherwise` where none is a candidate."""
    found = match.any(axis=1)
    best = np.where(match, scores, -np.inf).max(axis=1, keepdims=True)
    last = np.iinfo(np.int64).max
    first = np.where(match & (scores == best), items, last).min(axis=1, keepdims=True)
    before = (scores > best) | ((scores == best) & (items < first))
    return np.where(found, before.sum(axis=1), otherwise)
