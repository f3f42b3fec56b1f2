"""docs/scaling.md has the tables of its figures, and these are counted and bounded as it says."""

from __future__ import annotations

import importlib.util
import json

import pytest

from benchmarks import slices
from shnet_jax.observe.hardware import CHIPS
from shnet_jax.plan.planned_run import describe

V5E = CHIPS["TPU v5e"]


def step(batch: int, needed: float, effort: float = -1.0) -> dict:
    """Figures of a step on 4 chips: 197 GFLOP, 8.19 GB of traffic, 200 MB summed over the devices."""
    work = {"flops": 197e9, "float32": {}, "traffic": 8.19e9, "collectives": {"all-reduce": 0.2e9}}
    return {
        "model": "base",
        "batch": batch,
        "chips": 4,
        "needed": needed,
        "record_bytes": 1000,
        "effort": effort,
    } | work


def test_the_page_has_the_tables_of_its_figures():
    figures = json.loads(slices.FIGURES.read_text(encoding="utf-8"))
    text = slices.PAGE.read_text(encoding="utf-8")
    assert slices.page(text, figures) == text
    assert text.split("\n\n")[1].startswith("Nothing on this page was run on a TPU")  # the first line
    assert all(each["fits"] and not each["loops_once"] for each in figures["step"])


@pytest.mark.parametrize("model", slices.MODELS)
def test_stored_bytes_of_a_pair(model):
    """Regions, label maps and tokens as they lie in the records; vectors of both sides in float16."""
    units = 36 * 2048 * 2 + 36 + 32 * 4
    expected = {"base": units + 133 * 7 * 7 * 2 + 64 * 64 + 133, "user": units, "align": 2 * 1024 * 2}
    assert slices.record_bytes(describe(slices.configuration(model, 32_768))) == expected[model]
    figures = json.loads(slices.FIGURES.read_text(encoding="utf-8"))["step"]
    assert all(each["record_bytes"] == expected[model] for each in figures if each["model"] == model)


def test_bounds_of_a_step():
    times = slices.seconds_of(step(512, 1e9), V5E)
    assert times == pytest.approx({"compute": 1e-3, "HBM": 10e-3, "ICI": 2e-3})
    assert slices.step_seconds(step(512, 1e9), V5E) == pytest.approx(2e-3)  # the compiler made the least effort
    assert slices.step_seconds(step(512, 1e9, effort=0.0), V5E) == pytest.approx(10e-3)


def test_the_largest_batch_continues_the_line_of_memory():
    steps = [step(4096, 3e9), step(1024, 1.5e9), step(512, 1e9)]
    assert slices.largest(steps, 4.5e9, 4) == 4096 + 3072
    assert slices.largest(steps, 4.49e9, 4) == 4096 + 3072 - 4 * slices.MICROBATCH


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_what_is_compiled_is_not_compiled_again(tmp_path):
    made = []

    def compile_one(loss):
        made.append(loss)
        return slices.compiled_loss("tpu:v5e:2x2", loss, "gathered", 16, 8)

    name = "loss_sigmoid_gathered"
    for _ in range(2):
        slices.compile_all(tmp_path, {name: lambda: compile_one("sigmoid")})
    (figures,) = slices.collected(tmp_path)["loss"]
    assert made == ["sigmoid"] and figures["flops"] >= 3 * 2 * 4 * 16 * 8 and figures["collectives"]["all-gather"] > 0
