"""Retrieval in two stages: global vectors find each query's k candidates, the model's own score re-ranks them.

For any model whose score is more than the dot product of its vectors. With k the whole gallery the ranks are those of
exact ranking; the items behind the candidates keep the order of the global vectors.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from shnet_jax.evaluate.blocks import PairScorer, listed_scores
from shnet_jax.evaluate.rank import Ranks, ranks
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Array, Embedding

ROWS = 512
"""Queries whose candidates are looked for at once."""


def two_stage_ranks(
    images: Embedding, texts: Embedding, owner: np.ndarray, k: int, scorer: PairScorer
) -> tuple[Ranks, int]:
    """Ranks, and how many pairs were scored: a pair that is a candidate in both directions once.

    owner: [t], the image of each caption. Raises ValueError for k below 1, and for NaN among the scores.
    """
    if k < 1:
        raise ValueError(f"config.eval.two_stage is {k}; at least 1 candidate is needed")
    whole = ranks(
        Embedding(images.vector), Embedding(texts.vector), owner, RetrievalModel.score, scorer.tile, scorer.mesh
    )
    captions = candidates(images.vector, texts.vector, k)
    pictures = candidates(texts.vector, images.vector, k)
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


def candidates(queries: Array | np.ndarray, items: Array | np.ndarray, k: int) -> np.ndarray:
    """The k items [q, k] int64 with the largest dot product, best first, equal ones by their index."""
    k = min(k, len(items))
    everything = jnp.asarray(items)
    found = []
    for start in range(0, len(queries), ROWS):
        some = np.asarray(queries[start : start + ROWS])
        padded = np.pad(some, ((0, min(ROWS, len(queries)) - len(some)), (0, 0)))
        found.append(np.asarray(_best(jnp.asarray(padded), everything, k))[: len(some)])
    return np.concatenate(found).astype(np.int64)


@partial(jax.jit, static_argnums=2)
def _best(queries: Array, items: Array, k: int) -> Array:
    return lax.top_k(RetrievalModel.score(Embedding(queries), Embedding(items)), k)[1]


def _reranked(items: np.ndarray, scores: np.ndarray, match: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """[q] rank of the best-ranked match among the candidates `items` [q, k]; `otherwise` where none is a candidate."""
    found = match.any(axis=1)
    best = np.where(match, scores, -np.inf).max(axis=1, keepdims=True)
    last = np.iinfo(np.int64).max
    first = np.where(match & (scores == best), items, last).min(axis=1, keepdims=True)
    before = (scores > best) | ((scores == best) & (items < first))
    return np.where(found, before.sum(axis=1), otherwise)
