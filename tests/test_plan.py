"""Planning: the shapes are those of real batches, and programs compile for chips that are not there."""

from __future__ import annotations

import importlib.util
import json

import jax
import numpy as np
import pytest

from configs import base, demo
from shnet_jax import plan
from shnet_jax.experiment import abstract_variables, assemble
from shnet_jax.observe.compiled import Memory, OutOfMemory
from shnet_jax.observe.hardware import CHIPS, GIB, chip, target_devices
from shnet_jax.observe.work import Work
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.train.prepare import prepare
from tests.train import tiny

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)


def small(**changes):
    """configs/demo.py without its data set, made tiny; changes by dotted name with "__" for the dot."""
    c = demo.get_config()
    fixed = {
        "data.dir": "", "data.resident": False, "data.token_buckets": (16, 48), "data.max_tokens": 16, "model.dim": 32,
        "model.semantic": False, "model.spatial": False, "model.scene_tokens": False, "model.category_token": False,
        "text.tower": "transformer", "text.width": 16, "text.layers": 1, "text.heads": 2, "text.mlp_dim": 16,
        "text.vocab_size": 50, "train.batch_size": 80, "eval.batch_size": 8, "plan.regions": 4, "plan.region_dim": 16,
        "plan.search": False,
    }  # fmt: skip
    c.update_from_flattened_dict(fixed | {name.replace("__", "."): value for name, value in changes.items()})
    return c


def shapes(tree):
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), np.dtype(leaf.dtype).name), dict(tree))


@pytest.mark.parametrize("resident", [False, True])
def test_the_batch_is_that_of_training(resident):
    config = tiny.config(data__resident=resident, data__captions_per_image=5)
    parts, subject = prepare(assemble(config)), plan.describe(config)
    assert shapes(plan.train_batch(subject, config.train.batch_size)) == shapes(next(parts.iterator))
    if resident:
        assert shapes(plan.resident_table(subject)) == shapes(parts.table)


def test_the_parameters_are_those_of_training():
    config = tiny.config()
    experiment = assemble(config)
    config.text.vocab_size = experiment.config.text.vocab_size
    assert shapes(plan.variables(plan.describe(config))) == shapes(abstract_variables(experiment))


def test_described_sizes():
    config = base.get_config()
    config.model.units = ("grid",)
    config.train.batch_size = 64
    subject = plan.describe(config)
    assert subject.config.text.vocab_size == 30522 and subject.captions == 113287 * 5
    assert shapes(plan.train_batch(subject, 64)) == {
        "image_index": ((64,), "int32"),
        "grid": ((64, 49, 2048), "float16"),
        "grid_mask": ((64, 49), "bool"),
        "grid_keep": ((64, 49), "bool"),
        "seg_semantic": ((64, 133, 7, 7), "float16"),
        "seg_map": ((64, 64, 64), "uint8"),
        "categories": ((64, 133), "bool"),
        "tokens": ((64, 32), "int32"),
        "token_mask": ((64, 32), "bool"),
    }


@pytest.mark.parametrize("target", ["", "tpu", "tpu:v5e", "tpu:v3:2x2", "gpu:0", "cpu:many", "tpu:v5e:4x4:2"])
def test_an_unknown_target_lists_the_known_ones(target):
    with pytest.raises(ValueError, match=r"unknown; known are tpu:v4:2x2x2, tpu:v5e:4x4, .*gpu:8, cpu, cpu:8"):
        target_devices(target)


def test_targets_that_are_not_there():
    assert len(jax.devices()) == 8  # JAX has started
    with pytest.raises(ValueError, match="JAX finds no gpu"):
        target_devices("gpu")
    with pytest.raises(ValueError, match="this machine has 8 cpu devices"):
        target_devices("cpu:9")


@needs_libtpu
def test_tpu_slices():
    for target, kind, count in (
        ("tpu:v4:2x2x2", "TPU v4", 8),
        ("tpu:v5e:1x1", "TPU v5 lite", 1),
        ("tpu:v5e:16x16", "TPU v5 lite", 256),
        ("tpu:v5p:2x2x2", "TPU v5", 8),
        ("tpu:v6e:4x4", "TPU v6 lite", 16),
    ):
        devices = target_devices(target)
        assert {d.device_kind for d in devices} == {kind} and len(devices) == count
    with pytest.raises(ValueError, match="--target=tpu:v5e:3x5: libtpu knows no such slice"):
        target_devices("tpu:v5e:3x5")


def test_the_most_specific_chip():
    assert chip("NVIDIA H100 PCIe") is CHIPS["H100 PCIe"] and chip("NVIDIA H100 80GB HBM3") is CHIPS["H100"]
    assert chip("NVIDIA A100-SXM4-80GB").memory == 80e9 and chip("NVIDIA A100-SXM4-40GB").memory == 40e9
    assert chip("cpu") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__mapping": "pmap"}, "config.parallel.mapping is pmap, which compiles only for devices that are"),
        ({"parallel__devices": 9}, "config.parallel.devices is 9, --target=cpu has 8"),
        ({"train__batch_size": 84}, "config.train.batch_size is 84; it must divide into 8 devices with a multiple of"),
        ({"train__microbatch": 4}, "config.train.batch_size is 80; .* config.train.microbatch = 4"),
        ({"train__microbatch": 2}, "config.train.microbatch is 2, no multiple of config.data.captions_per_image = 5"),
        ({"plan__effort": 1.0}, "config.plan.effort is 1.0; it must be between -1 and 0"),
        ({"model__name": "nothing"}, "unknown model 'nothing'"),
    ],
)
def test_settings_that_do_not_fit(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan.plan(small(**changes), tmp_path, "cpu")


@pytest.mark.slow
def test_plan_for_this_machine(tmp_path, capsys):
    with tiny.quick():
        plan.plan(small(plan__effort=-1.0), tmp_path, "cpu:2")
    report = json.loads((tmp_path / "plan_cpu_2.json").read_text())
    assert report["devices"] == 2 and report["global_batch"] == 80 and report["chip"] is None
    assert report["largest_pairs_per_device"] is None  # the memory of a CPU is not known
    train = report["programs"]["train"]
    images = 8
    batch = images * (4 + 4 * (16 * 2 + 2)) + 40 * 16 * (4 + 1)
    assert train["memory"]["arguments"] - train["memory"]["aliased"] == pytest.approx(batch, rel=0.01)
    assert train["work"]["flops"] > 0 and train["work"]["collectives"]["all-reduce"] > 0
    out = capsys.readouterr().out
    assert "2 x cpu, global batch 80" in out and "all-reduce" in out and "plan_cpu_2.json" in out


def test_what_does_not_fit_is_said(monkeypatch):
    """The compiler gives up on the training step; encoding is compiled for this machine."""
    monkeypatch.setattr(plan, "chip", lambda kind: CHIPS["TPU v5e"])
    message = "RESOURCE_EXHAUSTED: Used 30.5G of 15.75G hbm."

    def lower_train(subject, mesh, pairs):
        raise OutOfMemory(message, 30.5 * GIB, 15.75 * GIB)

    monkeypatch.setattr(plan, "lower_train", lower_train)
    monkeypatch.setattr(plan, "lower_encode", lambda *_: jax.jit(lambda x: x @ x).lower(np.ones((8, 8), np.float32)))
    report = plan.make_plan(plan.describe(small(plan__search=True)), data_mesh(jax.devices()))
    assert report["programs"]["train"]["fits"] is False and report["programs"]["encode images"]["fits"] is True
    assert report["largest_pairs_per_device"] == 0
    text = plan.table(report)
    assert "30.50 GiB" in text and "NO" in text and message in text and "--config.train.microbatch" in text
    assert json.loads(json.dumps(report)) == report


@needs_libtpu
def test_a_tower_compiles_for_tpu():
    mesh = data_mesh(target_devices("tpu:v5e:2x4"))
    subject = plan.describe(small())
    found = plan.compile_program(lambda: plan.lower_encode(subject, mesh, 8, "text"), 8, 16 * GIB)
    assert found.fits and found.work.flops > 2 * 8 * 16 * 16 * 32 and found.work.collectives == {}


@needs_libtpu
@pytest.mark.slow
def test_microbatches_are_counted_for_tpu():
    """Four times the batch in microbatches of one size: the towers do four times as much."""
    mesh, found = data_mesh(target_devices("tpu:v5e:2x4")), []
    for pairs in (10, 40):
        subject = plan.describe(small(train__microbatch=5, train__microbatch_statistics="local"))
        lowered = plan.lower_train(subject, mesh, pairs)
        found.append(plan.compile_program(lambda lowered=lowered: lowered, pairs, 16 * GIB))
    once, more = found
    assert once.fits and more.fits and once.work.loops_once == more.work.loops_once == 0
    assert 3.9 < more.work.flops / once.work.flops < 5  # the scores of the loss grow with the square


# ----------------------------------------------------------------------- search, without compiling


def fake(limit, tried):
    def compiled(pairs):
        tried.append(pairs)
        return plan.Program(pairs, pairs <= limit, None, None, float(pairs), 0.0)

    return compiled


@pytest.mark.parametrize(
    ("start", "unit", "limit", "most", "expected"),
    [
        (64, 8, 64, 10**6, 64),
        (64, 8, 100, 10**6, 96),
        (64, 8, 1000, 10**6, 960),
        (64, 8, 10**9, 300, 296),  # all captions that there are
        (64, 8, 63, 10**6, 56),
        (64, 8, 9, 10**6, 8),
        (64, 8, 7, 10**6, 0),
        (8, 8, 7, 10**6, 0),
    ],
)
def test_largest_batch(start, unit, limit, most, expected):
    tried = []
    compiled = fake(limit, tried)
    first = compiled(start)
    found = plan.largest_batch(compiled, first, unit, most)
    assert found == expected
    assert found <= limit and len(set(tried)) == len(tried) and all(pairs % unit == 0 for pairs in tried)


def test_fitting_microbatch():
    def compiled(pairs, subject):
        microbatch = subject.config.train.microbatch
        return plan.Program(pairs, microbatch <= 30, None, None, float(microbatch), 0.0)

    subject = plan.describe(small())
    assert plan.fitting_microbatch(compiled, subject, 160) == (20, 20.0)  # 80, 40, 20; parts hold whole images of 5
    subject = plan.describe(small(data__captions_per_image=1, train__microbatch=16))
    assert plan.fitting_microbatch(compiled, subject, 160) == (10, 10.0)
    subject = plan.describe(small(train__microbatch=5))
    assert plan.fitting_microbatch(compiled, subject, 160) is None


def test_advice_names_only_what_is_not_done_yet():
    config = base.get_config()
    everything = " ".join(plan.advice(config, 8))
    for flag in ("dtype=bfloat16", "train.microbatch", "pairs.strategy=streamed", "more than 8 devices"):
        assert flag in everything
    assert "resident" not in everything
    config.model.dtype = config.text.dtype = "bfloat16"
    config.loss.pairs.strategy = "ring"
    config.train.microbatch = 64
    fewer = " ".join(plan.advice(config, 8))
    assert "dtype" not in fewer and "strategy" not in fewer and "a smaller --config.train.microbatch than 64" in fewer


def test_bounds():
    work = Work(flops=197e12, passes=2 * 197e12, bytes=819e9 / 2)
    assert plan.bounds(work, CHIPS["TPU v5e"], "TPU v5 lite") == (2.0, 0.5)
    assert plan.bounds(work, CHIPS["H100"], "H100")[0] == 197 / 989


def test_peak_counts_donated_memory_once():
    assert Memory(10, 7, 6, 5, 1).peak == 17


@needs_libtpu
@pytest.mark.slow
def test_a_global_batch_of_32768_fits_on_64_chips():
    """The published sizes (BERT base, 36 regions, 133 classes, a 64 x 64 map) in bfloat16 on v5e chips of 16 GiB."""
    config = base.get_config()
    config.model.dtype = config.text.dtype = "bfloat16"
    config.train.batch_size = 32768
    config.train.microbatch = 64
    config.train.microbatch_statistics = "local"
    config.loss.pairs.strategy = "streamed"
    subject, mesh = plan.describe(config), data_mesh(target_devices("tpu:v5e:8x8"))
    # With the least effort the compiler takes a tenth of the time, and more memory than it has to.
    found = plan.compile_program(lambda: plan.lower_train(subject, mesh, 512), 512, 16 * GIB, effort=-1.0)
    assert found.fits and found.needed < 16 * GIB, found.why
    assert found.work.loops_once == 0
    # Two forward passes and a backward one, as much as two: 4 x 2 operations for each weight of the layers and token.
    assert found.work.flops > 8 * 85e6 * 512 * 32
