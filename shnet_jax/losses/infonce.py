"""Symmetric InfoNCE with a temperature that can be learned (Radford et al. 2021, CLIP)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from shnet_jax.losses import pairs
from shnet_jax.parallel import axis
from shnet_jax.types import Array, Context, Embedding

MAX_SCALE = 100.0
"""Largest factor on the scores, 1 / temperature, that is learned (CLIP)."""

TAKES_QUEUES = True
"""Whether this loss has a term for the queues of momentum encoders (`ctx.keys`): see losses/total.py."""


def init_params(*, temperature: float, learn_temperature: bool, **_: Any) -> dict[str, Array]:
    """Initial {"log_scale": [] float32, log(1 / temperature)} when the temperature is learned, else {}.

    Raises ValueError for a temperature that is not positive, or that is learned and below 1 / MAX_SCALE.
    """
    smallest = 1 / MAX_SCALE if learn_temperature else 0.0
    if not temperature > 0 or temperature < smallest:
        limit = f"at least {smallest}, as its inverse is at most {MAX_SCALE}" if smallest else "above 0"
        raise ValueError(f"loss.infonce.temperature must be {limit}; it is {temperature}")
    return {"log_scale": jnp.asarray(-math.log(temperature), jnp.float32)} if learn_temperature else {}


def loss(
    images: Embedding,
    texts: Embedding,
    ids: Array,
    ctx: Context,
    *,
    temperature: float,
    learn_temperature: bool,
    mask_same_image: bool,
) -> dict[str, Array]:
    """Symmetric InfoNCE. With S the scores of B pairs and c = 1 / temperature, the mean over the global batch of

        -1/2 [ log softmax_j(c S_ij) at j = i  +  log softmax_j(c S_ji) at j = i ]

    over each pair's own partner and its negatives. With momentum encoders the same once more, of each query, the key of
    its partner and the other modality's queue (as MoCo; ALBEF for images and texts).

    temperature: used as it is unless learn_temperature, where
      c = exp(min(ctx.params["log_scale"], log MAX_SCALE)).
    mask_same_image: other captions of the same image stay out of the softmax.
    Returns shares that add up over devices to: infonce_loss; infonce_accuracy, the share of queries that
    score their own partner above every negative of the batch; infonce_scale, c; with momentum encoders infonce_queue,
    their part of the loss.
    """
    if learn_temperature:
        scale = jnp.exp(_limited(ctx.params["log_scale"]))
    else:
        scale = jnp.asarray(1 / temperature, jnp.float32)
    sides = pairs.directions(images, texts, ids, ctx, mask_same_image=mask_same_image)
    size = sides[0].size

    def cross_entropy(side: pairs.Direction, negatives: Array) -> Array:
        positive = scale * side.positive
        return jnp.logaddexp(positive, negatives) - positive

    negatives, first = zip(*(side.logsumexp_and_first(jnp.multiply, scale) for side in sides), strict=True)
    losses = jnp.stack([cross_entropy(side, x) for side, x in zip(sides, negatives, strict=True)])
    queue = pairs.over_queues(sides, ctx, lambda side: cross_entropy(side, side.logsumexp(jnp.multiply, scale)))
    queue = queue / (2 * size)
    return {
        "infonce_loss": losses.sum() / (2 * size) + queue,
        "infonce_accuracy": jnp.stack(first).sum() / (2 * size),
        "infonce_scale": scale / axis.axis_size(ctx.axis),
    } | ({"infonce_queue": queue} if ctx.keys else {})


@jax.custom_vjp
def _limited(log_scale: Array) -> Array:
    """Log scale clamped to log MAX_SCALE; beyond it the gradient may only lead back, as for CLIP's clamped value."""
    return jnp.minimum(log_scale, math.log(MAX_SCALE))


def _forward(log_scale: Array) -> tuple[Array, Array]:
    return _limited(log_scale), log_scale


def _backward(log_scale: Array, cotangent: Array) -> tuple[Array]:
    away = (log_scale > math.log(MAX_SCALE)) & (cotangent < 0)  # descent would raise it further
    return (jnp.where(away, 0.0, cotangent),)


_limited.defvjp(_forward, _backward)
