"""Collectives on a named device axis, which are the identity without an axis (None) and on an axis of one device.

XLA would copy all that passes through them on one device: in a step, all gradients of a model.
"""

from __future__ import annotations

from typing import TypeVar

import jax
from jax import lax

from shnet_jax.types import Array

Tree = TypeVar("Tree")


def _alone(axis: str | None) -> bool:
    return axis_size(axis) == 1


def psum(tree: Tree, axis: str | None) -> Tree:
    """Sum of each leaf over the devices."""
    return tree if _alone(axis) else lax.psum(tree, axis)


def pmean(tree: Tree, axis: str | None) -> Tree:
    """Mean of each leaf over the devices. Not for a loss that is differentiated: see `mapping`."""
    return tree if _alone(axis) else lax.pmean(tree, axis)


def all_gather(tree: Tree, axis: str | None) -> Tree:
    """Each leaf [b, ...] of all devices one after another, [devices * b, ...].

    Its gradient is a reduce-scatter: each device gets the sum of what all devices' losses say about its own
    rows.
    """
    return tree if _alone(axis) else jax.tree.map(lambda x: lax.all_gather(x, axis, tiled=True), tree)


def sum_scatter(tree: Tree, axis: str | None) -> Tree:
    """Each leaf [devices * b, ...] summed over the devices, of which each keeps its own rows, [b, ...]."""
    return tree if _alone(axis) else jax.tree.map(lambda x: lax.psum_scatter(x, axis, tiled=True), tree)


def ring_shift(tree: Tree, axis: str | None) -> Tree:
    """Passes each leaf to the next device of the ring; as many shifts as there are devices restore the start."""
    size = axis_size(axis)
    if size == 1:
        return tree
    return jax.tree.map(lambda x: lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)]), tree)


def axis_index(axis: str | None) -> Array | int:
    """Number of this device on the axis, [] int32; 0 when not mapped."""
    return 0 if axis is None else lax.axis_index(axis)


def axis_size(axis: str | None) -> int:
    """Devices on the axis; 1 when not mapped."""
    return 1 if axis is None else lax.axis_size(axis)
