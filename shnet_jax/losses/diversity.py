"""Diversity loss of embedding sets: elements of a set repel each other, and both modalities' sets are aligned.

Source: docs/models.md, after Kim et al., "Improving Cross-Modal Retrieval with Set of Diverse Embeddings"
(CVPR 2023). A loss sees embeddings, not the parts that the set head adds; the residual of an element is what of it is
orthogonal to its item's global vector (ours).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.losses import pairs
from shnet_jax.types import Array, Context, Embedding

TINY = 1e-12


def loss(
    images: Embedding, texts: Embedding, ids: Array, ctx: Context, *, sharpness: float, gamma: float
) -> dict[str, Array]:
    """Diversity loss. With r the residuals, divided by their length, of the elements z of B images and texts,

        uniformity: mean over items, and over pairs a != b of their elements, of exp(-sharpness |r_a - r_b|^2)
        mmd:        mean k(v, v') - 2 mean k(v, t) + mean k(t, t'),  k(x, y) = exp(-gamma |x - y|^2)

    uniformity is the mean of both modalities; mmd is taken over the elements of all images v and of all texts t, an
    element with itself included, every item weighing the same.

    sharpness: of the repulsion (DivE 2). gamma: of the kernel; 0: 1 / dimension (DivE).
    Returns shares that add up over devices to: uniformity_loss, mmd_loss.

    Raises ValueError for embeddings without elements.
    """
    if images.elements is None or texts.elements is None:
        raise ValueError(
            "loss.diversity is about sets, and this model's embeddings have no elements: set its weight to 0"
        )
    gamma = gamma or 1 / images.elements.shape[-1]
    alone = jnp.arange(ids.shape[0], dtype=jnp.int32)  # every pair of different items counts

    def score(a: Embedding, b: Embedding) -> Array:
        return _mean_kernel(a, b, gamma)

    ctx = dataclasses.replace(ctx, score=score)

    def mean(a: Embedding, b: Embedding) -> Array:
        direction, _ = pairs.directions(a, b, alone, ctx, mask_same_image=False)
        others = alone.shape[0] if ctx.pairs.strategy == "local" else direction.size
        return (direction.positive.sum() + direction.total(lambda k: k)) / (float(direction.size) * others)

    size = pairs.directions(images, texts, alone, ctx, mask_same_image=False)[0].size
    uniform = (_repulsion(images, sharpness) + _repulsion(texts, sharpness)).sum() / (2 * size)
    return {
        "uniformity_loss": uniform,
        "mmd_loss": mean(images, images) - 2 * mean(images, texts) + mean(texts, texts),
    }


def _valid(items: Embedding) -> Array:
    assert items.elements is not None
    return jnp.ones(items.elements.shape[:2]) if items.mask is None else items.mask.astype(jnp.float32)


def _repulsion(items: Embedding, sharpness: float) -> Array:
    """Repulsion [n], a mean over ordered pairs of different valid elements; 0 for an item with fewer than two."""
    assert items.elements is not None
    across = jnp.einsum("nmd,nd->nm", items.elements, items.vector, precision=lax.Precision.HIGHEST)
    residual = items.elements - across[..., None] * items.vector[:, None, :]
    residual = residual * lax.rsqrt(jnp.sum(jnp.square(residual), axis=-1, keepdims=True) + TINY)
    squares = jnp.sum(jnp.square(residual[:, :, None] - residual[:, None, :]), axis=-1)
    valid = _valid(items)
    counted = valid[:, :, None] * valid[:, None, :] * (1 - jnp.eye(valid.shape[1]))
    return jnp.sum(counted * jnp.exp(-sharpness * squares), axis=(1, 2)) / jnp.maximum(
        jnp.sum(counted, axis=(1, 2)), 1.0
    )


def _mean_kernel(a: Embedding, b: Embedding, gamma: float) -> Array:
    """Mean [n, t] of the kernel over the valid elements of two items; one element of `a` at a time."""
    assert a.elements is not None and b.elements is not None
    of_a, of_b = _valid(a), _valid(b)
    squares_b = jnp.sum(jnp.square(b.elements), axis=-1)

    @jax.checkpoint
    def visit(sums: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        element, weight = at
        products = jnp.einsum("nd,tmd->nmt", element, b.elements, precision=lax.Precision.HIGHEST)
        squares = jnp.sum(jnp.square(element), axis=-1)[:, None, None] + squares_b.T[None] - 2 * products
        kernel = jnp.exp(-gamma * jnp.maximum(squares, 0.0))
        return sums + weight[:, None] * jnp.sum(kernel * of_b.T[None], axis=1), None

    start = jnp.zeros((a.elements.shape[0], b.elements.shape[0]))
    sums, _ = lax.scan(visit, start, (a.elements.swapaxes(0, 1), of_a.T))
    counts = jnp.maximum(jnp.sum(of_a, axis=1), 1.0)[:, None] * jnp.maximum(jnp.sum(of_b, axis=1), 1.0)
    return sums / counts
