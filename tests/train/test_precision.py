"""Training with bfloat16 operands against training with float32, from data set to recalls."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from shnet_jax import experiment
from shnet_jax.modes import plan as plan_mode
from shnet_jax.training import workdir as workdirs
from shnet_jax.training.load import load
from shnet_jax.training.loop import train_and_evaluate
from tests.train import tiny

BAND = 30.0
"""Points of rSum (of 600, by chance 77) within which both precisions lie. Measured: 248.0 and 246.5."""


def trained(workdir, dtype, seed=0):
    """(rSum on the 40 images trained on, losses) of VSE-infinity: 10 unseen ones hardly tell runs apart."""
    off = dict.fromkeys(("semantic", "spatial", "scene_tokens", "category_token"), False)
    changes = {"data__val_split": "train", "loss__weights__infonce": 1.0, "loss__weights__triplet": 0.0}
    changes |= {"train__steps": 60, "train__batch_size": 100, "train__eval_epochs": 0.0, "train__log_steps": 10}
    changes |= {"train__checkpoint_steps": 60, "optim__ema": 0.0, "optim__lr": 3e-3, "data__word_change": 0.0}
    changes |= {"data__max_tokens": 16, "data__token_buckets": (16,)}
    changes |= {f"model__{name}": value for name, value in off.items()}
    config = tiny.config(seed=seed, model__dtype=dtype, text__dtype=dtype, **changes)
    with tiny.quick():
        results = train_and_evaluate(config, workdir)
    return results.metrics["rsum"], [line["loss"] for line in tiny.lines(workdir) if line["kind"] == "train"]


@pytest.mark.slow
def test_bfloat16_trains_like_float32(tmp_path):
    exact, losses = trained(tmp_path / "float32", "float32")
    rounded, rounded_losses = trained(tmp_path / "bfloat16", "bfloat16")
    assert exact > 200 and abs(rounded - exact) < BAND
    assert losses != rounded_losses  # the option does something
    np.testing.assert_allclose(rounded_losses, losses, rtol=0.02)  # measured: 0.0003


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this machine one that is fast at a dtype."""

    def be(dtype):
        for module in (experiment, workdirs):
            monkeypatch.setattr(module, "fast_dtype", lambda device: (dtype, f"a machine for {dtype}"))

    return be


def automatic(**changes):
    return tiny.config(
        model__name="tests.train.toy", model__dtype="auto", text__dtype="auto", train__steps=1, **changes
    )


def dtypes(config):
    return config.model.dtype, config.text.dtype


def settled(config, folder):
    """The dtypes of a run in `folder`, on this machine."""
    return dtypes(experiment.assemble(workdirs.with_dtypes(config, folder)).config)


@pytest.mark.parametrize(("first", "then"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_run_keeps_the_dtype_that_it_began_with(first, then, machine, caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="shnet_jax")
    machine(first)
    with tiny.quick():
        train_and_evaluate(automatic(), tmp_path)
    said = f"config.model.dtype and config.text.dtype: auto is {first} on a machine for {first}"
    assert said in caplog.text
    assert dtypes(workdirs.load_config(tmp_path / "config.json")) == (first, first)
    machine(then)  # copied to another machine
    with tiny.quick():
        train_and_evaluate(automatic(), tmp_path)  # nothing is left to do, and nothing refused
    continued = workdirs.with_dtypes(automatic(), tmp_path)
    assert dtypes(continued) == (first, first)
    assert f"config.text.dtype: auto is {first}, as the run in {tmp_path} began with" in caplog.text
    workdirs.claim(tmp_path, experiment.assemble(continued))
    assert dtypes(load(tmp_path, automatic()).experiment.config) == (first, first)
    with pytest.raises(workdirs.WorkdirError, match=f"config.model.dtype: '{then}', there '{first}'"):
        workdirs.claim(tmp_path, experiment.assemble(automatic()))


def test_a_folder_without_a_checkpoint_decides_nothing(machine, tmp_path):
    machine("bfloat16")
    workdirs.claim(tmp_path, experiment.assemble(automatic()))
    machine("float32")
    assert settled(automatic(), tmp_path) == ("float32", "float32")


def test_one_of_two_fields_is_automatic(machine, tmp_path):
    machine("bfloat16")
    config = automatic()
    config.text.dtype = "float32"
    assert settled(config, tmp_path) == ("bfloat16", "float32")


def test_the_processes_of_a_job_agree(machine, monkeypatch, tmp_path):
    machine("bfloat16")
    monkeypatch.setattr(workdirs.jax, "process_count", lambda: 2)
    for slow, expected in ((True, "float32"), (False, "bfloat16")):
        monkeypatch.setattr(workdirs.hosts, "anywhere", lambda flag, slow=slow: flag or slow)
        assert settled(automatic(), tmp_path) == (expected, expected)


def test_a_plan_is_for_its_target(monkeypatch, tmp_path):
    class Planned(Exception):
        pass

    def planned(config):
        raise Planned(*dtypes(config))

    tpu = [SimpleNamespace(platform="tpu")]
    monkeypatch.setattr(plan_mode, "target_devices", lambda target: tpu)
    monkeypatch.setattr(plan_mode, "data_mesh", lambda devices: None)
    monkeypatch.setattr(plan_mode, "describe", planned)
    with pytest.raises(Planned) as found:
        plan_mode.plan(automatic(), tmp_path, "tpu:v5e:2x4")
    assert found.value.args == ("bfloat16", "bfloat16")
