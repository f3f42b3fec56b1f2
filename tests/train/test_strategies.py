"""The strategies of a loss through the real training step, in microbatches."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from shnet_jax import registry
from shnet_jax.parallel.mapping import data_mesh, put_batch
from shnet_jax.train.prepare import build_step
from tests.models.test_shnet import random_variables
from tests.train import test_parallel_step as whole_model


@functools.cache
def trained(strategy, microbatch):
    """State and metrics after two steps of VSE-infinity on 2 devices."""
    config = whole_model.configuration(bn_sync=True)
    config.model.update(dict.fromkeys(("semantic", "spatial", "scene_tokens", "category_token"), False))
    config.loss.pairs.update({"strategy": strategy, "tile": 3})
    config.train.microbatch = microbatch
    model, mesh = registry.model("shnet").build(config), data_mesh(jax.devices()[:2])
    variables = random_variables(model, whole_model.batch())
    built = build_step(config, model, mesh, variables, 10, 100)
    state = built.first_state(variables)
    for _ in range(2):
        state, metrics = built.step(state, put_batch(whole_model.batch(), mesh), {})
    return state, metrics


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["streamed", "ring"])
def test_every_strategy_trains_alike(strategy):
    (state, metrics), (whole, expected) = trained(strategy, 2), trained("gathered", 0)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    for (path, ours), one in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-3, atol=2e-4, err_msg=jax.tree_util.keystr(path))
