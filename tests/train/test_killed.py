"""Runs in processes of their own: killed and started again, two in one folder, damage, full and read-only disks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from shnet_jax.scaling.processes import virtual_devices
from shnet_jax.training.checkpoint import Checkpoints
from tests.patience import PATIENCE
from tests.processes import ROOT, Program
from tests.train import tiny
from tests.train.test_faults import bit, disk, file, remount
from tests.train.test_loop import same_arrays

pytestmark = pytest.mark.slow

STEPS = 60
CHANGES = {"model.name": "tests.train.toy", "train.steps": STEPS, "train.eval_epochs": 2.0}


def start(workdir, *more, mode="train", logs=None):
    """main.py with the flags of the tiny run. Its output goes to the folder `logs` (beside `workdir`)."""
    values = dict(tiny.CHANGES) | {"data.dir": tiny.dataset()} | CHANGES
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    logs = logs or workdir.parent
    logs.mkdir(exist_ok=True)
    log = logs / f"{len(list(logs.glob('*.log')))}.log"
    command = ["main.py", f"--mode={mode}", "--config=configs/scenes.py", *flags, f"--workdir={workdir}", *more]
    return Program(command, log, XLA_FLAGS=virtual_devices(os.environ["XLA_FLAGS"], 1))


def run(workdir, *more, **options):
    """The same to its end: exit status, output, and the lines that name its fault."""
    with start(workdir, *more, **options) as process:
        status = process.wait()
    errors = [line for line in process.output().splitlines() if line.startswith("error: ")]
    return status, process.output(), errors


def last_logged(workdir):
    """The last step with a line in the log."""
    path = workdir / "metrics.jsonl"
    steps = re.findall(r'^{"step": (\d+), ', path.read_text("utf-8"), re.M) if path.exists() else []
    return int(steps[-1]) if steps else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Work folder of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    status, output, _ = run(workdir)
    assert status == 0, output
    return workdir


def ends_as(workdir, undisturbed):
    same_arrays(tiny.arrays(workdir, STEPS), tiny.arrays(undisturbed, STEPS))
    assert tiny.lines(workdir) == tiny.lines(undisturbed)
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def test_signals_between_and_during_checkpoints(undisturbed, tmp_path):
    """SIGTERM saves the current step; kill -9 comes between two checkpoints, then while one is written."""
    workdir = tmp_path / "run"
    folder = workdir / "checkpoints"
    with start(workdir) as process:
        assert process.until(lambda: last_logged(workdir) >= 8), process.output()
        process.send(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    saved = Checkpoints(workdir).step("last")
    assert 8 <= saved < STEPS and "Traceback" not in process.output()
    assert f"stopped by SIGTERM after step {saved} of {STEPS}; the same command continues" in process.output()

    with start(workdir) as process:
        assert process.until(lambda: last_logged(workdir) >= saved + 8), process.output()
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    second = Checkpoints(workdir).step("last")
    assert saved < second < STEPS

    def halted_while_saving():
        """Whether the process is stopped while a later checkpoint does not have its name yet."""
        for _ in range(2):
            if not any(int(path.name.split(".")[0]) > second + 6 for path in folder.glob("*.orbax-checkpoint-tmp*")):
                process.send(signal.SIGCONT)
                return False
            process.send(signal.SIGSTOP)
        return True

    with start(workdir) as process:
        assert process.until(halted_while_saving), process.output()
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert list(folder.glob("*.orbax-checkpoint-tmp*"))
    assert second < Checkpoints(workdir).step("last") < STEPS

    status, output, _ = run(workdir)
    assert status == 0, output
    ends_as(workdir, undisturbed)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_run_is_refused_a_reader_is_not_and_damage_is_named(tmp_path):
    workdir = tmp_path / "run"
    with start(workdir, "--config.train.steps=100000") as first:
        assert first.until(lambda: last_logged(workdir) >= 24), first.output()
        status, output, errors = run(workdir, "--config.train.steps=100000")
        assert status == 1 and len(errors) == 1, output
        assert f"{workdir} is being written to by process {first.pid} on {os.uname().nodename} since " in errors[0]
        status, output, _ = run(workdir, mode="eval")
        assert status == 0 and "rSum" in output, output
        first.send(signal.SIGTERM)
        assert first.wait() == 128 + signal.SIGTERM, first.output()
    assert len(list(workdir.glob("results_*.json"))) == 1

    best = Checkpoints(workdir).best
    damaged = file(workdir, best, "ema/d/*")
    bit(damaged)
    before = contents(workdir)
    status, output, errors = run(workdir, mode="eval")
    assert status == 1 and len(errors) == 1 and "Traceback" not in output
    assert f"checkpoint {best} in {workdir / 'checkpoints'} is damaged:" in errors[0]
    assert f"ema/d/{damaged.name}: expected sha256" in output and "Whole are: " in output
    assert contents(workdir) == before


def test_a_run_goes_on_once_there_is_space(undisturbed, tmp_path):
    """A disk that becomes full while a checkpoint is written; then a larger one; then one that is only read."""
    folder = tmp_path / "disk"
    workdir, logs = folder / "run", tmp_path / "logs"

    with disk(folder, "1m"):
        status, output, errors = run(workdir, logs=logs)
        assert status == 1 and len(errors) == 1 and "Traceback" not in output, output
        assert "No space left on device" in errors[0] and str(workdir) in errors[0] and "MB are free" in errors[0]
        saved = Checkpoints(workdir)
        last = saved.step("last")
        assert 0 < last < STEPS
        for step in {last, saved.step("best")}:
            saved.check(step)

        remount(folder, "size=100m")
        status, output, _ = run(workdir, logs=logs)
        assert status == 0 and f"continuing from step {last} of {STEPS}" in output, output
        ends_as(workdir, undisturbed)

        remount(folder, "ro")
        before = contents(workdir)
        status, output, errors = run(workdir, logs=logs)
        assert status == 1 and len(errors) == 1, output
        assert f"{workdir / '.lock'}: Read-only file system; needed was to write there, as user " in errors[0]
        assert contents(workdir) == before


def test_a_few_kills_of_other_programs():
    """Many, and of all programs: `python -m tests.soak --kills=50`."""
    soak = [sys.executable, "-m", "tests.soak", "--kills=3", "--seed=3", "--only=import,embed"]
    done = subprocess.run(soak, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "3 kills in" in done.stdout and "FAULT" not in done.stdout
