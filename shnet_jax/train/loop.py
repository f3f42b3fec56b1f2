"""The training loop: batches in; steps, log lines, evaluations, checkpoints out. Resumes exactly where it stopped."""

from __future__ import annotations

import logging
import math
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from shnet_jax.data.batches import gather, resident_table, steps_per_epoch, train_batches
from shnet_jax.data.tokenise import tokenise_split, vocabulary_file
from shnet_jax.evaluate.protocols import Results, Subject
from shnet_jax.evaluate.split import make_evaluator
from shnet_jax.experiment import (
    Experiment,
    abstract_variables,
    assemble,
    differences,
    init_variables,
    load_config,
    save_config,
)
from shnet_jax.losses import total
from shnet_jax.observe import cost
from shnet_jax.observe.clock import Clock
from shnet_jax.observe.curves import write_curves
from shnet_jax.observe.progress import Progress
from shnet_jax.observe.writer import MetricWriter
from shnet_jax.parallel.axis import DATA
from shnet_jax.parallel.mapping import data_mesh, map_step, put_batch, replicate
from shnet_jax.train.checkpoint import Checkpoints
from shnet_jax.train.optim import make_optimiser, schedule
from shnet_jax.train.state import TrainState, create_state
from shnet_jax.train.step import make_step

log = logging.getLogger(__name__)

# What may differ between the runs of one work folder: nothing that changes the parameters.
FREE_TO_CHANGE = (
    "config.data.dir",
    "config.eval.",
    "config.name",
    "config.study.",
    "config.tokenizer.path",
    "config.train.keep",
    "config.train.on_nonfinite",
)


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became infinite or NaN."""


class Interrupted(SystemExit):
    """Asked to stop by a signal; the state is saved."""


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> Results:
    """Trains to the end, from the last checkpoint in `workdir` if there is one; returns the last validation result.

    Writes config.json, the vocabulary, metrics.jsonl, TensorBoard events, curves.png and checkpoints/ into `workdir`.
    Raises NonFiniteLoss, and Interrupted after SIGTERM or SIGINT; in both cases the state was saved.
    """
    workdir = Path(workdir)
    experiment = assemble(config)
    config = experiment.config
    claim(workdir, experiment)
    mesh = make_mesh(config)

    dataset, data = experiment.dataset, config.data
    per_epoch = steps_per_epoch(dataset, data.train_split, config.train.batch_size)
    total_steps = config.train.steps or math.ceil(config.train.epochs * per_epoch)
    local_batch = _divide(config.train.batch_size, jax.process_count(), "processes")
    _divide(local_batch // data.captions_per_image, len(mesh.local_devices), "devices")
    captions = tokenise_split(dataset, data.train_split, experiment.tokenizer)
    iterator = train_batches(
        config,
        dataset,
        captions,
        experiment.tokenizer,
        experiment.fields,
        batch_size=local_batch,
        seed=config.seed,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )
    table = replicate(resident_table(dataset, data.train_split, experiment.fields), mesh) if data.resident else {}

    updates_per_epoch = per_epoch / config.optim.accumulate
    rate = schedule(config, updates_per_epoch, math.ceil(total_steps / config.optim.accumulate))
    tx = make_optimiser(config, rate)
    loss_params, total_loss = total.build(config.loss, per_epoch)
    per_device = make_step(
        experiment.model,
        total_loss,
        tx,
        finish=gather,
        ema=config.optim.ema,
        stop_on_nonfinite=config.train.on_nonfinite == "stop",
        axis_name=DATA,
    )
    step = map_step(per_device, mesh, config.parallel.mapping)
    evaluate = make_evaluator(experiment, data.val_split, mesh)

    def initial(variables: dict[str, Any]) -> TrainState:
        return create_state(variables, loss_params, tx, ema=config.optim.ema > 0, seed=config.seed)

    checkpoints = Checkpoints(workdir, config.train.keep)
    last = checkpoints.step("last")
    if last is None:
        state, notes = replicate(initial(init_variables(experiment, config.seed)), mesh), {}
    else:
        like = _with_sharding(jax.eval_shape(initial, abstract_variables(experiment)), mesh)
        restored = checkpoints.restore(last, like, iterator)
        state, notes = restored.state, restored.notes
        log.info("continuing from step %d of %d in %s", last, total_steps, workdir)
        if config.train.on_nonfinite == "stop" and int(state.nonfinite):
            raise NonFiniteLoss(
                f"{workdir}: the loss or its gradient was not finite in {int(state.nonfinite)} of the first {last} "
                "steps; --config.train.on_nonfinite=skip goes on without those batches"
            )
    first = last or 0

    clock = Clock(notes.get("clock"))
    sums = {name: np.float32(value) for name, value in notes.get("sums", {}).items()}
    writer = MetricWriter(workdir, resume_step=first)
    progress = Progress(total_steps)
    eval_steps = round(config.train.eval_epochs * per_epoch)
    results: Results | None = None
    utilisation = cost.Utilisation(step, mesh.size, config.model.dtype)
    pending: tuple[int, dict[str, np.ndarray], dict[str, Any]] | None = None

    def look(at: int, batch: dict[str, np.ndarray], metrics: dict[str, Any]) -> None:
        if metrics["nonfinite"]:
            ids = dataset.image_ids(data.train_split)[batch["image_index"]]
            message = f"step {at}: the loss or its gradient is not finite; images of the batch: {', '.join(ids)}"
            if config.train.on_nonfinite == "skip":
                log.warning("%s; its update was skipped", message)
            else:
                save()
                raise NonFiniteLoss(
                    f"{message}. The parameters before it are saved in {checkpoints.folder}. Look at these images, "
                    "lower config.optim.lr in a new work folder, or go on without them: "
                    "--config.train.on_nonfinite=skip"
                )
        progress.update(at, clock, loss=float(metrics["loss"]))

    def save(metrics: dict[str, float] | None = None) -> None:
        notes = {
            "clock": clock.state(),
            "sums": {name: float(value) for name, value in jax.device_get(sums).items()},
            "config": config.to_dict(),
            "total_steps": total_steps,
        }
        checkpoints.save(int(state.step), state, notes, iterator, metrics)

    # Whatever ends the loop, a checkpoint that is being saved is completed.
    with _stop_signals() as stopped, clock, closing(checkpoints), closing(writer), closing(progress):
        for at in range(first + 1, total_steps + 1):
            with clock.waiting_for_data():
                batch = next(iterator)
            device_batch = put_batch(batch, mesh, config.parallel.mapping)
            with clock.paused():  # compiles when the shapes are new
                utilisation.count(state, device_batch, table)
            state, metrics = step(state, device_batch, table)
            sums = _add(sums, metrics)
            clock.tick(config.train.batch_size)
            # The step before this one is finished by now: looking at its numbers keeps the device busy.
            if pending is not None:
                look(*pending)
            pending = (at, batch, metrics)

            if at % config.train.log_steps == 0 or at == total_steps:
                look(*pending)
                pending = None
                values = _means(jax.device_get(sums)) | {"lr": float(rate((at - 1) // config.optim.accumulate))}
                timing = clock.interval(total_steps - at) | utilisation.report(clock)
                writer.write(at, "train", values, timing)
                sums = {}
            if (eval_steps and at % eval_steps == 0) or at == total_steps:
                with clock.paused():
                    results = evaluate(state.variables, _subject(experiment, at))
                    writer.write(at, "eval", results.metrics, clock.totals())
                    progress.message(_line(at, total_steps, config.data.val_split, results))
                    save(results.metrics)
                    write_curves(workdir)
            elif at % config.train.checkpoint_steps == 0 or stopped:
                save()
            if stopped and at < total_steps:
                name = signal.Signals(stopped[0]).name
                log.warning("stopped by %s after step %d of %d; the same command continues", name, at, total_steps)
                raise Interrupted(128 + stopped[0])
    if results is None:  # everything was done already
        results = evaluate(state.variables, _subject(experiment, first))
    return results


def claim(workdir: Path, experiment: Experiment) -> None:
    """Makes `workdir` the folder of this configuration, or checks that it is; keeps the vocabulary beside it.

    A folder without a checkpoint holds nothing that another configuration could spoil. Raises ValueError with the
    fields that differ.
    """
    path = workdir / "config.json"
    if path.exists() and any((workdir / "checkpoints").glob("*")):
        found = differences(experiment.config.to_dict(), load_config(path).to_dict())
        found = [line for line in found if not line.startswith(FREE_TO_CHANGE)]
        if found:
            raise ValueError(
                f"{workdir} holds a run of another configuration; choose another --workdir or go back to:\n  "
                + "\n  ".join(found)
            )
        return
    path.unlink(missing_ok=True)  # until all is in place
    workdir.mkdir(parents=True, exist_ok=True)
    source = vocabulary_file(experiment.config)
    shutil.copyfile(source, workdir / f"vocabulary{source.suffix}")
    save_config(experiment.config, path)


def make_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """The devices that config.parallel.devices asks for."""
    devices = jax.devices()
    wanted = config.parallel.devices or len(devices)
    if wanted > len(devices):
        raise ValueError(f"config.parallel.devices is {wanted}, this machine has {len(devices)}")
    return data_mesh(devices[:wanted])


def _divide(rows: int, parts: int, what: str) -> int:
    if rows % parts:
        raise ValueError(f"config.train.batch_size: {rows} do not divide among {parts} {what}")
    return rows // parts


def _with_sharding(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


@jax.jit
def _add(sums: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Running sums of the metrics since the last log line."""
    return {name: sums.get(name, 0.0) + value for name, value in metrics.items()}


def _means(sums: dict[str, Any]) -> dict[str, float]:
    steps = float(sums["finite"])
    means = {name: float(value) / max(steps, 1.0) for name, value in sums.items() if name != "finite"}
    return means | {"nonfinite": float(sums["nonfinite"])}


def _subject(experiment: Experiment, at: int) -> Subject:
    config = experiment.config
    return Subject(
        dataset=experiment.dataset.path.parent.name,
        split=config.data.val_split,
        checkpoint_step=at,
        parameters=f"running average (decay {config.optim.ema})" if config.optim.ema else "trained",
        dtype=config.model.dtype,
        selected_on="none",
    )


def _line(at: int, steps: int, split: str, results: Results) -> str:
    m = results.metrics
    recalls = "  ".join(
        f"{d} R@1/5/10 {m[f'{d}_r1']:.1f} {m[f'{d}_r5']:.1f} {m[f'{d}_r10']:.1f}" for d in ("i2t", "t2i")
    )
    return f"step {at}/{steps}  {split}: {recalls}  rSum {m['rsum']:.1f}"


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them; a second SIGINT ends at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
