"""BERT's encoder (Devlin et al., 2019) without its pooler; pretrained weights: `interop/bert_weights.py`."""

from __future__ import annotations

import flax.linen as nn
from ml_collections import ConfigDict

from shnet_jax.models.layers import LayerNorm
from shnet_jax.models.transformer import Layer, TextTower, normal
from shnet_jax.types import Array

EPSILON = 1e-12  # of every LayerNorm
TYPES = 2  # rows of the token type table; retrieval uses the first only


class BERT(TextTower, kw_only=True):
    """A text tower of post-norm layers (see `models.text`). Attributes are those of `config.text`."""

    width: int = 768
    heads: int = 12
    mlp_dim: int = 3072
    max_positions: int = 512
    dropout: float = 0.1

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, *, train: bool) -> Array:
        """tokens [t, L] int32, mask [t, L] bool -> last hidden states [t, L, width]."""
        x = self.embed(tokens) + self.param("types", normal, (TYPES, self.width))[0]
        x = x.astype(self.activation_dtype)
        x = LayerNorm(epsilon=EPSILON, name="norm")(x)
        self.sow("intermediates", "embedded", x)
        x = nn.Dropout(self.dropout, deterministic=not train or self.frozen_layers > 0)(x)
        return self.run_layers(x, mask, train=train)

    @nn.nowrap
    def make_layer(self, name: str | None = None) -> Layer:
        """See `Tower.make_layer`."""
        return Layer(self.heads, self.mlp_dim, self.dropout, self.dtype, normal, EPSILON, pre_norm=False, name=name)


def build(text: ConfigDict) -> BERT:
    """Builds the text tower of `config.text`."""
    return BERT.from_config(text)
