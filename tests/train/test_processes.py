"""Two real processes with CPU collectives train as one process with all devices."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from tests.patience import PATIENCE
from tests.train import tiny
from tests.train.test_loop import same_arrays

ROOT = Path(__file__).parent.parent.parent
STEPS = 6
SPLIT = "--config.parallel.shard_params"
SMALL_TILES = "--config.eval.tile=1"  # 8 captions each: several for each process


def command(workdir, *more):
    config = tiny.config()
    changes = {"train.steps": STEPS, "train.batch_size": 40, "parallel.devices": 0, "model.name": "tests.train.toy"}
    given = [f"--config.{name}={value}" for name, value in changes.items()]
    rest = [flag for flag in tiny.flags(config) if flag.partition("=")[0] not in {f.partition("=")[0] for f in given}]
    return [sys.executable, "main.py", "--config=configs/demo.py", *given, *rest, f"--workdir={workdir}", *more]


def environment(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


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
    """Waits for the processes and returns their outputs; fails when one ended with another status."""
    try:
        outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == status, errors[-3000:]
    return [out for out, _ in outputs]


def together(workdir, *more):
    """The job from its start to its end; the outputs."""
    return outputs_of(start(workdir, *more))


def until(process_log, text):
    """Waits for a line of the log; the caller's assertions tell when it never came."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not (process_log.exists() and text in process_log.read_text("utf-8")):
        time.sleep(0.01)


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

    evaluated = together(two, "--mode=eval", SMALL_TILES)
    assert "rSum" in evaluated[0] and "rSum" not in evaluated[1]
    (results,) = two.glob("results_*.json")
    shared = json.loads(results.read_text("utf-8"))
    alone(two, "--mode=eval", SMALL_TILES)  # the same checkpoint; its gallery ranked by one process
    again = json.loads(results.read_text("utf-8"))
    assert {n: arm["metrics"] for n, arm in again["arms"].items()} == {
        n: a["metrics"] for n, a in shared["arms"].items()
    }


LONG = ("--mode=train", "--config.train.steps=40", "--config.train.eval_epochs=0")
QUEUED = (*LONG, "--config.momentum.queue=60")


@functools.cache
def undisturbed(*flags):
    """Work folder of a job that nothing happened to."""
    workdir = Path(tempfile.mkdtemp(dir=tiny.folder()))
    together(workdir, *flags)
    return workdir


def goes_on(workdir, flags):
    """Started again the job ends bitwise as the undisturbed one."""
    together(workdir, *flags)
    same_arrays(tiny.arrays(workdir, 40), tiny.arrays(undisturbed(*flags), 40))
    assert tiny.lines(workdir) == tiny.lines(undisturbed(*flags))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [QUEUED, (*LONG, f"{SPLIT}=True")], ids=["queues", "split"])
def test_sigterm_in_one_process_stops_both_and_the_job_goes_on(flags, tmp_path):
    """With parameters on every device and queues of momentum encoders, and split over the devices of both processes."""
    processes = start(tmp_path, *flags)
    until(tmp_path / "metrics.jsonl", '{"step": 8, ')
    processes[1].send_signal(signal.SIGTERM)  # not the one that writes the log
    outputs_of(processes, 128 + signal.SIGTERM)
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal())
    assert 8 < saved < 40 and saved % 10 == 0
    goes_on(tmp_path, flags)


def survivor(processes, victim, number):
    """Sends the signal to one process; the output of the other, which has to end with a status that is not 0."""
    processes[victim].send_signal(number)
    try:
        _, said = processes[1 - victim].communicate(timeout=PATIENCE)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[1 - victim].returncode not in (0, None)
    return said


BEATING = (*QUEUED, "--heartbeat_seconds=10")
VICTIMS = [pytest.param(1, id="worker"), pytest.param(0, id="coordinator")]


@pytest.mark.slow
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_process_ends_the_other_and_the_job_goes_on(victim, tmp_path):
    processes = start(tmp_path, *BEATING)
    until(tmp_path / "metrics.jsonl", '{"step": 8, ')
    said = survivor(processes, victim, signal.SIGKILL)
    assert re.search(r"another (process|task) died", said), said[-3000:]
    goes_on(tmp_path, QUEUED)


@pytest.mark.slow
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_process_that_falls_silent_ends_the_other(victim, tmp_path):
    """Stopped, with all its connections open: as a host that hangs or has lost its network, whom nobody tells."""
    processes = start(tmp_path, *BEATING)
    until(tmp_path / "metrics.jsonl", '{"step": 8, ')
    said = survivor(processes, victim, signal.SIGSTOP)
    assert re.search("heartbeat|another (process|task) died", said), said[-3000:]


@pytest.mark.slow
def test_queues_of_two_processes_are_those_of_one(tmp_path):
    alone(tmp_path, *QUEUED)
    ours, expected = tiny.arrays(undisturbed(*QUEUED), 40), tiny.arrays(tmp_path, 40)
    assert ours.keys() == expected.keys()
    queues = {name: values for name, values in expected.items() if "['images']" in name or "['texts']" in name}
    assert {len(values) for values in queues.values() if values.ndim} == {60}
    for name, values in queues.items():
        np.testing.assert_allclose(ours[name], values, atol=0.02, err_msg=name)  # ids and pointers: the same
