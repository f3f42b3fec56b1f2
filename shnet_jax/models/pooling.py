"""GPO: learned pooling of a set by rank (VSE-infinity, Chen et al., CVPR 2021)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from shnet_jax.models.layers import GRU, torch_uniform
from shnet_jax.ops.matmul import einsum
from shnet_jax.ops.positions import sinusoid
from shnet_jax.ops.set_pool import set_pool
from shnet_jax.types import Array


class GPO(nn.Module):
    """Generalised pooling operator: weights per rank from a small bidirectional GRU over position codes.

    Attributes:
      code: size of the position code (published 32).
      hidden: size of the GRU state (published 32).
      temperature: of the softmax over ranks (published 0.1).
    """

    code: int = 32
    hidden: int = 32
    temperature: float = 0.1

    @nn.compact
    def weights(self, lengths: Array, max_length: int) -> Array:
        """Weights of the ranks: lengths [n] int -> [n, max_length], 0 at and beyond the length."""
        codes = sinusoid(jnp.arange(max_length), self.code)
        active = jnp.arange(max_length) < lengths[:, None]
        forward = GRU(self.hidden, reverse=False, name="forward")(codes, active)
        backward = GRU(self.hidden, reverse=True, name="backward")(codes, active)
        kernel = self.param("score", torch_uniform(self.hidden), (self.hidden,))
        scores = einsum("nmh,h->nm", (forward + backward) / 2, kernel, "float32")
        scores = jnp.where(active, scores, -10000.0) / self.temperature
        return jnp.where(active, jax.nn.softmax(scores, axis=-1), 0.0)

    def __call__(self, features: Array, mask: Array) -> Array:
        """Pools each set: features [n, m, d], mask [n, m] bool -> [n, d] float32."""
        n, m = mask.shape
        lengths = jnp.sum(mask, axis=1)
        # The weights depend on the length alone: one table serves any number of sets.
        few = isinstance(n, int) and n <= m  # an export leaves n open
        weights = self.weights(lengths, m) if few else self.weights(jnp.arange(m + 1), m)[lengths]
        self.sow("intermediates", "weights", weights)
        return set_pool(features, mask, weights)
