"""Setup of training: from a configuration to the mapped step and the batches, before anything is compiled."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import grain
import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.data.batches import gather, images_per_batch, resident_table, steps_per_epoch, train_batches
from shnet_jax.data.tokenise import NO_UNKNOWN, Captions, Tokenizer, tokenise_split
from shnet_jax.durations import TrainingLength, count_steps, given
from shnet_jax.evaluation.encode import check as check_evaluation
from shnet_jax.experiment import Experiment, abstract_variables, vector_size
from shnet_jax.losses import matryoshka, total
from shnet_jax.models.contract import RetrievalModel, check_pairs_dtype, check_prefixes
from shnet_jax.observe import hardware, profile, trackers
from shnet_jax.parallel import hosts
from shnet_jax.parallel.mapping import Mapped, make_mesh, map_step, on_cpu, replicate
from shnet_jax.parallel.rules import like_params, param_specs, step_mesh
from shnet_jax.parallel.sharding import WHOLE, global_norm, specs, split_axes
from shnet_jax.training import momentum
from shnet_jax.training.microbatch import STATISTICS
from shnet_jax.training.optim import make_optimiser, schedule
from shnet_jax.training.state import TrainState, create_state
from shnet_jax.training.step import StepOptions, train_step
from shnet_jax.types import DATA, MODEL

log = logging.getLogger(__name__)

MUCH_UNKNOWN = 0.01
"""Share of unknown pieces in the training captions above which a warning is logged."""


@dataclasses.dataclass(frozen=True)
class StepIntervals:
    """Steps between two log lines, two evaluations and two saved states of a training."""

    log: int
    evaluate: int
    save: int


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """The mapped step of a configuration and what belongs to it, before data is read or anything is compiled.

    options: the constants of the step, with which its parts can be run alone. like: shapes, dtypes and shardings of the
    state. create: initial variables -> the state before step 1, on the host's default device. sharded: the state is
    split over the devices. rate: learning rate by number of the update.
    """

    mesh: Mesh
    step: Mapped
    options: StepOptions
    like: TrainState
    create: Callable[[dict[str, Any]], TrainState]
    sharded: bool
    rate: optax.Schedule
    intervals: StepIntervals
    total_steps: int

    def first_state(self, variables: dict[str, Any]) -> TrainState:
        """The state before step 1, on the devices, from initial {"params", "batch_stats"}."""
        if not self.sharded:
            return replicate(self.create(variables), self.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.like)
        # The complete arrays exist on the host only.
        return jax.jit(self.create, out_shardings=shardings)(jax.device_get(variables))


def setup_training(experiment: Experiment) -> TrainSetup:
    """The setup of a run: static checks, before I/O or compilation.

    Raises ValueError for settings that do not fit together, or that the data set or this machine do not fit.
    """
    config, dataset = experiment.config, experiment.dataset
    _check(config)
    if "identity" in dataset.features and config.data.val_split == "test":
        raise ValueError(
            "config.data.val_split is 'test': the checkpoint of a person search is never chosen on the split that is "
            "reported; set it to a validation split (docs/data.md tells how to hold one out)"
        )
    dataset.check_captioned(config.data.train_split)
    _check_negatives(config)
    mesh = make_mesh(config.parallel.devices)
    pairs_per_device(config, step_mesh(mesh, config.parallel).shape[DATA])
    check_evaluation(experiment.model, config, mesh)
    per_epoch = steps_per_epoch(dataset, config.data.train_split, config.train.batch_size)
    total_steps = count_steps(config.train, per_epoch)
    profile.check(config.train.profile_steps, total_steps)
    shapes = abstract_variables(experiment)
    setup = build_step(config, experiment.model, mesh, shapes, per_epoch, total_steps)
    momentum.check_start(config, per_epoch, total_steps)
    if config.loss.matryoshka:
        matryoshka.check_last(config.loss.matryoshka, vector_size(experiment))
    return setup


def build_step(
    config: FrozenConfigDict,
    model: RetrievalModel,
    mesh: Mesh,
    variables: Any,
    steps_per_epoch: float,
    total_steps: int,
) -> TrainSetup:
    """The setup of a model on the devices of a mesh. variables: shapes and dtypes of its {"params", "batch_stats"}.

    Raises ValueError for losses, an optimiser, microbatches or momentum encoders that do not fit together, and for
    config.parallel.rules that do not fit model or devices.
    """
    mesh = step_mesh(mesh, config.parallel)
    across = param_specs(variables["params"], config.parallel.rules, mesh)
    if config.train.microbatch and not takes_microbatches(model, variables):
        raise ValueError(
            f"config.train.microbatch is {config.train.microbatch}, and the model {config.model.name!r} has BatchNorms "
            "but no norm_depth (shnet_jax/models/contract.py)"
        )
    accumulate, sharded = config.optim.accumulate, config.parallel.shard_params or MODEL in mesh.shape
    rate = schedule(config, steps_per_epoch / accumulate, math.ceil(total_steps / accumulate))
    key_options = momentum.options(config, model, steps_per_epoch, total_steps)
    loss_params, total_loss = total.build(
        config.loss, steps_per_epoch, total_steps, queues=key_options is not None, memory=_device_memory(mesh)
    )
    score_dtype = config.loss.pairs.get("dtype", "float32")
    check_pairs_dtype(model, score_dtype)
    if config.loss.get("matryoshka", ()):
        check_prefixes(model, "loss.matryoshka")
    devices = mesh.shape[DATA] if config.parallel.shard_params else 1
    replicated = jax.tree.map(lambda _: PartitionSpec(), loss_params)
    axes = split_axes(
        {"model": variables["params"], "loss": loss_params}, devices, {"model": across, "loss": replicated}
    )
    tx = make_optimiser(config, rate, norm=partial(global_norm, axes=axes, name=DATA))
    options = StepOptions(
        model,
        total_loss,
        tx,
        prepare_batch=gather,
        ema=config.optim.ema,
        stop_on_nonfinite=config.train.on_nonfinite == "stop",
        microbatch=config.train.microbatch,
        statistics=config.train.microbatch_statistics,
        axis_name=DATA,
        split=axes,
        project=total.projection(config.loss),
        score_dtype=score_dtype,
        key_options=key_options,
    )
    create = partial(
        create_state, loss_params=loss_params, tx=tx, ema=config.optim.ema > 0, seed=config.seed, momentum=key_options
    )
    like, partition = _state_layout(jax.eval_shape(create, variables), variables["params"], across, devices, mesh)
    step = partial(train_step, options)
    mapped = map_step(step, mesh, config.parallel.mapping, state_specs=partition if sharded else None)
    intervals = step_intervals(config, steps_per_epoch, total_steps)
    return TrainSetup(mesh, mapped, options, like, create, sharded, rate, intervals, total_steps)


def _device_memory(mesh: Mesh) -> float:
    """Bytes of memory of a device of the mesh, the same in all processes; 0 where it is not known, as on a CPU."""
    if on_cpu(mesh):
        return 0.0
    if peaks := hardware.chip(mesh.devices.flat[0].device_kind):
        return peaks.memory  # of the data sheet: what an allocator has left differs between devices and runs
    hosts.meet_all()
    limit, _ = hardware.memory_limit(mesh.local_devices[0], None)
    [least] = hosts.largest(-(limit or 0.0))
    return -least


def step_intervals(config: FrozenConfigDict, steps_per_epoch: float, total_steps: int) -> StepIntervals:
    """The intervals of `config.train`, each at least 1 step; evaluations without one are at the end alone.

    Raises ValueError where none is given for log lines or saved states.
    """
    length = TrainingLength(steps_per_epoch, total_steps)
    steps = {name: length.steps(config.train, name, "config.train") for name in ("log", "eval", "checkpoint")}
    for name in ("log", "checkpoint"):
        if given(config.train, name, "config.train") is None:
            raise ValueError(
                f"config.train.{name}_steps is 0; it must be at least 1, or set {name}_epochs or {name}_percent"
            )
    evaluate = total_steps if given(config.train, "eval", "config.train") is None else steps["eval"]
    return StepIntervals(log=max(1, steps["log"]), evaluate=max(1, evaluate), save=max(1, steps["checkpoint"]))


def _state_layout(
    shapes: TrainState, params: Any, across: Any, devices: int, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """Shapes, dtypes and shardings of the state, and its partition specs.

    shapes: shapes and dtypes of the state. params: those of the model's parameters. across: partition specs of the
    model's parameters over `MODEL`. devices: number of devices that the state is split over along `DATA`.
    """
    state_across = like_params(shapes, params, across)
    partition = specs(_state_axes(shapes, devices, state_across), state_across)

    def placed(leaf: jax.ShapeDtypeStruct, spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, shapes, partition), partition


def _state_axes(shapes: TrainState, devices: int, across: TrainState) -> TrainState:
    """The axis along which each array of the state is split over `DATA`, or WHOLE. across: its spec over `MODEL`."""

    def whole(tree: Any) -> Any:
        return jax.tree.map(lambda _: WHOLE, tree)

    axes = split_axes(shapes, devices, across)
    stats = whole(shapes.batch_stats)  # averaged over the devices, whatever their shape
    axes = axes.replace(batch_stats=stats)
    if shapes.ema is not None:
        axes = axes.replace(ema=axes.ema | {"batch_stats": stats})
    if shapes.momentum is not None:  # every device scores its queries with the whole queues
        queues = {"images": whole(shapes.momentum.images), "texts": whole(shapes.momentum.texts)}
        axes = axes.replace(momentum=axes.momentum.replace(batch_stats=stats, **queues))
    return axes


def training_data(experiment: Experiment, mesh: Mesh) -> tuple[grain.DatasetIterator, dict[str, Any]]:
    """Data of a run: the endless stream of this process's batches, and resident features ({} in streaming mode).

    Warns of captions that are truncated, and of a vocabulary that does not know them.
    """
    config, dataset = experiment.config, experiment.dataset
    split = config.data.train_split
    captions = None
    if not experiment.text_fields:
        captions = tokenise_split(dataset, split, experiment.tokenizer)
        _warn_of_truncated(captions, split, config.data.max_tokens)
        _warn_of_unknown(captions, split, experiment.tokenizer)
    iterator = train_batches(
        config,
        dataset,
        captions,
        experiment.tokenizer,
        experiment.fields,
        experiment.text_fields,
        batch_size=config.train.batch_size // jax.process_count(),
        seed=config.seed,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )
    if not config.data.resident:
        return iterator, {}
    return iterator, replicate(resident_table(dataset, split, experiment.fields, experiment.text_fields), mesh)


def _warn_of_truncated(captions: Captions, split: str, max_tokens: int) -> None:
    lengths = captions.lengths() + 2  # with begin and end token
    truncated = int((lengths > max_tokens).sum())
    if truncated:
        log.warning(
            "%s: %d of %d captions have more than config.data.max_tokens = %d tokens and are cut; the longest has %d",
            *(split, truncated, len(lengths), max_tokens, int(lengths.max())),
        )


def _warn_of_unknown(captions: Captions, split: str, tokenizer: Tokenizer) -> None:
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


def _check_negatives(config: FrozenConfigDict) -> None:
    """Raises ValueError for hard negatives with a batch that they do not divide, or a loss that takes no ids."""
    if not config.data.negatives.folder and not config.data.negatives.count:
        return
    images_per_batch(config.train.batch_size, config.data)
    unmasked = [
        name
        for name, weight in config.loss.weights.items()
        if weight > 0 and not config.loss.get(name, {}).get("mask_same_image", True)
    ]
    if unmasked:
        raise ValueError(
            f"config.loss.{unmasked[0]}.mask_same_image is False, and with config.data.negatives an image may stand in "
            "a batch twice and would be its own negative: set it to True"
        )


def takes_microbatches(model: RetrievalModel, variables: Any) -> bool:
    """Whether the model has no BatchNorm or declares its norm_depth. variables: as in `build_step`."""
    return bool(model.norm_depth or not variables["batch_stats"])


AT_LEAST_ONE = (*("train.batch_size", "train.keep", "data.captions_per_image", "model.dim", "optim.accumulate"),)


def _check(config: FrozenConfigDict) -> None:
    train = config.train
    if train.on_nonfinite not in ("stop", "skip"):
        raise ValueError(f"config.train.on_nonfinite is {train.on_nonfinite!r}; choose stop or skip")
    for name in AT_LEAST_ONE:
        section, field = name.split(".")
        if config[section][field] < 1:
            raise ValueError(f"config.{name} is {config[section][field]}; it must be at least 1")
    if train.steps < 0 or (train.epochs <= 0 and not train.steps):
        raise ValueError(f"config.train.epochs is {train.epochs} and steps {train.steps}; one must be above 0")
    trackers.check(train.log_to)
    if not 0 <= config.optim.ema < 1:
        raise ValueError(f"config.optim.ema is {config.optim.ema}; it must be at least 0 and below 1")
    if jax.process_count() > 1 and config.parallel.mapping == "pmap":
        raise ValueError("several processes train under config.parallel.mapping=shard_map only")
    if jax.process_count() > 1 and config.parallel.shard_params and config.eval.stages > 1:
        raise ValueError("config.eval.stages > 1 with config.parallel.shard_params needs one process")
