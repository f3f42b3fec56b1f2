"""Retrieval in two stages: global vectors find each query's k candidates, the model's own score re-ranks them.

For any model whose score is more than the dot product of its vectors. With k the whole gallery the ranks are those of
exact ranking; the items behind the candidates keep the order of the global vectors.
"""

from __future__ import annotations

import numpy as np

from shnet_jax.evaluate.blocks import PairScorer
from shnet_jax.evaluate.lists import listed_scores
from shnet_jax.evaluate.nearest import top_k
from shnet_jax.evaluate.rank import Ranks, ranks
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Embedding


def two_stage_ranks(
    images: Embedding, texts: Embedding, owner: np.ndarray, k: int, scorer: PairScorer
) -> tuple[Ranks, int]:
    """Ranks, and how many pairs were scored: a pair that is a candidate in both directions once.

    owner: [t], the image of each caption. Raises ValueError for k below 1, and for NaN among the scores.
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
    scores = listed_scores(images, texts, pairs // t, pairs % t, scorer)
    if nans := int(np.isnan(scores).sum()):
        raise ValueError(f"{nans} of {len(pairs)} scores of candidates are NaN, so nothing can be ranked")

    def of(keys: np.ndarray) -> np.ndarray:
        return scores[np.searchsorted(pairs, keys)]

    i2t = _reranked(captions, of(by_image), owner[captions] == np.arange(n)[:, None], whole.i2t)
    t2i = _reranked(pictures, of(by_text), pictures == owner[:, None], whole.t2i)
    return Ranks(i2t, t2i), len(pairs)


def _reranked(items: np.ndarray, scores: np.ndarray, match: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """[q] rank of the best-ranked match among the candidates `items` [q, k]; `otherwise` where none is a candidate."""
    found = match.any(axis=1)
    best = np.where(match, scores, -np.inf).max(axis=1, keepdims=True)
    last = np.iinfo(np.int64).max
    first = np.where(match & (scores == best), items, last).min(axis=1, keepdims=True)
    before = (scores > best) | ((scores == best) & (items < first))
    return np.where(found, before.sum(axis=1), otherwise)
