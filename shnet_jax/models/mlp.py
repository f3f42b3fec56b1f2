"""BatchNorm over the rows of masked sets, and the two-layer perceptron built on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from shnet_jax.models.layers import Dense, in_float32, rounded
from shnet_jax.types import Array

MOMENTUM = 0.1
"""Share of a new batch in the running statistics (torch's convention and default)."""


@struct.dataclass
class Moments:
    """Statistics of a batch: mean [c], biased variance [c] and number of rows []."""

    mean: Array
    var: Array
    count: Array

    def into(self, mean: Array, var: Array) -> tuple[Array, Array]:
        """Running mean and variance after this batch; the running variance takes the unbiased one (torch)."""
        batch_mean, batch_var = lax.stop_gradient((self.mean, self.var))
        unbiased = batch_var * self.count / jnp.maximum(self.count - 1, 1)
        return mean + MOMENTUM * (batch_mean - mean), var + MOMENTUM * (unbiased - var)


class BatchNorm(nn.Module):
    """torch's BatchNorm over all axes but the last, with two choices that flax's lacks.

    The running variance takes the unbiased variance of the batch, the normalisation the biased one (torch); and rows
    can be left out of the statistics by a mask (the better choice for padded sets; the published code counts them).

    A batch that is encoded in parts (training/microbatch.py) makes the collection "moments" mutable to learn the
    statistics of a part, and provides those to normalise with as the collection "given_moments".

    Attributes:
      include_padding: masked rows enter the statistics (published True).
      axis: name of the device axis over which the statistics are taken in training; None: each device its own.
      epsilon: added to the variance.
    """

    include_padding: bool = True
    axis: str | None = None
    epsilon: float = 1e-5

    def __call__(self, x: Array, mask: Array | None, *, train: bool) -> Array:
        """x [..., c], mask [...] bool or None (all rows count) -> [..., c]; statistics are float32."""
        mask = None if self.include_padding else mask

        def moments() -> Moments:
            return in_float32(lambda x: self._moments(x, mask), x)

        coefficients = self.coefficients(x.shape[-1], moments, train=train)
        # The mean is subtracted first: it may be far larger than the spread.
        return rounded(lambda x, mean, factor, bias: (x - mean) * factor + bias, x, *coefficients)

    @nn.compact
    def coefficients(self, channels: int, moments: Callable[[], Moments], *, train: bool) -> tuple[Array, Array, Array]:
        """Coefficients (mean, factor, bias), each [channels]: the normalised x is (x - mean) * factor + bias.

        moments: gives those of this batch; asked for in training only.
        """
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        used = Moments(mean.value, var.value, jnp.zeros(()))
        if train and not self.is_initializing():
            used = of_batch = moments()
            if self.has_variable("given_moments", "batch"):
                used = self.get_variable("given_moments", "batch")
            if self.is_mutable_collection("moments"):
                self.put_variable("moments", "batch", of_batch)
            if self.is_mutable_collection("batch_stats"):
                mean.value, var.value = used.into(mean.value, var.value)
        return used.mean, scale * lax.rsqrt(used.var + self.epsilon), bias

    def _moments(self, x: Array, mask: Array | None) -> Moments:
        def total(values: Array) -> Array:
            values = jnp.sum(values, axis=tuple(range(values.ndim - 1)))
            return values if self.axis is None else lax.psum(values, self.axis)

        weight = jnp.ones((*x.shape[:-1], 1)) if mask is None else mask[..., None].astype(x.dtype)
        count = total(weight)[0]
        rows = jnp.maximum(count, 1.0)
        mean = total(x * weight) / rows
        return Moments(mean, total(jnp.square(x - mean) * weight) / rows, count)


def merge(parts: Any) -> Any:
    """Merges the moments of the parts of a batch, a tree of Moments with leaves [parts, ...]."""

    def merge_layer(parts: Moments) -> Moments:
        count = jnp.sum(parts.count)
        share = (parts.count / jnp.maximum(count, 1.0))[:, None]
        mean = jnp.sum(share * parts.mean, axis=0)
        return Moments(mean, jnp.sum(share * (parts.var + jnp.square(parts.mean - mean)), axis=0), count)

    return jax.tree.map(merge_layer, parts, is_leaf=lambda x: isinstance(x, Moments))


def advance(batch_stats: Any, moments: Any) -> Any:
    """Running statistics ("batch_stats" of a model) after a batch of these moments ("moments" of the same model).

    What has no moments, a tower that did not run as in training, keeps its statistics.
    """
    if not isinstance(moments.get("batch"), Moments):
        return {n: advance(stats, moments[n]) if n in moments else stats for n, stats in batch_stats.items()}
    mean, var = moments["batch"].into(batch_stats["mean"], batch_stats["var"])
    return {"mean": mean, "var": var}


def running_moments(batch_stats: Any) -> Any:
    """Running statistics as moments to normalise with."""
    if set(batch_stats) == {"mean", "var"}:
        return {"batch": Moments(batch_stats["mean"], batch_stats["var"], jnp.zeros(()))}
    return {name: running_moments(stats) for name, stats in batch_stats.items()}


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
