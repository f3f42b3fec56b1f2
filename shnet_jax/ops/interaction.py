"""Cross-attention scores of images and sentences: object-word attention, refinement, cross-level attention.

Spec cmsei, section 3 ("CMSEI-style": structure published, formulas reconstructed). With V_i the regions of an image,
W_j the words of a sentence, v and w their global unit vectors:

  c_ij = cos(V_i, W_j);  objects attend to words by a_ij = softmax_j(l1 [c_ij]+ / |[c_.j]+|),  U_i = sum_j a_ij W_j
  refinement  V'_i = V_i + sigmoid(A V_i + B U_i) * U_i
  alignment   mean_i cos(V'_i, U_i)
  cross-level o_i = softmax_i(l2 cos(V'_i, w)), cos(sum_i o_i V'_i, w)

and the same with regions and words exchanged; the score is a weighted sum of alignment, cross-level terms and v.w.

B U_i = sum_j a_ij (B W_j): the products with A and B are made once for each region and word, by the towers, and travel
in `Embedding.elements` as [X, B' X, A X] (B' that of the other side's gate), so no pair costs a product with a matrix.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from shnet_jax.ops.matmul import DType, einsum
from shnet_jax.ops.norms import cosine, l2norm, masked_softmax
from shnet_jax.types import Array, Embedding

SIDES = ("objects", "words")

BLOCK_ON_CPU, BLOCK = 64, 512


def default_block(platform: str) -> int:
    """Pairs of a block where config.model.cmsei.block is 0; platform: "cpu", "gpu" or "tpu".

    A CPU keeps a small block in its cache; an accelerator needs wide kernels, as blocks follow one another.
    """
    return BLOCK_ON_CPU if platform == "cpu" else BLOCK


@dataclasses.dataclass(frozen=True)
class Interaction:
    """Options of the interaction score; `config.model.cmsei`.

    attend: who attends: "objects" to the words, "words" to the objects, or both. refine: the gated refinement (else the
    elements are [n, m, d] alone). sharpness: l1 of objects and of words. cross_sharpness: l2.
    local, cross, whole: weights of the alignment (mean over the sides), of each cross-level term, and of v.w.
    block: pairs that are computed at once: memory grows with block * (K + L) * d. dtype: of the operands of products.
    """

    attend: tuple[str, ...] = SIDES
    refine: bool = True
    sharpness: tuple[float, float] = (9.0, 9.0)
    cross_sharpness: float = 4.0
    local: float = 1.0
    cross: float = 0.5
    whole: float = 1.0
    block: int = 64
    dtype: DType = "float32"


def interaction_scores(images: Embedding, texts: Embedding, how: Interaction) -> Array:
    """Interaction scores [n, t] of n images and t sentences, computed block by block.

    The images have elements [n, K, c], the sentences elements [t, L, c], c = 3 d or (without
    refinement) d. The blocks are computed once more in the backward pass, so that what exists at a time is
    [block, K, d] and never [n, t, K, d].
    """
    image_items, text_items = _items(images), _items(texts)
    n, t = images.vector.shape[0], texts.vector.shape[0]
    rows = max(1, math.isqrt(how.block))
    rows = min(n, rows) if isinstance(n, int) else rows  # an export leaves n and t open: blocks of full size
    columns = max(1, how.block // rows)
    columns = min(t, columns) if isinstance(t, int) else columns
    score_block = jax.checkpoint(partial(_block, how=how))
    if (rows, columns) == (n, t):
        return score_block(image_items, text_items)
    across, down = _cut(text_items, columns), _cut(image_items, rows)
    scores = lax.map(lambda row: lax.map(lambda column: score_block(row, column), across), down)
    return scores.swapaxes(1, 2).reshape(scores.shape[0] * rows, scores.shape[1] * columns)[:n, :t]


@struct.dataclass
class _Items:
    """Embedding that always has elements and a mask."""

    vector: Array
    elements: Array
    mask: Array


def _items(given: Embedding) -> _Items:
    if given.elements is None:
        raise ValueError("an interaction needs the elements of every item, regions or words; got global vectors alone")
    mask = jnp.ones(given.elements.shape[:2], bool) if given.mask is None else given.mask
    return _Items(given.vector, given.elements, mask)


def _cut(items: _Items, size: int) -> _Items:
    """Splits leaves [n, ...] into [blocks, size, ...]; the last block is filled with copies of the last item."""
    count = items.vector.shape[0]
    blocks = -(-count // size)

    def cut(x: Array) -> Array:
        if not isinstance(count, int):  # in an export
            x = x[jnp.minimum(jnp.arange(blocks * size), count - 1)]
        elif missing := blocks * size - count:
            x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), mode="edge")
        return x.reshape(blocks, size, *x.shape[1:])

    return jax.tree.map(cut, items)


def _block(images: _Items, texts: _Items, how: Interaction) -> Array:
    d = images.vector.shape[-1]
    regions, words = l2norm(images.elements[..., :d]), l2norm(texts.elements[..., :d])
    cosines = einsum("nkd,tld->ntkl", regions, words, how.dtype)
    valid = images.mask[:, None, :, None] & texts.mask[None, :, None, :]
    positive = jnp.where(valid, jax.nn.relu(cosines), 0.0)
    sides = {
        "objects": lambda sharpness: _attend(images, texts, positive.swapaxes(0, 1), sharpness, how).T,
        "words": lambda sharpness: _attend(texts, images, positive.swapaxes(2, 3), sharpness, how),
    }
    score = how.whole * einsum("nd,td->nt", images.vector, texts.vector, "float32")
    for side, sharpness in zip(SIDES, how.sharpness, strict=True):
        if side in how.attend:
            score = score + sides[side](sharpness)
    return score


def _attend(attending: _Items, other: _Items, positive: Array, sharpness: float, how: Interaction) -> Array:
    """Score term [t, n] of the side `attending` [n, K, c] when its elements attend to those of `other` [t, L, c].

    positive: [t, n, K, L], the cosines of their elements, 0 where negative or masked. The axis t of the other
    side comes first, so that the large product is one of contiguous matrices for each of its items.
    """
    d = attending.vector.shape[-1]
    logits = sharpness * l2norm(positive, axis=2)  # each element of `other` shares its attention among `attending`'s
    weights = masked_softmax(logits, other.mask[:, None, None, :])
    seen = einsum("tnkl,tlc->tnkc", weights, other.elements[..., : 2 * d], how.dtype)  # [U, B U]
    context = seen[..., :d]
    refined = jnp.broadcast_to(attending.elements[None, ..., :d], context.shape)
    if how.refine:
        refined = refined + jax.nn.sigmoid(attending.elements[None, ..., 2 * d :] + seen[..., d:]) * context
    # Merge the axes of the pairs: sums over arrays with an axis of length 1 are slow on a CPU.
    t, n = weights.shape[:2]
    context, refined = _pairs(context), _pairs(refined)
    mask = _pairs(jnp.broadcast_to(attending.mask, (t, *attending.mask.shape)))
    score = jnp.zeros((), jnp.float32)
    if how.local:
        aligned = jnp.where(mask, cosine(refined, context), 0.0)
        count = jnp.maximum(jnp.sum(mask, axis=1), 1)
        score = score + how.local / len(how.attend) * jnp.sum(aligned, axis=1) / count
    if how.cross:
        global_scores = _pairs(jnp.broadcast_to(other.vector[:, None, None, :], (t, n, 1, d)))
        shares = masked_softmax(how.cross_sharpness * cosine(refined, global_scores), mask)
        score = score + how.cross * cosine(jnp.sum(shares[..., None] * refined, axis=1), global_scores[:, 0])
    return score.reshape(t, n)


def _pairs(x: Array) -> Array:
    """Merges the first two axes: [t, n, ...] -> [t * n, ...]."""
    return x.reshape(-1, *x.shape[2:])
