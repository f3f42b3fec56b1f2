"""Whole steps of USER and ESA-style sets with momentum encoders and queues, on 1, 2 and 8 devices.

Those of 3SHNet: test_parallel_step.py.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest

from configs import esa as esa_config
from configs import user as user_config
from shnet_jax import registry
from shnet_jax.data.batches import gather
from shnet_jax.losses import total
from shnet_jax.models import user
from shnet_jax.parallel.mapping import data_mesh, map_step, put_batch, replicate
from shnet_jax.training import momentum
from shnet_jax.training.state import create_state
from shnet_jax.training.step import make_step
from shnet_jax.types import DATA, SetQueue
from tests.models.test_shnet import random_variables
from tests.train import test_parallel_step as whole_model
from tests.train.test_microbatch import agree

PAIRS, QUEUE, RATE = whole_model.IMAGES * whole_model.CAPTIONS, 20, 0.1  # texts wrap around in the second step


@pytest.fixture(scope="module", autouse=True)
def few_slots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(user, "SLOTS", whole_model.REGIONS)
        yield


def configuration(name: str, bn_sync: bool):
    c = {"user": user_config.get_config, "esa": esa_config.get_config}[name]()
    changes = {"model.dim": 8, "model.dropout": 0.0, "model.dtype": "float32", "model.bn_sync": bn_sync}
    changes |= {"text.tower": "bigru", "text.width": 4, "text.vocab_size": whole_model.VOCABULARY, "text.dropout": 0.0}
    changes |= {"text.dtype": "float32", "momentum.queue": QUEUE, "momentum.decay": 0.6, "train.batch_size": PAIRS}
    if name == "user":
        changes |= {"model.user.dropout": 0.0, "loss.uto.scale": 20.0}
    else:
        sets = {"size": 2, "text_size": 3, "depth": 1, "heads": 2}
        changes |= {"model.units": ("regions",)} | {f"loss.weights.{n}": 0.0 for n in ("identity", "asm", "diversity")}
        changes |= {f"model.esa.{field}": value for field, value in sets.items()}
    c.update_from_flattened_dict(changes)
    return c


@functools.cache
def batches():
    """Two batches; images of the first return in the second, for other pairs."""
    first = whole_model.batch()
    return first, {
        field: np.roll(values, 3 if field == "image_index" else 1, axis=0) for field, values in first.items()
    }


@functools.cache
def variables(name: str):
    return dict(random_variables(registry.model(name).build(configuration(name, False)), whole_model.batch()))


@functools.cache
def steps(name: str, devices: int, mapping: str = "shard_map", bn_sync: bool = True, microbatch: int = 0):
    """(what the state holds, metrics) after two steps of plain descent."""
    config = configuration(name, bn_sync)
    model, tx = registry.model(name).build(config), optax.sgd(RATE)
    keys = momentum.options(config, model, 1.0)
    loss_params, total_loss = total.build(config.loss, 0, queues=True)
    how = {"microbatch": microbatch, "statistics": "local", "axis_name": DATA, "key_options": keys}
    mesh = data_mesh(jax.devices()[:devices])
    step = map_step(make_step(model, total_loss, tx, prepare_batch=gather, **how), mesh, mapping)
    state = replicate(create_state(variables(name), loss_params, tx, False, 0, keys), mesh)
    for batch in batches():
        state, metrics = step(state, put_batch(batch, mesh, mapping), {})
    return jax.device_get(((state.params, state.batch_stats, state.momentum), metrics))


def same(found, expected):
    (ours, metrics), (wanted, values) = found, expected
    agree(ours, wanted)
    for name, value in values.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    whole_model.same_keys(ours[2], wanted[2])
    assert (ours[2].images.pointer, ours[2].texts.pointer) == (2 * whole_model.IMAGES, 2 * PAIRS - QUEUE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "devices", "mapping"), [("user", 8, "pmap"), ("esa", 2, "pmap"), ("esa", 8, "shard_map")]
)
def test_with_common_statistics_steps_do_not_depend_on_devices(name, devices, mapping):
    one = steps(name, 1)
    same(steps(name, devices, mapping), one)
    (params, stats, keys), metrics = one
    assert metrics["finite"] == 1 and stats
    first = variables(name)
    moved = ((params["model"], first["params"]), (keys.params, first["params"]), (stats, first["batch_stats"]))
    for values, before in moved:
        assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (values, before)), strict=True)) > 0.01
    assert isinstance(keys.images, SetQueue) == (name == "esa")


@pytest.mark.slow
def test_statistics_of_a_device_are_those_of_its_rows_for_models_and_keys():
    """USER's norms of each place, on two devices, against one device that normalises its halves by themselves."""
    apart = steps("user", 2, bn_sync=False)
    same(apart, steps("user", 1, bn_sync=False, microbatch=PAIRS // 2))
    (_, stats, keys), _ = apart
    (_, common, common_keys), _ = steps("user", 1)
    for ours, together in ((stats, common), (keys.batch_stats, common_keys.batch_stats)):
        with pytest.raises(AssertionError):
            agree(ours, together)
