"""Normalisation of vectors and of weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from shnet_jax.types import Array


def l2norm(x: Array, axis: int = -1) -> Array:
    """Unit vectors x / (||x|| + 1e-8) along `axis`; epsilon after the root as published (VSE-infinity, 3SHNet, USER).

    The gradient at x = 0 is defined as that of x / 1e-8, where the plain formula gives NaN.
    """
    return x / (_length(x, axis) + 1e-8)


def cosine(a: Array, b: Array) -> Array:
    """Cosine of vectors along the last axis, of shapes that broadcast; 0 where one of them is 0."""
    lengths = (_length(a, -1) + 1e-8) * (_length(b, -1) + 1e-8)
    return jnp.sum(a * b, axis=-1) / lengths[..., 0]


def masked_softmax(logits: Array, mask: Array) -> Array:
    """Softmax along the last axis over the valid entries; finite, though arbitrary, where none is valid."""
    # The least finite number, not -inf: a set without valid members must not give NaN.
    return jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(logits.dtype).min), axis=-1)


def _length(x: Array, axis: int) -> Array:
    """Euclidean length along `axis`, which is kept with size 1; its gradient at 0 is 0."""
    squares = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    zero = squares == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))
