"""Text encoder: any tower over the tokens, a linear head and learned pooling.

A tower is a `flax.linen.Module` called as `tower(tokens, mask, train=train)`: tokens [t, L] int32 and mask
[t, L] bool (valid tokens first) -> features [t, L, width] float32. Features of valid tokens must not depend
on L, what masked features hold is free. Its file has `build(text: ConfigDict) -> nn.Module`, given
`config.text`. A tower of equal layers that has `layers`, `make_layer` and `run_layers`, as BERT has, can
also be spread over devices layer by layer (`evaluation/pipelined.py`).
"""

from __future__ import annotations

import importlib

import flax.linen as nn
from ml_collections import ConfigDict

from shnet_jax.models.layers import Dense
from shnet_jax.models.pooling import GPO
from shnet_jax.ops.matmul import DTYPES, DType
from shnet_jax.ops.norms import l2norm
from shnet_jax.types import Array, Embedding

TOWERS = ("bert", "bigru", "transformer", "clip")
_FREEZABLE = ("shnet_jax.models.bert", "shnet_jax.models.clip")


def build_tower(config: ConfigDict) -> nn.Module:
    """The text tower of a configuration; `text.tower` may also be the dotted path of a module of yours.

    Raises ValueError for an unknown tower or dtype, when `config.text.vocab_size` is not known yet, and for
    `config.text.frozen_layers` with another tower than BERT or CLIP.
    """
    text = config.text
    if text.tower not in TOWERS and "." not in text.tower:
        raise ValueError(f"config.text.tower is {text.tower!r}; choose from {', '.join(TOWERS)}")
    if text.dtype not in DTYPES:
        raise ValueError(f"config.text.dtype is {text.dtype!r}; choose from {', '.join(DTYPES)}")
    if text.vocab_size < 1:
        raise ValueError(
            f"config.text.vocab_size is {text.vocab_size}: set it to the number of tokens of the vocabulary "
            "(a run takes it from its tokenizer)"
        )
    path = text.tower if "." in text.tower else f"shnet_jax.models.{text.tower}"
    if text.frozen_layers > 0 and path not in _FREEZABLE:
        raise ValueError(
            f"config.text.frozen_layers is {text.frozen_layers} and config.text.tower {text.tower!r}: "
            "only layers of bert and clip can be frozen, set it to 0"
        )
    return importlib.import_module(path).build(text)


def build_encoder(config: ConfigDict) -> TextEncoder:
    """`TextEncoder` on the tower of a configuration. Raises ValueError as `build_tower`."""
    return TextEncoder(tower=build_tower(config), dim=config.model.dim, dtype=config.text.dtype)


class TextEncoder(nn.Module):
    """Tower -> linear -> GPO over all valid tokens, [CLS] and [SEP] included -> unit length (3SHNet).

    Attributes:
      tower: the text tower.
      dim: size of the joint embedding.
      dtype: of the operands of the head's product.
    """

    tower: nn.Module
    dim: int
    dtype: DType = "float32"

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, *, train: bool, with_elements: bool = False) -> Embedding:
        """tokens [t, L] int32, mask [t, L] bool -> unit vectors [t, dim].

        with_elements: also give the tokens' features behind the head, [t, L, dim] (not normalised), and the
        mask.
        """
        features = self.tower(tokens, mask, train=train)
        words = Dense(self.dim, self.dtype, name="head")(features)
        pooled = GPO(name="pool")(words, mask)
        for name, value in (("hidden", features), ("words", words), ("pooled", pooled)):
            self.sow("intermediates", name, value)
        vector = l2norm(pooled)
        return Embedding(vector, words, mask) if with_elements else Embedding(vector)
