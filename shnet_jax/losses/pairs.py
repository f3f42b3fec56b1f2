"""Scores of a batch of image-text pairs that is spread over devices: the ground that every loss stands on.

Row i of the images and row i of the texts are a pair (an image with several captions is repeated). b pairs
are on this device and B in the global batch: b times the devices that `ctx.axis` names, b when it is None.

The gradient convention of all losses: a loss returns this device's share of the global loss. Shares add up
(`psum`) to the global loss; a mean divides by the global count, which is a constant. Each device scores its
own images against all texts and its own texts against all images, and differentiates through the gathering,
whose gradient is a reduce-scatter: so the gradient of an embedding is complete on the device that computed
it, and gradients of replicated parameters become complete by one explicit `psum`. Never differentiate a
`psum` or `pmean` of the loss itself.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from shnet_jax.parallel import axis
from shnet_jax.types import Array, Context, Embedding


@struct.dataclass
class Direction:
    """This device's queries of one direction (image to text, or text to image) against all B candidates.

    scores:    [b, B].
    positive:  [b], the score of each query with its own partner.
    own:       [b, B] bool, where that partner is.
    negatives: [b, B] bool, the candidates that count as wrong.
    """

    scores: Array
    positive: Array
    own: Array
    negatives: Array

    @property
    def size(self) -> int:
        """B, pairs in the global batch."""
        return self.scores.shape[1]

    def hardest_negative(self) -> Array:
        """[b], each query's best-scored negative; -inf where it has none."""
        return jnp.max(jnp.where(self.negatives, self.scores, -jnp.inf), axis=1)


def directions(
    images: Embedding, texts: Embedding, ids: Array, ctx: Context, *, mask_same_image: bool
) -> tuple[Direction, Direction]:
    """Scores every local image with all texts, and every local text with all images.

    images, texts: b embeddings each, in pairs.
    ids: [b] int32 image ids.
    mask_same_image: captions of the same image are no negatives of it (nor it of them). False, as published
      by VSE-infinity and 3SHNet: everything but the own pair is a negative.
    Returns (image to text, text to image). Raises ValueError when the three do not have equally many rows.
    """
    pairs = ids.shape[0]
    if images.vector.shape[0] != pairs or texts.vector.shape[0] != pairs:
        raise ValueError(
            "a loss takes pairs, with as many images as texts and ids; got "
            f"{images.vector.shape[0]} images, {texts.vector.shape[0]} texts and {pairs} ids"
        )
    all_ids = axis.all_gather(ids, ctx.axis)
    local = axis.axis_index(ctx.axis) * pairs + jnp.arange(pairs)
    own = local[:, None] == jnp.arange(all_ids.shape[0])
    # Both masks are the same in the two directions: a candidate's id is that of its pair.
    negatives = ids[:, None] != all_ids if mask_same_image else ~own

    image_scores = ctx.score(images, axis.all_gather(texts, ctx.axis))
    # Not mapped, the second block would be the first one again.
    text_scores = image_scores if ctx.axis is None else ctx.score(axis.all_gather(images, ctx.axis), texts)

    def direction(scores: Array) -> Direction:
        positive = jnp.take_along_axis(scores, local[:, None], axis=1)[:, 0]
        return Direction(scores=scores, positive=positive, own=own, negatives=negatives)

    return direction(image_scores), direction(text_scores.T)
