"""A training step of the CMSEI-style model itself: whole, in microbatches, and its relations under dropped regions."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest

from shnet_jax.data.batches import gather
from shnet_jax.losses import total
from shnet_jax.models import cmsei
from shnet_jax.parallel.mapping import data_mesh, map_step, put_batch, replicate
from shnet_jax.training.state import create_state
from shnet_jax.training.step import make_step
from shnet_jax.types import DATA
from tests.models import test_cmsei as small
from tests.models.test_shnet import random_variables

PAIRS = 8


@functools.cache
def batch():
    rng = np.random.default_rng(3)
    low = rng.random((PAIRS, small.K, 2)) * 0.4
    return {
        "image_index": np.arange(PAIRS, dtype=np.int32),
        "regions": rng.normal(size=(PAIRS, small.K, 6)).astype(np.float32),
        "region_mask": np.arange(small.K) < rng.integers(2, small.K + 1, (PAIRS, 1)),
        "region_keep": rng.random((PAIRS, small.K)) < 0.8,
        "boxes": np.concatenate([low, low + 0.5], -1).astype(np.float32),
        "relations": rng.integers(0, small.K, (PAIRS, 3, 3)).astype(np.int32),
        "tokens": rng.integers(1, 7, (PAIRS, small.L)).astype(np.int32),
        "token_mask": np.arange(small.L) < rng.integers(1, small.L + 1, (PAIRS, 1)),
    }


def stepped(devices, microbatch):
    config = small.config()
    config.loss.weights.global_triplet = 1.0
    config.text.dropout = 0.0
    model = cmsei.build(config)
    variables = dict(random_variables(model, gather({}, batch()))) | {"batch_stats": {}}
    loss_params, total_loss = total.build(config.loss, 0)
    tx, mesh = optax.sgd(1.0), data_mesh(jax.devices()[:devices])
    step = make_step(model, total_loss, tx, prepare_batch=gather, axis_name=DATA, microbatch=microbatch)
    state = create_state(variables, loss_params, tx, ema=False, seed=0)
    state, metrics = map_step(step, mesh)(replicate(state, mesh), put_batch(batch(), mesh), {})
    return jax.tree.map(np.subtract, variables["params"], state.params["model"]), metrics


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "microbatch"), [(1, 4), (8, 0)])
def test_a_step_does_not_depend_on_microbatches_and_devices(devices, microbatch):
    (wanted, metrics), (found, ours) = stepped(1, 0), stepped(devices, microbatch)
    assert {"triplet_loss", "global_triplet_loss"} <= metrics.keys()
    np.testing.assert_allclose(ours["loss"], metrics["loss"], rtol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))
    for name in ("image_gates", "text_gates"):
        assert all(np.abs(x).max() > 1e-6 for x in jax.tree.leaves(wanted[name]))


@pytest.mark.slow
def test_a_dropped_region_leaves_the_graphs():
    """Its box and its relations change nothing, as if the detector had not found it."""
    model, _, run = small.built()
    variables = random_variables(model, gather({}, batch()))
    kept = gather({}, batch())
    dropped = batch()["region_mask"] & ~kept["region_mask"]
    assert dropped.any()
    moved = batch() | {"boxes": np.where(dropped[..., None], 0.9, batch()["boxes"])}
    rows = batch()["relations"].copy()
    touched = np.take_along_axis(dropped, rows[..., [0, 2]].reshape(PAIRS, -1), 1).reshape(PAIRS, -1, 2).any(-1)
    assert touched.any()
    rows[touched] = -1
    one, other = (run(variables, gather({}, b))[0] for b in (batch(), moved | {"relations": rows}))
    np.testing.assert_allclose(other.vector, one.vector, atol=1e-6)
