"""Set pooling: every channel of every set sorted, and its gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import program_bytes
from benchmarks.rows import Row, compare
from benchmarks.timing import interleave
from shnet_jax.ops.set_pool import set_pool
from shnet_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Sizes:
    """sets x members x channels; a full image of 3SHNet has 2 * 36 + 50 members."""

    sets: int = 64
    members: int = 122
    channels: int = 1024
    rounds: int = 7


FULL = Sizes()
QUICK = Sizes(sets=4, rounds=3)
GPU = Sizes(sets=256, rounds=3)


def sorted_pool(features: Array, mask: Array, weights: Array) -> Array:
    """Reference implementation of `set_pool`: sorts every set with `jnp.sort`, then weights the ranks."""
    lowest = jnp.finfo(features.dtype).min
    ordered = -jnp.sort(-jnp.where(mask[..., None], features, lowest), axis=1)
    valid = jnp.arange(mask.shape[1]) < mask.sum(axis=1, keepdims=True)
    return jnp.einsum("bk,bkd->bd", weights, jnp.where(valid[..., None], ordered, 0.0))


def numpy_pool(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Reference implementation in NumPy, for sets without padding."""
    return np.einsum("bk,bkd->bd", weights, np.sort(features, axis=1)[:, ::-1])


def run(sizes: Sizes) -> list[Row]:
    """Forward, and forward with the gradients of features and weights."""
    rng = np.random.default_rng(0)
    shape = (sizes.sets, sizes.members, sizes.channels)
    host = rng.standard_normal(shape, np.float32), rng.random(shape[:2], np.float32)
    features, weights = jax.device_put(host)
    mask = jnp.ones(shape[:2], bool)
    seed = jax.device_put(rng.standard_normal((sizes.sets, sizes.channels), np.float32))

    def gradient(pool, features, mask, weights):
        return jax.grad(lambda f, w: jnp.vdot(pool(f, mask, w), seed), argnums=(0, 1))(features, weights)

    programs = {
        "set_pool": jax.jit(set_pool),
        "jnp.sort": jax.jit(sorted_pool),
        "set_pool, gradient": jax.jit(partial(gradient, set_pool)),
        "jnp.sort, gradient": jax.jit(partial(gradient, sorted_pool)),
    }
    compiled = {name: fn.lower(features, mask, weights).compile() for name, fn in programs.items()}
    calls: dict[str, Callable[[], Any]] = {name: partial(fn, features, mask, weights) for name, fn in compiled.items()}
    calls["numpy"] = lambda: numpy_pool(*host)
    times = interleave(calls, sizes.rounds)

    def row(contender: str, reference: str, label: str) -> Row:
        memory: dict[str, Any] = {}
        if reference in compiled:
            of, other = (program_bytes(compiled[name]) for name in (contender, reference))
            memory = {"memory_bytes": of, "reference_memory_bytes": other, "memory": "results and temporaries"}
        dims = " x ".join(map(str, shape))
        return compare("pool", f"{contender}, {dims}", times[contender], label, times[reference], **memory)

    return [
        row("set_pool", "jnp.sort", "jnp.sort, weighted sum"),
        row("set_pool", "numpy", "numpy.sort, weighted sum (host)"),
        row("set_pool, gradient", "jnp.sort, gradient", "jnp.sort, weighted sum, gradient"),
        row("set_pool, gradient", "numpy", "numpy.sort, weighted sum (host), no gradient"),
    ]
