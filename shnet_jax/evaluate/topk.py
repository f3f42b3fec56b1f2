"""The first k items of every query in both directions, streamed: no more than k scores of a query are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from shnet_jax.evaluate.tiles import Items, ItemScore, make_tiling, one_behind, programs, size
from shnet_jax.parallel import axis
from shnet_jax.parallel.mapping import Mapped, data_mesh, map_specs
from shnet_jax.types import DATA, Array


@dataclasses.dataclass(frozen=True)
class Top:
    """Items by descending score, equal scores by ascending number, as ranks are defined.

    i2t: [n, k] int64, captions of each image. t2i: [t, k'] int64, images of each caption; k, k' at most the gallery.
    """

    i2t: np.ndarray
    t2i: np.ndarray


def top_items(images: Items, texts: Items, score: ItemScore, k: int, tile: int = 512, mesh: Mesh | None = None) -> Top:
    """The first k captions of every image and the first k images of every caption.

    The arguments are those of `rank.ranks`; the scores are the same ones. The host keeps k numbers and scores a query,
    a device a few tiles. Raises ValueError for k below 1, and for NaN among the scores.
    """
    if k < 1:
        raise ValueError(f"the first {k} items were asked for; expected at least 1")
    n, t = size(images), size(texts)
    mesh = mesh or data_mesh(jax.devices()[:1])
    tiling = make_tiling(images, texts, np.zeros(t, np.int64), np.arange(t), tile, mesh)
    scores, first = programs(score, mesh).scores, _program(mesh, k)
    by_image, by_caption = _Best(n, min(k, t)), _Best(t, min(k, n))

    def dispatched() -> Iterator[tuple[Any, ...]]:
        for number in range(tiling.caption_tiles):
            columns, real_columns = tiling.captions(number)
            tile_texts, there = tiling.put_texts(columns), tiling.put_whole(real_columns)
            for round_ in range(tiling.rounds):
                rows, real_rows = tiling.image_rows(round_)
                found = first(scores(tiling.put_images(rows), tile_texts), tiling.put_split(real_rows), there)
                yield rows, real_rows, columns, real_columns, found

    nans = 0
    for rows, real_rows, columns, real_columns, found in one_behind(dispatched()):
        (row_scores, row_items, column_scores, column_items), bad = [np.asarray(a) for a in found[:4]], found[4]
        by_image.add(rows[real_rows], row_scores[real_rows], columns[row_items[real_rows]])
        by_caption.add(columns[real_columns], column_scores[real_columns], rows[column_items[real_columns]])
        nans += int(bad)
    if nans:
        raise ValueError(f"{nans} of {n * t} scores are NaN ({n} images x {t} captions), so nothing can be ranked")
    return Top(by_image.items, by_caption.items)


class _Best:
    """The best items of each query so far; they arrive in ascending order of their number."""

    def __init__(self, queries: int, k: int):
        self.scores = np.full((queries, k), -np.inf, np.float32)
        self.items = np.full((queries, k), -1, np.int64)

    def add(self, queries: np.ndarray, scores: np.ndarray, items: np.ndarray) -> None:
        """Takes in more items [m, j] of m queries, the best first."""
        scores = np.concatenate([self.scores[queries], scores], axis=1)
        items = np.concatenate([self.items[queries], items], axis=1)
        # Padding and places not yet filled come last even among scores of -inf; else earlier items first.
        order = np.lexsort((-scores, items < 0), axis=1)[:, : self.scores.shape[1]]
        self.scores[queries] = np.take_along_axis(scores, order, axis=1)
        self.items[queries] = np.take_along_axis(items, order, axis=1)


@lru_cache(maxsize=8)
def _program(mesh: Mesh, k: int) -> Mapped:
    """(scores, real images, real captions) -> scores and positions in the round of the first k of each query; NaNs."""

    def first(scores: Array, rows: Array, columns: Array) -> tuple[Array, ...]:
        real = rows[:, None] & columns[None, :]
        scores = jnp.where(scores == 0, 0.0, scores.astype(jnp.float32))  # -0.0 and 0.0 are a tie, not for top_k
        held = jnp.where(real, scores, -jnp.inf)
        row_scores, row_items = lax.top_k(held, min(k, held.shape[1]))
        column_scores, column_items = lax.top_k(held.T, min(k, held.shape[0]))
        column_items = column_items + axis.axis_index(DATA) * held.shape[0]
        # Of every device: [devices * columns, k] -> [columns, devices * k], in the order of the images.
        column_scores, column_items = (
            a.reshape(-1, *column_scores.shape).swapaxes(0, 1).reshape(len(columns), -1)
            for a in axis.all_gather((column_scores, column_items), DATA)
        )
        column_scores, places = lax.top_k(column_scores, min(k, column_scores.shape[1]))
        column_items = jnp.take_along_axis(column_items, places, axis=1)
        nans = axis.psum(jnp.sum(jnp.isnan(scores) & real, dtype=jnp.int32), DATA)
        return row_scores, row_items, column_scores, column_items, nans

    split, whole = P(DATA), P()
    return map_specs(first, mesh, (split, split, whole), (split, split, whole, whole, whole))
