"""Bidirectional GRU over word embeddings: the text tower of the models before BERT (VSE-infinity, SCAN)."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.layers import GRU
from shnet_jax.ops.matmul import DType
from shnet_jax.types import Array

EMBEDDING = 300  # size of a word embedding, as published

_table = partial(jax.random.uniform, minval=-0.1, maxval=0.1)  # as published


class BiGRU(nn.Module):
    """A text tower (see `models.text`): the states of both directions, concatenated.

    Attributes:
      vocab_size: tokens of the vocabulary.
      width: size of the result; the state of one direction has half of it.
      dropout: probability that an element of a word embedding is dropped in training.
      dtype: of the operands of the products.
      activation_dtype: of word embeddings, of the gates' inputs and of the result.
    """

    vocab_size: int
    width: int
    dropout: float = 0.1
    dtype: DType = "float32"
    activation_dtype: DType = "float32"

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, *, train: bool) -> Array:
        """tokens [t, L] int32, mask [t, L] bool -> [t, L, width]."""
        if self.width % 2:
            raise ValueError(f"width {self.width} of the bidirectional GRU is odd: each direction has half of it")
        words = self.param("words", _table, (self.vocab_size, EMBEDDING))
        # More tokens than words: what the gates read of a word is computed once. An export leaves t open.
        repeated = isinstance(tokens.size, int) and tokens.size > self.vocab_size
        rows = tokens if repeated and not (train and self.dropout > 0) else None
        # take, not words[tokens]: a token id outside the vocabulary gives NaN instead of the last row.
        x = words if rows is not None else jnp.take(words, tokens, axis=0)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.astype(self.activation_dtype))
        forward = GRU(self.width // 2, False, self.dtype, name="forward")(x, mask, rows)
        backward = GRU(self.width // 2, True, self.dtype, name="backward")(x, mask, rows)
        return jnp.concatenate([forward, backward], axis=-1)


def build(text: ConfigDict) -> BiGRU:
    """Builds the text tower of `config.text`."""
    return BiGRU(vocab_size=text.vocab_size, width=text.width, dropout=text.dropout, dtype=text.dtype)
