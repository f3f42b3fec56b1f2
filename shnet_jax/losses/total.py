"""The weighted sum of the losses that a configuration names."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from shnet_jax import registry
from shnet_jax.durations import UNITS, TrainingLength
from shnet_jax.losses import matryoshka
from shnet_jax.types import Array, Context, Embedding, Pairs

Total = Callable[[Embedding, Embedding, Array, Context], dict[str, Array]]
"""Function (images, texts, ids, ctx) -> this device's shares of "loss", the weighted sum, and of all that the losses
return.

`ctx.params` holds the learnable parameters of every loss by its name: {loss name: its params}.
"""
LOSS = "_loss"
"""End of the names of a loss's terms that add up to the objective; its other terms are metrics."""
WARMUP = tuple(f"warmup_{unit}" for unit in UNITS)


def build(
    loss_config: ConfigDict, steps_per_epoch: float, total_steps: int = 0, *, queues: bool = False, memory: float = 0.0
) -> tuple[dict[str, dict[str, Array]], Total]:
    """Builds the losses of `loss_config.weights` with their options `loss_config[name]`; those of weight 0 are left
    out. How they meet the pairs of other devices is `loss_config.pairs` (gathered when there is none). With sizes in
    `loss_config.matryoshka` the total is the mean over prefixes of the embeddings (losses/matryoshka.py).

    steps_per_epoch, total_steps: batches of an epoch and of the training (0: unknown), by which an option
      `warmup_epochs` or `warmup_percent` reaches its loss as `warmup_steps`.
    queues: momentum encoders will give the queues of `ctx.keys`. The module of a loss that has a part for them
      (`pairs.over_queues`) says so by `TAKES_QUEUES = True`; others do not get to see them.
    memory: bytes of a device, for tiles of a size by memory; 0 where that is not known.
    Returns (initial parameters {loss name: its params}, the total). Raises ValueError for a weight that is
    negative or not finite, when no loss is left, for an option that a loss does not have or lacks, and for queues that
    no loss takes.
    """
    weights = {name: float(weight) for name, weight in loss_config.weights.items()}
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"loss.weights.{name} must be a finite number >= 0, is {weight}")
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    if not weights:
        raise ValueError("loss.weights names no loss with a weight above 0")
    modules = {name: registry.loss(name) for name in weights}
    if queues and not any(map(_takes_queues, modules.values())):
        raise ValueError(
            f"config.momentum.queue is above 0, and of the losses of config.loss.weights, {', '.join(modules)}, none "
            "takes queues: give another one a weight, or set config.momentum.queue to 0"
        )
    options = {
        name: _options(name, module, loss_config.get(name, ConfigDict()), TrainingLength(steps_per_epoch, total_steps))
        for name, module in modules.items()
    }
    params = {name: _init_params(module)(**options[name]) for name, module in modules.items()}
    pairs = Pairs(**loss_config.get("pairs", {}), memory=memory)
    sizes = matryoshka.check(loss_config.get("matryoshka", ()))
    if sizes and "identity" in modules:
        raise ValueError(
            "config.loss.matryoshka cuts the vectors, and the classifier of config.loss.weights.identity reads whole "
            "ones: set one of the two to () or 0"
        )

    def total(images: Embedding, texts: Embedding, ids: Array, ctx: Context) -> dict[str, Array]:
        values: dict[str, Array] = {}
        weighted = []
        for name, module in modules.items():
            keys = ctx.keys if _takes_queues(module) else None
            ctx_of_loss = dataclasses.replace(ctx, params=ctx.params[name], pairs=pairs, keys=keys)
            terms = module.loss(images, texts, ids, ctx_of_loss, **options[name])
            if clash := sorted({"loss", *values} & set(terms)):
                raise ValueError(f"loss {name!r} returns {clash}, which another loss or the total returns as well")
            if not any(key.endswith(LOSS) for key in terms):
                expected = f"expected a term of the objective, whose name ends in {LOSS!r}"
                raise ValueError(f"loss {name!r} returns {sorted(terms)}; {expected}")
            values |= terms
            weighted += [weights[name] * value for key, value in terms.items() if key.endswith(LOSS)]
        return {"loss": sum(weighted), **values}

    return params, matryoshka.over_prefixes(total, sizes) if sizes else total


def projection(loss_config: ConfigDict) -> Callable[[Any], Any]:
    """The function that brings the losses' parameters {loss name: its params} back into their bounds after an update.

    A loss whose parameters have bounds has `project(params, **options)`; the others' are given back as they are.
    """
    modules = {name: registry.loss(name) for name, weight in loss_config.weights.items() if weight > 0}
    bounded = {name: module for name, module in modules.items() if hasattr(module, "project")}
    options = {name: dict(loss_config.get(name, ConfigDict()).items()) for name in bounded}

    def project(params: Any) -> Any:
        return params | {name: module.project(params[name], **options[name]) for name, module in bounded.items()}

    return project


def _init_params(module: ModuleType) -> Callable[..., dict[str, Array]]:
    """The `init_params` of a loss; a loss without one has nothing to learn."""
    return getattr(module, "init_params", lambda **_: {})


def _takes_queues(module: ModuleType) -> bool:
    return getattr(module, "TAKES_QUEUES", False)


def _options(name: str, module: ModuleType, config: ConfigDict, length: TrainingLength) -> dict[str, Any]:
    """The keyword arguments of a loss from its part of the configuration, checked against what it takes."""
    options = dict(config.items())
    if warmup := {field: options.pop(field) for field in WARMUP if field in options}:
        options["warmup_steps"] = length.steps(warmup, "warmup", f"config.loss.{name}")
    parameters = inspect.signature(module.loss).parameters.values()
    takes = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    unknown = sorted(set(options) - set(takes))
    missing = sorted(n for n, p in takes.items() if p.default is p.empty and n not in options)
    if unknown or missing:
        faults = [
            f"{problem} {', '.join(names)}" for problem, names in (("unknown", unknown), ("missing", missing)) if names
        ]
        raise ValueError(
            f"options loss.{name}: {'; '.join(faults)}; {module.__name__} takes {', '.join(sorted(takes))}"
        )
    return options
