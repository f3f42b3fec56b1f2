"""A run of `main.py` on a damaged data set, in a process of its own: it ends, soon, with one line that tells."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.train import tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_training_ends_at_a_damaged_record(tmp_path):
    """In the midst of the steps: reading is ahead in threads, logs and checkpoints are written behind."""
    path = shutil.copytree(tiny.dataset(), tmp_path / "tiny" / "1.0.0")
    shard = next(path.glob("*-train*array_record*"))
    data = bytearray(shard.read_bytes())
    data[int(len(data.rstrip(b"\0")) * 0.4)] ^= 1
    shard.write_bytes(data)
    config = tiny.config()
    config.data.dir = str(path)
    flags = [flag for flag in tiny.flags(config) if not flag.startswith("--config.train.steps")]
    command = [sys.executable, "main.py", "--mode=train", "--config=configs/scenes.py", f"--workdir={tmp_path / 'run'}"]
    command += ["--config.model.name=tests.train.toy", "--config.train.steps=60", *flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 1, run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"error: {shard}: record ") and "(split 'train' row " in last and "shnet data verify" in last
    assert "Traceback" not in run.stderr
