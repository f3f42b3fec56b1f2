"""Normalisation of vectors."""

from __future__ import annotations

import jax.numpy as jnp

from shnet_jax.types import Array


def l2norm(x: Array, axis: int = -1) -> Array:
    """x / (||x|| + 1e-8) along `axis`, the epsilon after the root as published (VSE-infinity, 3SHNet, USER).

    The gradient at x = 0 is defined as that of x / 1e-8, where the plain formula gives NaN.
    """
    squares = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    zero = squares == 0
    return x / (jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares))) + 1e-8)
