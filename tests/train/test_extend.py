"""Runs that begin with another run's parameters, and finished runs that go on."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from shnet_jax.modes.convert import convert
from shnet_jax.training.loop import train_and_evaluate
from shnet_jax.training.workdir import CONFIG, WorkdirError, load_config
from tests.train import tiny


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick():
        yield


def toy(**changes):
    fixed = {"model__name": "tests.train.toy", "train__eval_epochs": 0.0, "optim__warmup_epochs": 0.0}
    return tiny.config(**(fixed | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 3 steps at a constant rate."""
    path = tmp_path_factory.mktemp("extend") / "finished"
    train_and_evaluate(toy(train__steps=3, optim__schedule="constant"), path)
    return path


def test_a_finished_run_goes_on_as_if_it_had_been_longer(tmp_path, caplog):
    longer = toy(train__steps=5, optim__schedule="constant")
    train_and_evaluate(toy(train__steps=3, optim__schedule="constant"), tmp_path / "extended")
    with caplog.at_level("INFO", "shnet_jax"):
        train_and_evaluate(longer, tmp_path / "extended")
    assert "from 3 to 5 steps: the schedule 'constant' now ends there" in caplog.text
    train_and_evaluate(longer, tmp_path / "at_once")
    extended, at_once = (tiny.arrays(tmp_path / name, 5) for name in ("extended", "at_once"))
    assert extended.keys() == at_once.keys()
    for name, array in at_once.items():
        np.testing.assert_array_equal(extended[name], array, err_msg=name)
    assert load_config(tmp_path / "extended" / CONFIG).train.steps == 5
    with pytest.raises(
        WorkdirError, match=r"config\.train: 4 steps, the run has 5; it can be extended and not shorten"
    ):
        train_and_evaluate(toy(train__steps=4, optim__schedule="constant"), tmp_path / "extended")
    with pytest.raises(WorkdirError, match=r"config\.optim\.lr: 0\.1, there 0\.0005"):
        train_and_evaluate(toy(train__steps=7, optim__schedule="constant", optim__lr=0.1), tmp_path / "extended")
    assert load_config(tmp_path / "extended" / CONFIG).train.steps == 5


def test_the_schedule_of_an_extended_run_is_said(tmp_path, caplog):
    train_and_evaluate(toy(train__steps=4, optim__schedule="cosine"), tmp_path)
    with caplog.at_level("INFO", "shnet_jax"):
        train_and_evaluate(toy(train__steps=8, optim__schedule="cosine"), tmp_path)
    assert "the learning rate goes on at 0.00025 (it ended at 7.32e-05)" in caplog.text


def test_a_warm_start(finished, tmp_path):
    """From a work folder and from what was exported of it; the first step's parameters are those of the run."""
    convert(toy(convert__to=str(tmp_path / "exported"), train__steps=3), finished)
    sources = (finished, tmp_path / "exported", tmp_path / "exported" / "model.safetensors")
    trees = []
    for number, source in enumerate(sources):
        config = toy(train__steps=1, train__init_from=str(source), optim__lr=0.0, optim__ema=0.0)
        train_and_evaluate(config, tmp_path / str(number))
        trees.append({k: v for k, v in tiny.arrays(tmp_path / str(number), 1).items() if k.startswith("model")})
    averages = {k: v for k, v in tiny.arrays(finished, 3).items() if k.startswith("ema")}
    assert trees[0] and {k.removeprefix("model"): 0 for k in trees[0]} == {
        k.removeprefix("ema['params']"): 0 for k in averages if "['params']" in k
    }
    for name in trees[0]:
        expected = averages[f"ema['params']{name.removeprefix('model')}"]
        for tree in trees:
            np.testing.assert_array_equal(tree[name], expected, err_msg=name)


def test_a_warm_start_of_another_model(finished, tmp_path):
    other = {"train__steps": 1, "train__init_from": str(finished), "model__dim": 24, "optim__lr": 0.0}
    with pytest.raises(
        ValueError,
        match=r"a model of other arrays; --config.train.init_partial=True takes those that fit:\n  batch_stats/",
    ):
        train_and_evaluate(toy(**other), tmp_path / "strict")
    train_and_evaluate(toy(**other, train__init_partial=True), tmp_path / "partial")
    with pytest.raises(WorkdirError, match="not the work folder of a training run"):
        train_and_evaluate(toy(train__init_from=str(tmp_path)), tmp_path / "none")
    assert jax.tree.leaves(tiny.arrays(tmp_path / "partial", 1))
