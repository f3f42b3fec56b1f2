"""Parameters split over groups of devices by config.parallel.rules: 2 x 4 devices train and evaluate as one does."""

from __future__ import annotations

import functools
import re

import grain
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from shnet_jax import registry
from shnet_jax.evaluation.encode import Towers, check
from shnet_jax.evaluation.evaluator import Evaluator
from shnet_jax.experiment import assemble, init_variables
from shnet_jax.parallel import rules
from shnet_jax.parallel.mapping import data_mesh, make_mesh, put_batch
from shnet_jax.training.checkpoint import Checkpoints
from shnet_jax.training.load import load
from shnet_jax.training.loop import train_and_evaluate
from shnet_jax.training.setup import build_step
from shnet_jax.types import DATA, MODEL
from tests.models.test_shnet import random_variables
from tests.train import test_built_step, tiny
from tests.train import test_parallel_step as whole_model

GROUPS = 2, 4
"""Parts of a batch, and devices that share each."""

STEPS = 2


small_arrays_are_split = test_built_step.small_arrays_are_split


def configuration(*, model=1, split=False, microbatch=0, strategy="gathered"):
    """VSE-infinity with a BERT of two layers."""
    c = test_built_step.configuration(split=split, strategy=strategy, microbatch=microbatch)
    c.text.update({"tower": "bert", "layers": 2, "width": 8, "heads": 4, "mlp_dim": 16, "max_positions": 8})
    c.parallel.model = model
    return c


@functools.cache
def build(devices=8, **changes):
    config = configuration(**changes)
    model = registry.model("shnet").build(config)
    variables = random_variables(model, whole_model.batch())
    return build_step(config, model, data_mesh(jax.devices()[:devices]), variables, 10, 100), variables


@functools.cache
def trained(devices=8, **changes):
    """(setup, state, metrics) after STEPS steps."""
    setup, variables = build(devices, **changes)
    state = setup.first_state(variables)
    for _ in range(STEPS):
        state, metrics = setup.step(state, put_batch(whole_model.batch(), setup.mesh), {})
    return setup, state, metrics


def same(tree, other, rtol, atol):
    for (path, leaf), like in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(leaf, like, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def held(array):
    """Share of an array that each device holds."""
    (share,) = {shard.data.size / array.size for shard in array.addressable_shards}
    return share


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"split": True, "microbatch": 2, "strategy": "ring"}], ids=str)
def test_training_is_that_of_one_device(changes):
    """The moments are sums of gradients, which clipping has scaled; the average is evaluated."""
    (_, alone, expected), (setup, state, metrics) = trained(1), trained(model=GROUPS[1], **changes)
    assert dict(setup.mesh.shape) == dict(zip((DATA, MODEL), GROUPS, strict=True))
    assert metrics["grad_norm"] > 0.5
    same(metrics, expected, 1e-4, 1e-5)
    same(state.opt_state, alone.opt_state, 1e-3, 1e-5)
    # AdamW makes steps of nearly the learning rate from what rounding leaves of gradients that should be zero.
    same((state.params, state.ema), (alone.params, alone.ema), 1e-3, 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True])
def test_each_device_holds_its_part_of_what_rules_name(split):
    setup, state, _ = trained(
        model=GROUPS[1], **({"split": True, "microbatch": 2, "strategy": "ring"} if split else {})
    )
    tower = state.params["model"]["text"]["tower"]
    layer, rest = tower["layer_1"], GROUPS[0] if split else 1
    kernels = [layer["attention"][name]["kernel"] for name in ("query", "key", "value", "out")]
    kernels += [layer["mlp"]["in"]["kernel"], layer["mlp"]["out"]["kernel"], tower["words"]]
    assert {held(kernel) for kernel in kernels[:-1]} == {1 / (GROUPS[1] * rest)}
    assert held(kernels[-1]) == 1 / GROUPS[1]  # 11 words do not divide by 2
    assert held(layer["mlp"]["in"]["bias"]) == 1 / GROUPS[1] and held(layer["mlp"]["out"]["bias"]) == 1
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(setup.like), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    paths = jax.tree_util.tree_leaves_with_path(state)
    copies = [leaf for path, leaf in paths if jax.tree_util.keystr(path[-5:]).endswith("['query']['kernel']")]
    assert len(copies) == 2 * 4  # parameters, two moments and the average of two layers
    assert {held(leaf) for leaf in copies} == {1 / (GROUPS[1] * rest)}


@functools.cache
def experiment(**changes):
    small = {"text__tower": "bert", "text__layers": 2, "text__heads": 4, "text__width": 32, "text__mlp_dim": 128}
    small["text__max_positions"] = 32
    return assemble(tiny.config(**(small | {"eval__batch_size": 4} | changes)))


@pytest.mark.slow
def test_evaluation_is_that_of_one_device_and_needs_no_whole_copy():
    variables, vectors = init_variables(experiment(), 0), []
    batch = {"tokens": np.arange(3, 67, dtype=np.int32).reshape(8, 8) % 20, "token_mask": np.ones((8, 8), bool)}
    for devices, size in ((1, 1), (8, GROUPS[1])):
        mesh = data_mesh(jax.devices()[:devices])
        _, text = (towers := Towers(experiment(parallel__model=size), mesh, mesh)).place(variables)
        vectors.append(text.apply(text.put(batch)).vector)
    np.testing.assert_allclose(*vectors, rtol=1e-4, atol=1e-6)
    placed = towers._split(variables, text.mesh)
    compiled = towers._encode_text.lower(placed, text.put(batch)).compile()
    params = variables["params"]["text"]  # arguments that a program does not read are left out of it
    specs = rules.param_specs({"text": params}, ("tensor",), text.mesh)
    sizes = {True: 0, False: 0}
    for leaf, spec in zip(jax.tree.leaves(params), jax.tree.leaves(specs), strict=True):
        sizes[MODEL in spec] += leaf.nbytes
    rows = sum(value.nbytes for value in batch.values()) / GROUPS[0]
    expected = sizes[True] / GROUPS[1] + sizes[False] + rows
    assert sizes[True] > sizes[False]
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("there_and_back", [False, True])
def test_a_checkpoint_of_one_layout_continues_under_another(there_and_back, tmp_path):
    one, many = (1, {}), (8, {"model": GROUPS[1]})
    (devices, changes), (others, other) = (many, one) if there_and_back else (one, many)
    _, state, _ = trained(devices, **changes)
    like = build(others, **other)[0].like
    iterator = iter(grain.MapDataset.range(8).to_iter_dataset())
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(STEPS, state, {}, iterator)
    checkpoints.wait()
    restored = checkpoints.restore(STEPS, like, iterator).state
    checkpoints.close()
    same(restored, state, 0, 0)
    for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


@pytest.mark.slow
def test_a_run_in_groups_is_evaluated_by_one_device(tmp_path):
    tower = {"text__tower": "transformer", "text__layers": 1, "text__heads": 4}
    short = {"train__steps": 2, "train__eval_epochs": 0.0, "parallel__devices": 8, "parallel__model": GROUPS[1]}
    config = tiny.config(model__name="tests.evaluate.test_evaluator", **tower, **short)
    with tiny.quick():
        metrics = train_and_evaluate(config, tmp_path).metrics
    found = []
    for parallel in ({}, {"devices": 1, "model": 1}):
        config.parallel.update(parallel)
        loaded = load(tmp_path, config)
        mesh = make_mesh(config.parallel.devices)
        found.append(Evaluator(loaded.experiment, "val", mesh).run(loaded.variables, 2).metrics)
    assert found[0] == metrics
    assert found[1]["rsum"] == pytest.approx(metrics["rsum"], abs=12)  # two queries that rounding may move


def test_heads_on_frozen_vectors_are_split():
    shapes = {"kernel": jax.ShapeDtypeStruct((8, 16), np.float32), "bias": jax.ShapeDtypeStruct((16,), np.float32)}
    last = {"kernel": jax.ShapeDtypeStruct((16, 8), np.float32), "bias": jax.ShapeDtypeStruct((8,), np.float32)}
    head = {"f1": shapes, "f2": shapes, "g": last}
    specs = rules.param_specs({"image": {"head": head}}, ("tensor",), grid())["image"]["head"]
    assert specs["f1"] == specs["f2"] == {"kernel": P(None, MODEL), "bias": P(MODEL)}
    assert specs["g"] == {"kernel": P(MODEL, None), "bias": P()}


def grid():
    parallel = configuration(model=GROUPS[1]).parallel
    return rules.step_mesh(data_mesh(jax.devices()), parallel)


PARAMS = {"text": {"in": {"kernel": jax.ShapeDtypeStruct((6, 8), np.float32)}}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("text/out/kernel = None, model",), "'text/out/kernel = None, model' .* fits no parameter .* text/in/kernel"),
        (("tensor",), "the rule 'tensor' of config.parallel.rules fits no parameter"),
        ((), "config.parallel.rules is empty and fits no parameter"),
        (
            ("text/.* = model, None",),
            "'text/.* = model, None' .* fits text/in/kernel, of shape (6, 8): 6 does not divide into the 4 devices of "
            "axis model",
        ),
        ((".* = None, expert",), "names the axis 'expert'; the mesh has data (2 devices), model (4 devices)"),
        ((".* = data, None",), "names the axis 'data'; .* config.parallel.shard_params splits over data"),
        ((".* = model",), "of shape (6, 8), and names 1 dimensions; name 2"),
        ((".* = model, model",), "names model more than once"),
        (("text",), "config.parallel.rules has 'text'; choose tensor, or write 'REGEX = AXES'"),
        (("( = model",), "'( = model' of config.parallel.rules has a wrong regular expression"),
    ],
)
def test_rules_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, message.split(".* ")))):
        rules.param_specs(PARAMS, given, grid())


def test_the_first_rule_that_fits_is_the_one():
    given = (".*/in/kernel = None, model", "text/.* = None, None")
    with pytest.raises(ValueError, match=r"the rule 'text/\.\* = None, None' .* fits no parameter that an earlier"):
        rules.param_specs(PARAMS, given, grid())
    assert rules.param_specs(PARAMS, given[:1], grid())["text"]["in"]["kernel"] == P(None, MODEL)
    assert rules.param_specs(PARAMS, given, data_mesh(jax.devices()))["text"]["in"]["kernel"] == P()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__model": 3}, "config.parallel.model is 3; it must be at least 1 and divide the 8 devices"),
        ({"parallel__model": 0}, "config.parallel.model is 0; it must be at least 1"),
        ({"parallel__model": 4, "parallel__mapping": "pmap"}, "which needs config.parallel.mapping shard_map"),
        ({"parallel__model": 4, "eval__stages": 2}, "both split the text tower, set one of them to 1"),
    ],
)
def test_groups_that_do_not_fit(changes, message):
    parts = experiment(**changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        check(parts.model, parts.config, data_mesh(jax.devices()))
