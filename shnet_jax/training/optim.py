"""AdamW or Lion with a slower text tower, global-norm clipping and the schedules of the configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from shnet_jax.durations import TrainingLength

OPTIMISERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": partial(optax.scale_by_adam, eps=1e-8),
    "lion": optax.scale_by_lion,
}
"""Direction of an update by `optim.name`, given b1 and b2 (Loshchilov and Hutter 2019; Chen et al. 2023)."""


def schedule(config: ConfigDict, steps_per_epoch: float, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the update number, from `config.optim`; arguments count updates too."""
    o = config.optim
    length = TrainingLength(steps_per_epoch, total_steps, batches=o.accumulate)
    warmup = length.steps(o, "warmup", "config.optim")
    if o.schedule == "step":
        after = {decay - warmup: o.decay_factor for decay in length.moments(o, "decay", "config.optim")}
        main = optax.piecewise_constant_schedule(o.lr, after)
    elif o.schedule == "cosine":
        main = optax.cosine_decay_schedule(o.lr, max(1, total_steps - warmup))
    elif o.schedule == "constant":
        main = optax.constant_schedule(o.lr)
    else:
        raise ValueError(f"config.optim.schedule is {o.schedule!r}; choose step, cosine or constant")
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, o.lr, warmup), main], [warmup])


def in_text_tower(path: tuple[Any, ...]) -> bool:
    """Whether a parameter belongs to the text tower itself (the head behind it learns at the full rate).

    A vision tower that is trained too was pretrained with the text tower and shares its rate.
    """
    return any(getattr(key, "key", None) in ("tower", "vision_tower") for key in path)


def is_frozen(path: tuple[Any, ...], frozen_layers: int) -> bool:
    """Whether a parameter is one of those that `config.text.frozen_layers` keeps: embeddings, first layers."""
    names = [str(getattr(key, "key", "")) for key in path]
    if not frozen_layers or "tower" not in names[:-1]:
        return False
    part = names[names.index("tower") + 1]
    return not part.startswith("layer_") or int(part.removeprefix("layer_")) < frozen_layers


def make_optimiser(
    config: ConfigDict,
    learning_rate: optax.Schedule,
    norm: Callable[[Any], jax.Array] = optax.global_norm,
) -> optax.GradientTransformation:
    """Clip by global norm, the direction of AdamW or Lion, decoupled decay, then the rate of each group (as torch's).

    norm: of the whole gradient, where a device holds a part of it (`parallel.sharding.global_norm`). Not computed by an
      `update` that is told it, as `grad_norm=`.

    With `optim.accumulate` > 1 the gradients of that many batches are averaged before each update.

    Raises ValueError for an unknown `optim.name`.
    """
    o = config.optim
    if o.name not in OPTIMISERS:
        raise ValueError(f"config.optim.name is {o.name!r}; choose from {', '.join(OPTIMISERS)}")

    def clip(updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any) -> tuple[Any, Any]:
        del params
        # That of a batch is not that of the mean of several.
        length = norm(updates) if grad_norm is None or o.accumulate > 1 else grad_norm
        factor = jnp.minimum(1.0, o.clip_norm / jnp.maximum(length, 1e-30))
        return jax.tree.map(lambda u: u * factor, updates), state

    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda p: o.decay_all or p.ndim > 1, params)

    def text_tower(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: in_text_tower(path), params)

    def frozen(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: is_frozen(path, config.text.frozen_layers), params)

    optimiser = optax.chain(
        optax.GradientTransformationExtraArgs(optax.init_empty_state, clip) if o.clip_norm else optax.identity(),
        OPTIMISERS[o.name](b1=o.b1, b2=o.b2),
        optax.add_decayed_weights(o.weight_decay, mask=decayed),
        optax.masked(optax.scale(o.text_lr_factor), text_tower),
        optax.scale_by_learning_rate(learning_rate),
        optax.masked(optax.set_to_zero(), frozen),  # no gradient reaches these, but decay would
    )
    if o.accumulate > 1:
        return optax.MultiSteps(optimiser, o.accumulate).gradient_transformation()
    return optimiser
