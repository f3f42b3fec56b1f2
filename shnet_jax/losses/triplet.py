"""Triplet loss in both directions with a warm-up (VSE++; the loss of VSE-infinity's and 3SHNet's code)."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.losses import pairs
from shnet_jax.parallel import axis
from shnet_jax.types import WARM_UP, Array, Context, Embedding

TAKES_QUEUES = True
"""Whether this loss has a term for the queues of momentum encoders (`ctx.keys`): see losses/total.py."""


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
    name: str = "triplet",
) -> dict[str, Array]:
    """Triplet loss in both directions. With S the scores of B pairs and [x]+ = max(x, 0):

        sum_i max_j [margin + S_ij - S_ii]+  +  sum_j max_i [margin + S_ij - S_jj]+

    over the negatives j (i) of each image i (text j). While `ctx.step < warmup_steps` each max is a sum. With momentum
    encoders the same once more, of each query, the key of its partner and the other modality's queue.

    margin: in units of the score.
    reduction: "sum" over the global batch (published) | "mean", the sum divided by B.
    mask_same_image: captions of the same image are no negatives (published: False, they are).
    rank: 1, the hardest negative (published) | k, the k-th hardest; for large batches, whose hardest "negatives" are
      mostly false negatives.
    softness: 0, the hardest negative itself (published) | t > 0, in its place t log sum_j exp(S_ij / t), in which all
      hard ones take part; in units of the score.
    name: the section of config.loss that these options are of, for messages.
    Returns shares that add up over devices to: triplet_loss; triplet_violated, the share of queries whose negative
    breaks the margin; triplet_positive and triplet_negative, the mean score of the pairs and of these negatives (0 for
    a query that has none), these three in the batch; with momentum encoders triplet_queue, their part of the loss.
    """
    _check_options(reduction, rank, softness, ids.shape[0], ctx, name)
    sides = pairs.directions(images, texts, ids, ctx, mask_same_image=mask_same_image)
    size = sides[0].size
    every = partial(_every_violation, margin)
    negative = partial(_hardest, rank, softness)

    def hardest_violation(side: pairs.Direction) -> Array:
        return jax.nn.relu(margin + negative(side) - side.positive)

    negatives = jnp.stack([negative(side) for side in sides])
    positives = jnp.stack([side.positive for side in sides])
    gaps = margin + negatives - positives
    batch, queue = jax.nn.relu(gaps).sum(), pairs.over_queues(sides, ctx, hardest_violation)
    if warmup_steps:
        # A cond keeps what either branch's backward pass needs, in every step: after the warm-up, B x B zeros. Under
        # checkpoint this branch keeps its inputs alone, and scores once more for its gradient.
        warm = jax.checkpoint(lambda: (sum(every(side).sum() for side in sides), pairs.over_queues(sides, ctx, every)))
        with jax.named_scope(WARM_UP):
            batch, queue = lax.cond(ctx.step < warmup_steps, warm, lambda: (batch, queue))
    if reduction == "mean":
        batch, queue = batch / size, queue / size
    return {
        "triplet_loss": batch + queue,
        "triplet_violated": (gaps > 0).sum() / (2 * size),
        "triplet_positive": positives.sum() / (2 * size),
        "triplet_negative": jnp.where(jnp.isneginf(negatives), 0.0, negatives).sum() / (2 * size),
    } | ({"triplet_queue": queue} if ctx.keys else {})


def _check_options(reduction: str, rank: int, softness: float, count: int, ctx: Context, name: str) -> None:
    """Raises ValueError for options that cannot be. count: pairs of this device."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"loss.{name}.reduction is 'sum' or 'mean', not {reduction!r}")
    if rank < 1 or softness < 0 or (rank > 1 and softness > 0):
        raise ValueError(
            f"loss.{name}.rank is {rank} and softness {softness}; rank is at least 1, softness at least 0, "
            "and only one of them may differ from rank 1 and softness 0"
        )
    candidates = count * (1 if ctx.pairs.strategy == "local" else axis.axis_size(ctx.axis))
    if rank >= candidates:
        raise ValueError(f"loss.{name}.rank is {rank}; a query meets only {candidates - 1} others")


def _hardest(rank: int, softness: float, side: pairs.Direction) -> Array:
    """Score [b] of each query's rank-th hardest negative, or their soft maximum."""
    if not softness:
        return side.hardest(rank)
    return softness * side.logsumexp(lambda scores: scores / softness)


def _every_violation(margin: float, side: pairs.Direction) -> Array:
    """Sum [b] of the violations of the margin by all negatives of a query."""
    # Scored inside the branch: a gradient of scores from outside would be computed after the warm-up too.
    side = dataclasses.replace(side, known=None)
    return side.sum(lambda scores, positive: jax.nn.relu(margin + scores - positive), side.positive[:, None])
