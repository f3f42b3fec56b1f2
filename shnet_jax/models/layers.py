"""The linear layer of every model, and torch's initial weights."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from shnet_jax.ops.matmul import DType, matmul
from shnet_jax.types import Array

Initializer = jax.nn.initializers.Initializer

xavier_uniform: Initializer = nn.initializers.xavier_uniform()
"""U(±sqrt(6 / (fan_in + fan_out))), as the published image encoders initialise their first layer (VSE-infinity)."""


def torch_uniform(fan_in: int) -> Initializer:
    """U(±1/sqrt(fan_in)): torch's default for kernels and biases of `nn.Linear`, convolutions and GRUs.

    For a GRU torch takes the hidden size as fan_in, for all of its arrays.
    """
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: Array, shape: tuple[int, ...], dtype: DType = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nn.Module):
    """Linear layer x @ kernel + bias; parameters and result are float32.

    Attributes:
      features: size of the result.
      dtype: of the operands of the product, "float32" or "bfloat16" (see `ops.matmul`).
      kernel_init: None: torch's default for kernel and bias; else this kernel and a zero bias.
      use_bias: whether there is a bias.
    """

    features: int
    dtype: DType = "float32"
    kernel_init: Initializer | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., i] -> [..., features] float32."""
        fan_in = x.shape[-1]
        default = torch_uniform(fan_in)
        out = matmul(
            x, self.param("kernel", self.kernel_init or default, (fan_in, self.features)), self.dtype
        )
        if not self.use_bias:
            return out
        bias_init = nn.initializers.zeros if self.kernel_init else default
        return out + self.param("bias", bias_init, (self.features,))
