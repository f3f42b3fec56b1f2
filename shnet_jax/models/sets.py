"""Set head: the token features of an item become a few embeddings around its global vector.

Source: docs/models.md, a reconstruction ("ESA-style") after the abstract of Zhao et al. (Image and Vision
Computing 152, 2024) with the slot attention of Kim et al. (CVPR 2023). Nothing here is drawn at random: an item has one
set.
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from shnet_jax.models.layers import Dense, FeedForward, LayerNorm, split_heads, xavier_uniform
from shnet_jax.ops.matmul import DType, einsum
from shnet_jax.ops.norms import l2norm, masked_softmax
from shnet_jax.types import Array

MODES = ("slot", "merge")
EPSILON = 1e-5  # of every LayerNorm
TINY = 1e-7  # beside the sum that attention is divided by (DivE)


class SlotAttention(nn.Module):
    """One round of attention in which the slots compete for the tokens (Locatello et al., 2020, as in DivE).

    Attributes:
      heads: attention heads; divide the width of the slots.
      dtype: of the operands of the large products.
    """

    heads: int
    dtype: DType = "float32"

    @nn.compact
    def __call__(self, slots: Array, tokens: Array, mask: Array) -> Array:
        """slots [n, M, d], tokens [n, N, d], mask [n, N] -> slots [n, M, d]."""
        width = slots.shape[-1]
        dense = partial(Dense, width, self.dtype, xavier_uniform)
        query = split_heads(dense(name="query")(LayerNorm(epsilon=EPSILON, name="slot_norm")(slots)), self.heads)
        key, value = (split_heads(dense(name=name)(tokens), self.heads) for name in ("key", "value"))
        logits = einsum("nmhd,nkhd->nhmk", query / math.sqrt(query.shape[-1]), key, self.dtype)
        weights = jnp.where(mask[:, None, None, :], jax.nn.softmax(logits, axis=2), 0.0)  # over the slots
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + TINY)
        self.sow("intermediates", "attention", weights)
        mixed = einsum("nhmk,nkhd->nmhd", weights, value, self.dtype).reshape(slots.shape)
        slots = slots + dense(name="out")(mixed)
        hidden = LayerNorm(epsilon=EPSILON, name="mlp_norm")(slots)
        slots = slots + FeedForward(4 * width, self.dtype, xavier_uniform, name="mlp")(hidden)
        return LayerNorm(epsilon=EPSILON, name="norm")(slots)


class Merge(nn.Module):
    """Tokens merged by soft assignment: weighted by how the global vector attends to them, averaged per cluster.

    Attributes: those of `SetHead`.
    """

    size: int
    dtype: DType = "float32"

    @nn.compact
    def __call__(self, vector: Array, tokens: Array, mask: Array) -> Array:
        """vector [n, d], tokens [n, N, d], mask [n, N] -> clusters [n, size, d]; of no valid token: 0."""
        width = vector.shape[-1]
        query = Dense(width, self.dtype, xavier_uniform, name="query")(vector)
        key = Dense(width, self.dtype, xavier_uniform, name="key")(tokens)
        logits = einsum("nd,nkd->nk", query / math.sqrt(width), key, self.dtype)
        importance = masked_softmax(logits, mask)
        shares = Dense(self.size, self.dtype, xavier_uniform, result="float32", name="cluster")(tokens)
        cluster = jax.nn.softmax(shares, axis=-1)
        weights = jnp.where(mask, importance, 0.0)[..., None] * cluster
        weights = weights / (jnp.sum(weights, axis=1, keepdims=True) + TINY)
        self.sow("intermediates", "attention", weights.swapaxes(1, 2)[:, None])
        return einsum("nkm,nkd->nmd", weights, tokens, self.dtype)


class SetHead(nn.Module):
    """Elements z_m = l2norm(LN(global) + LN(part_m)): a set refines the global vector and never replaces it.

    Attributes:
      size: elements M of a set (DivE 4).
      mode: how tokens become parts: "slot" (rounds of `SlotAttention` that share weights) | "merge" (`Merge`).
      depth: rounds of "slot" (DivE 4). heads: of "slot" (DivE 4).
      dtype: of the operands of the large products.
    """

    size: int
    mode: str = "slot"
    depth: int = 4
    heads: int = 4
    dtype: DType = "float32"

    @nn.compact
    def __call__(self, vector: Array, tokens: Array, mask: Array) -> Array:
        """vector [n, d] global vectors, tokens [n, N, d], mask [n, N] bool -> unit vectors [n, size, d].

        Raises ValueError for an unknown mode, and for a size or depth below 1.
        """
        if self.mode not in MODES:
            raise ValueError(f"config.model.esa.mode is {self.mode!r}; choose from {', '.join(MODES)}")
        if self.size < 1 or self.depth < 1:
            raise ValueError(f"a set head needs at least 1 element and 1 round, not {self.size} and {self.depth}")
        tokens = LayerNorm(epsilon=EPSILON, name="token_norm")(tokens)
        if self.mode == "merge":
            parts = Merge(self.size, self.dtype, name="merge")(vector, tokens, mask)
        else:
            first = self.param("slots", nn.initializers.normal(1.0), (self.size, tokens.shape[-1]))
            parts = jnp.broadcast_to(first, (tokens.shape[0], *first.shape))
            attention = SlotAttention(self.heads, self.dtype, name="attention")
            for _ in range(self.depth):
                parts = attention(parts, tokens, mask)
        parts = LayerNorm(epsilon=EPSILON, name="part_norm")(parts)
        self.sow("intermediates", "parts", parts)
        return l2norm(LayerNorm(epsilon=EPSILON, name="global_norm")(vector)[:, None, :] + parts)
