"""The training loop: batches in; steps, log lines, evaluations, checkpoints out. Resumes exactly where it stopped.

The step itself is `train_step` in training/step.py; training/setup.py gives it its options and maps it over devices.
"""

from __future__ import annotations

import logging
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from shnet_jax.evaluation.evaluator import Evaluator
from shnet_jax.evaluation.metrics import recall_line
from shnet_jax.evaluation.protocols import Results
from shnet_jax.experiment import Experiment, assemble, init_variables
from shnet_jax.observe import cost
from shnet_jax.observe.banner import parameter_count
from shnet_jax.observe.clock import TimeRecord, shares_line
from shnet_jax.observe.profile import Profile
from shnet_jax.observe.progress import Progress, waiting
from shnet_jax.observe.trackers import open_trackers
from shnet_jax.observe.writer import MetricWriter, NoWriter
from shnet_jax.parallel import hosts
from shnet_jax.parallel.mapping import put_batch
from shnet_jax.training.checkpoint import CheckpointError, Checkpoints
from shnet_jax.training.setup import setup_training, training_data
from shnet_jax.training.signals import Interrupted, StopVote, stop_signals
from shnet_jax.training.state import TrainState
from shnet_jax.training.warm_start import warm_start
from shnet_jax.training.workdir import claimed, with_dtypes
from shnet_jax.types import DATA

log = logging.getLogger(__name__)

FIRST_LINE = 10
"""Step of the first log line, where config.train.log_steps is larger: a run shows early whether it learns."""


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
        with waiting("preparing the model and the data"):
            training = Training(experiment, Path(workdir))
        return training.run()


class Training:
    """A run in its work folder: state, data position, running sums, log and checkpoints.

    The device is kept busy: metrics of a step are read once the next one is under way. Nothing is logged, evaluated or
    saved before the metrics of the newest step were read.
    """

    def __init__(self, experiment: Experiment, workdir: Path):
        started, config = time.perf_counter(), experiment.config
        self.experiment, self.config, self.workdir = experiment, config, workdir
        self.setup = setup_training(experiment)
        self.iterator, self.table = training_data(experiment, self.setup.mesh)
        self.evaluator = Evaluator(experiment, config.data.val_split, self.setup.mesh)
        self.checkpoints = Checkpoints(workdir, config.train.keep)
        self.first = self.checkpoints.step("last") or 0
        self.state, notes = self._restored() if self.first else (self._initial(), {})
        self.record = TimeRecord(workdir, written=hosts.is_first())
        self.clock = self.record.resume(self.first, notes.get("clock"), started)
        self.sums: dict[str, Any] = {name: np.float32(value) for name, value in notes.get("sums", {}).items()}
        self._unread: tuple[int, dict[str, jax.Array]] | None = None  # (step, metrics) of the newest step
        self.writer: MetricWriter | NoWriter = NoWriter()
        if hosts.is_first():
            self.writer = MetricWriter(workdir, self.first, open_trackers(config, workdir))
        self.progress = Progress(self.setup.total_steps, shown=hosts.is_first())
        self.profile = Profile(config.train.profile_steps, workdir, self.first, shown=hosts.is_first())
        dtypes = config.model.dtype, config.text.dtype
        self.utilisation = cost.Utilisation(self.setup.step, self.setup.mesh.size, dtypes)

    def _initial(self) -> TrainState:
        variables = init_variables(self.experiment, self.config.seed)
        if self.config.train.init_from:
            variables = warm_start(variables, self.config)
        return self.setup.first_state(variables)

    def _restored(self) -> tuple[TrainState, dict[str, Any]]:
        """State and notes of the last checkpoint; moves the iterator to its position."""
        check_job(self.checkpoints.notes(self.first), self.setup.mesh.shape[DATA], self.workdir)
        restored = self.checkpoints.restore(self.first, self.setup.like, self.iterator)
        log.info("continuing from step %d of %d in %s", self.first, self.setup.total_steps, self.workdir)
        nonfinite = int(restored.state.nonfinite)
        if self.config.train.on_nonfinite == "stop" and nonfinite:
            raise NonFiniteLoss(
                f"{self.workdir}: the loss or its gradient was not finite in {nonfinite} of the first {self.first} "
                "steps; --config.train.on_nonfinite=skip goes on without those batches"
            )
        return restored.state, restored.notes

    def run(self) -> Results:
        """Trains to the end and returns the last validation result."""
        intervals, total = self.setup.intervals, self.setup.total_steps
        length, first = f"{total} steps of {self.config.train.batch_size} pairs", self.first + 1
        parameters = parameter_count(self.setup.like.params["model"])
        self.progress.message(f"{parameters} parameters, {length}; first step {first}")
        results: Results | None = None
        vote = StopVote()
        # However the loop ends, a checkpoint under way is completed, unless one process of several fails alone.
        alone = hosts.ending_together(NonFiniteLoss)
        with (
            stop_signals() as signals,
            self.clock,
            closing(self.writer),
            closing(self.checkpoints),  # first: the time between a signal and the end of the process may be short
            closing(self.progress),
            closing(self.profile),
            alone,
        ):
            for step in range(self.first + 1, total + 1):
                with self.profile.step(step):
                    self.start_step(step)
                stop = vote.after(step, signals, self.clock.speed()[1])
                logs = step % intervals.log == 0 or step in (min(FIRST_LINE, intervals.log), total)
                evaluates = step % intervals.evaluate == 0 or step == total
                saves = step % intervals.save == 0 or stop is not None
                if logs or evaluates or saves or self.profile.ends_with(step):
                    self.read_metrics()
                if self.profile.ends_with(step):
                    self.profile.close()
                if logs:
                    self.write_log_line(step)
                if evaluates:
                    results = self.evaluate_and_save(step)
                elif saves:
                    self.save()
                self.record.update(step, self.clock)
                if stop is not None or step == total:
                    self.settle(step)
                if stop is not None:
                    name = signal.Signals(stop).name
                    log.warning("stopped by %s after step %d of %d; the same command continues", name, step, total)
                    raise Interrupted(128 + stop)
        return results or self.evaluate(self.first)  # everything was done already

    def start_step(self, step: int) -> None:
        """Starts step number `step` on its batch and reads the metrics of the one before."""
        with self.clock.spent_on("input"):
            host_batch = next(self.iterator)
        batch = put_batch(host_batch, self.setup.mesh, self.config.parallel.mapping)
        with self.clock.spent_on("compile"):  # when the shapes are new, which they are in all processes
            if self.utilisation.count(self.state, batch, self.table):
                hosts.meet(f"compiled for step {step}")
        self.state, metrics = self.setup.step(self.state, batch, self.table)
        self.read_metrics()
        self._unread = step, metrics
        self.sums = _add(self.sums, metrics)
        self.clock.tick(self.config.train.batch_size)

    def read_metrics(self) -> None:
        """Waits for the newest step whose metrics were not read yet: shows its loss, reports one that is not finite."""
        if self._unread is None:
            return
        (step, metrics), self._unread = self._unread, None
        loss, nonfinite = jax.device_get((metrics["loss"], metrics["nonfinite"]))
        if nonfinite:
            self.report_nonfinite(step)
        self.progress.update(step, self.clock, loss=float(loss))

    def report_nonfinite(self, step: int) -> None:
        """Names the images of a batch whose loss is not finite; stops, unless such batches are skipped.

        The step after it may be under way. With on_nonfinite = "stop" it changes nothing, so the state is still the one
        right after `step`; and as batches are a function of their number, the iterator is moved to that place as well.
        """
        position = self.iterator.get_state()
        self.iterator.set_state(position | {"next_index": step - 1})
        batch = next(self.iterator)
        ids = self.experiment.dataset.image_ids(self.config.data.train_split)[batch["image_index"]]
        part = "" if jax.process_count() == 1 else " in this process"
        message = f"step {step}: the loss or its gradient is not finite; images of the batch{part}: {', '.join(ids)}"
        if self.config.train.on_nonfinite == "skip":
            log.warning("%s; its update was skipped", message)
            self.iterator.set_state(position)
            return
        self.save()
        raise NonFiniteLoss(
            f"{message}. The parameters before it are saved in {self.checkpoints.folder}. Look at these images, "
            "lower config.optim.lr in a new work folder, or go on without them: "
            "--config.train.on_nonfinite=skip"
        )

    def write_log_line(self, step: int) -> None:
        """Writes the means of the metrics since the last log line, and begins new sums."""
        timing = self.clock.interval(self.setup.total_steps - step) | self.utilisation.report(self.clock)
        timing |= self.clock.shares()
        updates = (int(self.state.step) - int(self.state.nonfinite)) // self.config.optim.accumulate
        learning_rate = float(self.setup.rate(max(updates - 1, 0)))
        self.writer.write(step, "train", _means(jax.device_get(self.sums)) | {"lr": learning_rate}, timing)
        self.sums = {}

    def evaluate(self, step: int) -> Results:
        """The validation result of the state, which is that after `step`."""
        with waiting(f"evaluating step {step}"):
            return self.evaluator.run(self.state.variables, step)

    def evaluate_and_save(self, step: int) -> Results:
        """Evaluates; writes the result to log and curves and saves a checkpoint with it."""
        with self.clock.spent_on("evaluation"):
            results = self.evaluate(step)
            self.writer.write(step, "eval", results.metrics, self.clock.totals() | self.clock.shares())
            split = self.config.data.val_split
            self.progress.message(f"step {step}/{self.setup.total_steps}  {split}: {recall_line(results.metrics)}")
            self.save(results.metrics)
            if hosts.is_first():
                from shnet_jax.observe.curves import write_curves  # matplotlib is slow to import; most modes do without

                write_curves(self.workdir)
        return results

    def save(self, metrics: dict[str, float] | None = None) -> None:
        """Starts to save state, data position, clock and sums; metrics: the validation result of this state."""
        sums = {name: float(value) for name, value in jax.device_get(self.sums).items()}
        job = {"devices": self.setup.mesh.shape[DATA], "processes": jax.process_count()}
        notes = {"clock": self.clock.state(), "sums": sums} | job
        with self.clock.spent_on("checkpoint"):
            self.checkpoints.save(int(self.state.step), self.state, notes, self.iterator, metrics)

    def settle(self, step: int) -> None:
        """Waits for the checkpoint under way, keeps the time that the run took until here, and shows it."""
        with self.clock.spent_on("checkpoint"):
            self.checkpoints.wait()
        self.record.write(step, self.clock)
        self.progress.message(shares_line(self.clock.spent()))


def check_job(notes: dict[str, Any], devices: int, workdir: Path) -> None:
    """Compares this job with the one that saved the checkpoint of `notes`. devices: parts of a batch.

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
