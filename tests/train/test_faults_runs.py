"""Faults of whole runs, in processes of their own: two in one folder, damage, full and read-only disks, many kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from shnet_jax.train.checkpoint import Checkpoints
from tests.patience import PATIENCE
from tests.train import tiny
from tests.train.test_faults import bit, disk, file, remount
from tests.train.test_killed import ROOT, command, logged, start
from tests.train.test_loop import same_arrays

pytestmark = pytest.mark.slow

STEPS = 24
SHORT = f"--config.train.steps={STEPS}"


def run(workdir, *more):
    """main.py with the flags of the tiny run; exit status, output and what it said of its fault."""
    done = subprocess.run(
        [*command(workdir), *more], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    return done, [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_run_is_refused_a_reader_is_not_and_damage_is_named(tmp_path):
    workdir = tmp_path / "run"
    first = start(workdir, "--config.train.steps=100000", "--config.train.eval_epochs=2.0")
    try:
        deadline = time.monotonic() + PATIENCE
        while not logged(workdir, 24) and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        second, errors = run(workdir, "--config.train.steps=100000")
        assert second.returncode == 1 and len(errors) == 1, second.stderr
        assert f"{workdir} is being written to by process {first.pid} on {os.uname().nodename} since " in errors[0]
        reader, _ = run(workdir, "--mode=eval")
        assert reader.returncode == 0 and "rSum" in reader.stdout, reader.stderr
        first.send_signal(signal.SIGTERM)
        _, said = first.communicate(timeout=PATIENCE)
        assert first.returncode == 128 + signal.SIGTERM, said
    finally:
        first.kill()
    assert len(list(workdir.glob("results_*.json"))) == 1

    best = Checkpoints(workdir).best
    damaged = file(workdir, best, "ema/d/*")
    bit(damaged)
    before = contents(workdir)
    evaluated, errors = run(workdir, "--mode=eval")
    assert evaluated.returncode == 1 and len(errors) == 1 and "Traceback" not in evaluated.stderr
    assert f"checkpoint {best} in {workdir / 'checkpoints'} is damaged:" in errors[0]
    assert f"ema/d/{damaged.name}: expected sha256" in evaluated.stderr and "Whole are: " in evaluated.stderr
    assert contents(workdir) == before


def test_a_run_goes_on_once_there_is_space(tmp_path):
    """A disk that becomes full while a checkpoint is written; then a larger one; then one that is only read."""
    folder = tmp_path / "disk"
    undisturbed = tmp_path / "undisturbed"
    assert run(undisturbed, SHORT)[0].returncode == 0
    with disk(folder, "1m"):
        workdir = folder / "run"
        stopped, errors = run(workdir, SHORT)
        assert stopped.returncode == 1 and len(errors) == 1 and "Traceback" not in stopped.stderr, stopped.stderr
        assert "No space left on device" in errors[0] and str(workdir) in errors[0] and "MB are free" in errors[0]
        saved = Checkpoints(workdir)
        last = saved.step("last")
        assert 0 < last < STEPS
        for step in {last, saved.step("best")}:
            saved.check(step)

        remount(folder, "size=100m")
        went_on, _ = run(workdir, SHORT)
        assert went_on.returncode == 0, went_on.stderr
        assert f"continuing from step {last} of {STEPS}" in went_on.stderr
        same_arrays(tiny.arrays(workdir, STEPS), tiny.arrays(undisturbed, STEPS))
        assert tiny.lines(workdir) == tiny.lines(undisturbed)
        assert not list((workdir / "checkpoints").glob("*tmp*"))

        remount(folder, "ro")
        before = contents(workdir)
        read_only, errors = run(workdir, SHORT)
        assert read_only.returncode == 1 and len(errors) == 1, read_only.stderr
        assert f"{workdir / '.lock'}: Read-only file system; needed was to write there, as user " in errors[0]
        assert contents(workdir) == before


def test_a_few_kills():
    """Many: `python -m tests.soak --kills=50`."""
    soak = [sys.executable, "-m", "tests.soak", "--kills=5", "--seed=3", "--only=train,eval,import,embed"]
    done = subprocess.run(soak, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "5 kills in" in done.stdout and "FAULT" not in done.stdout
