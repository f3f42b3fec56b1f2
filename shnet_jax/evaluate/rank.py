"""Ranks of the matching items in both directions, counted by tiles: the whole score matrix never exists."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from shnet_jax.types import Array, Embedding, Score

CAPTIONS_PER_ROW = 8  # a tile has this many captions for each of its images: 512 x 4096 float32 scores are 8 MiB


@dataclasses.dataclass(frozen=True)
class Ranks:
    """0-based ranks; 0 is the top of the list.

    i2t: [n] int64, for each image the rank of its best-ranked own caption among all captions.
    t2i: [t] int64, for each caption the rank of its image among all images.
    """

    i2t: np.ndarray
    t2i: np.ndarray


def ranks(images: Embedding, texts: Embedding, caption_image: np.ndarray, score: Score, tile: int = 512) -> Ranks:
    """Ranks every gallery item for every query.

    The rank of an item is the number of items that score strictly higher plus the number of those that score
    the same and have a smaller index, so a constant score ranks by index and gives chance, never 100 %.

    Args:
      images: n embeddings, arrays on the host or the device.
      texts: t embeddings, in any order, any number >= 1 of captions for each image.
      caption_image: [t] integers, row in `images` of each caption's image.
      score: (Embedding of some images, Embedding of some texts) -> scores of all their pairs; it is jitted.
      tile: images of a tile; it has `CAPTIONS_PER_ROW` times as many captions. A few tiles are held at once.

    Raises:
      ValueError: a caption of an image that is not there, an image without caption, or NaN among the scores.
    """
    n, t = len(images.vector), len(texts.vector)
    owner = check_captions(caption_image, n, t)
    order = np.argsort(owner, kind="stable")  # captions of an image side by side: few tiles hold all matches
    rows, columns = min(tile, n), min(tile * CAPTIONS_PER_ROW, t)

    # The score of a match must be the same number, bit by bit, here and when it is counted; two programs may
    # round the same sum differently. So both passes take the same tiles from one compiled function.
    positive = np.empty(t, np.float64)
    for caption_rows, _ in _tiles(t, columns):
        index = order[caption_rows]
        text_tile = jax.device_put(take(texts, index))  # once, for all tiles of images
        for image_rows, _ in _tiles(n, rows):
            inside = (owner[index] >= image_rows[0]) & (owner[index] <= image_rows[-1])
            if inside.any():
                scores = _scores(take(images, image_rows), text_tile, score)
                found = _at(scores, np.where(inside, owner[index] - image_rows[0], 0))
                positive[index[inside]] = np.asarray(found)[inside]

    best = _best_captions(positive, owner)
    i2t, t2i, nans = np.zeros(n, np.int64), np.zeros(t, np.int64), 0
    for caption_rows, real_columns in _tiles(t, columns):
        index = order[caption_rows]
        text_tile = jax.device_put(take(texts, index))  # once, for all tiles of images
        queries = Queries(index, real_columns, owner[index], positive[index])
        for image_rows, real_rows in _tiles(n, rows):
            own = best[image_rows]
            candidates = Queries(image_rows, real_rows, own, positive[own])
            scores = _scores(take(images, image_rows), text_tile, score)
            by_row, by_column, bad = _count(scores, candidates, queries)
            i2t[image_rows[real_rows]] += np.asarray(by_row)[real_rows]
            t2i[index[real_columns]] += np.asarray(by_column)[real_columns]
            nans += int(bad)
    if nans:
        raise ValueError(
            f"{nans} of {n * t} scores are NaN ({n} images x {t} captions), so nothing can be ranked; "
            "look for NaN in the embeddings"
        )
    return Ranks(i2t, t2i)


def check_captions(caption_image: np.ndarray, n: int, t: int) -> np.ndarray:
    """The image of each caption as [t] int64; checks that each image has a caption, each caption an image."""
    owner = np.asarray(caption_image)
    if owner.shape != (t,) or owner.dtype.kind not in "iu":
        raise ValueError(
            f"caption_image: expected one integer for each of {t} captions, found {owner.dtype} of shape {owner.shape}"
        )
    wrong = np.flatnonzero((owner < 0) | (owner >= n))
    if wrong.size:
        raise ValueError(
            f"caption_image: {wrong.size} captions belong to no image; "
            f"row {wrong[0]} says {owner[wrong[0]]}, expected 0 to {n - 1}"
        )
    missing = np.flatnonzero(np.bincount(owner.astype(np.int64), minlength=n) == 0)
    if missing.size or not n:
        raise ValueError(
            f"caption_image: {missing.size} of {n} images have no caption (rows {missing[:5].tolist()}); "
            "recall from image to text needs at least one for each image, and at least one image"
        )
    return owner.astype(np.int64)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
    """One side of a tile: what each of its items, as a query, looks for on the other side.

    index: [m] number of the item;  real: [m] bool, not padding
    match: [m] number of the matching item;  score: [m] its score
    """

    index: np.ndarray
    real: np.ndarray
    match: np.ndarray
    score: np.ndarray


def _tiles(count: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row numbers of each tile and which are real; the last tile repeats its last row to keep its size."""
    for start in range(0, count, size):
        rows = np.arange(start, start + size)
        yield np.minimum(rows, count - 1), rows < count


def take(items: Embedding, rows: np.ndarray) -> Embedding:
    """The items of those rows, in that order."""
    return jax.tree.map(lambda a: a[rows], items)


@partial(jax.jit, static_argnames="score")
def _scores(images: Embedding, texts: Embedding, score: Score) -> Array:
    scores, shape = score(images, texts), (len(images.vector), len(texts.vector))
    if scores.shape != shape:
        raise ValueError(f"score gave shape {scores.shape} for {shape[0]} images and {shape[1]} captions")
    return scores


@jax.jit
def _at(scores: Array, rows: Array) -> Array:
    return scores[rows, jnp.arange(scores.shape[1])]


def _best_captions(positive: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """[n] the own caption of each image that comes first: highest score, then smallest index."""
    order = np.lexsort((np.arange(len(owner)), -positive, owner))
    return order[np.unique(owner[order], return_index=True)[1]]


@jax.jit
def _count(scores: Array, rows: Queries, columns: Queries) -> tuple[Array, Array, Array]:
    """How many items of the tile come before each row's and each column's match; how many scores are NaN."""
    row_score, column_score = (q.score.astype(scores.dtype) for q in (rows, columns))
    real = rows.real[:, None] & columns.real[None, :]
    before_row = (scores > row_score[:, None]) | (
        (scores == row_score[:, None]) & (columns.index[None, :] < rows.match[:, None])
    )
    before_column = (scores > column_score[None, :]) | (
        (scores == column_score[None, :]) & (rows.index[:, None] < columns.match[None, :])
    )
    return (
        jnp.sum(before_row & real, axis=1, dtype=jnp.int32),
        jnp.sum(before_column & real, axis=0, dtype=jnp.int32),
        jnp.sum(jnp.isnan(scores) & real, dtype=jnp.int32),
    )
