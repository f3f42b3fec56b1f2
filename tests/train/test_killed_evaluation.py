"""An evaluation in two stages and in blocks that is killed in both, and started again with the same command."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from shnet_jax.modes.train import train
from tests.processes import Program
from tests.train import tiny

MODEL = "tests.train.test_score_params"
LISTED, EXACT = "scores/*/block_pairs_*.npy", "scores/*/block_[0-9]*.npy"


def start(workdir: Path) -> Program:
    changes = dict(tiny.CHANGES) | {"data.dir": tiny.dataset(), "model.name": MODEL}
    changes |= {"eval.two_stage": 4, "eval.tile": 1}
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    command = ["main.py", "--mode=eval", "--config=configs/scenes.py", *flags, f"--workdir={workdir}"]
    return Program(command, workdir.with_suffix(".log"))


def kill(workdir: Path, pattern: str) -> int:
    """Kills it as soon as there are 20 files more of the pattern; how many there are then."""
    before = len(list(workdir.glob(pattern)))
    with start(workdir) as process:
        assert process.until(lambda: len(list(workdir.glob(pattern))) >= before + 20), process.output()
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not list(workdir.glob("results_*"))
    return len(list(workdir.glob(pattern)))


def finish(workdir: Path) -> tuple[dict, str]:
    """Results without what time it took; what was logged."""
    with start(workdir) as process:
        assert process.wait() == 0, process.output()
    (path,) = workdir.glob("results_*.json")
    arms = json.loads(path.read_text("utf-8"))["arms"]
    for arm in arms.values():
        arm["card"].pop("ranking_seconds")
    assert not (workdir / "scores").exists()
    return arms, process.output()


@pytest.mark.slow
def test_kill_9_while_pairs_and_blocks_are_scored(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    with tiny.quick():
        train(tiny.config(model__name=MODEL, train__steps=2, train__eval_epochs=0.0), undisturbed)
    shutil.copytree(undisturbed, killed)
    expected, _ = finish(undisturbed)
    assert [name.split(", ")[1] for name in expected] == ["global vectors", "two-stage 4", "exact"]
    listed = kill(killed, LISTED)
    assert listed < 300 and not list(killed.glob(EXACT))
    blocks = kill(killed, EXACT)
    assert blocks < 500 and len(list(killed.glob(LISTED))) > listed  # it went on where it was
    results, log = finish(killed)
    assert results == expected and f"{blocks} of 500 blocks of scores are there" in log
