"""GPO: learned pooling of a set by rank (VSE-infinity, Chen et al., CVPR 2021)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.models.layers import torch_uniform
from shnet_jax.ops.positions import sinusoid
from shnet_jax.ops.set_pool import set_pool
from shnet_jax.types import Array


class GRUDirection(nn.Module):
    """One direction of a GRU in torch's parametrisation: two biases, the hidden one of the new gate inside the reset.

    The two biases of the reset and update gates could be one, but an optimiser moves two parameters twice as far as
    one; keeping both makes training steps equal the published ones.
    """

    hidden: int

    @nn.compact
    def __call__(self, inputs: Array, active: Array, *, reverse: bool) -> Array:
        """Runs over steps. inputs [m, i], active [n, m] bool -> states [n, m, hidden], 0 where inactive."""
        init = torch_uniform(self.hidden)
        w_input = self.param("input_kernel", init, (inputs.shape[-1], 3 * self.hidden))
        b_input = self.param("input_bias", init, (3 * self.hidden,))
        w_hidden = self.param("hidden_kernel", init, (self.hidden, 3 * self.hidden))
        b_hidden = self.param("hidden_bias", init, (3 * self.hidden,))

        def step(state: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            x, on = at
            r_x, z_x, n_x = jnp.split(x, 3)
            r_h, z_h, n_h = jnp.split(state @ w_hidden + b_hidden, 3, axis=-1)
            update = jax.nn.sigmoid(z_x + z_h)
            new = jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h)
            # An inactive step leaves the state at zero, so that the backward direction starts at the last valid one.
            state = jnp.where(on[:, None], (1.0 - update) * new + update * state, 0.0)
            return state, state

        start = jnp.zeros((active.shape[0], self.hidden), jnp.float32)
        _, states = lax.scan(step, start, (inputs @ w_input + b_input, active.T), reverse=reverse)
        return states.swapaxes(0, 1)


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
        forward = GRUDirection(self.hidden, name="forward")(codes, active, reverse=False)
        backward = GRUDirection(self.hidden, name="backward")(codes, active, reverse=True)
        scores = ((forward + backward) / 2) @ self.param("score", torch_uniform(self.hidden), (self.hidden,))
        scores = jnp.where(active, scores, -10000.0) / self.temperature
        return jnp.where(active, jax.nn.softmax(scores, axis=-1), 0.0)

    def __call__(self, features: Array, mask: Array) -> Array:
        """Pools each set: features [n, m, d], mask [n, m] bool -> [n, d] float32."""
        n, m = mask.shape
        lengths = jnp.sum(mask, axis=1)
        # The weights depend on the length alone: one table serves any number of sets.
        weights = self.weights(lengths, m) if n <= m else self.weights(jnp.arange(m + 1), m)[lengths]
        self.sow("intermediates", "weights", weights)
        return set_pool(features, mask, weights)
