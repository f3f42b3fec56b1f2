"""SigLIP's and SigLIP 2's text tower (Zhai et al., 2023; Tschannen et al., 2025): a transformer up to the joint space.

It differs from CLIP's: every token attends to every other one, a caption is filled up to a fixed length with a token
that is attended to as all others are (`data/siglip_tokens.py`), and the projection has a bias. The scale and bias of
SigLIP's sigmoid, one number each, change no order of scores; they belong to the loss and are not part of the tower.
Weights of a local Hugging Face folder: `interop/siglip_weights.py`.
"""

from __future__ import annotations

import flax.linen as nn
from ml_collections import ConfigDict

from shnet_jax.models.clip import check_activation, clip_layer
from shnet_jax.models.layers import Dense, LayerNorm
from shnet_jax.models.transformer import Layer, TextTower, normal
from shnet_jax.types import Array

EPSILON = 1e-6  # of every LayerNorm


class Text(TextTower, kw_only=True):
    """A text tower (see `models.text`) whose result is `projection` wide. Attributes are those of `config.text`.

    The last position, whichever token fills it, is SigLIP's global vector of a caption.
    """

    width: int = 768
    heads: int = 12
    mlp_dim: int = 3072
    max_positions: int = 64
    projection: int = 768
    activation: str = "gelu_pytorch_tanh"

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, *, train: bool) -> Array:
        """tokens [t, L] int32, mask [t, L] bool -> projected states [t, L, projection] float32."""
        x = self.run_layers(self.embed(tokens).astype(self.activation_dtype), mask, train=train)
        x = LayerNorm(epsilon=EPSILON, name="norm")(x)
        return Dense(self.projection, self.dtype, normal, result="float32", name="projection_head")(x)

    @nn.nowrap
    def make_layer(self, name: str | None = None) -> Layer:
        """See `Tower.make_layer`."""
        return clip_layer(self, causal=False, name=name, epsilon=EPSILON)


def build(text: ConfigDict) -> Text:
    """Builds the text tower of `config.text`."""
    check_activation(text.activation, "text")
    return Text.from_config(text)
