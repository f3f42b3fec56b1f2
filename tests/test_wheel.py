"""The package as it is installed from a wheel, used outside of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder that the wheel is installed in, without its dependencies: those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source, site = folder / "source", folder / "site"
    aside = shutil.ignore_patterns(".*", "runs", "data_sets", "tests", "docs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=aside)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    for command in (
        [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", str(source)],
        [*pip, "install", "--no-deps", "--no-index", f"--target={site}", f"--find-links={folder}", "shnet_jax"],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    shutil.rmtree(source)
    return site


@pytest.fixture
def shnet(installed, tmp_path):
    """Runs the installed command in an empty folder; returns its output."""

    def run(*arguments, status=0):
        done = subprocess.run(
            [sys.executable, str(installed / "bin" / "shnet"), *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    return run


def test_one_top_level_name(installed):
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"shnet_jax", "bin"}
    assert not list((installed / "shnet_jax" / "_bundled").glob("tests*"))


def test_modes_and_version(shnet):
    overview = shnet()
    assert overview == shnet("--help") and "shnet search --workdir=" in overview and "shnet data" in overview
    assert shnet("--version") == "shnet_jax 0.1.0\n"


def test_a_data_set_and_a_run_from_bundled_files(shnet, tmp_path):
    """Rendering starts processes of its own, which must find the bundled folders too."""
    shnet("data", "scenes", "--out=sets", "--train=40", "--val=10", "--test=10")
    (tmp_path / "mine.py").write_text(
        "from configs import demo\n\ndef get_config():\n    c = demo.get_config()\n    c.name = 'mine'\n    return c\n"
    )
    small = ["--config.data.dir=sets/scenes", "--config.train.steps=2", "--config.train.batch_size=40"]
    small += [f"--noconfig.model.{part}" for part in ("semantic", "spatial", "scene_tokens", "category_token")]
    small += ["--config.model.dim=16", "--config.text.layers=1", "--config.text.width=16", "--config.text.heads=2"]
    assert "mine, val" in shnet("train", "--config=mine.py", "--workdir=run", *small)
    assert "mine" in shnet("eval", "--workdir=run", "--config.eval.split=test")
    assert "a red star" in shnet("search", "--workdir=run", "--query=a red star", "--top_k=2")
    assert "did you mean demo?" in shnet("train", "--config=demmo", "--workdir=other", status=2)
