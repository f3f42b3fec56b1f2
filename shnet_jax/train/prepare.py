"""The parts of a training run: from a configuration to the mapped step, the stream of batches and the first state."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import grain
import jax
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.data.batches import gather, resident_table, steps_per_epoch, train_batches
from shnet_jax.data.tokenise import NO_UNKNOWN, Captions, Tokenizer, tokenise_split
from shnet_jax.evaluate.split import check as check_evaluation
from shnet_jax.experiment import Experiment, abstract_variables, init_variables
from shnet_jax.losses import total
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import Mapped, make_mesh, map_step, replicate
from shnet_jax.parallel.sharding import WHOLE, global_norm, specs, split_axes
from shnet_jax.train import momentum
from shnet_jax.train.microbatch import STATISTICS
from shnet_jax.train.optim import make_optimiser, schedule
from shnet_jax.train.state import TrainState, create_state
from shnet_jax.train.step import make_step
from shnet_jax.types import DATA

log = logging.getLogger(__name__)

MUCH_UNKNOWN = 0.01
"""Share of unknown pieces in the training captions that is warned of."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run consists of.

    table: resident features on the devices, {} in streaming mode. rate: learning rate by number of the update.
    first_state: makes the state before step 1. like: its shapes, dtypes and shardings.
    """

    mesh: Mesh
    iterator: grain.DatasetIterator
    table: dict[str, Any]
    step: Mapped
    rate: optax.Schedule
    steps_per_epoch: int
    total_steps: int
    first_state: Callable[[], TrainState]
    like: TrainState


class Outline(NamedTuple):
    """What a run does, before anything of it is read or compiled; see Parts."""

    mesh: Mesh
    built: BuiltStep
    steps_per_epoch: int
    total_steps: int


def outline(experiment: Experiment) -> Outline:
    """Of the run of an experiment. Raises ValueError for settings that do not fit together."""
    config, dataset = experiment.config, experiment.dataset
    _check(config)
    if "identity" in dataset.features and config.data.val_split == "test":
        raise ValueError(
            "config.data.val_split is 'test': the checkpoint of a person search is never chosen on the split that is "
            "reported; set it to a validation split (docs/data.md tells how to hold one out)"
        )
    mesh = make_mesh(config.parallel.devices)
    pairs_per_device(config, mesh.size)
    check_evaluation(experiment.model, config, mesh)
    per_epoch = steps_per_epoch(dataset, config.data.train_split, config.train.batch_size)
    total_steps = config.train.steps or math.ceil(config.train.epochs * per_epoch)
    shapes = abstract_variables(experiment)
    built = build_step(config, experiment.model, mesh, shapes, per_epoch, total_steps)
    momentum.check_start(config, per_epoch, total_steps)
    return Outline(mesh, built, per_epoch, total_steps)


def prepare(experiment: Experiment) -> Parts:
    """Builds the parts; compiles nothing yet. Raises ValueError for settings that do not fit together."""
    mesh, built, per_epoch, total_steps = outline(experiment)
    config, dataset = experiment.config, experiment.dataset
    split = config.data.train_split
    captions = tokenise_split(dataset, split, experiment.tokenizer)
    _tell_of_cuts(captions, split, config.data.max_tokens)
    _tell_of_unknown(captions, split, experiment.tokenizer)
    iterator = train_batches(
        config,
        dataset,
        captions,
        experiment.tokenizer,
        experiment.fields,
        batch_size=config.train.batch_size // jax.process_count(),
        seed=config.seed,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )
    table = replicate(resident_table(dataset, split, experiment.fields), mesh) if config.data.resident else {}

    def first_state() -> TrainState:
        return built.first_state(init_variables(experiment, config.seed))

    return Parts(mesh, iterator, table, built.step, built.rate, per_epoch, total_steps, first_state, built.like)


def _tell_of_cuts(captions: Captions, split: str, max_tokens: int) -> None:
    lengths = captions.lengths() + 2  # with begin and end token
    cut = int((lengths > max_tokens).sum())
    if cut:
        log.warning(
            "%s: %d of %d captions have more than config.data.max_tokens = %d tokens and are cut; the longest has %d",
            *(split, cut, len(lengths), max_tokens, int(lengths.max())),
        )


def _tell_of_unknown(captions: Captions, split: str, tokenizer: Tokenizer) -> None:
    if tokenizer.unknown_id == NO_UNKNOWN:
        return
    share = captions.unknown_share(tokenizer)
    log.info("%s: %.2f %% of the pieces of the captions are unknown to the vocabulary", split, 100 * share)
    if share > MUCH_UNKNOWN:
        log.warning(
            "%s: %.1f %% of the pieces of the captions are unknown to the vocabulary, [UNK]: is it of their language, "
            "and right about capitals (do_lower_case in the tokenizer_config.json beside it)?",
            *(split, 100 * share),
        )


def pairs_per_device(config: ConfigDict | FrozenConfigDict, devices: int) -> int:
    """Pairs of a batch on each device. Raises ValueError where batch or microbatch do not divide into whole images."""
    batch, unit = config.train.batch_size, config.data.captions_per_image
    microbatch, statistics = config.train.microbatch, config.train.microbatch_statistics
    if batch < 1 or batch % (unit * devices):
        raise ValueError(
            f"config.train.batch_size is {batch}; it must divide into {devices} devices with whole images of "
            f"config.data.captions_per_image = {unit}"
        )
    pairs = batch // devices
    if statistics not in STATISTICS:
        raise ValueError(f"config.train.microbatch_statistics is {statistics!r}; choose from {', '.join(STATISTICS)}")
    if microbatch < 0 or (microbatch and (pairs % microbatch or microbatch % unit)):
        raise ValueError(
            f"config.train.microbatch is {microbatch}; it must divide the {pairs} pairs of a device into parts with "
            f"whole images of config.data.captions_per_image = {unit}, or be 0"
        )
    return pairs


@dataclasses.dataclass(frozen=True)
class BuiltStep:
    """The mapped step and what belongs to it.

    first_state: makes the state before step 1, on the devices, from initial variables. like: its shapes, dtypes and
    shardings. rate: learning rate by number of the update.
    """

    step: Mapped
    first_state: Callable[[dict[str, Any]], TrainState]
    like: TrainState
    rate: optax.Schedule


def takes_microbatches(model: RetrievalModel, variables: Any) -> bool:
    """Whether the model has no BatchNorm or says how they lie. variables: as in `build_step`."""
    return bool(model.norm_depth or not variables["batch_stats"])


def build_step(
    config: FrozenConfigDict,
    model: RetrievalModel,
    mesh: Mesh,
    variables: Any,
    steps_per_epoch: float,
    total_steps: int,
) -> BuiltStep:
    """The step of a configuration. variables: shapes and dtypes of the model's {"params", "batch_stats"}.

    Raises ValueError for losses, an optimiser, microbatches or momentum encoders that do not fit together.
    """
    if config.train.microbatch and not takes_microbatches(model, variables):
        raise ValueError(
            f"config.train.microbatch is {config.train.microbatch}, and the model {config.model.name!r} has BatchNorms "
            "but no norm_depth (shnet_jax/models/contract.py)"
        )
    accumulate = config.optim.accumulate
    rate = schedule(config, steps_per_epoch / accumulate, math.ceil(total_steps / accumulate))
    key_options = momentum.options(config, model, steps_per_epoch)
    loss_params, total_loss = total.build(config.loss, steps_per_epoch, queues=key_options is not None)
    devices = mesh.size if config.parallel.shard_params else 1
    axes = split_axes({"model": variables["params"], "loss": loss_params}, devices)
    tx = make_optimiser(config, rate, norm=partial(global_norm, axes=axes, name=DATA))
    step = make_step(
        model,
        total_loss,
        tx,
        finish=gather,
        ema=config.optim.ema,
        stop_on_nonfinite=config.train.on_nonfinite == "stop",
        microbatch=config.train.microbatch,
        statistics=config.train.microbatch_statistics,
        axis_name=DATA,
        split=axes,
        key_options=key_options,
    )

    def state(variables: dict[str, Any]) -> TrainState:
        average = config.optim.ema > 0
        return create_state(variables, loss_params, tx, ema=average, seed=config.seed, momentum=key_options)

    shapes = jax.eval_shape(state, variables)
    state_axes = split_axes(shapes, devices)
    whole = jax.tree.map(lambda _: WHOLE, shapes.batch_stats)  # averaged over the devices, whatever their shape
    state_axes = state_axes.replace(batch_stats=whole)
    if shapes.ema is not None:
        state_axes = state_axes.replace(ema=state_axes.ema | {"batch_stats": whole})
    if shapes.momentum is not None:  # every device scores its queries with the whole queues
        queues = {name: jax.tree.map(lambda _: WHOLE, getattr(shapes.momentum, name)) for name in ("images", "texts")}
        state_axes = state_axes.replace(momentum=state_axes.momentum.replace(batch_stats=whole, **queues))
    partition = specs(state_axes)
    like = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
        partition,
    )

    def first_state(variables: dict[str, Any]) -> TrainState:
        if not config.parallel.shard_params:
            return replicate(state(variables), mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        return jax.jit(state, out_shardings=shardings)(jax.device_get(variables))  # nowhere whole but on the host

    state_specs = partition if config.parallel.shard_params else None
    mapped = map_step(step, mesh, config.parallel.mapping, state_specs=state_specs)
    return BuiltStep(mapped, first_state, like, rate)


def _check(config: FrozenConfigDict) -> None:
    train = config.train
    if train.on_nonfinite not in ("stop", "skip"):
        raise ValueError(f"config.train.on_nonfinite is {train.on_nonfinite!r}; choose stop or skip")
    least = {f"train.{name}": train[name] for name in ("batch_size", "log_steps", "checkpoint_steps", "keep")}
    least |= {"data.captions_per_image": config.data.captions_per_image, "model.dim": config.model.dim}
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"config.{name} is {value}; it must be at least 1")
    if train.steps < 0 or (train.epochs <= 0 and not train.steps):
        raise ValueError(f"config.train.epochs is {train.epochs} and steps {train.steps}; one must be above 0")
    if not 0 <= config.optim.ema < 1:
        raise ValueError(f"config.optim.ema is {config.optim.ema}; it must be at least 0 and below 1")
    if jax.process_count() > 1 and config.parallel.mapping == "pmap":
        raise ValueError("several processes train under config.parallel.mapping=shard_map only")
    if jax.process_count() > 1 and config.parallel.shard_params and config.eval.stages > 1:
        raise ValueError("config.eval.stages > 1 with config.parallel.shard_params needs one process")
    if config.optim.accumulate < 1:
        raise ValueError(f"config.optim.accumulate is {config.optim.accumulate}; it must be at least 1")
