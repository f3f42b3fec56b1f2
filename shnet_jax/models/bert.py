"""BERT's encoder (Devlin et al., 2019) without its pooler; pretrained weights: `interop/bert_weights.py`."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.layers import FeedForward, LayerNorm, SelfAttention, run_layer
from shnet_jax.ops.matmul import DType
from shnet_jax.types import Array

EPSILON = 1e-12  # of every LayerNorm
TYPES = 2  # rows of the token type table; retrieval uses the first only

_init = nn.initializers.normal(0.02)


class Layer(nn.Module):
    """One post-norm layer: LayerNorm(x + attention(x)), then LayerNorm(x + mlp(x))."""

    heads: int
    mlp_dim: int
    dropout: float
    dtype: DType

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """x [t, L, width], mask [t, L] bool -> [t, L, width]."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attended = SelfAttention(self.heads, self.dropout, self.dtype, _init, name="attention")(x, mask, train=train)
        x = LayerNorm(epsilon=EPSILON, name="attention_norm")(x + drop(attended))
        transformed = FeedForward(self.mlp_dim, self.dtype, _init, name="mlp")(x)
        return LayerNorm(epsilon=EPSILON, name="mlp_norm")(x + drop(transformed))


class BERT(nn.Module):
    """A text tower (see `models.text`). Attributes are those of `config.text`."""

    vocab_size: int
    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp_dim: int = 3072
    max_positions: int = 512
    dropout: float = 0.1
    frozen_layers: int = 0
    dtype: DType = "float32"
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, *, train: bool) -> Array:
        """tokens [t, L] int32, mask [t, L] bool -> last hidden states [t, L, width] float32."""
        length = tokens.shape[1]
        if length > self.max_positions:
            raise ValueError(f"captions of {length} tokens, but BERT has {self.max_positions} positions")
        words = self.param("words", _init, (self.vocab_size, self.width))
        positions = self.param("positions", _init, (self.max_positions, self.width))
        types = self.param("types", _init, (TYPES, self.width))
        # take, not words[tokens]: a token id outside the vocabulary gives NaN instead of the last row.
        x = jnp.take(words, tokens, axis=0) + positions[:length] + types[0]
        x = LayerNorm(epsilon=EPSILON, name="norm")(x)
        self.sow("intermediates", "embedded", x)
        x = nn.Dropout(self.dropout, deterministic=not train or self.frozen_layers > 0)(x)
        return self.run_layers(x, mask, train=train)

    @nn.nowrap
    def make_layer(self, name: str | None = None) -> Layer:
        """One of the layers; outside of this module's own methods it is unbound."""
        return Layer(self.heads, self.mlp_dim, self.dropout, self.dtype, name=name)

    def run_layers(self, x: Array, mask: Array, *, train: bool) -> Array:
        """All layers on x [t, L, width], mask [t, L]; apart from `__call__` so that a pipeline can take its place."""
        for i in range(self.layers):
            learns = train and i >= self.frozen_layers
            x = run_layer(self.make_layer(f"layer_{i}"), x, mask, train=learns, remat=self.remat and learns)
            if i + 1 == self.frozen_layers:
                x = jax.lax.stop_gradient(x)
        return x


def build(text: ConfigDict) -> BERT:
    """Builds the text tower of `config.text`."""
    if not 0 <= text.frozen_layers <= text.layers:
        raise ValueError(f"config.text.frozen_layers is {text.frozen_layers}, the tower has {text.layers} layers")
    return BERT(
        vocab_size=text.vocab_size,
        layers=text.layers,
        width=text.width,
        heads=text.heads,
        mlp_dim=text.mlp_dim,
        max_positions=text.max_positions,
        dropout=text.dropout,
        frozen_layers=text.frozen_layers,
        dtype=text.dtype,
        remat=text.remat,
    )
