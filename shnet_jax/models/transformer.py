"""A small pre-norm transformer with learned positions: the text tower for training from scratch."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.layers import FeedForward, LayerNorm, SelfAttention, run_layer, xavier_uniform
from shnet_jax.ops.matmul import DType
from shnet_jax.types import Array

EPSILON = 1e-5  # of every LayerNorm

_table = nn.initializers.normal(0.02)


class Layer(nn.Module):
    """One pre-norm layer: x + attention(LayerNorm(x)), then x + mlp(LayerNorm(x)) (Xiong et al., 2020).

    Unlike BERT's post-norm layers these train from random weights without a warm-up of the learning rate.
    """

    heads: int
    mlp_dim: int
    dropout: float
    dtype: DType

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """x [t, L, width], mask [t, L] bool -> [t, L, width]."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = SelfAttention(self.heads, self.dropout, self.dtype, xavier_uniform, name="attention")
        mlp = FeedForward(self.mlp_dim, self.dtype, xavier_uniform, name="mlp")
        normed = LayerNorm(epsilon=EPSILON, name="attention_norm")(x)
        x = x + drop(attention(normed, mask, train=train))
        return x + drop(mlp(LayerNorm(epsilon=EPSILON, name="mlp_norm")(x)))


class Transformer(nn.Module):
    """A text tower (see `models.text`). Attributes are those of `config.text`."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    mlp_dim: int
    max_positions: int
    dropout: float = 0.1
    dtype: DType = "float32"
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, *, train: bool) -> Array:
        """tokens [t, L] int32, mask [t, L] bool -> [t, L, width] float32."""
        length = tokens.shape[1]
        if length > self.max_positions:
            raise ValueError(f"captions of {length} tokens, but the transformer has {self.max_positions} positions")
        words = self.param("words", _table, (self.vocab_size, self.width))
        positions = self.param("positions", _table, (self.max_positions, self.width))
        # take, not words[tokens]: a token id outside the vocabulary gives NaN instead of the last row.
        x = jnp.take(words, tokens, axis=0) + positions[:length]
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = self.run_layers(x, mask, train=train)
        return LayerNorm(epsilon=EPSILON, name="norm")(x)

    @nn.nowrap
    def make_layer(self, name: str | None = None) -> Layer:
        """One of the layers; outside of this module's own methods it is unbound."""
        return Layer(self.heads, self.mlp_dim, self.dropout, self.dtype, name=name)

    def run_layers(self, x: Array, mask: Array, *, train: bool) -> Array:
        """All layers on x [t, L, width], mask [t, L]; apart from `__call__` so that a pipeline can take its place."""
        for i in range(self.layers):
            x = run_layer(self.make_layer(f"layer_{i}"), x, mask, train=train, remat=self.remat and train)
        return x


def build(text: ConfigDict) -> Transformer:
    """Builds the text tower of `config.text`."""
    return Transformer(
        vocab_size=text.vocab_size,
        layers=text.layers,
        width=text.width,
        heads=text.heads,
        mlp_dim=text.mlp_dim,
        max_positions=text.max_positions,
        dropout=text.dropout,
        dtype=text.dtype,
        remat=text.remat,
    )
