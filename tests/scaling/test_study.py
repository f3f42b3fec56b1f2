"""The scaling study: which points, what is measured, and again; what fails is recorded."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import pytest

from configs import scaling as small
from shnet_jax.modes import scale as scale_mode
from shnet_jax.observe.work import work
from shnet_jax.plan import planned_run as planned
from shnet_jax.scaling import parts
from shnet_jax.scaling import point as measuring
from shnet_jax.scaling.processes import run_point, virtual_devices
from shnet_jax.scaling.rows import PARTS
from shnet_jax.scaling.sweep import Point, check_machine, point_config, sweep
from tests.train import tiny

MACHINE = {
    "platform": "gpu",
    "device_kind": "Some <fast> card",
    "devices": 4,
    "cpu": "a processor",
    "cores": 2,
    "system": "Linux",
    "python": "3.11",
    "versions": {"jax": "0.10"},
}
CPU = MACHINE | {"platform": "cpu", "device_kind": "cpu", "devices": 1}


def configuration(**changes):
    """A toy model; changes by dotted name with "__" for the dot."""
    c = small.get_config()
    fixed = {
        "model.name": "tests.train.toy", "model.dim": 8, "text.width": 8, "text.vocab_size": 50, "plan.regions": 3,
        "plan.region_dim": 4, "scale.devices": (1, 2), "scale.pairs_per_device": (4,), "scale.batch_sizes": (8,),
        "scale.strategies": ("gathered", "ring"), "scale.steps": 2, "scale.warmup_steps": 0, "scale.timeout": 300.0,
    }  # fmt: skip
    c.update_from_flattened_dict(fixed | {name.replace("__", "."): value for name, value in changes.items()})
    return c


# ---------------------------------------------------------------------------------------------------------- the sweep


def test_every_point_once():
    scale = configuration(scale__devices=(1, 2, 4), scale__dtypes=("float32", "bfloat16")).scale
    points = sweep(scale, references=False)
    sizes = [(1, 4), (2, 4), (4, 4), (1, 8), (4, 2)]  # 2 devices with 4 pairs each are on both lines
    assert [(p.devices, p.pairs) for p in points if (p.strategy, p.dtype) == ("ring", "float32")] == sizes
    assert len(points) == len(set(points)) == 4 * len(sizes)
    assert {(p.strategy, p.dtype) for p in points} == {(s, d) for s in scale.strategies for d in scale.dtypes}
    with_references = sweep(scale, references=True)
    assert {(p.devices, p.pairs) for p in with_references} - {*sizes} == {(1, 2)}


def test_the_configuration_of_a_point():
    config = configuration(data__token_buckets=(8, 16, 32))
    changed = point_config(config, Point("streamed", "bfloat16", 6, 4))
    assert (changed.parallel.devices, changed.train.batch_size, changed.loss.pairs.strategy) == (4, 24, "streamed")
    assert changed.model.dtype == changed.text.dtype == "bfloat16" and changed.data.token_buckets == (16,)
    assert config.train.batch_size != 24 and config.loss.pairs.strategy == "gathered"
    assert changed.loss.weights == config.loss.weights and changed.loss.triplet == config.loss.triplet


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale__strategies": ("gather",)}, r"config.scale.strategies is \('gather',\); choose .*gathered"),
        ({"scale__dtypes": ()}, r"config.scale.dtypes is \(\)"),
        ({"scale__devices": (0,)}, r"config.scale.devices is \(0,\)"),
        ({"scale__batch_sizes": ("",)}, r"config.scale.batch_sizes is \('',\); expected whole numbers"),
        ({"scale__devices": (1, 3)}, "config.scale.batch_sizes has 8; it must divide into 3 devices"),
        ({"scale__pairs_per_device": (), "scale__batch_sizes": ()}, "needs devices, and pairs_per_device or"),
        (
            {"data__captions_per_image": 3, "scale__batch_sizes": ()},
            "pairs_per_device has 4; it must divide into 1 device with whole images",
        ),
        ({"scale__steps": 0}, "config.scale.steps is 0"),
        ({"data__resident": True}, "random batches are not resident"),
    ],
)
def test_settings_that_do_not_fit(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        scale_mode.scale(configuration(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_devices_that_are_not_there():
    with pytest.raises(ValueError, match="asks for 8, this machine has 4 x Some <fast> card"):
        check_machine(configuration(scale__devices=(1, 8)), MACHINE)
    check_machine(configuration(scale__devices=(1, 8)), CPU)
    with pytest.raises(ValueError, match="mapping is pmap"):
        check_machine(configuration(parallel__mapping="pmap"), CPU)


def test_virtual_devices_replace_those_of_the_environment():
    flags = "--xla_a=1 --xla_force_host_platform_device_count=8"
    assert virtual_devices(flags, 2) == "--xla_a=1 --xla_force_host_platform_device_count=2"


# ---------------------------------------------------------------------------------------------- resuming and failing


class Runner:
    """Measures nothing; remembers what it was asked for."""

    def __init__(self, **statuses):
        self.statuses, self.asked = statuses, []

    def __call__(self, config, point, compile_only, folder):
        self.asked.append((point.name, compile_only))
        status = self.statuses.get(point.name, "measured")
        return {"status": status, "message": "" if status == "measured" else "why"}


def test_points_are_measured_once(tmp_path, capsys, monkeypatch):
    config = configuration()
    points = sweep(config.scale, references=False)

    def measure(runner, config=config, machine=CPU):
        monkeypatch.setattr(scale_mode, "run_point", runner)
        return scale_mode.measure_all(config, machine, points, tmp_path)

    first = Runner(ring_float32_4x1="failed", ring_float32_4x2="out of memory")
    records = measure(first)
    assert [name for name, _ in first.asked] == [p.name for p in points] and len(points) == 6
    assert {only for name, only in first.asked if name.endswith("x1")} == {False}
    assert {only for name, only in first.asked if name.endswith("x2")} == {True}
    assert [records[p]["status"] for p in points].count("measured") == 4
    said = capsys.readouterr().err
    assert "point 2/6  2 devices with 4 pairs each, gathered, float32  ETA 0:00:0" in said and "failed: why" in said

    again = Runner()  # the failed one alone: what did not fit will not fit now
    records = measure(again)
    assert [name for name, _ in again.asked] == ["ring_float32_4x1"]
    assert [records[p]["status"] for p in points].count("measured") == 5

    for changed, machine in (
        (configuration(scale__steps=3), CPU),
        (configuration(model__dim=9), CPU),
        (config, CPU | {"cpu": "another"}),
    ):
        other = Runner()
        measure(other, changed, machine)
        assert len(other.asked) == 6
    aside = Runner()
    renamed = configuration(name="x", scale__timeout=1.0)
    measure(aside, renamed, CPU | {"cpu": "another", "devices": 8})
    assert not aside.asked


def executable(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return str(path)


OOM = "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."


@pytest.mark.parametrize(
    ("lines", "status", "message"),
    [
        (["echo Traceback", "echo 'ValueError: no such tower' >&2", "exit 1"], "failed", "ValueError: no such tower"),
        ([f"echo '{OOM}' >&2", "exit 1"], "out of memory", OOM),
        (["kill -9 $$"], "failed", "ended by SIGKILL (by the system, for want of memory?): no message"),
        (["echo compiling", "exec sleep 20"], "failed", "took longer than config.scale.timeout = 0.5 seconds"),
    ],
)
def test_a_failing_point_is_recorded(lines, status, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", executable(tmp_path / "python", *lines))
    config = configuration(scale__timeout=0.5 if "sleep" in lines[-1] else 60.0)
    points = sweep(config.scale, references=False)[:2]
    records = scale_mode.measure_all(config, CPU, points, tmp_path)
    assert [records[p]["status"] for p in points] == [status] * 2  # and the study went on
    log = tmp_path / f"{points[0].name}.log"
    assert records[points[0]]["message"] == f"{message} (output: {log})"
    assert log.exists() and ("sleep" not in lines[-1] or log.read_text() == "compiling\n")
    kept = json.loads((tmp_path / f"{points[0].name}.json").read_text())
    assert kept["status"] == status and kept["message"].startswith(message)


def test_a_part_that_does_not_fit_costs_not_the_step(tmp_path, monkeypatch):
    lines = ["for last; do :; done", 'echo \'{"examples_per_second": 3.0, "seconds": {"step": 1}}\' > "$last"']
    lines += [f"echo '{OOM}' >&2", "exit 1"]
    monkeypatch.setattr(sys, "executable", executable(tmp_path / "python", *lines))
    point = Point("ring", "float32", 4, 1)
    record = run_point(point_config(configuration(), point), point, False, tmp_path)
    assert record["status"] == "measured" and record["examples_per_second"] == 3 and record["seconds"] == {"step": 1}
    assert record["message"].startswith(f"not all parts were measured: out of memory: {OOM}")


def test_what_was_measured_before_a_part_is_there_already(monkeypatch):
    def too_large(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    trivial = parts.Part(lambda *_: np.zeros(()), None, None)
    monkeypatch.setattr(measuring, "PROGRAMS", {"encode": lambda *_: trivial, "loss": too_large})
    monkeypatch.setattr(measuring, "compiled_figures", lambda lowered: {})
    monkeypatch.setattr(measuring, "time_steps", lambda run, state, *_: (state, 0.5))
    timed = []
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        config = point_config(configuration(), Point("gathered", "float32", 4, 1))
        for figures in measuring.measure_point(config):
            timed.append([*figures["seconds"]])
            assert figures["examples_per_second"] == 8
    assert timed == [["step", "input", "collectives"], ["step", "input", "collectives", "encode"]]


def test_a_study_without_any_result_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(scale_mode, "describe_machine", lambda folder: CPU)
    monkeypatch.setattr(scale_mode, "run_point", lambda *_: {"status": "failed", "message": "why"})
    with pytest.raises(SystemExit, match="error: none of 6 points has a result; the first: failed: why") as ended:
        scale_mode.scale(configuration(), tmp_path)
    assert ended.value.code != 0 and (tmp_path / "report.html").exists()


def test_a_result_is_read_and_what_led_to_it_removed(tmp_path, monkeypatch):
    lines = ["for last; do :; done", 'echo \'{"flops": 3.0}\' > "$last"', 'echo "$XLA_FLAGS" > flags']
    monkeypatch.setattr(sys, "executable", executable(tmp_path / "python", *lines))
    monkeypatch.chdir(tmp_path)
    point = Point("ring", "float32", 4, 2)
    folder = tmp_path / "points"
    folder.mkdir()
    record = run_point(point_config(configuration(), point), point, True, folder)
    assert record == {"status": "measured", "message": "", "flops": 3.0} and not list(folder.iterdir())
    assert "--xla_force_host_platform_device_count=2" in (tmp_path / "flags").read_text()


# ---------------------------------------------------------------------------------------------------------- measuring


def test_random_batches_have_the_shapes_of_training():
    config = configuration()
    config.model.name = "shnet"
    config.model.semantic = config.model.spatial = config.model.scene_tokens = config.model.category_token = True
    subject = planned.describe(config)
    batch, like = planned.random_batch(subject, 6, 0), planned.train_batch_shapes(subject, 6)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in like.items()}
    assert batch["tokens"].max() < 50 and batch["token_mask"].all() and batch["region_keep"].all()
    assert len(np.unique(batch["image_index"])) == 6
    assert not np.array_equal(batch["tokens"], planned.random_batch(subject, 6, 1)["tokens"])


QUEUES = {"momentum__queue": 16, "loss__weights__infonce": 1.0, "loss__weights__triplet": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize(("mapping", "changes"), [("shard_map", {}), ("pmap", QUEUES)])
def test_a_measured_point(mapping, changes):
    """The figures of a step that runs are those of the step that is only compiled; parts and rest make up the step."""
    config = point_config(configuration(parallel__mapping=mapping, **changes), Point("ring", "float32", 4, 2))
    *_, figures = measuring.measure_point(config)
    seconds = dict(figures["seconds"])
    step = seconds.pop("step")
    assert set(seconds) == set(PARTS) and sum(seconds.values()) == pytest.approx(step)
    assert all(seconds[part] > 0 for part in ("encode", "loss", "collectives", "optimiser"))
    assert figures["examples_per_second"] == pytest.approx(8 / step)
    if mapping == "shard_map":
        compiled = measuring.compile_point(config)
        assert compiled["collectives"]["collective-permute"] > 0
        assert all(figures[name] == compiled[name] for name in ("flops", "collectives", "memory"))


@pytest.mark.slow
def test_parts_are_those_of_the_step_after_the_warm_up():
    config = point_config(configuration(), Point("ring", "float32", 4, 2))
    assert config.loss.triplet.warmup_epochs == 1.0
    run = measuring.random_run(config)
    batch = run.put(next(run.batches))
    state, params = run.steady_state(), jax.device_get(run.steady_state().params)
    assert int(state.step) >= 2**29  # far beyond any warm-up

    part = parts.collectives_part(run, batch)
    summed = jax.device_get(part.program(part.state, part.batch, part.table))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), summed, params)
    sent = work(part.program.lower(part.state, part.batch, part.table).compile().as_text()).collectives
    assert sent == {"all-reduce": sum(leaf.nbytes for leaf in jax.tree.leaves(params))}

    exchanged = work(run.setup.step.lower(state, batch, {}).compile().as_text()).collectives["collective-permute"]
    part = parts.loss_part(run, batch)
    alone = work(part.program.lower(part.state, part.batch, part.table).compile().as_text()).collectives
    assert alone["collective-permute"] == exchanged
    part = parts.encode_part(run, batch)
    towers = work(part.program.lower(part.state, part.batch, part.table).compile().as_text()).collectives
    assert "collective-permute" not in towers and 0 < towers["all-reduce"] < 100

    part = parts.optimiser_part(run, batch)
    applied = part.program(part.state, part.batch, part.table)
    assert int(applied.step) == int(state.step) + 1 and int(applied.nonfinite) == 0
    moved = jax.tree.map(lambda x, y: (x != y).any() == y.any(), jax.device_get(applied.params), params)
    assert all(jax.tree.leaves(moved))  # each by itself, as parameters serve as gradients


@pytest.mark.slow
def test_from_a_data_set():
    config = tiny.config(scale__steps=2, scale__warmup_steps=0)
    config.model.name = "tests.train.toy"
    *_, figures = measuring.measure_point(point_config(config, Point("gathered", "float32", 10, 1)))
    assert figures["seconds"]["input"] >= 0 and figures["memory"]["peak"] > 0


@pytest.mark.slow
def test_the_study_itself(tmp_path, monkeypatch, capsys):
    config = configuration(scale__strategies=("gathered",), scale__batch_sizes=())
    rows = scale_mode.scale(config, tmp_path)
    assert [(r["devices"], r["pairs"], r["status"], r["virtual"]) for r in rows] == [
        (1, 4, "measured", False),
        (2, 4, "measured", True),
    ]
    assert rows[0]["examples_per_second"] and rows[1]["examples_per_second"] is None
    assert rows[1]["all-reduce_bytes"] > 0 and rows[0]["all-reduce_bytes"] == 0
    assert (tmp_path / "report.html").read_text("utf-8").rstrip().endswith("</html>")
    assert f"2 points: {tmp_path / 'report.html'}" in capsys.readouterr().out
    monkeypatch.setattr(scale_mode, "run_point", lambda *_: pytest.fail("measured again"))
    assert scale_mode.scale(config, tmp_path) == rows
