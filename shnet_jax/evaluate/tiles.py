"""Tiles of the score matrix on the devices of a mesh: what travels to them and what each of them computes.

A tile is `rows` images by `columns` captions. In a round every device scores its own tile of images with the same tile
of captions. The embeddings stay where they are (on the host, or in a file: `np.memmap`), only tiles travel, and the
shapes of a tile depend on nothing but its settings: so a device needs the same memory for a gallery of any size.
Tile k of the images is the same rows, computed by the same program, on any number of devices: every score, and so every
rank, is bitwise the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel import axis
from shnet_jax.parallel.mapping import Mapped, map_specs
from shnet_jax.types import DATA, Array, Embedding

CAPTIONS_PER_ROW = 8  # a tile has this many captions for each of its images: 512 x 4096 float32 scores are 8 MiB

Items = Any
"""A gallery side: an `Embedding`, or any pytree of them (one for each model of an ensemble) whose leaves have a row an
item; the score function knows which."""
ItemScore = Callable[[Items, Items], Array]
"""(n images, t captions) -> scores [n, t]; a `types.Score` is one."""

T = TypeVar("T")
Tree = TypeVar("Tree")


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


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the pairs of n images and t captions are cut into tiles.

    images, texts: items on the host (NumPy, np.memmap) or a device.
    owner: [t] int64, image of each caption.
    order: [t] int64, captions as they are tiled.
    rows, columns: images and captions of a tile. mesh: its devices, one axis `DATA`.
    """

    images: Items
    texts: Items
    owner: np.ndarray
    order: np.ndarray
    rows: int
    columns: int
    mesh: Mesh

    @property
    def rounds(self) -> int:
        """Rounds in which all images meet one tile of captions."""
        return -(-size(self.images) // (self.rows * self.mesh.size))

    @property
    def caption_tiles(self) -> int:
        """Tiles that hold all captions."""
        return -(-len(self.order) // self.columns)

    def image_rows(self, round_: int) -> tuple[np.ndarray, np.ndarray]:
        """Images of a round, [devices * rows], and which are real; padding repeats the last one."""
        return _block(size(self.images), self.rows * self.mesh.size, round_)

    def captions(self, tile: int) -> tuple[np.ndarray, np.ndarray]:
        """Captions of a tile, [columns], and which are real; padding repeats the last one."""
        positions, real = _block(len(self.order), self.columns, tile)
        return self.order[positions], real

    def put_images(self, rows: np.ndarray) -> Items:
        """Those images, split over the devices."""
        return self.put_split(_on_host(self.images, rows))

    def put_texts(self, index: np.ndarray) -> Items:
        """Those captions, whole on every device."""
        return self.put_whole(_on_host(self.texts, index))

    def put_split(self, tree: Tree) -> Tree:
        """Leaves [devices * rows, ...], split over the devices."""
        return jax.device_put(tree, NamedSharding(self.mesh, P(DATA)))

    def put_whole(self, tree: Tree) -> Tree:
        """A copy on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, P()))


def make_tiling(images: Items, texts: Items, owner: np.ndarray, order: np.ndarray, tile: int, mesh: Mesh) -> Tiling:
    """A Tiling of tiles with `tile` images; a smaller gallery has smaller ones, whatever the number of devices."""
    rows, columns = tile_shape(size(images), size(texts), tile)
    return Tiling(images, texts, owner, order, rows, columns, mesh)


def tile_shape(n: int, t: int, tile: int) -> tuple[int, int]:
    """Images and captions of a tile, of a gallery of n images and t captions. Raises ValueError below 1."""
    if tile < 1:
        raise ValueError(f"a score tile (config.eval.tile) needs at least 1 image, got {tile}")
    return min(tile, n), min(tile * CAPTIONS_PER_ROW, t)


def size(items: Items) -> int:
    """How many items there are."""
    return len(jax.tree.leaves(items)[0])


def needed(score: ItemScore, items: Items) -> Items:
    """What the score looks at: of the default one the vectors alone, so that no set members travel for nothing."""
    return Embedding(items.vector) if score is RetrievalModel.score else items


def take(items: Tree, rows: np.ndarray) -> Tree:
    """The items of those rows, in that order."""
    return jax.tree.map(lambda a: a[rows], items)


def one_behind(dispatched: Iterable[T]) -> Iterator[T]:
    """Each item after the next one was asked for: its results are waited for while the devices compute the next."""
    before: list[T] = []
    for item in dispatched:
        yield from before
        before = [item]
    yield from before


def _on_host(items: Items, rows: np.ndarray) -> Items:
    return jax.tree.map(np.asarray, take(items, rows))


def _block(count: int, size: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(number * size, (number + 1) * size)
    return np.minimum(rows, count - 1), rows < count


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled functions of a round; images and their queries are split over the devices, captions are whole.

    scores: (images, captions) -> [devices * rows, columns]. A match's score must be the same number, bit by bit, when
      it is looked up and when it is counted, and two programs may round the same sum differently: so all scores
      that are compared come from this one.
    at: (scores, [columns] row of each column) -> [columns], 0 where that row is outside.
    count: (scores, Queries of the images, Queries of the captions) -> how many items of the round come before the
      match of each row [devices * rows] and of each column [columns], how many scores are NaN [].
    """

    scores: Mapped
    at: Mapped
    count: Mapped


@lru_cache(maxsize=16)
def programs(score: ItemScore, mesh: Mesh) -> Programs:
    """The programs for a score function; JAX compiles each for the shapes it meets."""

    def scores(images: Items, texts: Items) -> Array:
        found, shape = score(images, texts), (size(images), size(texts))
        if found.shape != shape:
            raise ValueError(f"score gave shape {found.shape} for {shape[0]} images and {shape[1]} captions")
        return found

    return Programs(
        map_specs(scores, mesh, (P(DATA), P()), P(DATA)),
        map_specs(_at, mesh, (P(DATA), P()), P()),
        map_specs(_count, mesh, (P(DATA), P(DATA), P()), (P(DATA), P(), P())),
    )


def _at(scores: Array, rows: Array) -> Array:
    here = rows - axis.axis_index(DATA) * scores.shape[0]
    inside = (here >= 0) & (here < scores.shape[0])
    found = scores[jnp.where(inside, here, 0), jnp.arange(scores.shape[1])]
    return axis.psum(jnp.where(inside, found, 0), DATA)  # one device's number and zeros: exact


def _count(scores: Array, rows: Queries, columns: Queries) -> tuple[Array, Array, Array]:
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
        axis.psum(jnp.sum(before_column & real, axis=0, dtype=jnp.int32), DATA),
        axis.psum(jnp.sum(jnp.isnan(scores) & real, dtype=jnp.int32), DATA),
    )
