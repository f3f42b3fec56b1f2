"""Everything that changes while training, as one pytree; a checkpoint holds all of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from shnet_jax.training.momentum import Momentum, MomentumState, first_state
from shnet_jax.types import Array


@struct.dataclass
class TrainState:
    """The state of a run after `step` batches.

    step: [] int32. params: {"model": ..., "loss": ...}. ema: running averages {"params", "batch_stats"}, or None.
    rng: data of the random key; each step folds its number in.
    nonfinite: [] int32, batches whose loss or gradient was not finite (their update was not made). With on_nonfinite =
      "stop" the state changes no more once this is above 0.
    momentum: key encoders and queues (training/momentum.py), None without them.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any
    rng: Array
    nonfinite: Array
    momentum: MomentumState | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that evaluation applies: the running averages, or the trained ones where there are none."""
        return {"params": self.params["model"], "batch_stats": self.batch_stats} if self.ema is None else self.ema


def create_state(
    variables: dict[str, Any],
    loss_params: dict[str, Any],
    tx: optax.GradientTransformation,
    ema: bool,
    seed: int,
    momentum: Momentum | None = None,
) -> TrainState:
    """The state before the first step. momentum: options of the momentum encoders, None for none."""
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    params = {"model": variables["params"], "loss": loss_params}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(params),
        # A copy: the step donates its input, and one buffer cannot be given away twice.
        ema=jax.tree.map(jnp.copy, variables) if ema else None,
        rng=jax.random.key_data(jax.random.key(seed)),
        nonfinite=jnp.zeros((), jnp.int32),
        momentum=None if momentum is None else first_state(momentum, variables, seed),
    )
