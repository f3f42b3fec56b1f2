"""Options of the built step that change no number: split parameters, microbatches, strategies of the loss."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from shnet_jax import registry
from shnet_jax.parallel import sharding
from shnet_jax.parallel.mapping import data_mesh, put_batch
from shnet_jax.training.setup import build_step
from shnet_jax.types import DATA
from tests.models.test_shnet import random_variables
from tests.train import test_parallel_step as whole_model

DEVICES = 4


@pytest.fixture(scope="module", autouse=True)
def small_arrays_are_split():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "SMALLEST", 8)
        yield


def configuration(*, split=False, strategy="gathered", microbatch=0):
    """VSE-infinity: what is split are arrays, whatever they belong to."""
    c = whole_model.configuration(bn_sync=True)
    c.model.update(dict.fromkeys(("semantic", "spatial", "scene_tokens", "category_token"), False))
    c.loss.pairs.update({"strategy": strategy, "tile": 3})
    c.optim.update({"clip_norm": 0.5, "ema": 0.5, "lr": 1e-2})  # a clip that acts
    c.parallel.shard_params = split
    c.train.microbatch = microbatch
    return c


@functools.cache
def trained(**changes):
    """(setup, state, metrics) after two steps."""
    config = configuration(**changes)
    model, mesh = registry.model("shnet").build(config), data_mesh(jax.devices()[:DEVICES])
    variables = random_variables(model, whole_model.batch())
    setup = build_step(config, model, mesh, variables, 10, 100)
    state = setup.first_state(variables)
    for _ in range(2):
        state, metrics = setup.step(state, put_batch(whole_model.batch(), mesh), {})
    return setup, state, metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"split": True}, {"split": True, "microbatch": 2, "strategy": "ring"}, {"microbatch": 2, "strategy": "streamed"}],
    ids=str,
)
def test_the_state_is_that_of_the_plain_step(changes):
    (_, plain, expected), (_, state, metrics) = trained(), trained(**changes)
    assert metrics["grad_norm"] > 0.5
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(plain), strict=True):
        # AdamW makes steps of nearly the learning rate from what rounding leaves of gradients that should be zero.
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=2e-3, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_each_device_holds_its_part():
    setup, state, _ = trained(split=True)
    axes = sharding.split_axes(jax.eval_shape(lambda: state), DEVICES)
    parts = dict.fromkeys((sharding.WHOLE, 0, 1), 0)
    for leaf, like, at in zip(*map(jax.tree.leaves, (state, setup.like, axes)), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
        held = leaf.addressable_shards[0].data.size
        assert held == (leaf.size if at == sharding.WHOLE else leaf.size // DEVICES)
        parts[min(at, 1)] += leaf.size
    assert parts[0] > 0 and parts[1] > 0
    assert parts[sharding.WHOLE] < 0.5 * (parts[0] + parts[1])


def test_axes_are_a_function_of_the_shape(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST", 2**14)
    shapes = {
        "table": jax.ShapeDtypeStruct((30522, 768), np.float32),
        "kernel": jax.ShapeDtypeStruct((768, 3072), np.float32),
        "odd": jax.ShapeDtypeStruct((769, 771), np.float32),
        "vector": jax.ShapeDtypeStruct((2**20,), np.float32),
        "small": jax.ShapeDtypeStruct((8, 8), np.float32),
    }
    whole = sharding.WHOLE
    assert sharding.split_axes(shapes, 8) == {"table": 1, "kernel": 1, "odd": whole, "vector": whole, "small": whole}
    assert sharding.split_axes(shapes, 2)["table"] == 0
    assert set(sharding.split_axes(shapes, 1).values()) == {whole}
    assert sharding.specs({"table": 1, "vector": whole}) == {
        "table": jax.sharding.PartitionSpec(None, DATA),
        "vector": jax.sharding.PartitionSpec(),
    }


def test_pmap_cannot_split_a_state():
    config = configuration(split=True)
    config.parallel.mapping = "pmap"
    model, mesh = registry.model("shnet").build(config), data_mesh(jax.devices()[:DEVICES])
    with pytest.raises(ValueError, match=r"needs parallel\.mapping shard_map"):
        build_step(config, model, mesh, whole_model.variables(False), 10, 100)
