"""Extension of a finished run: the same work folder, trained for more steps."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.data.batches import steps_per_epoch
from shnet_jax.durations import count_steps
from shnet_jax.experiment import Experiment
from shnet_jax.training.optim import schedule

log = logging.getLogger(__name__)

LENGTH = ("config.train.epochs", "config.train.steps")
"""Fields that an extension changes, by dotted name."""


def refused_extension(workdir: Path, experiment: Experiment, saved: ConfigDict) -> str | None:
    """Why the run in `workdir` cannot get the length of `experiment`; None where it can, and says so in the log.

    A run is extended once it is finished, and only to more steps: until then its schedule has not ended.
    """
    config = experiment.config
    per_epoch = steps_per_epoch(experiment.dataset, config.data.train_split, config.train.batch_size)
    before, total = count_steps(saved.train, per_epoch), count_steps(config.train, per_epoch)
    # By the names of complete checkpoints: process 0 alone is here, and orbax would wait for the others.
    step = max((int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()), default=0)
    if total == before:
        return None
    if total < before:
        return f"config.train: {total} steps, the run has {before}; it can be extended and not shortened"
    if step < before:
        return f"config.train: {total} steps, the run is at step {step} of {before}; finish it first, then extend it"
    rates = [_learning_rate(one, per_epoch, length, step) for one, length in ((saved, before), (config, total))]
    log.info(
        "extending the run in %s from %d to %d steps: the schedule %r now ends there, and the learning rate goes on "
        "at %.3g (it ended at %.3g)",
        workdir,
        before,
        total,
        config.optim.schedule,
        rates[1],
        rates[0],
    )
    return None


def _learning_rate(config: ConfigDict | FrozenConfigDict, per_epoch: int, total: int, step: int) -> float:
    batches = config.optim.accumulate
    rate = schedule(config, per_epoch / batches, math.ceil(total / batches))
    return float(rate(max(step // batches - 1, 0) if step == total else step // batches))
