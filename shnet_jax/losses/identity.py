"""Identity cross-entropy: one linear classifier of persons for images and texts (as in IRRA, CVPR 2023)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from shnet_jax.parallel import axis
from shnet_jax.types import Array, Context, Embedding

DEVIATION = 0.001
"""Standard deviation of the classifier's initial weights (IRRA)."""


def init_params(*, classes: int, dim: int, **_: Any) -> dict[str, Array]:
    """Initial {"kernel": [dim, classes], "bias": [classes]} float32: normal weights, zero bias.

    Raises ValueError where a size is not known, as for a data set without the field `identity`.
    """
    if classes < 2 or dim < 1:
        raise ValueError(
            f"loss.identity needs at least 2 classes and the size of the embedding, it has {classes} and {dim}; a run "
            "takes them from the field 'identity' of its data set and from config.model.dim"
        )
    kernel = DEVIATION * jax.random.normal(jax.random.key(0), (dim, classes), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros((classes,), jnp.float32)}


def loss(images: Embedding, texts: Embedding, ids: Array, ctx: Context, *, classes: int, dim: int) -> dict[str, Array]:
    """Identity cross-entropy. With x the global vectors of B pairs, W and b learned, y the identities,

        1/(2B) sum_i [ -log softmax(W x_i + b) at y_i ]  over images and texts.

    classes: identities of the training split; `ids` lie in 0..classes-1. dim: size of the embedding.
    Returns shares that add up over devices to: identity_loss; identity_accuracy, the share named right.
    """
    del classes, dim  # the shape of ctx.params
    size = ids.shape[0] * axis.axis_size(ctx.axis)
    lost, right = jnp.zeros(()), jnp.zeros(())
    for side in (images, texts):
        logits = jnp.dot(side.vector, ctx.params["kernel"], precision=jax.lax.Precision.HIGHEST) + ctx.params["bias"]
        of_id = jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0]  # an id outside gives NaN, which stops the run
        lost += (jax.nn.logsumexp(logits, axis=1) - of_id).sum()
        right += (jnp.argmax(logits, axis=1) == ids).sum()
    return {"identity_loss": lost / (2 * size), "identity_accuracy": right / (2 * size)}
