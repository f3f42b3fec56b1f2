"""Two real processes with CPU collectives train as one process with all devices, and survive faults of either."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
from contextlib import ExitStack

import numpy as np
import pytest

from shnet_jax.modes.embed import embed
from shnet_jax.modes.evaluate import evaluate
from shnet_jax.modes.mine import mine
from shnet_jax.scaling.processes import virtual_devices
from shnet_jax.training.loop import train_and_evaluate
from tests.processes import Program
from tests.train import late, tiny
from tests.train.test_loop import same_arrays

pytestmark = pytest.mark.slow

STEPS = 80
CHANGES = {
    "train.steps": STEPS,
    "train.batch_size": 40,
    "train.eval_epochs": 2.0,
    "train.checkpoint_steps": 6,
    "train.keep": 100,
    "parallel.devices": 0,
    "model.name": "tests.train.toy",
    "momentum.queue": 60,
}
SMALL_TILES = "--config.eval.tile=1"  # 8 captions each: several for each process
WITHOUT_QUEUES = "--config.momentum.queue=0"
SPLIT = (WITHOUT_QUEUES, "--config.parallel.shard_params=True")


class Job:
    """Both processes of a job, 2 devices each; killed at the end of the context."""

    def __init__(self, workdir, *more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        values = dict(tiny.CHANGES) | {"data.dir": tiny.dataset()} | CHANGES
        flags = [f"--config.{name}={value}" for name, value in values.items()]
        command = ["main.py", "--config=configs/scenes.py", *flags, f"--workdir={workdir}", "--heartbeat_seconds=10"]
        command += ["--distributed", f"--coordinator_address={address}", "--process_count=2", *more]
        self.metrics, place = workdir / "metrics.jsonl", workdir.parent
        devices = {"XLA_FLAGS": virtual_devices(os.environ["XLA_FLAGS"], 2)}
        job = len(list(place.glob(f"{workdir.name}.*.0.log")))
        logs = [place / f"{workdir.name}.{job}.{i}.log" for i in range(2)]
        self.processes = [Program([*command, f"--process_id={i}"], log, **devices) for i, log in enumerate(logs)]

    def __enter__(self):
        with ExitStack() as stack:
            for process in self.processes:
                stack.enter_context(process)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def outputs(self, status=0):
        """Waits for both processes and returns what they printed; fails when one ended with another status."""
        for process in self.processes:
            assert process.wait() == status, process.output()[-3000:]
        return [process.output() for process in self.processes]

    def last_logged(self):
        """The last step with a line in the log."""
        steps = re.findall(r'^{"step": (\d+), ', self.metrics.read_text("utf-8"), re.M) if self.metrics.exists() else []
        return int(steps[-1]) if steps else 0

    def until_it_trains(self):
        """Waits until the job has logged 8 steps more than any job before it in this folder."""
        first = self.last_logged()
        assert self.processes[0].until(lambda: self.last_logged() >= first + 8), self.processes[0].output()[-3000:]


def together(workdir, *more):
    """The job from its start to its end; what its processes printed."""
    with Job(workdir, *more) as job:
        return job.outputs()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Work folder of a job with queues that nothing happened to; the name of its last checkpoint is STEPS."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    printed = together(workdir, "--mode=train")
    assert "rSum" in printed[0] and "rSum" not in printed[1]
    return workdir


def ends_as(workdir, undisturbed):
    same_arrays(tiny.arrays(workdir, STEPS), tiny.arrays(undisturbed, STEPS))
    assert tiny.lines(workdir) == tiny.lines(undisturbed)


def test_two_processes_train_and_evaluate_like_one(undisturbed, tmp_path):
    config = tiny.config()
    config.update_from_flattened_dict(CHANGES | {"parallel.devices": 4})
    with tiny.quick():
        train_and_evaluate(config, tmp_path)
    early, ours = tiny.arrays(undisturbed, 6), tiny.arrays(undisturbed, STEPS)
    assert early.keys() == ours.keys()
    for name, values in tiny.arrays(tmp_path, 6).items():
        # The bias before a BatchNorm has no gradient: Adam makes steps of its rounding.
        if "['linear']['bias']" not in name:
            np.testing.assert_allclose(early[name], values, rtol=1e-2, atol=1e-3, err_msg=name)
    expected = tiny.arrays(tmp_path, STEPS)
    queues = {name: values for name, values in expected.items() if "['images']" in name or "['texts']" in name}
    assert {len(values) for values in queues.values() if values.ndim} == {60}
    for name, values in queues.items():
        np.testing.assert_allclose(ours[name], values, atol=0.02, err_msg=name)  # ids and pointers: the same
    for line, reference in zip(tiny.lines(undisturbed), tiny.lines(tmp_path), strict=True):
        assert line["step"] == reference["step"] and line.keys() == reference.keys()
        if line["kind"] == "eval" and line["step"] <= 10:
            np.testing.assert_allclose(line["rsum"], reference["rsum"], atol=15)  # of 10 images: 1 place is 10 points

    printed = together(undisturbed, "--mode=eval", SMALL_TILES)
    assert "rSum" in printed[0] and "rSum" not in printed[1]
    (path,) = undisturbed.glob("results_*.json")
    shared = json.loads(path.read_text("utf-8"))["arms"]
    config.eval.tile = 1
    evaluate(config, undisturbed)  # the same checkpoint; its gallery ranked by one process
    alone = json.loads(path.read_text("utf-8"))["arms"]
    assert {name: arm["metrics"] for name, arm in alone.items()} == {n: arm["metrics"] for n, arm in shared.items()}


def files(folder):
    """Bytes of the files of a folder by name, without those that say how it was made."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".npy", ".safetensors")}


def test_two_processes_embed_mine_and_rerank_like_one(undisturbed, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for folder in (alone, shared):
        shutil.copytree(undisturbed, folder, ignore=shutil.ignore_patterns("embeddings", "negatives"))
    config = tiny.config()
    config.update_from_flattened_dict(CHANGES | {"parallel.devices": 2, "eval.tile": 1, "eval.batch_size": 2})
    config.search.split, config.eval.two_stage, config.eval.hubness = "val", 3, True
    small = SMALL_TILES, "--config.eval.batch_size=2"
    with tiny.quick():
        embed(config, alone)
        mine(config, alone)
        evaluate(config, alone)
    together(shared, "--mode=embed", "--config.search.split=val", *small)
    (embedded,), (expected,) = shared.glob("embeddings/*val*"), alone.glob("embeddings/*val*")
    assert files(embedded) == files(expected) and len(files(embedded)) == 2
    printed = together(shared, "--mode=mine", *small)
    assert "hard negatives of" in printed[0] and "hard negatives of" not in printed[1]
    (mined,), (expected,) = shared.glob("negatives/*"), alone.glob("negatives/*")
    assert files(mined) == files(expected) and len(files(mined)) == 2
    together(shared, "--mode=eval", "--config.eval.two_stage=3", "--config.eval.hubness", *small)
    ours, theirs = (json.loads(next(f.glob("results_*.json")).read_text("utf-8"))["arms"] for f in (shared, alone))
    ours, theirs = ({n: (arm["metrics"], arm["extra"]) for n, arm in arms.items()} for arms in (ours, theirs))
    assert len(ours) == 3 and ours == theirs and any("hubness_t2i" in extra for _, extra in ours.values())
    assert not (shared / "scores").exists()


def test_two_processes_train_the_runs_of_a_study_in_turn(tmp_path):
    short = "--config.train.steps=12", "--config.study.only=('full','none')", WITHOUT_QUEUES
    printed = together(tmp_path / "study", "--mode=study", *short)
    assert "| full " in printed[0] and "| full " not in printed[1]
    assert (tmp_path / "study" / "study.html").exists()
    again = together(tmp_path / "study", "--mode=study", *short)
    assert again[0].count("finished: rSum") == 2 and "step 1/" not in again[0]


def test_a_process_that_dies_or_falls_silent_ends_the_other_and_the_job_goes_on(undisturbed, tmp_path):
    """Silent: stopped with all its connections open, as a host that hangs or has lost its network."""
    workdir = tmp_path / "run"
    for number, reason in (
        (signal.SIGSTOP, "heartbeat|another (process|task) died"),
        (signal.SIGKILL, "another (process|task) died"),
    ):
        for victim in (1, 0):  # a worker, the coordinator
            with Job(workdir, "--mode=train") as job:
                job.until_it_trains()
                job.processes[victim].send(number)
                survivor = job.processes[1 - victim]
                assert survivor.wait() not in (0, None), survivor.output()[-3000:]
                assert re.search(reason, survivor.output()), survivor.output()[-3000:]
    together(workdir, "--mode=train")
    ends_as(workdir, undisturbed)


def test_sigterm_stops_both_processes_in_order_and_the_job_goes_on(tmp_path):
    """In one of them, then in both, as a scheduler sends it; with parameters split over the devices of both.

    Both end by themselves: nobody has to kill them after a period of grace.
    """
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "run"
    together(undisturbed, "--mode=train", *SPLIT)
    saved = 0
    for told in ((1,), (0, 1)):  # the first one writes the log
        with Job(workdir, "--mode=train", *SPLIT) as job:
            job.until_it_trains()
            for process in told:
                job.processes[process].send(signal.SIGTERM)
            printed = job.outputs(128 + signal.SIGTERM)
        before, saved = saved, max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())
        assert before + 8 <= saved < STEPS
        assert all(f"stopped by SIGTERM after step {saved} of {STEPS}" in text for text in printed)
    together(workdir, "--mode=train", *SPLIT)
    ends_as(workdir, undisturbed)


def test_a_process_that_compiles_long_does_not_count_as_dead(tmp_path):
    """Of the step, then of an evaluation; the other one waits for it, and gets its signs of life."""
    short = WITHOUT_QUEUES, "--config.train.steps=12", "--config.model.name=tests.train.late"
    printed = together(tmp_path / "run", "--mode=train", *short)
    assert "rSum" in printed[0]
    assert all(f"silent for {late.SECONDS} s, {train=}" in printed[1] for train in (True, False))
