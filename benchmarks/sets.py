"""Set similarity of pairs of embedding sets against the one dot product of their global vectors."""

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
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.models.esa import SetScore
from shnet_jax.types import Array, Embedding


@dataclasses.dataclass(frozen=True)
class Sizes:
    """images x texts scored at once, pairs of a training batch, elements of a set on both sides, dimension."""

    images: int = 512
    texts: int = 4096
    pairs: int = 512
    elements: int = 4
    dim: int = 512
    rounds: int = 7


FULL = Sizes()
QUICK = Sizes(images=16, texts=32, pairs=16, dim=16, rounds=3)


def at_once(images: Embedding, texts: Embedding, sharpness: float = 16.0) -> Array:
    """Reference implementation of `SetScore("smooth_chamfer", ...)`, which holds all cosines [n, t, M, M] at once."""
    assert images.elements is not None and texts.elements is not None
    cosines = sharpness * jnp.einsum("nad,tbd->ntab", images.elements, texts.elements)
    directions = sum(jax.nn.logsumexp(cosines, axis=axis).mean(-1) for axis in (2, 3))
    return images.vector @ texts.vector.T + directions / (2 * sharpness)


def run(sizes: Sizes) -> list[Row]:
    """Scores of a tile of an evaluation, and value with gradients of a training batch, in pairs/s."""
    rng = np.random.default_rng(0)

    def sets(count: int) -> Embedding:
        parts = rng.standard_normal((count, 1 + sizes.elements, sizes.dim), np.float32)
        parts /= np.linalg.norm(parts, axis=-1, keepdims=True)
        return Embedding(jnp.asarray(parts[:, 0]), jnp.asarray(parts[:, 1:]))

    def gradient(score: Callable[[Embedding, Embedding], Array], images: Embedding, texts: Embedding) -> Any:
        return jax.grad(lambda v, t: jnp.sum(jax.nn.logsumexp(score(v, t), axis=1)), argnums=(0, 1))(images, texts)

    scores: dict[str, Callable[[Embedding, Embedding], Array]] = {
        name: SetScore(name, 16.0, 1.0) for name in ("smooth_chamfer", "chamfer", "maxsim_texts", "max", "mean")
    }
    scores |= {"dot product": RetrievalModel.score, "all at once": at_once}
    tile, batch = (sets(sizes.images), sets(sizes.texts)), (sets(sizes.pairs), sets(sizes.pairs))
    programs = {name: (jax.jit(score), tile) for name, score in scores.items()}
    with_gradient = ("smooth_chamfer", "dot product", "all at once")
    programs |= {f"{name}, gradient": (jax.jit(partial(gradient, scores[name])), batch) for name in with_gradient}
    compiled = {name: (fn.lower(*args).compile(), args) for name, (fn, args) in programs.items()}
    times = interleave({name: partial(fn, *args) for name, (fn, args) in compiled.items()}, sizes.rounds)

    def row(contender: str, reference: str) -> Row:
        images, texts = (len(side.vector) for side in compiled[contender][1])
        of, other = (program_bytes(compiled[name][0]) for name in (contender, reference))
        dims = f"{images} x {texts} pairs, {sizes.elements} x {sizes.elements} elements, D {sizes.dim}"
        memory: dict[str, Any] = {
            "memory_bytes": of,
            "reference_memory_bytes": other,
            "memory": "results and temporaries",
        }
        return compare(
            "sets",
            f"{contender}, {dims}",
            times[contender],
            reference,
            times[reference],
            work=images * texts,
            unit="pairs",
            **memory,
        )

    rows = [row(name, "dot product") for name in ("smooth_chamfer", "chamfer", "maxsim_texts", "max", "mean")]
    return [
        *rows,
        row("smooth_chamfer", "all at once"),
        row("smooth_chamfer, gradient", "dot product, gradient"),
        row("smooth_chamfer, gradient", "all at once, gradient"),
    ]
