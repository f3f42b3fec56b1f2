"""Exact top-k in one or both directions, streamed in tiles over the devices: the score matrix never exists.

The order is that of evaluation, for searches and for metrics. The higher score comes first, of equal scores the smaller
index; -0.0 equals 0.0; infinite scores are numbers like others; NaN is an error. Scores come from the program that
evaluation ranks with (`tiles.programs`).
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from shnet_jax.evaluation.tiles import (
    Items,
    ItemScore,
    Tile,
    Tiling,
    check_no_nan,
    make_tiling,
    prefetch_one,
    programs,
    size,
)
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel import axis, hosts
from shnet_jax.parallel.mapping import Mapped, map_specs
from shnet_jax.types import DATA, Array, Embedding, Score

NONE = np.iinfo(np.int32).max  # index of a place that holds no item


@dataclasses.dataclass(frozen=True)
class TopK:
    """The best k items for each of q queries. index: [q, k] int64, row in the gallery. score: [q, k] float32."""

    index: np.ndarray
    score: np.ndarray


class BothTopK(NamedTuple):
    """i2t: the best captions of each image, [n, k]. t2i: the best images of each caption, [t, k']."""

    i2t: TopK
    t2i: TopK


def is_dot_product(score: Score) -> bool:
    """Whether a score is the default one: then a nearest-neighbour index can stand in for it."""
    return score is RetrievalModel.score


@lru_cache(maxsize=8)
def transpose_score(score: Score) -> Score:
    """Transposed score, captions first: (captions, images) -> [t, n]. Equal scores give the same function."""

    def captions_first(texts: Embedding, images: Embedding) -> Array:
        return score(images, texts).T

    return captions_first


def top_k(
    queries: Items,
    gallery: Items,
    k: int,
    score: ItemScore,
    tile: int = 512,
    mesh: Mesh | None = None,
    *,
    shared: bool = False,
) -> TopK:
    """The k best-scoring items of a gallery of n for each of q queries; all n of them where k is larger.

    Args:
      queries: q embeddings, or other `tiles.Items`, arrays on the host or a device.
      gallery: n items, also `np.memmap`: only tiles of it are read, once for each 8 * tile queries.
      score: (some of the gallery, some queries) -> scores; for images as queries of captions `transpose_score(score)`.
      tile: items of the gallery that a device scores at once.
      mesh: devices that share the gallery; None: the first one. The result is the same.
      shared: all processes call this together, with the same items, each with a mesh of its own devices. They share the
        tiles of queries, and all of them get the same result.

    Raises:
      ValueError: k below 1, an empty gallery, NaN among the scores.
    """
    n, q = size(gallery), size(queries)
    if k < 1:
        raise ValueError(f"top_k is {k}; it must be at least 1")
    if not n:
        raise ValueError("nothing to search: the gallery is empty")
    if not q:
        return TopK(np.empty((0, min(k, n)), np.int64), np.empty((0, min(k, n)), np.float32))
    tiling = make_tiling(gallery, _pad_queries(queries), tile, mesh)
    best = _stream(tiling, score, min(k, n), 0, shared).t2i
    return TopK(best.index[:q], best.score[:q])


def top_k_both(
    images: Items,
    texts: Items,
    score: ItemScore,
    k: int,
    tile: int = 512,
    mesh: Mesh | None = None,
    *,
    shared: bool = False,
) -> BothTopK:
    """The first k captions of every image and the first k images of every caption, at most the whole gallery.

    The arguments are those of `ranks.ranks`; each score is computed once, for both directions. The host keeps k numbers
    and scores a query. shared: see `top_k`. Raises ValueError for k below 1, and for NaN among the scores.
    """
    if k < 1:
        raise ValueError(f"the first {k} items were asked for; expected at least 1")
    n, t = size(images), size(texts)
    return _stream(make_tiling(images, texts, tile, mesh), score, min(k, n), min(k, t), shared)


def _pad_queries(queries: Items) -> Items:
    """Repeats the last query up to a power of two: searches of a few at a time compile a few programs only."""
    q = size(queries)
    missing = (1 << (q - 1).bit_length()) - q
    return jax.tree.map(lambda a: np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]), queries)


def _stream(tiling: Tiling, score: ItemScore, k: int, k_captions: int, shared: bool) -> BothTopK:
    """The best k images of each caption and k_captions captions of each image.

    The devices keep the best images of a tile of captions; the host merges those of all devices, and the captions.
    shared: the processes share the tiles of captions.
    """
    n, t, devices = size(tiling.images), size(tiling.texts), tiling.mesh.size
    scores, keep = programs(score, tiling.mesh).scores, keep_best(tiling.mesh, k, k_captions)
    by_image, by_caption = _empty(n, k_captions), _empty(t, k)
    nothing = (
        np.full((devices, tiling.columns, k), -np.inf, np.float32),
        np.full((devices, tiling.columns, k), NONE, np.int32),
    )
    best: Any = None
    nans, here = 0, np.zeros(t, bool)

    def update(tile: Tile) -> tuple[Tile, Any, Any, Any]:
        nonlocal best
        if tile.round == 0:
            best = tiling.put_split(nothing)
        rows = tiling.put_split(np.where(tile.images.real, tile.images.items, NONE).astype(np.int32))
        tile_scores = scores(tile.placed_images, tile.placed_captions)
        best, bad, of_images = keep(best, tile_scores, rows, tile.extra)
        return tile, best, bad, of_images

    tiles = hosts.own_part(tiling.caption_tiles) if shared else None
    walk = tiling.walk(tiles, place_extra=lambda side: tiling.put_whole(side.real))
    for tile, best_images, bad, of_images in prefetch_one(map(update, walk)):
        nans += int(bad)  # waits: else a fast host would fill the devices with tiles that wait
        columns, real = tile.captions
        if k_captions:
            values, places = (np.asarray(a)[tile.images.real] for a in of_images)
            _merge(by_image, tile.images.items[tile.images.real], values, columns[places])
        if tile.round == tiling.rounds - 1:
            merged = merge_devices(best_images, real, k)
            by_caption.index[columns[real]], by_caption.score[columns[real]] = merged.index, merged.score
            here[columns[real]] = True
    if shared and jax.process_count() > 1:
        by_image, by_caption, nans = _merge_processes(by_image, by_caption, here, nans)
    check_no_nan(nans, n, t)
    for side in (by_image, by_caption):
        _fill_lowest(side)
    return BothTopK(by_image, by_caption)


def _merge_processes(by_image: TopK, by_caption: TopK, here: np.ndarray, nans: int) -> tuple[TopK, TopK, int]:
    """The lists of all processes, and all NaN scores. here: [t], whether this process has the list of a caption."""
    captions = [np.where(here[:, None], a, 0) for a in (by_caption.index, by_caption.score)]
    captions, total = hosts.add_up((captions, np.array(nans)))
    n, k = by_image.index.shape
    rows = max(1, hosts.CHUNK // (12 * max(1, k) * jax.process_count()))
    for part in (slice(start, start + rows) for start in range(0, n if k else 0, rows)):
        best = hosts.from_all(by_image.score[part]), hosts.from_all(by_image.index[part])
        merged = merge_devices(best, np.ones(best[0].shape[1], bool), k)
        by_image.index[part], by_image.score[part] = merged.index, merged.score
    return by_image, TopK(*captions), int(total)


def merge_devices(best: tuple[Any, Any], real: np.ndarray, k: int) -> TopK:
    """The best k of the lists [devices, columns, k] of scores and items, of the columns that are real."""
    values, index = (np.moveaxis(np.asarray(a), 0, 1).reshape(len(real), -1)[real] for a in best)
    order = np.lexsort((index, -values), axis=1)[:, :k]
    return TopK(np.take_along_axis(index, order, 1).astype(np.int64), np.take_along_axis(values, order, 1))


def _empty(queries: int, k: int) -> TopK:
    return TopK(np.full((queries, k), NONE, np.int64), np.full((queries, k), -np.inf, np.float32))


def _merge(best: TopK, queries: np.ndarray, values: np.ndarray, items: np.ndarray) -> None:
    """Takes in more items [m, j] of m queries, the best first; they arrive in ascending order of their number."""
    values = np.concatenate([best.score[queries], values], axis=1)
    items = np.concatenate([best.index[queries], items], axis=1)
    order = np.argsort(-values, axis=1, kind="stable")[:, : best.score.shape[1]]
    best.score[queries] = np.take_along_axis(values, order, axis=1)
    best.index[queries] = np.take_along_axis(items, order, axis=1)


def _fill_lowest(best: TopK) -> None:
    """Fills the places that score -inf with the smallest numbers not yet in the list.

    While lists are kept, padding scores -inf too. Every item above -inf was kept, so all others score -inf: they tie.
    """
    for query in np.flatnonzero(np.isneginf(best.score).any(axis=1)):
        kept = best.index[query][~np.isneginf(best.score[query])]
        others = np.setdiff1d(np.arange(best.index.shape[1]), kept, assume_unique=True)
        best.index[query, len(kept) :] = others[: best.index.shape[1] - len(kept)]


@lru_cache(maxsize=32)
def keep_best(mesh: Mesh, k: int, k_captions: int) -> Mapped:
    """The program that updates the best images of a tile of captions.

    (best scores and images so far, each [devices, columns, k]; scores [devices * rows, columns]; their images, NONE for
    padding; [columns] which captions are real) -> the best so far; NaN scores []; scores and columns of the first
    k_captions of each image.
    """

    def keep(
        best: tuple[Array, Array], scores: Array, images: Array, real_captions: Array
    ) -> tuple[tuple[Array, Array], Array, tuple[Array, ...]]:
        real = (images != NONE)[:, None] & real_captions[None, :]
        nans = axis.psum(jnp.sum(jnp.isnan(scores) & real, dtype=jnp.int32), DATA)
        scores = jnp.where(scores == 0, 0.0, scores.astype(jnp.float32))  # -0.0 and 0.0 are a tie, not for top_k
        scores = jnp.where(real, scores, -jnp.inf)
        of_images = lax.top_k(scores, min(k_captions, scores.shape[1]))
        # Images kept before have smaller numbers and come first: of equal values top_k takes the first ones.
        values, places = lax.top_k(jnp.concatenate([best[0][0], scores.T], axis=1), k)
        index = jnp.concatenate([best[1][0], jnp.broadcast_to(images, scores.T.shape)], axis=1)
        index = jnp.take_along_axis(index, places, axis=1)
        return (values[None], index[None]), nans, tuple(of_images)

    split = P(DATA)
    return map_specs(keep, mesh, ((split, split), split, split, P()), ((split, split), P(), (split, split)))
