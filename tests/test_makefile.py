"""`make test-pythons` with interpreters that only say their version, and without running any test."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def executable(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


def python(path: Path, version: str) -> Path:
    return executable(path, f'case "$2" in *print*) echo {version};; esac')


def make(path: Path | str, home: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output."""
    command = [str(shutil.which("make")), "test-pythons", *arguments]
    environment = {"PATH": str(path), "HOME": str(home)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def pythons(tmp_path: Path, *flags: str, failing: str = "none") -> tuple[int, str]:
    """Exit status and output where python3.11 is found by name and python3.12 among pyenv's."""
    python(tmp_path / "bin" / "python3.11", "3.11")
    python(tmp_path / ".pyenv" / "versions" / "3.12.9" / "bin" / "python3", "3.12")
    run = executable(tmp_path / "run", 'echo "ran $*"', f'case "$*" in *{failing}*) exit 1;; esac')
    return make(tmp_path / "bin", tmp_path, f"MAKE={run}", *flags)


def test_each_python_that_is_found_has_an_environment_of_its_own(tmp_path):
    status, said = pythons(tmp_path)
    assert status == 0 and said.endswith("Tested on Python: 3.11 3.12; not found: 3.13; failed: none\n")
    assert "ran --no-print-directory test-fast VENV=.venv-3.11 PYTHON=python3.11\n" in said
    assert f"VENV=.venv-3.12 PYTHON={tmp_path}/.pyenv/versions/3.12.9/bin/python3\n" in said


def test_a_python_that_only_its_path_finds(tmp_path):
    status, said = pythons(tmp_path, f"PYTHONS={python(tmp_path / 'opt' / 'python', '3.13')}")
    assert status == 0 and said.endswith("Tested on Python: 3.11 3.12 3.13; not found: none; failed: none\n")
    assert f"VENV=.venv-3.13 PYTHON={tmp_path}/opt/python\n" in said


def test_one_that_fails_fails_all_and_the_others_are_tried(tmp_path):
    status, said = pythons(tmp_path, failing="venv-3.11")
    assert status != 0 and said.endswith("Tested on Python: 3.11 3.12; not found: 3.13; failed: 3.11\n")


def test_no_python_is_no_success(tmp_path):
    status, said = make("/nowhere", tmp_path)
    assert status != 0 and "not found: 3.11 3.12 3.13" in said


@pytest.mark.parametrize(
    ("extras", "accelerator", "by_hash"),
    [
        ("cuda12", "cuda12", True),
        ("dev,cuda13", "cuda13", True),
        ("tpu", "tpu", True),
        ("dev", "", True),
        ("serve,cuda12", "cuda12", False),  # no lock for serve
    ],
)
def test_setup_for_an_accelerator(extras, accelerator, by_hash):
    """What would run: the check of the machine comes first, then the locks."""

    def dry(*flags):
        command = [str(shutil.which("make")), "-n", "setup", f"EXTRAS={extras}", *flags]
        environment = {"PATH": os.environ["PATH"]}  # without what a `make` that runs the tests hands down, as VENV
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    said = dry()
    assert ('[ -n "yes" ]; then \\\n\t\techo "Installing packages into .venv, by hash' in said) == by_hash
    if accelerator:
        assert f"accelerators.py {accelerator}; fi" in said and f"requirements/{accelerator}.txt" in said
        assert said.index("accelerators.py") < said.index("pip install")
        assert '[ -n "" ]; then .venv/bin/python shnet_jax/observe/accelerators.py' in dry("CHECK_MACHINE=")
