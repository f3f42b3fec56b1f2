"""Triplet loss on the product of global vectors, beside one on a score that looks inside (CMSEI-style).

It keeps the towers' own vectors a retrieval model of their own: they find the candidates that the score then re-ranks.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax

from shnet_jax.losses import triplet
from shnet_jax.types import Array, Context, Embedding


def loss(
    images: Embedding,
    texts: Embedding,
    ids: Array,
    ctx: Context,
    *,
    margin: float,
    warmup_steps: int,
    reduction: str,
    mask_same_image: bool,
    rank: int = 1,
    softness: float = 0.0,
) -> dict[str, Array]:
    """Triplet loss on dot products of global vectors: `triplet.loss` and its options; values are global_triplet_*."""
    values = triplet.loss(
        Embedding(images.vector),  # elements are not sent
        Embedding(texts.vector),
        ids,
        dataclasses.replace(ctx, score=product),
        margin=margin,
        warmup_steps=warmup_steps,
        reduction=reduction,
        mask_same_image=mask_same_image,
        rank=rank,
        softness=softness,
        name="global_triplet",
    )
    return {f"global_{name}": value for name, value in values.items()}


def product(images: Embedding, texts: Embedding) -> Array:
    """Scores [n, t] by the global vectors alone, whatever the model's score is."""
    return jnp.einsum("nd,td->nt", images.vector, texts.vector, precision=lax.Precision.HIGHEST)
