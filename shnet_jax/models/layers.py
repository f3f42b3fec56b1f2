"""Layers that several models share: torch's initial weights, linear layer, GRU, self-attention.

A layer gives its result in the dtype of its input, float32 or bfloat16 (`config.model.activation_dtype`), and computes
in float32 what `rounded` encloses. So the entry of a tower alone chooses the dtype of what lies between its layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

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
T = TypeVar("T")

xavier_uniform: Initializer = nn.initializers.xavier_uniform()
"""Initializer U(±sqrt(6 / (fan_in + fan_out))) of the first layer of the published image encoders (VSE-infinity)."""


def in_float32(run: Callable[..., T], x: Array, *others: Array) -> T:
    """run(x, *others), and of a bfloat16 x, run with all of these arrays in float32.

    The backward pass then keeps the arrays as they are and repeats `run`, so that it keeps nothing in float32. run: a
    pure function, without modules; it may close over other arrays.
    """
    if x.dtype == jnp.float32:
        return run(x, *others)
    return cast(T, jax.checkpoint(lambda *arrays: run(*(a.astype(jnp.float32) for a in arrays)))(x, *others))


def rounded(run: Callable[..., Array], x: Array, *others: Array) -> Array:
    """run(x, *others) computed by `in_float32`, in the dtype of x."""
    return in_float32(run, x, *others).astype(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Flax's LayerNorm with the two-pass variance: the fast formula loses digits where the mean is large.

    Statistics are float32; the result has the dtype of x.
    """

    use_fast_variance: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:  # type: ignore[override]  # none here has masked channels
        """x [..., c] -> [..., c]."""

        def run(norm: nn.LayerNorm, x: Array) -> Array:
            return nn.LayerNorm.__call__(norm, x)

        return run(self, x) if x.dtype == jnp.float32 else nn.remat(run)(self, x).astype(x.dtype)


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
    """Linear layer x @ kernel + bias; parameters and sums are float32.

    Attributes:
      features: size of the result.
      dtype: of the operands of the product, "float32" or "bfloat16" (see `ops.matmul`).
      kernel_init: None: torch's default for kernel and bias; else this kernel and a zero bias.
      result: dtype of the result; None: that of x.
    """

    features: int
    dtype: DType = "float32"
    kernel_init: Initializer | None = None
    result: DType | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., i] -> [..., features]."""
        fan_in = x.shape[-1]
        default = torch_uniform(fan_in)
        kernel = self.param("kernel", self.kernel_init or default, (fan_in, self.features))
        out = matmul(x, kernel, self.dtype)
        bias_init = nn.initializers.zeros if self.kernel_init else default
        out = out + self.param("bias", bias_init, (self.features,))
        return out.astype(self.result or x.dtype)


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
    def __call__(self, x: Array, mask: Array, rows: Array | None = None) -> Array:
        """x [t, L, i], or [L, i] for all sequences; mask [t, L] bool, valid steps first -> states [t, L, hidden].

        rows [t, L] int: the row of x [v, i] that each step reads; the product with a row is taken once for all steps.
        States are 0 where masked. They pass from step to step in float32.
        """
        init = torch_uniform(self.hidden)
        w_input = self.param("input_kernel", init, (x.shape[-1], 3 * self.hidden))
        b_input = self.param("input_bias", init, (3 * self.hidden,))
        w_hidden = self.param("hidden_kernel", init, (self.hidden, 3 * self.hidden))
        b_hidden = self.param("hidden_bias", init, (3 * self.hidden,))

        def step(state: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            inputs, valid = at
            r_x, z_x, n_x = jnp.split(inputs.astype(jnp.float32), 3, axis=-1)
            r_h, z_h, n_h = jnp.split(matmul(state, w_hidden, self.dtype) + b_hidden, 3, axis=-1)
            update = jax.nn.sigmoid(z_x + z_h)
            new = jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h)
            # Zero through the padding, so that the backward direction starts at the last valid step.
            state = jnp.where(valid[:, None], (1.0 - update) * new + update * state, 0.0)
            return state, state

        # The inputs of all steps in one large product; only the recurrent one has to wait for its turn.
        inputs = matmul(x, w_input, self.dtype) + b_input
        if rows is not None:
            inputs = jnp.take(inputs, rows, axis=0)  # in float32, as is the sum of its gradients; NaN outside x
        inputs = jnp.moveaxis(inputs.astype(x.dtype), -2, 0)
        start = jnp.zeros((mask.shape[0], self.hidden), jnp.float32)
        # As in `rounded`: of a bfloat16 x, the gates of a step are computed again and not kept.
        run = step if x.dtype == jnp.float32 else jax.checkpoint(step, prevent_cse=False)
        _, states = lax.scan(run, start, (inputs, mask.T), reverse=self.reverse)
        return states.swapaxes(0, 1).astype(x.dtype)


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
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def attend(drop: nn.Dropout, query: Array, key: Array, value: Array) -> Array:
            logits = einsum("tqhd,tkhd->thqk", query / math.sqrt(query.shape[-1]), key, self.dtype)
            allowed = mask[:, None, None, :]
            if self.causal:
                allowed = allowed & jnp.tri(x.shape[1], dtype=bool)
            return einsum("thqk,tkhd->tqhd", drop(masked_softmax(logits, allowed)), value, self.dtype)

        # As in `rounded`: of a bfloat16 x, the float32 weights are computed again and not kept.
        attend = attend if x.dtype == jnp.float32 else nn.remat(attend)
        mixed = attend(drop, query, key, value).astype(x.dtype)
        return dense(name="out")(mixed.reshape(x.shape))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),  # by erf
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),  # of SigLIP
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # of the first CLIP models
}


def feed_forward(x: Array, hidden: int, dtype: DType, kernel_init: Initializer, activation: str = "gelu") -> Array:
    """Two-layer perceptron on x [..., width], with layers "in" and "out" of the calling module; zero biases."""
    inner = rounded(ACTIVATIONS[activation], Dense(hidden, dtype, kernel_init, name="in")(x))
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
