"""An evaluation in two stages and in blocks that is killed in both, and started again with the same command."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shnet_jax.modes.train import train
from tests.patience import PATIENCE
from tests.train import tiny

ROOT = Path(__file__).parents[2]
MODEL = "tests.train.test_score_params"
LISTED, EXACT = "scores/*/block_pairs_*.npy", "scores/*/block_[0-9]*.npy"


def start(workdir: Path) -> subprocess.Popen[str]:
    flags = [*tiny.flags(tiny.config()), f"--config.model.name={MODEL}", "--config.eval.two_stage=4"]
    command = [sys.executable, "main.py", "--mode=eval", "--config=configs/demo.py", *flags, "--config.eval.tile=1"]
    return subprocess.Popen([*command, f"--workdir={workdir}"], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def kill(workdir: Path, pattern: str) -> int:
    """Kills it as soon as there are 20 files more of the pattern; how many there are then."""
    before = len(list(workdir.glob(pattern)))
    process = start(workdir)
    try:
        deadline = time.monotonic() + PATIENCE
        while len(list(workdir.glob(pattern))) < before + 20:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL and not list(workdir.glob("results_*"))
    return len(list(workdir.glob(pattern)))


def finish(workdir: Path) -> tuple[dict, str]:
    """Results without what time it took; what was logged."""
    process = start(workdir)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    (path,) = workdir.glob("results_*.json")
    arms = json.loads(path.read_text("utf-8"))["arms"]
    for arm in arms.values():
        arm["card"].pop("ranking_seconds")
    assert not (workdir / "scores").exists()
    return arms, errors


@pytest.mark.slow
def test_kill_9_while_pairs_and_blocks_are_scored(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    with tiny.quick():
        train(tiny.config(model__name=MODEL, train__steps=2, train__eval_epochs=0.0), undisturbed)
    shutil.copytree(undisturbed, killed)
    whole, _ = finish(undisturbed)
    assert [name.split(", ")[1] for name in whole] == ["global vectors", "two-stage 4", "exact"]
    listed = kill(killed, LISTED)
    assert listed < 300 and not list(killed.glob(EXACT))
    blocks = kill(killed, EXACT)
    assert blocks < 500 and len(list(killed.glob(LISTED))) > listed  # it went on where it was
    found, log = finish(killed)
    assert found == whole and f"{blocks} of 500 blocks of scores are there" in log
