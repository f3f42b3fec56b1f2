"""The training loop: batches in; steps, log lines, evaluations, checkpoints out. Resumes exactly where it stopped."""

from __future__ import annotations

import dataclasses
import logging
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from shnet_jax.evaluate.protocols import Results
from shnet_jax.evaluate.report import one_line
from shnet_jax.evaluate.split import make_evaluator, subject
from shnet_jax.experiment import Experiment, assemble
from shnet_jax.observe import cost
from shnet_jax.observe.clock import Clock
from shnet_jax.observe.curves import write_curves
from shnet_jax.observe.progress import Progress
from shnet_jax.observe.writer import MetricWriter, NoWriter
from shnet_jax.parallel import hosts
from shnet_jax.parallel.mapping import put_batch
from shnet_jax.train.checkpoint import CheckpointError, Checkpoints
from shnet_jax.train.prepare import prepare
from shnet_jax.train.signals import Interrupted, stop_signals
from shnet_jax.train.workdir import claimed, with_dtypes

log = logging.getLogger(__name__)

STOP_STEPS = 10
"""Steps between two looks of several processes at whether one of them was asked to stop."""


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became infinite or NaN."""


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> Results:
    """Trains to the end, from the last checkpoint in `workdir` if there is one; returns the last validation result.

    Writes config.json, the vocabulary, metrics.jsonl, TensorBoard events, curves.png and checkpoints/ into `workdir`.
    No other run can write there meanwhile (FolderInUse), and a damaged checkpoint is set aside for the one before it.
    Raises NonFiniteLoss, and Interrupted after SIGTERM or SIGINT; in both cases the state was saved. After a loss that
    is not finite, config.train.on_nonfinite = "skip" goes on as if it had been set from the start.
    """
    experiment = assemble(with_dtypes(config, Path(workdir)))
    with claimed(Path(workdir), experiment):
        return _train(experiment, Path(workdir))


def _train(experiment: Experiment, workdir: Path) -> Results:
    config, data = experiment.config, experiment.config.data
    parts = prepare(experiment)
    mesh, iterator, total_steps = parts.mesh, parts.iterator, parts.total_steps
    evaluate = make_evaluator(experiment, data.val_split, mesh)

    checkpoints = Checkpoints(workdir, config.train.keep)
    first = checkpoints.step("last") or 0
    notes: dict[str, Any] = {}
    if first:
        check_job(checkpoints.notes(first), mesh.size, workdir)
        restored = checkpoints.restore(first, parts.like, iterator)
        state, notes = restored.state, restored.notes
        log.info("continuing from step %d of %d in %s", first, total_steps, workdir)
        if config.train.on_nonfinite == "stop" and int(state.nonfinite):
            raise NonFiniteLoss(
                f"{workdir}: the loss or its gradient was not finite in {int(state.nonfinite)} of the first {first} "
                "steps; --config.train.on_nonfinite=skip goes on without those batches"
            )
    else:
        state = parts.first_state()

    clock = Clock(notes.get("clock"))
    sums = {name: np.float32(value) for name, value in notes.get("sums", {}).items()}
    writer = MetricWriter(workdir, resume_step=first) if hosts.is_first() else NoWriter()
    progress = Progress(total_steps, shown=hosts.is_first())
    every = config.train.eval_epochs
    eval_steps = max(1, round(every * parts.steps_per_epoch)) if every else total_steps
    utilisation = cost.Utilisation(parts.step, mesh.size, (config.model.dtype, config.text.dtype))
    results: Results | None = None
    place, latest = iterator.get_state(), dict[str, Any]()
    pending: tuple[int, dict[str, np.ndarray], dict[str, Any]] | None = None

    def look(at: int, batch: dict[str, np.ndarray], metrics: dict[str, Any]) -> None:
        if metrics["nonfinite"]:
            ids = experiment.dataset.image_ids(data.train_split)[batch["image_index"]]
            part = "" if jax.process_count() == 1 else " in this process"
            message = f"step {at}: the loss or its gradient is not finite; images of the batch{part}: {', '.join(ids)}"
            if config.train.on_nonfinite == "skip":
                log.warning("%s; its update was skipped", message)
            else:
                step_back(at)
                save()
                raise NonFiniteLoss(
                    f"{message}. The parameters before it are saved in {checkpoints.folder}. Look at these images, "
                    "lower config.optim.lr in a new work folder, or go on without them: "
                    "--config.train.on_nonfinite=skip"
                )
        progress.update(at, clock, loss=float(metrics["loss"]))

    def step_back(at: int) -> None:
        # The batch after the one that is looked at is on its way. After a fault it changes no more than the counters.
        nonlocal state
        if int(state.step) > at:
            counted = latest["nonfinite"].astype(state.nonfinite.dtype)
            state = dataclasses.replace(state, step=state.step - 1, nonfinite=state.nonfinite - counted)
            iterator.set_state(place)

    def learning_rate() -> float:
        updates = (int(state.step) - int(state.nonfinite)) // config.optim.accumulate
        return float(parts.rate(max(updates - 1, 0)))

    def save(metrics: dict[str, float] | None = None) -> None:
        interval = {name: float(value) for name, value in jax.device_get(sums).items()}
        notes = {"clock": clock.state(), "sums": interval, "devices": mesh.size, "processes": jax.process_count()}
        checkpoints.save(int(state.step), state, notes, iterator, metrics)

    # Whatever ends the loop, a checkpoint that is being saved is completed, unless a process of several fails alone.
    alone = hosts.ending_together(NonFiniteLoss)
    with stop_signals() as stopped, clock, closing(checkpoints), closing(writer), closing(progress), alone:
        for at in range(first + 1, total_steps + 1):
            place = iterator.get_state()
            with clock.waiting_for_data():
                batch = next(iterator)
            device_batch = put_batch(batch, mesh, config.parallel.mapping)
            with clock.paused():  # compiles when the shapes are new
                utilisation.count(state, device_batch, parts.table)
            state, latest = parts.step(state, device_batch, parts.table)
            # The step before this one is finished by now: looking at its numbers keeps the device busy.
            if pending is not None:
                look(*pending)
            pending = (at, batch, latest)
            sums = _add(sums, latest)
            clock.tick(config.train.batch_size)
            # One answer for the rest of this step, and the same in all processes, which ask each other now and then.
            ask = jax.process_count() == 1 or at % STOP_STEPS == 0
            stop = hosts.anywhere(bool(stopped)) if ask else False

            if at % config.train.log_steps == 0 or at == total_steps:
                look(*pending)
                pending = None
                timing = clock.interval(total_steps - at) | utilisation.report(clock)
                writer.write(at, "train", _means(jax.device_get(sums)) | {"lr": learning_rate()}, timing)
                sums = {}
            if at % eval_steps == 0 or at == total_steps:
                with clock.paused():
                    results = evaluate(state.variables, subject(experiment, data.val_split, at, "none", mesh.size))
                    writer.write(at, "eval", results.metrics, clock.totals())
                    progress.message(f"step {at}/{total_steps}  {data.val_split}: {one_line(results)}")
                    save(results.metrics)
                    if hosts.is_first():
                        write_curves(workdir)
            elif at % config.train.checkpoint_steps == 0 or stop:
                save()
            if stop:
                number = stopped[0] if stopped else signal.SIGTERM  # another process was told
                name = signal.Signals(number).name
                log.warning("stopped by %s after step %d of %d; the same command continues", name, at, total_steps)
                raise Interrupted(128 + number)
    if results is None:  # everything was done already
        results = evaluate(state.variables, subject(experiment, data.val_split, first, "none", mesh.size))
    return results


def check_job(notes: dict[str, Any], devices: int, workdir: Path) -> None:
    """Compares this job with the one that saved the checkpoint of `notes`.

    Devices may be others: batches and their order stay the same, but each device's dropout and BatchNorm statistics are
    of other rows, so the run goes on a little differently than undisturbed. Processes may not: each has its own place
    in the data. Raises CheckpointError.
    """
    before, now = notes.get("processes", jax.process_count()), jax.process_count()
    if before != now:
        raise CheckpointError(
            f"{workdir}: saved by a job of {before} processes, this one has {now}; each process keeps its own place in "
            f"the data, so start {before} of them"
        )
    if notes.get("devices", devices) != devices:
        log.warning(
            "%s: saved on %d devices, going on with %d: the same batches in the same order, but dropout and BatchNorm "
            "statistics of each device are of other rows than they would have been",
            workdir,
            notes["devices"],
            devices,
        )


@jax.jit
def _add(sums: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Running sums of the metrics since the last log line."""
    return {name: sums.get(name, 0.0) + value for name, value in metrics.items()}


def _means(sums: dict[str, Any]) -> dict[str, float]:
    steps = float(sums["finite"])
    means = {name: float(value) / max(steps, 1.0) for name, value in sums.items() if name != "finite"}
    return means | {"nonfinite": float(sums["nonfinite"])}
