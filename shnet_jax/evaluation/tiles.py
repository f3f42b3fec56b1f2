"""Tiles of the score matrix: how a gallery is cut, what travels to the devices, and the one walk over all tiles.

A tile is `rows` images by `columns` captions. In a round every device scores its own tile of images with the same tile
of captions. The embeddings stay on the host (or in a file: `np.memmap`) and only tiles travel. The shape of a tile
depends on the settings alone, so a device needs the same memory for a gallery of any size; where an accelerator has
room for all images, they stay there and are sent once. Tile k of the images has the same rows, computed by the same
program, on any number of devices: every score, and so every rank, is bitwise the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.models.contract import RetrievalModel
from shnet_jax.observe.clock import Clock
from shnet_jax.observe.progress import Progress
from shnet_jax.parallel import axis
from shnet_jax.parallel.mapping import Mapped, data_mesh, map_specs, on_cpu
from shnet_jax.types import DATA, Array, Embedding

TILE_ON_CPU, TILE = 512, 2048  # images of a tile unless config.eval.tile says how many
RESIDENT = 0.25  # share of a device's free memory that all images of a ranking may take to stay there
CAPTIONS_PER_ROW = 8  # a tile has this many captions for each of its images: 512 x 4096 float32 scores are 8 MiB

Items = Any
"""A gallery side: an `Embedding`, or any pytree of them (one for each model of an ensemble) whose leaves have a row an
item; the score function knows which."""
ItemScore = Callable[[Items, Items], Array]
"""Function (n images, t captions) -> scores [n, t]; a `types.Score` is one."""

T = TypeVar("T")
Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
    """One side of a tile: each item, as a query, with the match that it looks for on the other side.

    index: [m] number of the item;  real: [m] bool, False for padding
    match: [m] number of the matching item;  score: [m] its score
    """

    index: np.ndarray
    real: np.ndarray
    match: np.ndarray
    score: np.ndarray


class Side(NamedTuple):
    """Items on one side of a tile. items: [m] their numbers; real: [m] bool, False for padding (at the end)."""

    items: np.ndarray
    real: np.ndarray


class Tile(NamedTuple):
    """A round of the walk over all pairs: one tile of captions with one tile of images on every device.

    number, round: which tile of captions and which round of images.
    captions: [columns], images: [devices * rows] on the host.
    placed_captions: embeddings of the captions, whole on every device. placed_images: split over the devices.
    extra: what the walk placed beside the captions, see `Tiling.walk`.
    """

    number: int
    round: int
    captions: Side
    images: Side
    placed_captions: Items
    placed_images: Items
    extra: Any


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Partition of the pairs of n images and t captions into tiles.

    images, texts: items on the host (NumPy, np.memmap) or a device.
    owner: [t] int64, image of each caption.
    order: [t] int64, captions as they are tiled.
    rows, columns: images and captions of a tile. mesh: its devices, one axis `DATA`.
    resident: the images that were sent stay on the devices, so that later tiles of captions do not send them again.
    """

    images: Items
    texts: Items
    owner: np.ndarray
    order: np.ndarray
    rows: int
    columns: int
    mesh: Mesh
    resident: bool = False
    _placed: dict[int, Items] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def rounds(self) -> int:
        """Rounds in which all images meet one tile of captions."""
        return -(-size(self.images) // (self.rows * self.mesh.size))

    @property
    def caption_tiles(self) -> int:
        """Tiles that hold all captions."""
        return -(-len(self.order) // self.columns)

    def image_rows(self, round_: int) -> Side:
        """Images of a round, [devices * rows]; padding repeats the last one."""
        return _block(size(self.images), self.rows * self.mesh.size, round_)

    def captions(self, tile: int) -> Side:
        """Captions of a tile, [columns]; padding repeats the last one."""
        positions, real = _block(len(self.order), self.columns, tile)
        return Side(self.order[positions], real)

    def walk(
        self,
        tiles: Iterable[int] | None = None,
        *,
        include: Callable[[Side, int, int], bool] = lambda captions, tile, round_: True,
        place_captions: Callable[[np.ndarray], Items] | None = None,
        place_extra: Callable[[Side], Any] = lambda captions: None,
    ) -> Iterator[Tile]:
        """Iterates over all pairs, caption tile by caption tile; captions are sent once for all rounds of their tile.

        Nothing is computed here: callers dispatch a program for each tile, usually through `prefetch_one`.

        Args:
          tiles: numbers of caption tiles; None: all.
          include: (captions, tile, round) -> whether the round is visited.
          place_captions: rows -> embeddings on the devices; None: `put_texts`.
          place_extra: gives `Tile.extra` of a tile of captions, placed on the devices by the caller.
        """
        for number in range(self.caption_tiles) if tiles is None else tiles:
            captions = self.captions(number)
            placed: tuple[Items, Any] | None = None
            for round_ in range(self.rounds):
                if not include(captions, number, round_):
                    continue
                if placed is None:
                    placed = (place_captions or self.put_texts)(captions.items), place_extra(captions)
                images = self.image_rows(round_)
                yield Tile(number, round_, captions, images, placed[0], self._images_of(round_, images), placed[1])

    def _images_of(self, round_: int, images: Side) -> Items:
        """Embeddings of a round's images on the devices, kept there if `resident`."""
        placed = self._placed.get(round_)
        if placed is None:
            placed = self.put_images(images.items)
            if self.resident:
                self._placed[round_] = placed
        return placed

    def put_images(self, rows: np.ndarray) -> Items:
        """Embeddings of images, split over the devices."""
        return self.put_split(jax.tree.map(np.asarray, take(self.images, rows)))

    def put_texts(self, index: np.ndarray) -> Items:
        """Embeddings of captions, whole on every device."""
        return self.put_whole(jax.tree.map(np.asarray, take(self.texts, index)))

    def put_split(self, tree: Tree) -> Tree:
        """Places leaves [devices * rows, ...], split over the devices."""
        return jax.device_put(tree, NamedSharding(self.mesh, P(DATA)))

    def put_whole(self, tree: Tree) -> Tree:
        """Places a copy on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, P()))


def make_tiling(
    images: Items,
    texts: Items,
    tile: int,
    mesh: Mesh | None,
    owner: np.ndarray | None = None,
    order: np.ndarray | None = None,
) -> Tiling:
    """A Tiling of tiles with `tile` images; a smaller gallery has smaller tiles, whatever the number of devices.

    mesh: None for the first device. owner, order: see `Tiling`; zeros and the order of the data unless given.
    """
    t = size(texts)
    rows, columns = tile_shape(size(images), t, tile)
    owner, order = np.zeros(t, np.int64) if owner is None else owner, np.arange(t) if order is None else order
    mesh = mesh or data_mesh(jax.devices()[:1])
    resident = sum(a.nbytes for a in jax.tree.leaves(images)) / mesh.size <= RESIDENT * free_bytes(mesh)
    return Tiling(images, texts, owner, order, rows, columns, mesh, resident)


def free_bytes(mesh: Mesh) -> int:
    """Free memory of a device of the mesh; 0 where it does not say, and on a CPU, which has the images already."""
    stats = None if on_cpu(mesh) else mesh.local_devices[0].memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats and "bytes_limit" in stats else 0


def tile_size(evaluation: ConfigDict | FrozenConfigDict, mesh: Mesh) -> int:
    """Images of a score tile: config.eval.tile, or where it is 0 the size for the devices of `mesh`.

    A CPU keeps a small tile in its cache; an accelerator takes longer to be told of one than to compute it.
    """
    return evaluation.tile or (TILE_ON_CPU if on_cpu(mesh) else TILE)


def tile_shape(n: int, t: int, tile: int) -> tuple[int, int]:
    """Images and captions of a tile, of a gallery of n images and t captions. Raises ValueError below 1."""
    if tile < 1:
        raise ValueError(f"a score tile (config.eval.tile) needs at least 1 image, got {tile}")
    return min(tile, n), min(tile * CAPTIONS_PER_ROW, t)


def size(items: Items) -> int:
    """Number of items on a gallery side."""
    return len(jax.tree.leaves(items)[0])


def score_inputs(score: ItemScore, items: Items) -> Items:
    """The part of the embeddings that a score reads: for the default one the vectors alone, no set members."""
    return vectors_of(items) if score is RetrievalModel.score else items


def vectors_of(items: Embedding) -> Embedding:
    """The global vectors of embeddings, without their set members."""
    return Embedding(items.vector)


def take(items: Tree, rows: np.ndarray) -> Tree:
    """Items of the given rows, in that order; those that lie side by side on the host are not copied."""
    adjoin = rows.ndim == 1 and len(rows) > 0 and bool((np.diff(rows) == 1).all())
    return jax.tree.map(lambda a: a[rows[0] : rows[-1] + 1] if adjoin else a[rows], items)


def prefetch_one(dispatched: Iterable[T]) -> Iterator[T]:
    """Yields each item after the next one was asked for: results are read while the devices compute the next."""
    pending: list[T] = []
    for item in dispatched:
        yield from pending
        pending = [item]
    yield from pending


@contextmanager
def show_progress(total: int, step: str, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows the progress of a loop of `total` steps; the loop calls what this yields, with its units, after each step.

    step: name of a step. unit: what the speed counts. done: steps that were finished before.
    """
    progress, clock, numbers = Progress(total, what=step, unit=unit), Clock(), count(done + 1)

    def advance(units: int) -> None:
        clock.tick(units)
        progress.update(next(numbers), clock)

    with clock:
        yield advance
    progress.close()


def check_no_nan(nans: int, n: int, t: int) -> None:
    """Raises ValueError where scores of n items with t others are NaN: they have no order."""
    if nans:
        raise ValueError(
            f"{nans} of {n * t} scores are NaN ({n} x {t} items), so nothing can be ranked; "
            "look for NaN in the embeddings"
        )


def _block(count: int, size: int, number: int) -> Side:
    rows = np.arange(number * size, (number + 1) * size)
    return Side(np.minimum(rows, count - 1), rows < count)


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
        values, shape = score(images, texts), (size(images), size(texts))
        if values.shape != shape:
            raise ValueError(f"score gave shape {values.shape} for {shape[0]} images and {shape[1]} captions")
        return values

    return Programs(
        map_specs(scores, mesh, (P(DATA), P()), P(DATA)),
        map_specs(_at, mesh, (P(DATA), P()), P()),
        map_specs(_count, mesh, (P(DATA), P(DATA), P()), (P(DATA), P(), P())),
    )


def _at(scores: Array, rows: Array) -> Array:
    local = rows - axis.axis_index(DATA) * scores.shape[0]
    inside = (local >= 0) & (local < scores.shape[0])
    values = scores[jnp.where(inside, local, 0), jnp.arange(scores.shape[1])]
    return axis.psum(jnp.where(inside, values, 0), DATA)  # one device's number and zeros: exact


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
