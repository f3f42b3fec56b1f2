"""Runs in processes of their own that are killed and started again with the same command."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shnet_jax.train.checkpoint import Checkpoints
from tests.patience import PATIENCE
from tests.train import tiny
from tests.train.test_loop import same_arrays

ROOT = Path(__file__).parent.parent.parent
STEPS = 60
FLAGS = [
    "--mode=train",
    "--config=configs/demo.py",
    "--config.model.name=tests.train.toy",
    f"--config.train.steps={STEPS}",
    "--config.train.eval_epochs=2.0",
]


def command(workdir: Path) -> list[str]:
    given = {flag.partition("=")[0] for flag in FLAGS}
    rest = [flag for flag in tiny.flags(tiny.config()) if flag.partition("=")[0] not in given]
    return [sys.executable, "main.py", *FLAGS, *rest, f"--workdir={workdir}"]


def start(workdir: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*command(workdir), *more], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def finish(workdir: Path) -> None:
    process = start(workdir)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors


def stop(workdir: Path, number: int, ready) -> tuple[int, str]:
    """Sends the signal as soon as `ready()`; (exit status, standard error)."""
    process = start(workdir)
    try:
        deadline = time.monotonic() + PATIENCE
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, errors


def logged(workdir: Path, step: int) -> bool:
    path = workdir / "metrics.jsonl"
    return path.exists() and f'{{"step": {step}, ' in path.read_text("utf-8")


@pytest.fixture(scope="module")
def undisturbed():
    workdir = tiny.folder() / "not_killed"
    finish(workdir)
    return tiny.arrays(workdir, STEPS), tiny.lines(workdir)


@pytest.mark.slow
def test_kill_9_between_and_during_checkpoints(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    folder = workdir / "checkpoints"

    status, errors = stop(workdir, signal.SIGKILL, lambda: logged(workdir, 12))
    assert status == -signal.SIGKILL, errors
    saved = Checkpoints(workdir).step("last")
    assert 3 <= saved < STEPS

    def saving():  # a later checkpoint does not have its name yet
        return any(int(path.name.split(".")[0]) > saved + 6 for path in folder.glob("*.orbax-checkpoint-tmp*"))

    status, errors = stop(workdir, signal.SIGKILL, saving)
    assert status == -signal.SIGKILL, errors
    assert list(folder.glob("*.orbax-checkpoint-tmp*"))  # the kill came while it was written
    assert saved < Checkpoints(workdir).step("last") < STEPS

    finish(workdir)
    assert tiny.lines(workdir) == undisturbed[1]
    same_arrays(tiny.arrays(workdir, STEPS), undisturbed[0])
    assert not list(folder.glob("*tmp*"))


@pytest.mark.slow
def test_sigterm_saves_the_current_step(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    status, errors = stop(workdir, signal.SIGTERM, lambda: logged(workdir, 8))
    assert status == 128 + signal.SIGTERM
    saved = Checkpoints(workdir).step("last")
    assert 8 <= saved < STEPS
    assert f"stopped by SIGTERM after step {saved} of {STEPS}; the same command continues" in errors
    assert "Traceback" not in errors
    finish(workdir)
    assert tiny.lines(workdir) == undisturbed[1]
    same_arrays(tiny.arrays(workdir, STEPS), undisturbed[0])
