"""Triplet loss in both directions with a warm-up (VSE++; the loss of VSE-infinity's and 3SHNet's code)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from shnet_jax.losses import pairs
from shnet_jax.types import Array, Context, Embedding


def init_params(**_: Any) -> dict[str, Array]:
    """This loss learns nothing."""
    return {}


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
) -> dict[str, Array]:
    """With S the scores of B pairs and [x]+ = max(x, 0):

        sum_i max_j [margin + S_ij - S_ii]+  +  sum_j max_i [margin + S_ij - S_jj]+

    over the negatives j (i) of each image i (text j). While `ctx.step < warmup_steps` each max is a sum.

    margin: in units of the score.
    reduction: "sum" over the global batch (published) | "mean", the sum divided by B.
    mask_same_image: captions of the same image are no negatives (published: False, they are).
    Returns shares that add up over devices to: triplet_loss; triplet_violated, the share of queries whose
    hardest negative breaks the margin; triplet_positive and triplet_negative, the mean score of the pairs and
    of the hardest negatives (0 when all pairs are of one image and there is no negative).
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"loss.triplet.reduction is 'sum' or 'mean', not {reduction!r}")
    both = pairs.directions(images, texts, ids, ctx, mask_same_image=mask_same_image)
    size = both[0].size
    every, hardest, violated, positive, negative = (
        sum(parts) for parts in zip(*(_sums(direction, margin) for direction in both), strict=True)
    )
    share = jnp.where(ctx.step < warmup_steps, every, hardest)
    return {
        "triplet_loss": share / size if reduction == "mean" else share,
        "triplet_violated": violated / (2 * size),
        "triplet_positive": positive / (2 * size),
        "triplet_negative": negative / (2 * size),
    }


def _sums(direction: pairs.Direction, margin: float) -> tuple[Array, ...]:
    """Sums over one direction: all violations, hardest ones, their number, positive and negative scores."""
    gaps = margin + direction.scores - direction.positive[:, None]
    every = jnp.where(direction.negatives, jax.nn.relu(gaps), 0.0)
    negative = direction.hardest_negative()
    hardest = jax.nn.relu(margin + negative - direction.positive)
    return (
        every.sum(),
        hardest.sum(),
        (hardest > 0).sum(),
        direction.positive.sum(),
        jnp.where(jnp.isneginf(negative), 0.0, negative).sum(),
    )
