"""A whole training step of 3SHNet with queues is the same function on 1, 2 and 8 devices, under both mappings."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest

from configs import scenes
from shnet_jax import registry
from shnet_jax.data.batches import gather
from shnet_jax.losses import total
from shnet_jax.parallel.mapping import data_mesh, map_step, put_batch, replicate
from shnet_jax.training import momentum
from shnet_jax.training.state import create_state
from shnet_jax.training.step import make_step
from shnet_jax.types import DATA

IMAGES, CAPTIONS, REGIONS, CLASSES, TOKENS, VOCABULARY = 8, 2, 3, 5, 4, 11
WARM_UP = 3  # steps of the triplet loss that sum over all violations
QUEUE = 20
WAYS = [(1, "shard_map"), (2, "pmap"), (8, "shard_map")]


def configuration(bn_sync: bool):
    c = scenes.get_config()
    c.model.update({"dim": 8, "map_channels": 2, "num_classes": CLASSES, "dropout": 0.0, "dtype": "float32"})
    c.model.bn_sync = bn_sync
    c.text.update({"width": 4, "vocab_size": VOCABULARY, "dropout": 0.0, "dtype": "float32"})
    c.loss.weights.update({"triplet": 1.0, "infonce": 2.0})
    return c


@functools.cache
def batch():
    """Two images appear twice, on different devices; masks and caption lengths vary."""
    rng = np.random.default_rng(0)
    pairs = IMAGES * CAPTIONS
    return {
        "image_index": np.array([0, 1, 2, 3, 4, 1, 6, 0], np.int32),
        "regions": rng.normal(size=(IMAGES, REGIONS, 6)).astype(np.float32),
        "region_mask": np.arange(REGIONS) < rng.integers(1, REGIONS + 1, (IMAGES, 1)),
        "seg_semantic": rng.normal(size=(IMAGES, CLASSES, 2, 2)).astype(np.float32),
        "seg_map": rng.integers(0, CLASSES + 1, (IMAGES, 16, 16)).astype(np.uint8),
        "categories": rng.random((IMAGES, CLASSES)) < 0.4,
        "tokens": rng.integers(1, VOCABULARY, (pairs, TOKENS)).astype(np.int32),
        "token_mask": np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (pairs, 1)),
    }


@functools.cache
def variables(bn_sync: bool):
    """Random values of the right shapes: to initialise the model would take longer than to train it."""
    model = registry.model("shnet").build(configuration(False))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch(), train=False))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return np.float32(1 + 0.1 * np.abs(values) if path[-1].key in ("scale", "var") else values)

    return jax.tree_util.tree_map_with_path(draw, dict(shapes))


@functools.cache
def steps(devices: int, mapping: str, bn_sync: bool):
    """[(state, metrics)] after one step from the warm-up of the triplet loss and one from its hardest negatives.

    Plain gradient descent with rate 1: the parameters that are missing are the gradient.
    """
    config = configuration(bn_sync)
    config.momentum.update({"queue": QUEUE, "start": "gaussian"})
    config.train.batch_size = IMAGES * CAPTIONS
    loss_params, total_loss = total.build(config.loss, WARM_UP, queues=True)
    tx = optax.sgd(1.0)
    mesh = data_mesh(jax.devices()[:devices])
    model = registry.model("shnet").build(config)
    keys = momentum.options(config, model, 1.0)
    how = {"prepare_batch": gather, "axis_name": DATA, "key_options": keys}
    step = map_step(make_step(model, total_loss, tx, **how), mesh, mapping)
    done = []
    for number in (WARM_UP - 1, WARM_UP):
        state = create_state(variables(bn_sync), loss_params, tx, ema=False, seed=0, momentum=keys)
        state = state.replace(step=np.int32(number))
        done.append(step(replicate(state, mesh), put_batch(batch(), mesh, mapping), {}))
    return done


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "mapping"), WAYS[1:])
def test_a_step_does_not_depend_on_devices_and_mapping(devices, mapping):
    before = variables(True)["params"]
    for (one, expected), (state, metrics) in zip(steps(*WAYS[0], True), steps(devices, mapping, True), strict=True):
        assert expected.keys() == metrics.keys() >= {"loss", "triplet_loss", "infonce_loss", "grad_norm", "finite"}
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
        wanted = jax.tree_util.tree_leaves_with_path(jax.tree.map(np.subtract, before, one.params["model"]))
        found = jax.tree.leaves(jax.tree.map(np.subtract, before, state.params["model"]))
        largest = max(np.abs(gradient).max() for _, gradient in wanted)
        assert largest > 1
        for (path, gradient), ours in zip(wanted, found, strict=True):
            # 1e-5 of the largest covers gradients that cancel out (biases in front of a normalisation).
            np.testing.assert_allclose(
                ours, gradient, rtol=2e-3, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path)
            )
        ours, expected = state.params["loss"]["infonce"], one.params["loss"]["infonce"]
        assert ours.keys() == expected.keys() == {"log_scale"}
        np.testing.assert_allclose(ours["log_scale"], expected["log_scale"], rtol=1e-4)
        for ours, statistic in zip(jax.tree.leaves(state.batch_stats), jax.tree.leaves(one.batch_stats), strict=True):
            np.testing.assert_allclose(ours, statistic, rtol=1e-4, atol=1e-6)
            assert ours.ndim
        same_keys(state.momentum, one.momentum)
        assert (np.asarray(state.momentum.texts.ids)[: IMAGES * CAPTIONS] == np.repeat(batch()["image_index"], 2)).all()


def same_keys(found, expected):
    """Key encoders, their statistics, and queues; ids and pointers exactly."""
    for (path, ours), wanted in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        compare = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
        if np.issubdtype(wanted.dtype, np.integer):
            compare = np.testing.assert_array_equal
        compare(ours, wanted, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_the_two_steps_differ_in_the_negatives_that_count():
    (_, warm), (_, hardest) = steps(*WAYS[0], True)
    assert warm["triplet_loss"] > 2 * hardest["triplet_loss"]
    np.testing.assert_allclose(warm["infonce_loss"], hardest["infonce_loss"], rtol=1e-6)


@pytest.mark.slow
def test_statistics_of_each_device_are_averaged_into_one_state():
    state, metrics = steps(8, "shard_map", False)[1]
    assert metrics["finite"] == 1
    different = 0
    synchronised = jax.tree.leaves(steps(8, "shard_map", True)[1][0].batch_stats)
    for ours, together in zip(jax.tree.leaves(state.batch_stats), synchronised, strict=True):
        shards = [np.asarray(shard.data) for shard in ours.addressable_shards]
        assert len(shards) == 8 and all((shard == shards[0]).all() for shard in shards)
        different += not np.allclose(ours, together, rtol=1e-3)
    assert different  # variances of one image are not those of eight
    for leaf in jax.tree.leaves(state.params):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all((shard == shards[0]).all() for shard in shards)
