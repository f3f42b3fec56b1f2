"""USER's unified training objective (Zhang et al. 2024): all negatives in a soft maximum, of batch and queues.

The in-batch part is the hubness-aware loss of Liu et al. (AAAI 2020).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from shnet_jax.losses import pairs
from shnet_jax.types import Array, Context, Embedding

TAKES_QUEUES = True
"""Whether this loss has a term for the queues of momentum encoders (`ctx.keys`): see losses/total.py."""


def init_params(*, scale: float, **_: Any) -> dict[str, Array]:
    """Returns no parameters: this loss has none to learn. Raises ValueError for a scale that is not positive."""
    if not scale > 0:
        raise ValueError(f"loss.uto.scale must be above 0; it is {scale}")
    return {}


def loss(
    images: Embedding,
    texts: Embedding,
    ids: Array,
    ctx: Context,
    *,
    scale: float,
    offset: float,
    batch_weight: float,
    mask_same_image: bool,
) -> dict[str, Array]:
    """USER's objective. With S the scores of B pairs and h(X) = 1/scale log(1 + sum_{x in X} exp(scale (x - offset))),

        batch_weight * 1/B sum_i [h(S_ij, j != i) + h(S_ji, j != i) - log(1 + [S_ii]+)]
        + 1/B sum_i [h(<v_i, Q_t>) - log(1 + [<v_i, t'_i>]+)]  +  the same of the texts t_i, the queue Q_v and v'_i

    over the negatives of each query; v', t' are what the momentum encoders make of the pair, Q_v and Q_t the queues of
    past ones. Without momentum encoders it is the first line.

    scale, offset: mu and gamma (published 90 and 0.5), in units of 1 / score and of the score.
    batch_weight: lambda (published 1 on COCO, 20 on Flickr30K).
    mask_same_image: captions of the same image are no negatives, in batch or queue (published: False, they are).
    Returns shares that add up over devices to: uto_loss; uto_batch and uto_queue, its two lines; uto_positive, the mean
    score of the pairs.
    """
    sides = pairs.directions(images, texts, ids, ctx, mask_same_image=mask_same_image)
    size, positive = sides[0].size, sides[0].positive

    def softmax_of(direction: pairs.Direction) -> Array:
        # A log of a sum of exponentials: exp(scale / 2) itself would overflow half precision, exp(scale) float32.
        return jnp.logaddexp(0.0, direction.logsumexp(lambda scores: scale * (scores - offset))) / scale

    def reward(scores: Array) -> Array:
        return jnp.log1p(jax.nn.relu(scores))

    batch = batch_weight * (softmax_of(sides[0]) + softmax_of(sides[1]) - reward(positive)).sum() / size
    queue = pairs.over_queues(sides, ctx, lambda queued: softmax_of(queued) - reward(queued.positive)) / size
    return {
        "uto_loss": batch + queue,
        "uto_batch": batch,
        "uto_queue": queue,
        "uto_positive": positive.sum() / size,
    }
