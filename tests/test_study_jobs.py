"""Runs of a study at the same time: the same results, and an interrupted study continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from shnet_jax.modes import study_jobs
from shnet_jax.modes.study import study
from shnet_jax.modes.study_jobs import Processes, split_cores
from shnet_jax.training.signals import Interrupted
from tests.patience import PATIENCE
from tests.train import tiny


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick():
        yield


def configuration(jobs):
    """Two arms of 3 steps."""
    c = tiny.config(model__name="tests.train.toy", train__steps=3, train__log_steps=3, train__eval_epochs=0.0)
    c.study.arms = ConfigDict({"wide": {}, "narrow": {"model": {"dim": 4}}})
    c.study.only = ()
    c.study.seeds = (3,)
    c.study.jobs = jobs
    return c


def test_cores_are_shared_out():
    assert split_cores([0, 1, 2, 5, 6], 2) == [(0, 2, 6), (1, 5)]
    assert split_cores([4], 2) == [(4,), (4,)]
    assert split_cores([], 2) == [(), ()]


def test_no_jobs(tmp_path):
    with pytest.raises(ValueError, match=r"config\.study\.jobs is 0; expected at least 1"):
        study(configuration(0), tmp_path)


def test_runs_do_not_share_an_accelerator_or_a_bucket(tmp_path, monkeypatch):
    assert study_jobs.usable_jobs(configuration(2), tmp_path) == 2
    with monkeypatch.context() as patch:
        patch.setattr(study_jobs, "is_copy", lambda folder: True)
        assert study_jobs.usable_jobs(configuration(2), tmp_path) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert study_jobs.usable_jobs(configuration(2), tmp_path) == 1


@pytest.mark.slow
def test_runs_at_once_are_those_of_one_after_the_other(tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(study_jobs, "split_cores", lambda cores, jobs: [tuple(cores)] * jobs)  # sums in the same order
        runs = study(configuration(2), tmp_path / "at_once")
    output = capfd.readouterr()
    assert "wide, seed 3: " in output.err and "narrow, seed 3: " in output.err
    alone = study(configuration(1), tmp_path / "alone")
    assert list(runs) == list(alone) == ["narrow", "wide"]
    for arm in runs:
        ours, other = runs[arm][0].results, alone[arm][0].results
        np.testing.assert_array_equal(ours.queries.t2i, other.queries.t2i)
        assert ours.metrics == other.metrics
    assert json.loads((tmp_path / "at_once/study.json").read_text("utf-8")).keys() == {"narrow", "wide"}


def program(code):
    """A command in place of a run's process."""
    return [sys.executable, "-c", code]


def as_processes(monkeypatch, codes):
    """Runs Python code by the name of the arm in place of the runs of a study."""
    real = subprocess.Popen

    def start(command, **options):
        return real(program(codes[command[4]]), **options)

    monkeypatch.setattr(study_jobs.subprocess, "Popen", start)


RUNS = [("a", 0, Path("a")), ("b", 0, Path("b")), ("c", 0, Path("c"))]
WAITS = "import sys; print('begun', flush=True); sys.stdin.read()"


def test_a_failed_run_ends_the_study(monkeypatch, capsys):
    as_processes(monkeypatch, {"a": "print('what is wrong'); raise SystemExit(3)", "b": WAITS, "c": "1/0"})
    with (
        pytest.raises(ValueError, match="a, seed 0: ended with status 3"),
        study_jobs.started(ConfigDict(), RUNS, 2) as wait,
    ):
        wait("a", 0)
    assert "a, seed 0: what is wrong\n" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(number, monkeypatch, capsys):
    as_processes(monkeypatch, {"a": WAITS, "b": WAITS, "c": "print('never')"})
    started, real = [], Processes.run

    def counted(self, *run):
        started.append(run)
        return real(self, *run)

    monkeypatch.setattr(Processes, "run", counted)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as ended, study_jobs.started(ConfigDict(), RUNS, 2) as wait:
        end = time.monotonic() + PATIENCE
        while capsys.readouterr().err.count("begun") < 1 and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        wait("a", 0)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert "never" not in capsys.readouterr().err
