"""Similarity distribution matching between global vectors (IRRA: Jiang and Ye, CVPR 2023, arXiv 2303.12501)."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from shnet_jax.losses import pairs
from shnet_jax.losses.global_triplet import product
from shnet_jax.parallel import axis
from shnet_jax.types import Array, Context, Embedding

EPSILON = 1e-8
"""Constant added to the target probability inside the logarithm (IRRA)."""


def loss(images: Embedding, texts: Embedding, ids: Array, ctx: Context, *, temperature: float) -> dict[str, Array]:
    """SDM loss. With c_ij the cosine of global vectors of B pairs, y their ids, n_i how many in the batch have id y_i,

        p_ij = softmax_j(c_ij / temperature),  q_ij = [y_i = y_j] / n_i
        1/B sum_i KL(p_i || q_i + EPSILON)  +  the same from text to image

    temperature: of the softmax (IRRA 0.02).
    Returns shares that add up over devices to: sdm_loss; sdm_matched, the mean probability given to items of the
    query's id.

    Raises ValueError for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"loss.sdm.temperature must be above 0; it is {temperature}")
    images, texts = Embedding(images.vector), Embedding(texts.vector)  # no set has to travel
    ctx = dataclasses.replace(ctx, score=product)
    others = pairs.directions(images, texts, ids, ctx, mask_same_image=False)
    strangers = pairs.directions(images, texts, ids, ctx, mask_same_image=True)
    batch_ids = ids if ctx.pairs.strategy == "local" else axis.all_gather(ids, ctx.axis)
    same = jnp.sum(ids[:, None] == batch_ids[None, :], axis=1).astype(jnp.float32)  # n_i

    total, matched = jnp.zeros(()), jnp.zeros(())
    for other, stranger in zip(others, strangers, strict=True):
        positive = other.positive / temperature
        norm = jnp.logaddexp(positive, other.logsumexp(lambda c: c / temperature))
        log_p = positive - norm

        # sum_j p_j log p_j, and the part of p that strangers have
        entropy = other.sum(lambda c, norm: _x_exp_x(c / temperature - norm), norm[:, None]) + _x_exp_x(log_p)
        wrong = stranger.sum(lambda c, norm: jnp.exp(c / temperature - norm), norm[:, None])
        right = 1 - wrong
        total += (entropy - right * jnp.log(1 / same + EPSILON) - wrong * math.log(EPSILON)).sum()
        matched += right.sum()
    return {"sdm_loss": total / others[0].size, "sdm_matched": matched / (2 * others[0].size)}


def _x_exp_x(x: Array) -> Array:
    return x * jnp.exp(x)
