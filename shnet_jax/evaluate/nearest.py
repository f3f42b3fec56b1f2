"""Exact top-k of a gallery for each query, streamed in tiles over the devices: the score matrix never exists.

In a round every device scores its own tile of the gallery with the same queries and keeps the best k so far; in the
end the host merges the k of all devices. Order is that of evaluation: higher score first, of equal scores the smaller
index. Scores come from the program that evaluation ranks with (`evaluate.tiles.programs`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shnet_jax.evaluate.tiles import Tiling, make_tiling, one_behind, programs
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel import axis
from shnet_jax.parallel.mapping import Mapped, data_mesh, map_specs
from shnet_jax.types import DATA, Array, Embedding, Score

NONE = np.iinfo(np.int32).max  # index of a place that nothing was found for


@dataclasses.dataclass(frozen=True)
class Found:
    """The best k items for each of q queries. index: [q, k] int64, row in the gallery. score: [q, k] float32."""

    index: np.ndarray
    score: np.ndarray


def is_dot_product(score: Score) -> bool:
    """Whether a score is the default one: then a nearest-neighbour index can stand in for it."""
    return score is RetrievalModel.score


@lru_cache(maxsize=8)
def turned(score: Score) -> Score:
    """The same score with captions first: (captions, images) -> [t, n]. One function for each score."""

    def captions_first(texts: Embedding, images: Embedding) -> Array:
        return score(images, texts).T

    return captions_first


def top_k(
    queries: Embedding, gallery: Embedding, k: int, score: Score, tile: int = 512, mesh: Mesh | None = None
) -> Found:
    """The k best-scoring items of a gallery of n for each of q queries; all n of them where k is larger.

    Args:
      queries: q embeddings, arrays on the host or a device.
      gallery: n embeddings, also `np.memmap`: only tiles of it are read, once for each 8 * tile queries.
      score: (some of the gallery, some queries) -> their scores; for images as queries of captions `turned(score)`.
      tile: items of the gallery that a device scores at once.
      mesh: devices that share the gallery; None: the first one. The result is the same.

    Raises:
      ValueError: k below 1, an empty gallery, a score that is not finite.
    """
    n, q = len(gallery.vector), len(queries.vector)
    if k < 1:
        raise ValueError(f"top_k is {k}; it must be at least 1")
    if not n:
        raise ValueError("nothing to search: the gallery is empty")
    k = min(k, n)
    mesh = mesh or data_mesh(jax.devices()[:1])
    index, values = np.empty((q, k), np.int64), np.empty((q, k), np.float32)
    if not q:
        return Found(index, values)
    # A power of two, so that searches of a few queries at a time compile a few programs only.
    tiling = make_tiling(gallery, _padded(queries), np.arange(q), np.arange(q), tile, mesh)
    for number in range(tiling.caption_tiles):
        rows, real = tiling.captions(number)
        block = _search(tiling, tiling.put_texts(rows), score, k)
        index[rows[real]], values[rows[real]] = block.index[real], block.score[real]
    return Found(index, values)


def _padded(queries: Embedding) -> Embedding:
    q = len(queries.vector)
    missing = (1 << (q - 1).bit_length()) - q
    return jax.tree.map(lambda a: np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]), queries)


def _search(tiling: Tiling, queries: Embedding, score: Score, k: int) -> Found:
    run, keep = programs(score, tiling.mesh), _keep(tiling.mesh, k)
    devices, columns = tiling.mesh.size, len(queries.vector)
    best: Any = tiling.put_split(
        (np.full((devices, columns, k), -np.inf, np.float32), np.full((devices, columns, k), NONE, np.int32))
    )
    bad: Any = jax.device_put(np.zeros((), np.int32), NamedSharding(tiling.mesh, P()))

    def dispatched() -> Iterator[Any]:
        nonlocal best, bad
        for round_ in range(tiling.rounds):
            rows, real = tiling.image_rows(round_)
            scores = run.scores(tiling.put_images(rows), queries)
            best, bad = keep(best, bad, scores, tiling.put_split(np.where(real, rows, NONE).astype(np.int32)))
            yield bad

    for before in one_behind(dispatched()):
        jax.block_until_ready(before)  # else a fast host would fill the devices with tiles that wait
    if int(bad):
        raise ValueError(f"{int(bad)} scores are not finite; look for NaN in the embeddings of gallery and queries")
    values, index = (np.moveaxis(np.asarray(part), 0, 1).reshape(columns, -1) for part in best)
    order = np.lexsort((index, -values), axis=1)[:, :k]
    return Found(np.take_along_axis(index, order, 1).astype(np.int64), np.take_along_axis(values, order, 1))


@lru_cache(maxsize=32)
def _keep(mesh: Mesh, k: int) -> Mapped:
    """(best scores and rows so far [devices, q, k], scores not finite [], scores [devices * rows, q], their rows)."""

    def keep(best: tuple[Array, Array], bad: Array, scores: Array, rows: Array) -> tuple[tuple[Array, Array], Array]:
        values, index = best[0][0], best[1][0]
        real = (rows != NONE)[:, None]
        finite = jnp.isfinite(scores)
        bad = bad + axis.psum(jnp.sum(real & ~finite, dtype=jnp.int32), DATA)
        scores = jnp.where(scores == 0, 0.0, scores.astype(jnp.float32))  # -0.0 and 0.0 are a tie, not for top_k
        scores = jnp.where(real & finite, scores, -jnp.inf).T
        # What was found before has smaller rows and comes first: of equal values top_k takes the first ones.
        values, at = lax.top_k(jnp.concatenate([values, scores], axis=1), k)
        rows = jnp.broadcast_to(rows, scores.shape)
        index = jnp.take_along_axis(jnp.concatenate([index, rows], axis=1), at, axis=1)
        return (values[None], index[None]), bad

    split = P(DATA)
    return map_specs(keep, mesh, ((split, split), P(), split, split), ((split, split), P()))
