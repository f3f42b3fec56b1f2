"""Bidirectional GRU over word embeddings: the text tower of the models before BERT (VSE-infinity, SCAN)."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from shnet_jax.models.layers import torch_uniform
from shnet_jax.ops.matmul import DType, matmul
from shnet_jax.types import Array

EMBEDDING = 300  # size of a word embedding, as published

_table = partial(jax.random.uniform, minval=-0.1, maxval=0.1)  # as published


class GRU(nn.Module):
    """One direction in torch's parametrisation: gates reset, update, new; the new gate's hidden bias inside
    the reset.

    Attributes:
      hidden: size of the state.
      reverse: whether the last valid token comes first.
      dtype: of the operands of the products.
    """

    hidden: int
    reverse: bool
    dtype: DType

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [t, L, i], mask [t, L] bool, valid steps first -> states [t, L, hidden], 0 where masked."""
        init = torch_uniform(self.hidden)
        w_input = self.param("input_kernel", init, (x.shape[-1], 3 * self.hidden))
        b_input = self.param("input_bias", init, (3 * self.hidden,))
        w_hidden = self.param("hidden_kernel", init, (self.hidden, 3 * self.hidden))
        b_hidden = self.param("hidden_bias", init, (3 * self.hidden,))

        def step(state: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            inputs, valid = at
            r_x, z_x, n_x = jnp.split(inputs, 3, axis=-1)
            r_h, z_h, n_h = jnp.split(matmul(state, w_hidden, self.dtype) + b_hidden, 3, axis=-1)
            update = jax.nn.sigmoid(z_x + z_h)
            new = jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h)
            # Zero through the padding, so that the backward direction starts at the last valid token.
            state = jnp.where(valid[:, None], (1.0 - update) * new + update * state, 0.0)
            return state, state

        # The inputs of all steps in one large product; only the recurrent one has to wait for its turn.
        inputs = matmul(x, w_input, self.dtype) + b_input
        start = jnp.zeros((x.shape[0], self.hidden), jnp.float32)
        _, states = lax.scan(step, start, (inputs.swapaxes(0, 1), mask.T), reverse=self.reverse)
        return states.swapaxes(0, 1)


class BiGRU(nn.Module):
    """A text tower (see `models.text`): the states of both directions, concatenated.

    Attributes:
      vocab_size: tokens of the vocabulary.
      width: size of the result; the state of one direction has half of it.
      dropout: probability that an element of a word embedding is dropped in training.
      dtype: of the operands of the products.
    """

    vocab_size: int
    width: int
    dropout: float = 0.1
    dtype: DType = "float32"

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, *, train: bool) -> Array:
        """tokens [t, L] int32, mask [t, L] bool -> [t, L, width] float32."""
        if self.width % 2:
            raise ValueError(f"width {self.width} of the bidirectional GRU is odd: each direction has half of it")
        words = self.param("words", _table, (self.vocab_size, EMBEDDING))
        # take, not words[tokens]: a token id outside the vocabulary gives NaN instead of the last row.
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.take(words, tokens, axis=0))
        forward = GRU(self.width // 2, False, self.dtype, name="forward")(x, mask)
        backward = GRU(self.width // 2, True, self.dtype, name="backward")(x, mask)
        return jnp.concatenate([forward, backward], axis=-1)


def build(text: ConfigDict) -> BiGRU:
    """The tower of `config.text`."""
    return BiGRU(vocab_size=text.vocab_size, width=text.width, dropout=text.dropout, dtype=text.dtype)
