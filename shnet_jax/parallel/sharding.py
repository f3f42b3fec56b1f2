"""Parameters and optimiser state spread over the data axis, for towers that do not fit on one device (FSDP, ZeRO-3).

Every large array is split along one of its own axes, and each device holds one part: of the parameters, the moments of
the optimiser, the running average and the gradient. A step gathers the parameters where it uses them and drops them
afterwards; the gradient of that gathering is a reduce-scatter, so gradients arrive summed and split. Which axis is a
function of the shape, and of the axes that parallel/rules.py has split already: a parameter and its moments are split
alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from shnet_jax.parallel import axis
from shnet_jax.types import DATA, Array

SMALLEST = 2**14
"""Elements below which an array is not worth splitting."""

WHOLE = -1
"""Marker in place of an axis: the array is not split, every device has all of it."""


def split_axes(tree: Any, devices: int, across: Any = None) -> Any:
    """Axis along which each array is split over the devices: the longest divisible one, or WHOLE.

    Vectors stay whole: statistics, norms and biases are small, and statistics are averaged over the devices.
    tree: arrays or their shapes, of the whole (not of one device's part). across: the partition spec of each over other
    mesh axes (parallel/rules.py); what these split is not split again. None: they split nothing.
    """

    def longest(leaf: Any, other: P) -> int:
        taken = {i for i, name in enumerate(other) if name is not None}
        candidates = [i for i, size in enumerate(leaf.shape) if size % devices == 0 and i not in taken]
        if leaf.ndim < 2 or leaf.size < SMALLEST or devices == 1 or not candidates:
            return WHOLE
        return max(candidates, key=lambda i: leaf.shape[i])

    return jax.tree.map(longest, tree, _unsplit(tree) if across is None else across)


def specs(axes: Any, across: Any = None) -> Any:
    """Partition spec of each array, from its axis by `split_axes` and its spec over other mesh axes, if any."""

    def merged(at: int, other: P) -> P:
        if at == WHOLE:
            return other
        names = [*other, *[None] * (at + 1 - len(other))]
        return P(*names[:at], DATA, *names[at + 1 :])

    return jax.tree.map(merged, axes, _unsplit(axes) if across is None else across)


def _unsplit(tree: Any) -> Any:
    return jax.tree.map(lambda _: P(), tree)


def gather(tree: Any, axes: Any, name: str | None) -> Any:
    """Gathers the whole arrays from the devices' parts; differentiable."""

    def whole(part: Array, split: int) -> Array:
        return part if split == WHOLE else lax.all_gather(part, name, axis=split, tiled=True)

    return jax.tree.map(whole, tree, axes)


def reduce(gradients: Any, axes: Any, name: str | None) -> Any:
    """Sums the gradients of unsplit arrays over the devices; those of split arrays are summed already."""
    return jax.tree.map(lambda g, split: axis.psum(g, name) if split == WHOLE else g, gradients, axes)


def global_norm(tree: Any, axes: Any, name: str | None) -> Array:
    """Euclidean norm of all arrays together, [] float32; the same on all devices."""

    def squares(split: bool) -> Array:
        kept = jax.tree.map(lambda x, at: x if (at != WHOLE) == split else jnp.zeros((), x.dtype), tree, axes)
        return jnp.square(optax.global_norm(kept))

    if all(at == WHOLE for at in jax.tree.leaves(axes)):
        return optax.global_norm(tree)
    return jnp.sqrt(squares(False) + axis.psum(squares(True), name))


def remat_gather(fn: Callable[..., Any], axes: Any) -> Callable[..., Any]:
    """Rematerialises `fn` so that its backward pass gathers split parameters once more instead of keeping them.

    Products are kept; what lies between them, the gathered and rounded parameters with it, is made again.
    """
    if all(at == WHOLE for at in jax.tree.leaves(axes)):
        return fn
    return jax.checkpoint(fn, policy=jax.checkpoint_policies.dots_saveable)
