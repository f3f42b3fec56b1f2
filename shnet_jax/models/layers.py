"""Layers that several models share: torch's initial weights, linear layer, GRU, self-attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from shnet_jax.ops.matmul import DType, einsum, matmul
from shnet_jax.ops.norms import masked_softmax
from shnet_jax.types import Array

Initializer = nn.initializers.Initializer
M = TypeVar("M", bound=nn.Module)

xavier_uniform: Initializer = nn.initializers.xavier_uniform()
"""Initializer U(±sqrt(6 / (fan_in + fan_out))) of the first layer of the published image encoders (VSE-infinity)."""

LayerNorm = partial(nn.LayerNorm, use_fast_variance=False)
"""Flax's LayerNorm with the two-pass variance: the fast formula loses digits where the mean is large."""


def from_config(module: type[M], section: ConfigDict, **others: Any) -> M:
    """Builds a module from the fields of a section of the configuration that are its attributes, and from others."""
    names = {field.name for field in dataclasses.fields(module)} - {"parent", "name"}
    return module(**{name: section[name] for name in names if name in section} | others)


def torch_uniform(fan_in: int) -> Initializer:
    """Initializer U(±1/sqrt(fan_in)), torch's default for kernels and biases of `nn.Linear`, convolutions and GRUs.

    For a GRU torch takes the hidden size as fan_in, for all of its arrays.
    """
    bound = 1.0 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32, out_sharding=None) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

    return init


class Dense(nn.Module):
    """Linear layer x @ kernel + bias; parameters and result are float32.

    Attributes:
      features: size of the result.
      dtype: of the operands of the product, "float32" or "bfloat16" (see `ops.matmul`).
      kernel_init: None: torch's default for kernel and bias; else this kernel and a zero bias.
    """

    features: int
    dtype: DType = "float32"
    kernel_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., i] -> [..., features] float32."""
        fan_in = x.shape[-1]
        default = torch_uniform(fan_in)
        kernel = self.param("kernel", self.kernel_init or default, (fan_in, self.features))
        out = matmul(x, kernel, self.dtype)
        bias_init = nn.initializers.zeros if self.kernel_init else default
        return out + self.param("bias", bias_init, (self.features,))


class GRU(nn.Module):
    """One direction in torch's parametrisation: gates reset, update, new; the new gate's hidden bias inside the reset.

    The two biases of the reset and update gates could be one, but an optimiser moves two parameters twice as far as
    one; keeping both makes training steps equal the published ones.

    Attributes:
      hidden: size of the state.
      reverse: whether the last valid step comes first.
      dtype: of the operands of the products.
    """

    hidden: int
    reverse: bool
    dtype: DType = "float32"

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [t, L, i], or [L, i] for all sequences; mask [t, L] bool, valid steps first -> states [t, L, hidden].

        States are 0 where masked.
        """
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
            # Zero through the padding, so that the backward direction starts at the last valid step.
            state = jnp.where(valid[:, None], (1.0 - update) * new + update * state, 0.0)
            return state, state

        # The inputs of all steps in one large product; only the recurrent one has to wait for its turn.
        inputs = jnp.moveaxis(matmul(x, w_input, self.dtype) + b_input, -2, 0)
        start = jnp.zeros((mask.shape[0], self.hidden), jnp.float32)
        _, states = lax.scan(step, start, (inputs, mask.T), reverse=self.reverse)
        return states.swapaxes(0, 1)


def split_heads(x: Array, heads: int) -> Array:
    """Reshapes [..., width] to [..., heads, size]. Raises ValueError for heads that do not divide the width."""
    if x.shape[-1] % heads:
        raise ValueError(f"width {x.shape[-1]} does not divide into {heads} attention heads")
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the valid members of each sequence (Vaswani et al., 2017).

    Attributes:
      heads: number of heads; divides the width of the input.
      dropout: probability that an attention weight is dropped in training.
      dtype: of the operands of the products.
      kernel_init: of the four projections, with zero biases.
      causal: a member attends to itself and those before it only.
    """

    heads: int
    dropout: float
    dtype: DType
    kernel_init: Initializer
    causal: bool = False

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """x [t, L, width], mask [t, L] bool -> [t, L, width]; masked members are attended to by none."""
        dense = partial(Dense, x.shape[-1], self.dtype, self.kernel_init)
        query, key, value = (split_heads(dense(name=name)(x), self.heads) for name in ("query", "key", "value"))
        logits = einsum("tqhd,tkhd->thqk", query / math.sqrt(query.shape[-1]), key, self.dtype)
        allowed = mask[:, None, None, :]
        if self.causal:
            allowed = allowed & jnp.tri(x.shape[1], dtype=bool)
        weights = nn.Dropout(self.dropout, deterministic=not train)(masked_softmax(logits, allowed))
        mixed = einsum("thqk,tkhd->tqhd", weights, value, self.dtype)
        return dense(name="out")(mixed.reshape(x.shape))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),  # by erf
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),  # of SigLIP
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # of the first CLIP models
}


def feed_forward(x: Array, hidden: int, dtype: DType, kernel_init: Initializer, activation: str = "gelu") -> Array:
    """Two-layer perceptron on x [..., width], with layers "in" and "out" of the calling module; zero biases."""
    inner = ACTIVATIONS[activation](Dense(hidden, dtype, kernel_init, name="in")(x))
    return Dense(x.shape[-1], dtype, kernel_init, name="out")(inner)


class FeedForward(nn.Module):
    """`feed_forward` as a module."""

    hidden: int
    dtype: DType
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., width] -> [..., width]."""
        return feed_forward(x, self.hidden, self.dtype, self.kernel_init)
