"""Trackers: a run keeps its id, training outlives a tracker, and the real clients have the lines of metrics.jsonl.

The clients are no part of `make setup`; `make test-trackers` installs them and runs this file. Nothing leaves the
machine: W&B is offline, MLflow's server is started here, trackio writes a local file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from shnet_jax import bundled
from shnet_jax.observe import trackers
from shnet_jax.observe.sinks import Line
from shnet_jax.observe.trackers import Background
from shnet_jax.observe.writer import MetricWriter, read_metrics
from tests.patience import PATIENCE


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: make test-trackers")


def line(step):
    return Line(step, "train", {"loss": 1 / step}, {})


class Fake:
    """A tracker that raises while `down` is set."""

    def __init__(self, down=0):
        self.down, self.steps, self.opened, self.closed = down, [], 0, False

    def open(self):
        self._fail()
        self.opened += 1
        return self

    def log(self, line):
        self._fail()
        self.steps.append(line.step)

    def close(self):
        self.closed = True

    def _fail(self):
        if self.down:
            self.down -= 1
            raise ConnectionError("no route to host\nand a traceback")


@pytest.mark.parametrize("down", [0, 3])
def test_every_line_arrives_once_and_a_failure_is_told_once(down, caplog):
    fake = Fake(down)
    with caplog.at_level(logging.WARNING, logger="shnet_jax"):
        sink = Background("mlflow", fake.open, pause=0.0)
        for step in range(1, 6):
            sink.write(line(step))
        while len(fake.steps) < 5:  # an end would stop the attempts
            assert sink._thread.is_alive()
        sink.close()
    assert fake.steps == [1, 2, 3, 4, 5] and fake.opened == 1 and fake.closed
    told = [message for message in caplog.messages if "no route" in message]
    assert told == ["mlflow: no route to host. Training goes on, and tries again; metrics.jsonl has every line"][:down]


def test_a_tracker_that_is_gone_at_the_end(caplog):
    sink = Background("wandb", Fake(down=10**9).open, pause=60.0)
    sink.write(line(1))
    sink.write(line(2))
    sink.close()
    assert caplog.messages[-1] == "wandb does not have the last lines of this run; metrics.jsonl has them all"
    assert len(caplog.messages) == 2 and not sink._thread.is_alive()


def test_a_tracker_that_hangs_does_not_hold_the_end(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.01)
    answered = threading.Event()

    def hang():
        answered.wait(PATIENCE)
        raise SystemExit(1)  # as a client does that asks for a login

    sink = Background("wandb", hang)
    sink.write(line(1))
    sink.close()
    assert "does not have the last lines" in caplog.text
    answered.set()


def test_names_and_packages(monkeypatch):
    trackers.check(())
    with pytest.raises(ValueError, match=r"log_to has 'comet'; choose from wandb, mlflow, trackio, or \(\)"):
        trackers.check(("comet",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'mlflow', whose package is not installed: .* install -e '\.\[mlflow\]'"):
        trackers.check(("mlflow",))


def test_a_work_folder_keeps_its_id(tmp_path):
    first = trackers.run_id(tmp_path)
    assert trackers.run_id(tmp_path) == first and len(first) == 32
    (tmp_path / "other").mkdir()
    assert trackers.run_id(tmp_path / "other") != first
    assert trackers.flat(configuration())["train.batch_size"] == configuration().train.batch_size


def configuration(*names):
    config = bundled.get_config("demo")
    config.train.log_to, config.train.log_tags, config.train.log_project = names, ("small", "test"), "tests"
    return config


def interrupted(name, workdir):
    """A run killed after step 7, whose last checkpoint is 4, and continued to 9: what metrics.jsonl has of it."""
    for resume_step, last in ((0, 7), (4, 9)):
        writer = MetricWriter(workdir, resume_step, trackers.open_trackers(configuration(name), workdir))
        for step in range(resume_step + 1, last + 1):
            writer.write(step, "train", {"loss": 1 / step}, {"examples_per_second": 3.0})
        writer.write(last, "eval", {"rsum": 10.0 * last})
        writer.close()
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "train"]
    return {line["step"]: line["loss"] for line in lines}


def wandb_records(path):
    """Records of a .wandb file: a log in LevelDB's format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


@needs("wandb")
@pytest.mark.slow
def test_wandb(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    expected = interrupted("wandb", tmp_path)
    found, runs = {}, []
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                if "train/loss" in row:
                    found[int(row["step"])] = float(row["train/loss"])
    assert {run.run_id for run in runs} == {trackers.run_id(tmp_path)} and found == expected
    run = runs[0]
    assert (run.project, run.display_name, sorted(run.tags)) == ("tests", configuration().name, ["small", "test"])
    config = {item.key: item.value_json for record in runs for item in record.config.update}
    assert config["train.batch_size"] == str(configuration().train.batch_size)
    assert not [message for message in caplog.messages if "wandb" in message]


@contextlib.contextmanager
def mlflow_server(folder, port):
    """MLflow's own server with a file of SQLite, at the port, until the end of the context."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers=1", f"--port={port}", "--host=127.0.0.1"]
    command += [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/files"]
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=PATIENCE).close()
                break
            assert server.poll() is None, (folder / "server.log").read_text()
        yield
    finally:
        os.killpg(server.pid, 9)
        server.wait()


@needs("mlflow")
@pytest.mark.slow
def test_mlflow(monkeypatch, tmp_path, caplog):
    """Against a real server, which is gone for some lines."""
    from mlflow import MlflowClient

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    workdir = tmp_path / "run"
    with mlflow_server(tmp_path, port):
        expected = interrupted("mlflow", workdir)
        assert not [message for message in caplog.messages if "mlflow" in message]
        writer = MetricWriter(workdir, 9, trackers.open_trackers(configuration("mlflow"), workdir))
        writer.write(10, "train", {"loss": 0.1})
        (run,) = runs(MlflowClient())
        while len(MlflowClient().get_metric_history(run.info.run_id, "train/loss")) < 11:
            pass
    writer.write(11, "train", {"loss": 1 / 11})
    while not caplog.messages:
        assert writer._sinks[-1]._thread.is_alive()
    assert "mlflow: " in caplog.text and "Training goes on" in caplog.text
    with mlflow_server(tmp_path, port):
        while len(MlflowClient().get_metric_history(run.info.run_id, "train/loss")) < 12:
            pass
        writer.close()
        (run,) = runs(MlflowClient())
        history = MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert {m.step: m.value for m in history} == expected | {10: 0.1, 11: 1 / 11}
    assert run.data.tags["shnet_jax.tracking_id"] == trackers.run_id(workdir) and run.data.tags["tags"] == "small, test"
    assert run.info.run_name == configuration().name and run.info.status == "FINISHED"
    assert run.data.params["train.batch_size"] == str(configuration().train.batch_size)
    assert len(caplog.messages) == 1


def runs(client):
    return client.search_runs([client.get_experiment_by_name("tests").experiment_id])


@needs("trackio")
@pytest.mark.slow
def test_trackio(tmp_path):
    """In a process of its own, as trackio reads TRACKIO_DIR once."""
    code = (
        "from pathlib import Path; from tests.observe import test_trackers as t\n"
        "from trackio.sqlite_storage import SQLiteStorage as s\n"
        f"w = Path({str(tmp_path / 'run')!r}); expected = t.interrupted('trackio', w)\n"
        "(run,) = s.get_runs('tests'); name = t.configuration().name\n"
        "assert run == f'{name} {t.trackers.run_id(w)[:8]}', run\n"
        "rows = [row for row in s.get_logs('tests', run) if 'train/loss' in row]\n"
        "assert {row['step']: row['train/loss'] for row in rows} == expected, rows\n"
        "config = s.get_run_config('tests', run); assert config['tags'] == 'small, test', config\n"
        "assert config['train.batch_size'] == t.configuration().train.batch_size\n"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
