"""Metrics on disk, and that resuming leaves what an undisturbed run would have."""

import json
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from shnet_jax.observe.writer import MetricWriter, read_metrics


def train(workdir, steps, resume_step=0, speed=1.0):
    writer = MetricWriter(workdir, resume_step)
    for step in steps:
        writer.write(step, "train", {"loss": np.float32(1 / step)}, {"examples_per_second": speed})
        if step % 4 == 0:
            writer.write(step, "eval", {"rsum": 10 * step})
    writer.close()


def lines(workdir):
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_metrics(workdir / "metrics.jsonl")]


def test_lines(tmp_path):
    train(tmp_path, [4])
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == [
        {"step": 4, "kind": "train", "loss": 0.25, "timing": {"examples_per_second": 1.0}},
        {"step": 4, "kind": "eval", "rsum": 40},
    ]


@pytest.mark.parametrize("torn", ["", '{"step": 8, "ki', '{"step": 8, "kind": "train"}', "\0\0\0"])
@pytest.mark.parametrize("resume_step", [0, 4])
def test_resumed_run_has_the_lines_of_an_undisturbed_one(tmp_path, torn, resume_step):
    train(tmp_path / "whole", range(1, 10))
    train(tmp_path / "pieces", range(1, 8))
    with (tmp_path / "pieces" / "metrics.jsonl").open("a") as file:
        file.write(torn)
    train(tmp_path / "pieces", range(resume_step + 1, 10), resume_step, speed=2.0)
    assert lines(tmp_path / "pieces") == lines(tmp_path / "whole")
    assert [p.name for p in (tmp_path / "pieces").glob("*.tmp")] == []


def test_complete_line_without_its_line_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0}')
    train(tmp_path, [2], resume_step=1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_each_line_is_on_disk_when_write_returns(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, "train", {"loss": 2.0})
    assert len(lines(tmp_path)) == 1
    writer.close()


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, "train", {"loss": float("nan"), "grad_norm": np.float32("inf")})
    writer.close()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["loss"], line["grad_norm"]) == ("nan", "inf")


def test_errors_name_the_place(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\nhello\n{"step": 2, "kind": "train"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        MetricWriter(tmp_path, resume_step=2)
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(ValueError, match="line 1: expected an object with an integer 'step'"):
        MetricWriter(tmp_path, resume_step=2)
    writer = MetricWriter(tmp_path / "new")
    with pytest.raises(ValueError, match="may not be called step"):
        writer.write(1, "train", {"step": 3})
    with pytest.raises(ValueError, match="train or eval, not 'test'"):
        writer.write(1, "test", {})
    writer.close()


def events(workdir):
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, checksum, payload, checksum
            (length,) = struct.unpack("<Q", data[at : at + 8])
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def test_tensorboard_has_the_scalars_and_forgets_dropped_steps(tmp_path):
    train(tmp_path, [1, 2])
    actual = {(e.step, v.tag): v.simple_value for e in events(tmp_path) for v in e.summary.value}
    assert actual[2, "train/loss"] == 0.5
    assert actual[2, "timing/examples_per_second"] == 1.0
    assert not any(e.session_log.status == SessionLog.START for e in events(tmp_path))
    train(tmp_path, [2], resume_step=1)
    assert [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START] == [2]
