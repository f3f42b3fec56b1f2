"""One step on one device: running averages, batches that are not finite, randomness."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from shnet_jax.losses import total
from shnet_jax.training.state import create_state
from shnet_jax.training.step import make_step
from tests.train import toy

INFONCE = {"temperature": 0.1, "learn_temperature": True, "mask_same_image": True}
LOSS = ConfigDict({"weights": {"infonce": 1.0}, "infonce": INFONCE})
RATE = 0.1


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image_index": np.arange(4, dtype=np.int32),
        "regions": rng.normal(size=(4, 3, 5)).astype(np.float32),
        "region_mask": np.ones((4, 3), bool),
        "tokens": rng.integers(1, 9, (8, 3)).astype(np.int32),
        "token_mask": np.ones((8, 3), bool),
    }


class Run:
    """Steps on their own; `dropout` > 0 makes them depend on the key."""

    def __init__(self, *, ema=0.0, stop=True, dropout=0.0, tx=None, seed=0, loss=None):
        text = toy.Text(toy.Words(9, 4), 4)
        model = toy.Toy(toy.Image(4, dropout), text)
        variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), batch())
        loss_params, total_loss = total.build(LOSS, 10)
        tx = tx or optax.sgd(RATE)
        self.state = create_state(variables, loss_params, tx, ema=ema > 0, seed=seed)
        self._step = jax.jit(
            make_step(
                model, loss or total_loss, tx, prepare_batch=lambda table, raw: raw, ema=ema, stop_on_nonfinite=stop
            )
        )

    def step(self, examples):
        self.state, metrics = self._step(self.state, examples)
        return jax.device_get(metrics)


def broken(examples):
    regions = examples["regions"].copy()
    regions[2, 1, 0] = np.nan
    return examples | {"regions": regions}


def same(a, b):
    return all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def averaged():
    """[(state, metrics of the step that led to it)] of three steps."""
    run = Run(ema=0.15)
    done = [(run.state, None)]
    for seed in range(3):
        metrics = run.step(batch(seed))
        done.append((run.state, metrics))
    return done


def test_running_average(averaged):
    """ema <- d ema + (1 - d) variables with d = min(decay, (1 + step) / (10 + step)): 0.1, then 0.15."""

    def raw(state):
        return {"params": state.params["model"], "batch_stats": state.batch_stats}

    expected = jax.tree.map(np.float64, raw(averaged[0][0]))
    for decay, (state, _) in zip((0.1, 0.15, 0.15), averaged[1:], strict=True):
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * np.float64(p), expected, raw(state))
        for ours, mean in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, mean, rtol=1e-5, atol=1e-7)
    last = averaged[-1][0]
    assert last.variables is last.ema
    assert not same(last.ema, raw(last))


def test_metrics_are_those_of_the_gradient(averaged):
    (before, _), (after, metrics) = averaged[:2]
    gradient = jax.tree.map(lambda a, b: (np.float64(a) - b) / RATE, before.params, after.params)
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert metrics["loss"] == metrics["infonce_loss"] > 0


def test_the_optimiser_is_told_the_norm_of_the_gradient():
    def update(gradient, state, params=None, *, grad_norm):
        return jax.tree.map(lambda g: -g / grad_norm, gradient), state

    run = Run(tx=optax.GradientTransformationExtraArgs(optax.init_empty_state, update))
    before = jax.tree.map(np.asarray, run.state.params)
    run.step(batch())
    way = optax.global_norm(jax.tree.map(jnp.subtract, run.state.params, before))
    np.testing.assert_allclose(way, 1.0, rtol=1e-5)


@pytest.mark.parametrize("stop", [True, False])
def test_a_batch_that_is_not_finite_changes_nothing(stop):
    run = Run(stop=stop, ema=0.5, tx=optax.adam(RATE))
    run.step(batch(0))
    before = run.state
    metrics = run.step(broken(batch(1)))
    after = run.state
    assert (metrics["finite"], metrics["nonfinite"], metrics["loss"], metrics["grad_norm"]) == (0, 1, 0, 0)
    assert (int(after.step), int(after.nonfinite)) == (2, 1)
    for name in ("params", "ema", "opt_state", "batch_stats"):
        assert same(getattr(after, name), getattr(before, name)), name
    metrics = run.step(batch(2))
    if stop:  # nothing changes any more, the counters neither, and nothing enters the means
        assert same(run.state, after) and not any(metrics.values())
    else:
        assert metrics["finite"] == 1 and metrics["loss"] > 0 and not same(run.state.params, before.params)


def test_a_gradient_that_is_not_finite_counts_as_well():
    # The root of zero: its derivative is infinite.
    run = Run(loss=lambda images, texts, ids, ctx: {"loss": jnp.sqrt(jnp.square(images.vector).sum() * 0.0)})
    params = run.state.params
    metrics = run.step(batch())
    assert metrics["nonfinite"] == 1 and same(run.state.params, params)


def test_every_step_has_its_own_randomness():
    def losses(seed):
        run = Run(dropout=0.5, tx=optax.sgd(0.0), seed=seed)
        return [float(run.step(batch())["loss"]) for _ in range(3)]

    first = losses(0)
    assert len(set(first)) == 3  # the same batch, the same parameters
    assert losses(0) == first != losses(1)
