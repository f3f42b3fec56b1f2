"""Two real processes with CPU collectives train as one process with all devices."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train import tiny
from tests.train.test_loop import same_arrays

ROOT = Path(__file__).parent.parent.parent
STEPS = 6
SPLIT = "--config.parallel.shard_params"


def command(workdir, *more):
    config = tiny.config()
    changes = {"train.steps": STEPS, "train.batch_size": 40, "parallel.devices": 0, "model.name": "tests.train.toy"}
    given = [f"--config.{name}={value}" for name, value in changes.items()]
    rest = [flag for flag in tiny.flags(config) if flag.partition("=")[0] not in {f.partition("=")[0] for f in given}]
    return [sys.executable, "main.py", "--config=configs/demo.py", *given, *rest, f"--workdir={workdir}", *more]


def environment(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def start(workdir, *more):
    """Both processes of the job, 2 devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = ["--distributed", f"--coordinator_address={address}", "--process_count=2"]
    return [
        subprocess.Popen(
            command(workdir, *job, f"--process_id={i}", *more),
            cwd=ROOT,
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def outputs_of(processes, status=0):
    """Of the processes when they have ended; fails when one ended with another status."""
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == status, errors[-3000:]
    return [out for out, _ in outputs]


def together(workdir, *more):
    """The job from its start to its end; the outputs."""
    return outputs_of(start(workdir, *more))


def alone(workdir, *more):
    done = subprocess.run(command(workdir, *more), cwd=ROOT, env=environment(4), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_resume_and_evaluate_like_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    alone(one, "--mode=train")
    together(two, "--mode=train")
    shutil.rmtree(two / "checkpoints" / str(STEPS))  # as if killed before the last checkpoint was complete
    tables = together(two, "--mode=train")
    assert "rSum" in tables[0] and "rSum" not in tables[1]

    ours, expected = tiny.arrays(two, STEPS), tiny.arrays(one, STEPS)
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        # The bias before a BatchNorm has no gradient: Adam makes steps of its rounding.
        if "['linear']['bias']" not in name:
            np.testing.assert_allclose(ours[name], values, rtol=1e-2, atol=1e-3, err_msg=name)
    for line, reference in zip(tiny.lines(two), tiny.lines(one), strict=True):
        assert line["step"] == reference["step"]
        assert line.keys() == reference.keys()
        if line["kind"] == "eval":
            np.testing.assert_allclose(line["rsum"], reference["rsum"], atol=15)  # of 10 images: 1 place is 10 points

    evaluated = together(two, "--mode=eval")
    assert "rSum" in evaluated[0] and "rSum" not in evaluated[1]
    assert len(list(two.glob("results_*.json"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True])
def test_sigterm_in_one_process_stops_both_and_the_job_goes_on(split, tmp_path):
    """With parameters on every device, and split over the devices of both processes."""
    flags = ["--mode=train", "--config.train.steps=40", "--config.train.eval_epochs=0", f"{SPLIT}={split}"]
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    together(undisturbed, *flags)
    processes = start(stopped, *flags)
    log = stopped / "metrics.jsonl"
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and not (log.exists() and '{"step": 8, ' in log.read_text("utf-8")):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)  # not the one that writes the log
    outputs_of(processes, 128 + signal.SIGTERM)
    saved = max(int(path.name) for path in (stopped / "checkpoints").iterdir() if path.name.isdecimal())
    assert 8 < saved < 40 and saved % 10 == 0
    together(stopped, *flags)
    same_arrays(tiny.arrays(stopped, 40), tiny.arrays(undisturbed, 40))
    assert tiny.lines(stopped) == tiny.lines(undisturbed)
