"""Sigmoid loss: binary classification of every pair of the batch (Zhai et al. 2023, SigLIP)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shnet_jax.losses import pairs
from shnet_jax.parallel import axis
from shnet_jax.types import Array, Context, Embedding

REDUCTIONS = ("queries", "pairs")


def init_params(
    *, scale: float, bias: float, scale_limits: Sequence[float] = (), reduction: str = "queries", **_: Any
) -> dict[str, Array]:
    """Initial {"log_scale": [], "bias": []} float32.

    Raises ValueError for a scale that is not positive or beyond its limits, and for an unknown reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"loss.sigmoid.reduction is {reduction!r}; choose from {', '.join(REDUCTIONS)}")
    if not scale > 0:
        raise ValueError(f"loss.sigmoid.scale must be above 0; it is {scale}")
    limits = tuple(scale_limits)
    if limits and (len(limits) != 2 or not 0 < limits[0] <= scale <= limits[1]):
        raise ValueError(
            f"loss.sigmoid.scale_limits must be () or two numbers above 0 around loss.sigmoid.scale = {scale}; "
            f"it is {limits}"
        )
    return {"log_scale": jnp.asarray(math.log(scale), jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


def project(params: dict[str, Array], *, scale_limits: Sequence[float] = (), **_: Any) -> dict[str, Array]:
    """The parameters after an update, with the scale within its limits (SAIL: 1 to 100)."""
    if not scale_limits:
        return params
    low, high = map(math.log, scale_limits)
    return params | {"log_scale": jnp.clip(params["log_scale"], low, high)}


def loss(
    images: Embedding,
    texts: Embedding,
    ids: Array,
    ctx: Context,
    *,
    scale: float,
    bias: float,
    mask_same_image: bool,
    reduction: str = "queries",
    scale_limits: Sequence[float] = (),
) -> dict[str, Array]:
    """Sigmoid loss. With S the scores of N images and C captions of each, c = exp(log_scale) and b = bias, learned,

        1/M sum_ij softplus(-z_ij (c S_ij + b)),  z_ij = 1 where caption j is of image i and -1 for negatives.

    scale, bias: where c and b start (SigLIP 10 and -10, SAIL 20 and -10).
    scale_limits: of c after every update (`project`); (): none.
    mask_same_image: captions of the same image in another place of the batch are neither.
    reduction: "queries": M = C N, and a negative counts C times, as in a batch of C N pairs (SigLIP, with C = 1).
      "pairs": M = C N^2, all entries of the matrix, masked ones included (SAIL, C = 1 or 2); with the strategy local,
      those of each device.
    Returns shares that add up over devices to: sigmoid_loss; sigmoid_positive and sigmoid_negative, the parts of pairs
    and negatives in it; sigmoid_scale, c; sigmoid_bias, b.
    """
    del scale, bias, scale_limits  # where ctx.params started, and what `project` does
    learned = jnp.exp(ctx.params["log_scale"]), ctx.params["bias"]
    if ctx.captions == 1:
        side, _ = pairs.directions(images, texts, ids, ctx, mask_same_image=mask_same_image)
    else:
        side = pairs.each_image_once(images, texts, ids, ctx, mask_same_image=mask_same_image)
    # Floats: the entries of 46,341 pairs and more do not fit into int32.
    entries, weight = (side.size, ctx.captions) if reduction == "queries" else (float(side.size) * side.width, 1)
    negative = side.total(lambda scores, c, b: jax.nn.softplus(c * scores + b), *learned) * (weight / entries)
    positive = jax.nn.softplus(-(learned[0] * side.positive + learned[1])).sum() / entries
    devices = axis.axis_size(ctx.axis)
    return {
        "sigmoid_loss": positive + negative,
        "sigmoid_positive": positive,
        "sigmoid_negative": negative,
        "sigmoid_scale": learned[0] / devices,
        "sigmoid_bias": learned[1] / devices,
    }
