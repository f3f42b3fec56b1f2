"""Durations in steps, epochs and per cent, where they are used, and in the configurations of older runs."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from shnet_jax.durations import TrainingLength, count_steps
from shnet_jax.losses import total, triplet
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.training import momentum
from shnet_jax.training.optim import schedule
from shnet_jax.training.setup import StepIntervals, step_intervals
from shnet_jax.training.workdir import _changes

LENGTH = TrainingLength(steps_per_epoch=7.5, total_steps=200)


def config(**changes):
    """base.py without any duration but the length of the training; `changes` by dotted name with "__" for the dot."""
    c = base.get_config()
    off = {"loss.triplet.warmup_epochs": 0.0, "optim.decay_epochs": (), "train.log_steps": 0}
    off |= {"train.eval_epochs": 0.0, "train.checkpoint_steps": 0}
    c.update_from_flattened_dict(off | {name.replace("__", "."): value for name, value in changes.items()})
    return c


@pytest.mark.parametrize(
    ("section", "steps"),
    [
        ({}, 0),
        ({"warmup_epochs": 0.0, "warmup_steps": 0}, 0),
        ({"warmup_epochs": 1.5, "warmup_steps": 0}, 11),
        ({"warmup_steps": 30, "warmup_percent": 0.0}, 30),
        ({"warmup_percent": 12.5}, 25),
    ],
)
def test_units(section, steps):
    assert LENGTH.steps(section, "warmup", "x") == steps
    in_updates = TrainingLength(7.5 / 4, 50, batches=4)
    assert in_updates.steps(section, "warmup", "x") == pytest.approx(steps / 4, abs=0.75)


def test_points_in_time():
    assert LENGTH.steps({"from_epoch": 2.0, "from_step": 0}, "from", "x") == 15
    assert LENGTH.moments({"decay_epochs": (1.0, 2.5), "decay_steps": ()}, "decay", "x") == [8, 19]
    assert LENGTH.moments({"decay_percent": (50.0, 75.0)}, "decay", "x") == [100, 150]
    assert LENGTH.moments({"decay_steps": ()}, "decay", "x") == []


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"warmup_epochs": 1.0, "warmup_steps": 5},
            r"config\.optim\.warmup_steps is 5 and config\.optim\.warmup_epochs is 1\.0: set one of them, and the "
            "others to 0",
        ),
        ({"warmup_epochs": (1.0,), "warmup_steps": (5,)}, r"and the others to \(\)"),
        (
            {"warmup_percent": -1.0},
            r"config\.optim\.warmup_percent is -1\.0; it must be a finite number of percent >= 0",
        ),
        ({"warmup_epochs": (2.0, float("nan"))}, "must be a finite number of epochs"),
    ],
)
def test_wrong_durations_are_named(section, message):
    with pytest.raises(ValueError, match=message):
        LENGTH.steps(section, "warmup", "config.optim")


def test_per_cent_of_an_unknown_length():
    with pytest.raises(ValueError, match=r"x\.warmup_percent is 5\.0, and the length of the training is not known"):
        TrainingLength(7.5, 0).steps({"warmup_percent": 5.0}, "warmup", "x")


def test_the_length_of_a_training():
    assert count_steps({"steps": 0, "epochs": 2.1}, 7.5) == 16
    assert count_steps({"steps": 3, "epochs": 2.1}, 7.5) == 3


def test_intervals_of_a_training():
    # checkpoint_percent 0.1 of 200 steps are less than one.
    every = config(train__log_percent=1.0, train__eval_steps=30, train__checkpoint_percent=0.1)
    assert step_intervals(every, 7.5, 200) == StepIntervals(log=2, evaluate=30, save=1)
    at_the_end = config(train__log_epochs=2.0, train__checkpoint_epochs=0.5)
    assert step_intervals(at_the_end, 7.5, 200) == StepIntervals(log=15, evaluate=200, save=4)
    with pytest.raises(ValueError, match=r"config\.train\.checkpoint_steps is 0; it must be at least 1, or set checkp"):
        step_intervals(config(train__log_steps=1), 7.5, 200)


def test_the_learning_rate():
    """4 batches an update: 100 updates, 5 of an epoch."""
    changes = {"optim__accumulate": 4, "optim__lr": 1.0, "optim__decay_factor": 0.5}
    by_epochs, by_steps, by_percent = (
        schedule(config(**changes, **{f"optim__{name}": value for name, value in fields.items()}), 5, 100)
        for fields in (
            {"warmup_epochs": 2.0, "decay_epochs": (4.0, 10.0)},
            {"warmup_steps": 40, "decay_steps": (80, 200)},
            {"warmup_percent": 10.0, "decay_percent": (20.0, 50.0)},
        )
    )
    updates = np.arange(100)
    rates = by_epochs(updates)
    np.testing.assert_allclose(rates[np.array([0, 5, 10, 19, 20, 49, 50])], [0, 0.5, 1, 1, 0.5, 0.5, 0.25])
    for rate in (by_steps, by_percent):
        np.testing.assert_array_equal(rate(updates), rates)


def test_the_warm_up_of_a_loss_and_the_start_of_queues():
    options = config(loss__triplet__warmup_percent=25.0).loss.triplet
    assert total._options("triplet", triplet, options, TrainingLength(5, 40))["warmup_steps"] == 10
    c = config(momentum__queue=512, momentum__from_percent=25.0)
    assert momentum.options(c, RetrievalModel(), 5, 40).from_step == 10
    c.momentum.from_percent = 100.0
    with pytest.raises(ValueError, match=r"momentum\.from_percent is 100\.0, step 40, and the run has 40 steps"):
        momentum.check_start(c, 5, 40)


def test_a_run_that_is_older_than_these_fields_goes_on(caplog):
    """Without the new units of its durations, and without the sections of other models; with no new duration."""
    ours = base.get_config()
    saved = ours.to_dict()
    for section in (saved["loss"]["triplet"], saved["optim"], saved["train"], saved["momentum"]):
        for field in list(section):
            if field.endswith("_percent") or field in ("warmup_steps", "decay_steps", "from_step", "eval_steps"):
                del section[field]
    del saved["train"]["log_epochs"], saved["train"]["checkpoint_epochs"]
    del saved["model"]["user"], saved["model"]["esa"], saved["model"]["clip"]
    saved["model"]["cmsei"]["block"] = 64  # the default then
    with caplog.at_level(logging.INFO, logger="shnet_jax"):
        assert _changes(ours.to_dict(), ConfigDict(saved), Path("run")) == []
    assert not caplog.text
    given = {
        "loss.triplet.warmup_steps": 3,
        "optim.decay_percent": (50.0,),
        "momentum.from_step": 9,
        "train.eval_steps": 5,
        "train.log_percent": 1.0,
        "train.checkpoint_epochs": 1.0,
    }
    ours.update_from_flattened_dict(given)
    refused = _changes(ours.to_dict(), ConfigDict(saved), Path("run"))
    assert [line.split(": ")[0].removeprefix("config.") for line in refused] == sorted(given)
