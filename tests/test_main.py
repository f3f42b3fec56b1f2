"""Mistakes on the command line are one line, not a traceback. Each test is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import main as command_line
from tests.patience import PATIENCE
from tests.train import tiny

ROOT = Path(__file__).parent.parent
DEMO = "--config=configs/demo.py"


def main(*flags):
    return subprocess.run(
        [sys.executable, "main.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.train.stepss=3"], "--config.train.stepss: no field 'stepss'; did you mean 'steps'?"),
        (["--config.trian.steps=3"], "--config.trian.steps: no field 'trian'; did you mean 'train'?"),
        (["--noconfig.data.residen"], "--config.data.residen: no field 'residen'; did you mean 'resident'?"),
        (["--config.data.dir.x=3"], "--config.data.dir.x: 'x' is asked of a value, not of a section"),
        (["--config.loss.weights.hinge=3"], "no field 'hinge'; there are "),
        (["--config.train.steps=many"], "flag --config.train.steps=many: invalid literal for int()"),
        (["--config.data.resident=maybe"], "flag --config.data.resident=maybe"),
        (["--mode=evaluate"], "flag --mode=evaluate: value should be one of <train|eval"),
        (["--confg.train.steps=3"], "Unknown command line flag 'confg.train.steps'"),
        (["train"], "unexpected arguments: train"),
        (["--query=snow", "--mode=embed"], "--query belongs to --mode=search, not to --mode=embed"),
        (["--target=gpu"], "--target belongs to --mode=plan, not to --mode=train"),
        (["--workdir="], "--workdir is empty: give the folder of the run"),
    ],
)
def test_mistakes_in_flags(flags, message, tmp_path):
    done = main(DEMO, f"--workdir={tmp_path}", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([DEMO], "Flag --workdir must have a value"),
        (["--workdir=runs/x"], "Flag --config must have a value"),
        (["--workdir=runs/x", "--config=configs/dmo.py"], "No such file or directory: 'configs/dmo.py'"),
        (["--workdir=runs/x", "--config=configs/dmo.py", "--config.seed=1"], "configs/dmo.py"),
        (["--workdir=runs/x", "--config=configs/shnet.py:grid,f31k"], "variant 'grid,f31k': expected one of region, "),
    ],
)
def test_missing_flags(flags, message):
    done = main(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "configs/shnet.py:f31k",
            "--config=configs/shnet.py: variant 'f31k': expected one of region, grid, hybrid and ",
        ),
        (
            "configs/demo.py:x",
            "--config=configs/demo.py:x: configs/demo.py has no variants; expected --config=configs/d",
        ),
        *((value, None) for value in ("configs/shnet.py:grid,f30k", "configs/shnet.py", "configs/none.py:x")),
    ],
)
def test_variants_of_a_configuration(value, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    for argv in ([f"--config={value}"], ["--config", value]):
        error = command_line._unknown_variant(["main.py", *argv])
        assert error is None if message is None else error.startswith(message)


def test_an_unknown_field_of_a_variant(monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = ["main.py", "--config=configs/esa.py:frozen", "--config.study.arms.slot={}", "--config.modl.dim=3"]
    assert command_line._unknown_field(argv) == "--config.modl.dim: no field 'modl'; did you mean 'model'?"


@pytest.mark.parametrize("variant", ["", ":grid"])
def test_a_colon_in_the_path_of_a_configuration(variant, tmp_path, capsys):
    path = tmp_path / "a:b.py"
    path.write_text("")
    with pytest.raises(SystemExit, match="2"):
        command_line._with_paths(f"--config={path}{variant}")
    assert capsys.readouterr().err == (
        f"error: --config={path}{variant}: expected a path without ':'; copy the file, or call it by a relative path\n"
    )


def test_a_file_that_is_no_configuration(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("x = 1\n")
    done = main(f"--config={path}", f"--workdir={tmp_path}")
    assert done.returncode == 2 and done.stderr == (
        f"error: {path}: expected a configuration with a function get_config, found none\n"
    )


def test_a_fault_in_the_configuration_file_shows_where(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from configs import demo\n\ndef get_config():\n    c = demo.get_config()\n    return c.modell\n")
    done = main(f"--config={path}", f"--workdir={tmp_path}")
    assert done.returncode == 1 and f'File "{path}", line 5' in done.stderr


def test_help():
    done = main("--help")
    assert "--config.train.epochs=4" in done.stdout and "--workdir" in done.stdout and "<train|eval" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("debug", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_faults_of_the_run(debug, tmp_path):
    flags = ["-v=1"] if debug else []
    done = main(DEMO, f"--workdir={tmp_path}", f"--config.data.dir={tmp_path / 'nothing'}", *flags)
    assert done.returncode == 1
    assert f"{str(tmp_path / 'nothing')!r}: no such folder" in done.stderr
    assert ("Traceback" in done.stderr) == debug
    if not debug:
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_finished_run_says_so_on_a_terminal_without_arrows(tmp_path):
    flags = [*tiny.flags(tiny.config()), "--config.model.name=tests.train.toy", "--config.train.steps=2"]
    command = [sys.executable, "main.py", DEMO, f"--workdir={tmp_path}", *flags]
    for _ in range(2):  # the second one finds nothing left to do
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
            capture_output=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert b"i->t R@1" in done.stdout
