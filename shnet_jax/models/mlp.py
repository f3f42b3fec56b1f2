"""BatchNorm over the rows of masked sets, and the two-layer perceptron built on it."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.models.layers import Dense
from shnet_jax.types import Array


class BatchNorm(nn.Module):
    """torch's BatchNorm over all axes but the last, with two choices that flax's lacks.

    The running variance takes the unbiased variance of the batch, the normalisation the biased one (torch); and rows
    can be left out of the statistics by a mask (the better choice for padded sets; the published code counts them).

    Attributes:
      include_padding: masked rows enter the statistics (published True).
      axis: name of the device axis over which the statistics are taken in training; None: each device its own.
      momentum: share of the new batch in the running statistics (torch's convention: 0.1).
      epsilon: added to the variance.
    """

    include_padding: bool = True
    axis: str | None = None
    momentum: float = 0.1
    epsilon: float = 1e-5

    def __call__(self, x: Array, mask: Array | None, *, train: bool) -> Array:
        """x [..., c] float32, mask [...] bool or None (all rows count) -> [..., c]."""
        mask = None if self.include_padding else mask
        mean, factor, bias = self.coefficients(x.shape[-1], lambda: self._moments(x, mask), train=train)
        # The mean is subtracted first: it may be far larger than the spread.
        return (x - mean) * factor + bias

    @nn.compact
    def coefficients(
        self, channels: int, moments: Callable[[], tuple[Array, Array, Array]], *, train: bool
    ) -> tuple[Array, Array, Array]:
        """(mean, factor, bias), each [channels]: the normalised x is (x - mean) * factor + bias.

        moments: gives mean [c], biased variance [c] and number of rows of this batch; asked for in training only.
        """
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        if train and not self.is_initializing():
            batch_mean, batch_var, count = moments()
            unbiased = batch_var * count / jnp.maximum(count - 1, 1)
            mean.value += self.momentum * (lax.stop_gradient(batch_mean) - mean.value)
            var.value += self.momentum * (lax.stop_gradient(unbiased) - var.value)
        else:
            batch_mean, batch_var = mean.value, var.value
        return batch_mean, scale * lax.rsqrt(batch_var + self.epsilon), bias

    def _moments(self, x: Array, mask: Array | None) -> tuple[Array, Array, Array]:
        def total(values: Array) -> Array:
            values = jnp.sum(values, axis=tuple(range(values.ndim - 1)))
            return values if self.axis is None else lax.psum(values, self.axis)

        weight = jnp.ones((*x.shape[:-1], 1)) if mask is None else mask[..., None].astype(x.dtype)
        count = jnp.maximum(total(weight), 1.0)
        mean = total(x * weight) / count
        return mean, total(jnp.square(x - mean) * weight) / count, count


class MLP(nn.Module):
    """Linear -> BatchNorm -> ReLU -> Linear, as in VSE-infinity and 3SHNet.

    The published module owns a second BatchNorm that is never applied; it is left out here.
    """

    hidden: int
    features: int
    dtype: str = "float32"
    include_padding: bool = True
    axis: str | None = None

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None, *, train: bool) -> Array:
        """x [..., i], mask [...] bool or None -> [..., features]."""
        x = Dense(self.hidden, dtype=self.dtype, name="in")(x)
        x = jax.nn.relu(BatchNorm(self.include_padding, self.axis, name="norm")(x, mask, train=train))
        return Dense(self.features, dtype=self.dtype, name="out")(x)
