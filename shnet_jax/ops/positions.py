"""Sinusoidal position codes."""

from __future__ import annotations

import jax.numpy as jnp

from shnet_jax.types import Array


def sinusoid(positions: Array, size: int) -> Array:
    """Interleaved sine and cosine code of Vaswani et al. (2017): [..., size] float32 for positions [...].

    code[2j] = sin(p * 10000^(-2j/size)), code[2j+1] = cos of the same; `size` is even.
    """
    frequency = 10000.0 ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*positions.shape, size)


def map_code_1d(height: int, width: int, size: int) -> Array:
    """Position code [height*width, size] of the flattened row-major index, as in the released 3SHNet code."""
    return sinusoid(jnp.arange(height * width), size)


def map_code_2d(height: int, width: int, size: int) -> Array:
    """Position code [height*width, size]: half of the code from the row, half from the column."""
    rows = jnp.repeat(sinusoid(jnp.arange(height), size // 2), width, axis=0)
    return jnp.concatenate([rows, jnp.tile(sinusoid(jnp.arange(width), size // 2), (height, 1))], axis=-1)
