"""Plans have the shapes of real batches, and their programs compile for chips that this machine lacks."""

from __future__ import annotations

import functools
import importlib.util
import json
import types

import jax
import numpy as np
import pytest

from configs import base, scenes
from configs import esa as esa_config
from shnet_jax.experiment import abstract_variables, assemble
from shnet_jax.modes import plan as plan_mode
from shnet_jax.observe.compiled import Memory, OutOfMemory
from shnet_jax.observe.hardware import CHIPS, GIB, Chip, chip, memory_limit, target_devices
from shnet_jax.observe.work import Work
from shnet_jax.ops import interaction
from shnet_jax.parallel import sharding
from shnet_jax.parallel.mapping import data_mesh, make_mesh
from shnet_jax.plan import programs, search
from shnet_jax.plan.planned_run import (
    describe,
    gallery_size,
    random_batch,
    resident_table_shapes,
    train_batch_shapes,
    variable_shapes,
)
from shnet_jax.plan.table import table
from shnet_jax.training.setup import training_data
from tests.train import tiny

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed"
)


def small(**changes):
    """configs/scenes.py without its data set, made tiny; changes by dotted name with "__" for the dot."""
    c = scenes.get_config()
    fixed = {
        "data.dir": "", "data.resident": False, "data.token_buckets": (16, 48), "data.max_tokens": 16, "model.dim": 32,
        "model.semantic": False, "model.spatial": False, "model.scene_tokens": False, "model.category_token": False,
        "text.tower": "transformer", "text.width": 16, "text.layers": 1, "text.heads": 2, "text.mlp_dim": 16,
        "text.vocab_size": 50, "train.batch_size": 80, "eval.batch_size": 8, "plan.regions": 4, "plan.region_dim": 16,
        "plan.search": False, "plan.gallery": 40, "eval.tile": 4,
    }  # fmt: skip
    c.update_from_flattened_dict(fixed | {name.replace("__", "."): value for name, value in changes.items()})
    return c


def shapes(tree):
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), np.dtype(leaf.dtype).name), dict(tree))


@pytest.mark.parametrize("resident", [False, True])
def test_the_batch_is_that_of_training(resident):
    config = tiny.config(data__resident=resident, data__captions_per_image=5)
    (iterator, table), run = training_data(assemble(config), make_mesh(1)), describe(config)
    assert shapes(train_batch_shapes(run, config.train.batch_size)) == shapes(next(iterator))
    if resident:
        assert shapes(resident_table_shapes(run)) == shapes(table)


def test_the_parameters_are_those_of_training():
    config = tiny.config()
    experiment = assemble(config)
    assert describe(config).config.text.vocab_size == experiment.tokenizer.vocab_size
    assert shapes(variable_shapes(describe(config))) == shapes(abstract_variables(experiment))


def test_described_sizes():
    config = base.get_config()
    config.model.units = ("grid",)
    config.train.batch_size = 64
    run = describe(config)
    assert run.config.text.vocab_size == 30522 and run.captions == 113287 * 5
    assert shapes(train_batch_shapes(run, 64)) == {
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


def test_a_person_search_without_data():
    run = describe(esa_config.get_config("cuhk_pedes"))
    assert run.config.loss.identity.classes == run.config.plan.persons == 11003
    assert shapes(train_batch_shapes(run, 64))["identity"] == ((64,), "int32")
    identity = random_batch(run, 4, 0)["identity"]
    assert identity.tolist() == [0, 0, 1, 1]


def test_words_are_those_of_the_vocabulary_that_is_named(tmp_path):
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]) + "\n", encoding="utf-8")
    config = small(text__vocab_size=0, tokenizer__kind="wordpiece", tokenizer__path=str(words))
    assert describe(config).config.text.vocab_size == 7
    assert describe(small(text__vocab_size=0)).config.text.vocab_size == 30522
    assert describe(small()).config.text.vocab_size == 50


def test_the_gallery_is_that_of_the_evaluation():
    assert gallery_size(describe(small())) == (40, 200)
    assert gallery_size(describe(tiny.config())) == (10, 50)


@pytest.mark.slow
def test_stages_divide_the_layers_and_must_fit():
    """A device holds the parameters of its stage only, in evaluation too."""
    mesh, arguments = data_mesh(jax.devices()[:4]), []
    for stages in (1, 2):
        config = small(text__layers=2, text__mlp_dim=4096, eval__stages=stages, eval__microbatches=4)
        lowered = programs.lower_encode(describe(config), mesh, 8, "text")
        arguments.append(programs.compile_program(lambda lowered=lowered: lowered, 8, None).memory.arguments)
    layer = 4 * (2 * 16 * 4096 + 4096 + 16 + 4 * 16 * 17 + 4 * 16)
    assert arguments[0] - arguments[1] == pytest.approx(layer, rel=0.01)
    with pytest.raises(ValueError, match=r"config\.eval\.microbatches is 7, which does not divide the 16 captions"):
        plan_mode.make_plan(describe(small(text__layers=2, eval__stages=2, eval__microbatches=7)), mesh)


def test_the_bubble_of_a_pipeline_is_part_of_the_plan(monkeypatch):
    def give_up(*_):
        raise OutOfMemory("nothing is compiled here", None, None)

    monkeypatch.setattr(plan_mode, "lower_train", give_up)
    monkeypatch.setattr(plan_mode, "lower_encode", give_up)
    monkeypatch.setattr(plan_mode, "_rankings", lambda *_: {})
    config = small(text__layers=2, eval__stages=2, eval__microbatches=4)
    report = plan_mode.make_plan(describe(config), data_mesh(jax.devices()[:2]))
    assert report["pipeline"]["bubble_share"] == 0.2
    assert "text tower in 2 stages, microbatches: 4; a stage is idle for 20.0 % of the ticks" in table(report)


@pytest.mark.parametrize(("split", "resident"), [(False, True), (True, False)])
def test_what_stays_on_the_devices_while_evaluating(split, resident, monkeypatch):
    """Parameters, two moments and the average, of which each device has all or its part; resident features."""
    monkeypatch.setattr(sharding, "SMALLEST", 1)
    config = small(text__vocab_size=4096, optim__ema=0.9, parallel__shard_params=split, data__resident=resident)
    run, mesh = describe(config), data_mesh(jax.devices()[:4])
    model = sum(leaf.size * 4 for leaf in jax.tree.leaves(variable_shapes(run)["params"]))
    features = config.plan.images * 4 * (16 * 2 + 1)  # regions in float16 and their mask
    expected = 4 * model / (4 if split else 1) + resident * features
    assert programs.stays_while_evaluating(run, mesh) == pytest.approx(expected, rel=0.05)  # vectors stay whole
    actual = programs.compile_program(lambda: jax.jit(lambda x: x @ x).lower(np.ones((8, 8))), 8, 1500.0, beside=1000.0)
    assert actual.needed == actual.memory.peak + 1000 and actual.fits is (actual.needed <= 1500)


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
    for other in ("NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A1000", "TPU v50"):
        assert chip(other) is None


@pytest.mark.parametrize(
    ("platform", "stats", "limit", "says"),
    [
        ("gpu", {"bytes_limit": 60e9}, 60e9, "what the allocator may hand out"),
        ("gpu", None, 72e9, "data sheet, less 10%"),
        ("tpu", None, 80e9, "data sheet"),
    ],
)
def test_memory_that_programs_may_take(platform, stats, limit, says):
    device = types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)
    assert memory_limit(device, CHIPS["H100"]) == (pytest.approx(limit), says)


def test_memory_of_an_unknown_device():
    assert memory_limit(jax.devices()[0], None) == (None, "not known")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__mapping": "pmap"}, "config.parallel.mapping is pmap, which compiles only for devices that are"),
        ({"parallel__devices": 9}, "config.parallel.devices is 9, --target=cpu has 8"),
        ({"train__batch_size": 84}, "config.train.batch_size is 84; it must divide into 8 devices with whole images"),
        ({"train__microbatch": 4}, "config.train.microbatch is 4; it must divide the 10 pairs of a device"),
        (
            {"train__microbatch": 2},
            "config.train.microbatch is 2; .* whole images of config.data.captions_per_image = 5",
        ),
        ({"plan__effort": 1.0}, "config.plan.effort is 1.0; it must be between -1 and 0"),
        ({"model__name": "nothing"}, "unknown model 'nothing'"),
        ({"data__max_tokens": 600}, "config.data.max_tokens is 600, the text tower has 512 positions"),
    ],
)
def test_settings_that_do_not_fit(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan_mode.plan(small(**changes), tmp_path, "cpu")


@pytest.mark.slow
def test_plan_for_this_machine(tmp_path, capsys):
    plan_mode.plan(small(plan__effort=-1.0), tmp_path, "cpu:2")
    report = json.loads((tmp_path / "plan_cpu_2.json").read_text())
    assert report["devices"] == 2 and report["global_batch"] == 80 and report["chip"] is None
    ranking = report["rankings"]["exact"]
    assert ranking["seconds"] > 0 and ranking["rounds"] == 5 * 7 + 5 + 7 - 1
    assert report["largest_pairs_per_device"] is None  # the memory of a CPU is not known
    train = report["programs"]["train"]
    images = 8
    batch = images * (4 + 4 * (16 * 2 + 2)) + 40 * 16 * (4 + 1)
    assert train["memory"]["arguments"] - train["memory"]["aliased"] == pytest.approx(batch, rel=0.01)
    assert train["work"]["flops"] > 0 and train["work"]["collectives"]["all-reduce"] > 0
    out = capsys.readouterr().out
    assert "ranking, exact: 40 images x 200 captions on 2 devices: 92 tiles of 4 x 32" in out
    assert "2 x cpu, global batch 80" in out and "all-reduce" in out and "plan_cpu_2.json" in out


def test_what_does_not_fit_is_said(monkeypatch):
    """The compiler gives up on the training step; encoding is compiled for this machine."""
    monkeypatch.setattr(plan_mode, "chip", lambda kind: CHIPS["TPU v5e"])
    message = "RESOURCE_EXHAUSTED: Used 30.5G of 15.75G hbm."

    def lower_train(run, mesh, pairs):
        raise OutOfMemory(message, 30.5 * GIB, 15.75 * GIB)

    monkeypatch.setattr(plan_mode, "lower_train", lower_train)
    monkeypatch.setattr(
        plan_mode, "lower_encode", lambda *_: jax.jit(lambda x: x @ x).lower(np.ones((8, 8), np.float32))
    )
    report = plan_mode.make_plan(describe(small(plan__search=True)), data_mesh(jax.devices()))
    assert report["programs"]["train"]["fits"] is False and report["programs"]["encode images"]["fits"] is True
    assert report["largest_pairs_per_device"] == 0 and report["pipeline"] is None
    text = table(report)
    assert "30.50 GiB" in text and "NO" in text and message in text and "--config.train.microbatch" in text
    assert json.loads(json.dumps(report)) == report


def test_the_largest_batch_with_queues_is_one_that_they_hold(monkeypatch):
    monkeypatch.setattr(plan_mode, "chip", lambda kind: CHIPS["TPU v5e"])
    nothing, tried = jax.jit(lambda x: x @ x).lower(np.ones((8, 8), np.float32)), []

    def lower_train(run, mesh, pairs):
        programs.planned_setup(run, mesh, pairs)  # raises ValueError for a batch that the queues do not hold
        tried.append(pairs)
        return nothing

    monkeypatch.setattr(plan_mode, "lower_train", lower_train)
    monkeypatch.setattr(plan_mode, "lower_encode", lambda *_: nothing)
    monkeypatch.setattr(plan_mode, "_rankings", lambda *_: {})
    changes = {"model__name": "tests.train.toy", "loss__weights__infonce": 1.0, "plan__search": True}
    changes |= {"momentum__queue": 300, "momentum__from_epoch": 1.0, "train__steps": 20_000}
    report = plan_mode.make_plan(describe(small(**changes)), data_mesh(jax.devices()[:2]))
    assert tried == [40, 80, 150] and report["largest_pairs_per_device"] == 150


@pytest.mark.slow
def test_the_search_to_its_end(monkeypatch):
    """With real programs: the largest batch fits, one an eighth larger does not; the first may fit or not."""
    mesh, changes = data_mesh(jax.devices()[:1]), {"model__name": "tests.train.toy", "plan__search": True}
    run = describe(small(**changes, train__batch_size=40))
    nothing = jax.jit(lambda x: x @ x).lower(np.ones((8, 8), np.float32))
    monkeypatch.setattr(plan_mode, "lower_encode", lambda *_: nothing)
    monkeypatch.setattr(plan_mode, "_rankings", lambda *_: {})

    lower_train = functools.cache(lambda pairs: programs.lower_train(run, mesh, pairs))  # two searches, the same sizes
    monkeypatch.setattr(plan_mode, "lower_train", lambda run, mesh, pairs: lower_train(pairs))

    def needed(pairs):
        return programs.compile_program(lambda: lower_train(pairs), pairs, None).needed

    limit = needed(120)
    monkeypatch.setattr(plan_mode, "chip", lambda kind: Chip(1e12, limit, 1e9))
    for start in (40, 400):
        report = plan_mode.make_plan(describe(small(**changes, train__batch_size=start)), mesh)
        assert report["programs"]["train"]["fits"] is (start == 40)
        largest = report["largest_pairs_per_device"]
        assert 105 < largest <= 120 and needed(largest) <= limit < needed(largest + 25)
        assert f"largest batch that fits: {largest} pairs a device" in table(report)
    assert report["changes"] and not any("it fits with" in change for change in report["changes"])  # has no norm_depth


def fake(limit, tried):
    def compiled(pairs):
        tried.append(pairs)
        return programs.Program(pairs, pairs <= limit, None, None, float(pairs), 0.0)

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
    actual = search.largest_batch(compiled, first, unit, most)
    assert actual == expected
    assert actual <= limit and len(set(tried)) == len(tried) and all(pairs % unit == 0 for pairs in tried)


def test_fitting_microbatch():
    def compiled(pairs, run):
        microbatch = run.config.train.microbatch
        return programs.Program(pairs, microbatch <= 30, None, None, float(microbatch), 0.0)

    run = describe(small())
    assert search.fitting_microbatch(compiled, run, 160) == (20, 20.0)  # 80, 40, 20; parts hold whole images of 5
    run = describe(small(data__captions_per_image=1, train__microbatch=16))
    assert search.fitting_microbatch(compiled, run, 160) == (10, 10.0)
    run = describe(small(train__microbatch=5))
    assert search.fitting_microbatch(compiled, run, 160) is None


def test_advice_names_only_what_is_not_done_yet():
    config = base.get_config()
    everything = " ".join(search.advice(config, 8))
    for flag in ("dtype=bfloat16", "train.microbatch", "pairs.strategy=streamed", "more than 8 devices"):
        assert flag in everything
    assert "resident" not in everything and "activation_dtype=bfloat16" in everything
    config.model.dtype = config.text.dtype = config.model.activation_dtype = "bfloat16"
    config.loss.pairs.strategy = "ring"
    config.train.microbatch = 64
    fewer = " ".join(search.advice(config, 8))
    assert "dtype" not in fewer and "strategy" not in fewer and "a smaller --config.train.microbatch than 64" in fewer


def test_bounds():
    """Each product at the peak of its operands: a tenth of them in float32, of these half rounded."""
    work = Work(flops=1e12, float32={"highest": 0.05e12, "default": 0.03e12, "high": 0.02e12}, bytes=819e9 / 2)
    compute, traffic = programs.bounds(work, CHIPS["TPU v5e"])
    assert compute == pytest.approx((0.9 + 0.05 * 6 + 0.03 + 0.02 * 3) / 197) and traffic == 0.5
    assert programs.bounds(work, CHIPS["H100"])[0] == pytest.approx(0.9 / 989 + 0.05 / 67 + 0.05 / 495)
    assert programs.bounds(work, CHIPS["A100"])[0] == pytest.approx(0.9 / 312 + 0.05 / 19.5 + 0.05 / 156)


@needs_libtpu
def test_blocks_of_a_plan_fit_its_target(tmp_path, monkeypatch):
    """And not this machine, by whose devices a model is built."""
    seen = {}

    def make_plan(run, mesh):
        seen[mesh.devices.flat[0].platform] = run.config.model.cmsei.block
        raise InterruptedError

    monkeypatch.setattr(plan_mode, "make_plan", make_plan)
    for target in ("cpu:1", "tpu:v5e:2x2"):
        with pytest.raises(InterruptedError):
            plan_mode.plan(small(), tmp_path, target)
    assert seen == {"cpu": interaction.BLOCK_ON_CPU, "tpu": interaction.BLOCK}


def test_the_bound_of_the_interconnect():
    """A v5e chip has four links of 50 GB/s: all share a sum or a gather, one carries a shift."""
    sent = {"all-reduce": 1e9, "all-gather": 3e9, "reduce-scatter": 1e9, "collective-permute": 1e9}
    work = Work(collectives=sent)
    assert programs.interconnect_seconds(work, CHIPS["TPU v5e"]) == pytest.approx((2 + 3 + 1) / 200 + 1 / 50)
    assert programs.interconnect_seconds(Work(), CHIPS["TPU v5e"]) == 0
    assert programs.interconnect_seconds(work, CHIPS["H100"]) is None


@pytest.mark.slow
def test_the_warm_up_of_the_loss_is_told_beside_the_steps_after_it(monkeypatch):
    nothing = jax.jit(lambda x: x @ x).lower(np.ones((8, 8), np.float32))
    monkeypatch.setattr(plan_mode, "chip", lambda kind: CHIPS["TPU v5e"])
    monkeypatch.setattr(plan_mode, "lower_encode", lambda *_: nothing)
    monkeypatch.setattr(plan_mode, "_rankings", lambda *_: {})
    changes = {"model__name": "tests.train.toy", "loss__weights__triplet": 1.0, "loss__weights__infonce": 0.0}
    config, mesh = small(**changes), data_mesh(jax.devices()[:2])
    assert config.loss.triplet.warmup_epochs == 1.0
    report = plan_mode.make_plan(describe(config), mesh)
    train, text = report["programs"]["train"], table(report)
    product = 2 * 40 * 80 * config.model.dim  # scores of a device's own items with those of all devices
    # Both directions: scored, and in the backward pass once more and for two gradients.
    assert train["warm_up"]["flops"] - train["work"]["flops"] == 2 * 4 * product
    assert report["programs"]["encode images"]["warm_up"] is None
    assert "in the loss's warm-up" in text and "the larger, in the warm-up" in text
    config.loss.triplet.warmup_epochs = 0.0
    plain = plan_mode.make_plan(describe(config), mesh)
    assert plain["programs"]["train"]["work"]["flops"] == train["work"]["flops"]
    assert plain["programs"]["train"]["warm_up"] is None and "warm-up" not in table(plain)


def test_peak_counts_donated_memory_once():
    assert Memory(10, 7, 6, 5, 1).peak == 17
