"""Candidates of a query over all devices: four strategies to iterate over them (see pairs.py).

A walk visits blocks that together are all candidates. Its counterpart for the backward pass brings back to each device
the gradient of its own candidates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from shnet_jax.parallel import axis
from shnet_jax.types import Array, Embedding, Pairs

Carry = TypeVar("Carry")

TILE, TILES = 1024, (128, 8192)
"""Size of a tile on a device whose memory is not known, as a CPU's, and the limits of a size by memory."""

PART, ARRAYS = 1 / 8, 8
"""Part of a device's memory that the scores of a tile may take, and float32 arrays of a loss and its gradient that have
the shape of these scores. The bound of tests/parallel/test_loss_memory.py is ARRAYS."""


def tile_size(pairs: Pairs, queries: Embedding, items: Embedding) -> int:
    """Candidates of a tile: `pairs.tile`, or where it is 0 the largest power of two in TILES that PART holds.

    A large tile makes fewer and wider products. queries: of one device, as arrays or as their shapes. A score of
    elements is taken to need an array of all pairs of elements.
    """
    if pairs.tile or not pairs.memory:
        return pairs.tile or TILE
    sets = (side.elements.shape[1] for side in (queries, items) if side.elements is not None)
    bytes_per_candidate = ARRAYS * 4 * queries.vector.shape[0] * math.prod(sets)
    fits = math.floor(math.log2(max(1.0, PART * pairs.memory / bytes_per_candidate)))
    return min(max(2**fits, TILES[0]), TILES[1])


@struct.dataclass
class Block:
    """Block of t candidates that are scored together: embeddings, image ids and rows in the batch (-1: padding)."""

    items: Embedding
    ids: Array
    rows: Array


@dataclasses.dataclass(frozen=True)
class Candidates:
    """All candidates of one direction, image to text or text to image.

    items: the b embeddings of this device. ids: [b], their image ids. pairs: strategy for those of other devices.
    axis: name of the mapped device axis, None when unmapped.
    """

    items: Embedding
    ids: Array
    pairs: Pairs
    axis: str | None

    def own_block(self) -> Block:
        """Block of this device's candidates."""
        count = self.ids.shape[0]
        rows = axis.axis_index(self.axis) * count + jnp.arange(count, dtype=jnp.int32)
        return Block(self.items, self.ids, rows)

    def in_one_block(self) -> Block | None:
        """Block of all candidates if the strategy scores them at once, else None."""
        if self.pairs.strategy == "gathered":
            return axis.all_gather(self.own_block(), self.axis)
        return self.own_block() if self.pairs.strategy == "local" else None

    def walk(self, visit: Callable[[Carry, Block], Carry], carry: Carry) -> Carry:
        """Folds `visit` over all blocks: `carry = visit(carry, block)` for each; returns the last carry."""
        block = self.in_one_block()
        if block is not None:
            return visit(carry, block)
        if self.pairs.strategy == "streamed":
            return lax.scan(lambda carry, block: (visit(carry, block), None), carry, self._tiles())[0]

        return self._around(visit, carry)

    def walk_back(
        self, visit: Callable[[Carry, Block], tuple[Carry, Embedding]], carry: Carry
    ) -> tuple[Carry, Embedding]:
        """Folds `visit` over all blocks in the backward pass; returns (carry, gradient of this device's items).

        For each block: `carry, gradient = visit(carry, block)`. The gradients have no mask.
        Only for the strategies with several blocks.
        """
        if self.pairs.strategy == "streamed":
            carry, gradients = lax.scan(visit, carry, self._tiles())
            size = self.ids.shape[0] * axis.axis_size(self.axis)
            gradients = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], gradients)
            return carry, axis.sum_scatter(gradients, self.axis)

        def add(state: tuple[Carry, Embedding], block: Block) -> tuple[Carry, Embedding]:
            # The sums are sent one step after their block, so that both are sent while the products are computed.
            carry, sums = state
            sums = axis.ring_shift(sums, self.axis)
            carry, gradient = visit(carry, block)
            return carry, jax.tree.map(jnp.add, sums, gradient)

        zeros = jax.tree.map(jnp.zeros_like, dataclasses.replace(self.items, mask=None))
        carry, sums = self._around(add, (carry, zeros))
        return carry, axis.ring_shift(sums, self.axis)  # those of the last visit are one device from home

    def take(self, rows: Array) -> Embedding:
        """Candidates in these rows [b] of the global batch; differentiable."""
        block = self.in_one_block()
        if self.pairs.strategy == "streamed":
            block = axis.all_gather(self.own_block(), self.axis)
        if block is not None:
            place = jnp.maximum(rows - block.rows[0], 0)  # a query without any negative names row 0
            return jax.tree.map(lambda x: x[place], block.items)

        def pick(taken: Embedding, block: Block) -> Embedding:
            place = rows - block.rows[0]
            inside = (place >= 0) & (place < block.rows.shape[0])

            def choose(old: Array, items: Array) -> Array:
                return jnp.where(inside.reshape(-1, *[1] * (items.ndim - 1)), items[jnp.where(inside, place, 0)], old)

            return jax.tree.map(choose, taken, block.items)

        return self._around(pick, jax.tree.map(jnp.zeros_like, self.items))

    def _around(self, visit: Callable[[Carry, Block], Carry], carry: Carry) -> Carry:
        """Folds `visit` over the blocks of all devices, which travel around the ring.

        The last shift brings each block home, where it is not needed. Leaving it out takes a visit outside the loop,
        whose memory the compiler does not share with the visits inside: 288 MB of temporaries, beyond the bound of
        tests/parallel/test_loss_memory.py. One more block on the way is cheaper.
        """

        def turn(state: tuple[Carry, Block], _: None) -> tuple[tuple[Carry, Block], None]:
            carry, block = state
            return (visit(carry, block), axis.ring_shift(block, self.axis)), None

        return lax.scan(turn, (carry, self.own_block()), None, length=axis.axis_size(self.axis))[0][0]

    def tile_items(self) -> Embedding:
        """Items of one block, as arrays or as their shapes."""
        if self.pairs.strategy != "streamed":
            return self.items
        return jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], self._tiles().items))

    def _tiles(self) -> Block:
        """All candidates, gathered, as tiles: every leaf [tiles, tile, ...], the last tile padded."""
        block = axis.all_gather(self.own_block(), self.axis)
        size = block.rows.shape[0]
        tile = min(self.pairs.tile, size)
        missing = -size % tile

        def cut(x: Array) -> Array:
            # Copies of the last row: zeros may be no valid input of a score.
            x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), mode="edge") if missing else x
            return x.reshape(-1, tile, *x.shape[1:])

        rows = jnp.pad(block.rows, (0, missing), constant_values=-1).reshape(-1, tile)
        return Block(jax.tree.map(cut, block.items), cut(block.ids), rows)


def merge_best(best: tuple[Array, Array], new: tuple[Array, Array], rank: int) -> tuple[Array, Array]:
    """Merges two lists of (scores, rows) [b, k] into the `rank` best; ties go to the lowest row.

    So every strategy and every device names the same, in whatever order blocks were visited. NaN comes first.
    """
    scores, rows = (jnp.concatenate(lists, axis=1) for lists in zip(best, new, strict=True))
    order = -jnp.where(jnp.isnan(scores), jnp.inf, scores)
    _, rows, scores = lax.sort((order, rows, scores), dimension=1, num_keys=2)
    return scores[:, :rank], rows[:, :rank]
