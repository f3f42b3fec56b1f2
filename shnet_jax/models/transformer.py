"""Transformer towers: what BERT, CLIP and the small text tower here have in common, and that tower itself."""

from __future__ import annotations

from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.layers import (
    FeedForward,
    Initializer,
    LayerNorm,
    SelfAttention,
    feed_forward,
    from_config,
    xavier_uniform,
)
from shnet_jax.ops.matmul import DType
from shnet_jax.types import Array

EPSILON = 1e-5  # of every LayerNorm of `Transformer`

normal: Initializer = nn.initializers.normal(0.02)
"""Initializer of BERT's and CLIP's parameters, and of every table of embeddings."""


class Layer(nn.Module):
    """Self-attention and a perceptron, each a residual branch with a LayerNorm.

    Attributes:
      pre_norm: x + branch(LayerNorm(x)), which trains from random weights without a warm-up of the learning rate
        (Xiong et al., 2020); else LayerNorm(x + branch(x)) as in BERT.
      epsilon: of the LayerNorms.
      causal: a member attends to itself and those before it only.
      activation: of the perceptron, one of `layers.ACTIVATIONS`.
      flat_mlp: the perceptron's parameters lie beside the others, as "in" and "out", not in "mlp" (CLIP).
    """

    heads: int
    mlp_dim: int
    dropout: float
    dtype: DType
    kernel_init: Initializer
    epsilon: float
    pre_norm: bool = True
    causal: bool = False
    activation: str = "gelu"
    flat_mlp: bool = False

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """x [n, L, width], mask [n, L] bool -> [n, L, width]."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = SelfAttention(
            self.heads, self.dropout, self.dtype, self.kernel_init, causal=self.causal, name="attention"
        )
        attention_norm = LayerNorm(epsilon=self.epsilon, name="attention_norm")
        mlp_norm = LayerNorm(epsilon=self.epsilon, name="mlp_norm")
        if self.pre_norm:
            x = x + drop(attention(attention_norm(x), mask, train=train))
            return x + drop(self._mlp(mlp_norm(x)))
        x = attention_norm(x + drop(attention(x, mask, train=train)))
        return mlp_norm(x + drop(self._mlp(x)))

    def _mlp(self, x: Array) -> Array:
        if self.flat_mlp:
            return feed_forward(x, self.mlp_dim, self.dtype, self.kernel_init, self.activation)
        return FeedForward(self.mlp_dim, self.dtype, self.kernel_init, name="mlp")(x)


class Tower(nn.Module, kw_only=True):
    """Base of the towers of equal layers, whose parameters are layer_0, layer_1, ...

    Attributes: those of `config.text` or of the weights' config.json. remat: activations of the layers are recomputed
    in the backward pass. activation_dtype: of what lies between the layers, `config.model.activation_dtype`.
    """

    layers: int = 12
    width: int
    heads: int
    mlp_dim: int
    frozen_layers: int = 0
    dtype: DType = "float32"
    remat: bool = False
    activation_dtype: DType = "float32"

    @classmethod
    def from_config(cls, section: ConfigDict, **others: Any) -> Self:
        """Builds the tower of a section of the configuration; others: attributes that the section lacks."""
        tower = from_config(cls, section, **others)
        if not 0 <= tower.frozen_layers <= tower.layers:
            raise ValueError(f"config.text.frozen_layers is {tower.frozen_layers}, the tower has {tower.layers} layers")
        return tower

    @nn.nowrap
    def make_layer(self, name: str | None = None) -> Layer:
        """One of the layers; outside of this module's own methods it is unbound."""
        raise NotImplementedError

    def run_layers(self, x: Array, mask: Array, *, train: bool) -> Array:
        """All layers on x [n, L, width], mask [n, L]; apart from `__call__` so that a pipeline can take its place."""
        for i in range(self.layers):
            learns = train and i >= self.frozen_layers

            def run(layer: Layer, x: Array, mask: Array, learns: bool = learns) -> Array:
                return layer(x, mask, train=learns)

            x = (nn.remat(run) if self.remat and learns else run)(self.make_layer(f"layer_{i}"), x, mask)
            if i + 1 == self.frozen_layers:
                x = jax.lax.stop_gradient(x)
        return x


class TextTower(Tower, kw_only=True):
    """Base of the transformer towers over tokens (see `models.text`)."""

    vocab_size: int
    max_positions: int

    def embed(self, tokens: Array) -> Array:
        """Sum of the embeddings of tokens [t, L] int32 and of their positions -> [t, L, width]."""
        length = tokens.shape[1]
        if length > self.max_positions:
            raise ValueError(f"captions of {length} tokens, but the text tower has {self.max_positions} positions")
        words = self.param("words", normal, (self.vocab_size, self.width))
        positions = self.param("positions", normal, (self.max_positions, self.width))
        # take, not words[tokens]: a token id outside the vocabulary gives NaN instead of the last row.
        return jnp.take(words, tokens, axis=0) + positions[:length]


class Transformer(TextTower, kw_only=True):
    """A small pre-norm transformer with learned positions: the text tower for training from scratch."""

    dropout: float = 0.1

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, *, train: bool) -> Array:
        """tokens [t, L] int32, mask [t, L] bool -> [t, L, width]."""
        x = self.embed(tokens).astype(self.activation_dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return LayerNorm(epsilon=EPSILON, name="norm")(self.run_layers(x, mask, train=train))

    @nn.nowrap
    def make_layer(self, name: str | None = None) -> Layer:
        """See `Tower.make_layer`."""
        return Layer(self.heads, self.mlp_dim, self.dropout, self.dtype, xavier_uniform, EPSILON, name=name)


def build(text: ConfigDict) -> Transformer:
    """Builds the text tower of `config.text`."""
    return Transformer.from_config(text)
