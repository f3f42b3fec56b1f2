"""Sigmoid loss: binary classification of every pair of the batch (Zhai et al. 2023, SigLIP)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from shnet_jax.losses import pairs
from shnet_jax.parallel import axis
from shnet_jax.types import Array, Context, Embedding


def init_params(*, scale: float, bias: float, **_: Any) -> dict[str, Array]:
    """Initial {"log_scale": [], "bias": []} float32. Raises ValueError for a scale that is not positive."""
    if not scale > 0:
        raise ValueError(f"loss.sigmoid.scale must be above 0; it is {scale}")
    return {"log_scale": jnp.asarray(math.log(scale), jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


def loss(
    images: Embedding,
    texts: Embedding,
    ids: Array,
    ctx: Context,
    *,
    scale: float,
    bias: float,
    mask_same_image: bool,
) -> dict[str, Array]:
    """Sigmoid loss. With S the scores of B pairs, c = exp(log_scale) and b = bias, both learned,

        1/B sum_ij softplus(-z_ij (c S_ij + b)),  z_ij = 1 for the pairs and -1 for negatives.

    scale, bias: where c and b start (published 10 and -10).
    mask_same_image: other captions of the same image are neither.
    Returns shares that add up over devices to: sigmoid_loss; sigmoid_positive and sigmoid_negative, the parts of pairs
    and negatives in it; sigmoid_scale, c; sigmoid_bias, b.
    """
    del scale, bias  # where ctx.params started
    learned = jnp.exp(ctx.params["log_scale"]), ctx.params["bias"]
    rows, _ = pairs.directions(images, texts, ids, ctx, mask_same_image=mask_same_image)
    negative = rows.sum(lambda scores, c, b: jax.nn.softplus(c * scores + b), *learned).sum() / rows.size
    positive = jax.nn.softplus(-(learned[0] * rows.positive + learned[1])).sum() / rows.size
    devices = axis.axis_size(ctx.axis)
    return {
        "sigmoid_loss": positive + negative,
        "sigmoid_positive": positive,
        "sigmoid_negative": negative,
        "sigmoid_scale": learned[0] / devices,
        "sigmoid_bias": learned[1] / devices,
    }
