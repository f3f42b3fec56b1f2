import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.models.mlp import MLP, BatchNorm
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA
from tests.models import image_oracle as oracle

N, K, C = 8, 5, 3
RNG = np.random.default_rng(0)
# A mean far above the spread, as in raw features: squares minus the squared mean would lose it in float32.
X = (RNG.normal(size=(N, K, C)) + 300.0).astype(np.float32)
MASK = np.arange(K) < np.array([5, 2, 1, 3, 4, 0, 5, 2])[:, None]
COTANGENT = RNG.normal(size=X.shape).astype(np.float32)
PARAMS = {"scale": np.float32([0.5, 1.0, -2.0]), "bias": np.float32([0.1, 0.0, 3.0])}
STATS = {"mean": np.float32([299.0, 301.0, 300.0]), "var": np.float32([0.5, 2.0, 1.5])}
include = pytest.mark.parametrize("include_padding", [True, False])


def normalise(train: bool, include_padding: bool = True, mask=MASK, x=X):
    run = jax.jit(
        functools.partial(BatchNorm(include_padding=include_padding).apply, train=train, mutable="batch_stats")
    )
    out, updated = run({"params": PARAMS, "batch_stats": STATS}, x, mask)
    return np.asarray(out), {name: np.asarray(stat) for name, stat in updated["batch_stats"].items()}


@include
def test_evaluation_takes_the_running_statistics_and_leaves_them(include_padding):
    out, stats = normalise(train=False, include_padding=include_padding)
    np.testing.assert_allclose(out, oracle.batch_norm(X.astype(np.float64), PARAMS, STATS), rtol=1e-5, atol=1e-4)
    assert all(np.array_equal(stats[name], STATS[name]) for name in STATS)


@include
@pytest.mark.parametrize("mask", [MASK, None])
def test_training(include_padding, mask):
    """The biased variance normalises, the unbiased one enters the running statistics with a share of 0.1."""
    out, stats = normalise(True, include_padding, mask)
    rows = X.astype(np.float64)
    counted = np.ones((N, K), bool) if include_padding or mask is None else mask
    np.testing.assert_allclose(out, oracle.batch_norm(rows, PARAMS, None, counted), rtol=1e-3, atol=1e-3)
    expected = {"mean": rows[counted].mean(axis=0), "var": rows[counted].var(axis=0, ddof=1)}
    for name, batch in expected.items():
        np.testing.assert_allclose(stats[name], 0.9 * STATS[name] + 0.1 * batch, rtol=1e-5)


def test_masked_rows_are_left_out_of_everything():
    junk = np.where(MASK[..., None], X, -1e3).astype(np.float32)
    (plain, stats), (other, other_stats) = (normalise(True, include_padding=False, x=x) for x in (X, junk))
    np.testing.assert_allclose(other[MASK], plain[MASK], rtol=1e-5)
    np.testing.assert_allclose(other_stats["var"], stats["var"], rtol=1e-5)


def test_a_batch_without_rows_or_with_one_gives_no_nan():
    for mask in (np.zeros((N, K), bool), np.arange(N * K).reshape(N, K) == 7):
        out, stats = normalise(True, include_padding=False, mask=mask)
        assert np.isfinite(out).all() and all(np.isfinite(s).all() for s in stats.values())


def test_initial_statistics_are_neutral():
    """Initialising must not count as a step of training."""
    variables = jax.jit(lambda: BatchNorm().init(jax.random.key(0), X, None, train=True))()
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(C))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(C))


def whole_step(params, batch, include_padding: bool, name: str | None):
    """Output, statistics, gradients of parameters and rows; the loss is the sum of the devices' shares."""

    def share(params, x):
        model, variables = BatchNorm(include_padding, name), {"params": params, "batch_stats": STATS}
        out, updated = model.apply(variables, x, batch["mask"], train=True, mutable=["batch_stats"])
        return jnp.sum(out * batch["cotangent"]), (out, updated["batch_stats"])

    (d_params, d_x), (out, stats) = jax.grad(share, argnums=(0, 1), has_aux=True)(params, batch["x"])
    return axis.all_gather(out, name), stats, axis.psum(d_params, name), axis.all_gather(d_x, name)


@include
@pytest.mark.parametrize("how", mapping.MAPPINGS)
def test_eight_devices_equal_one_on_the_whole_batch(how, include_padding):
    batch = {"x": X, "mask": MASK, "cotangent": COTANGENT}  # one image a device, one without any valid row
    one = jax.jit(functools.partial(whole_step, include_padding=include_padding, name=None))(PARAMS, batch)
    mesh = mapping.data_mesh(jax.devices()[:8])
    step = functools.partial(whole_step, include_padding=include_padding, name=DATA)
    run = mapping.map_step(step, mesh, how, donate_state=False)
    eight = run(mapping.replicate(PARAMS, mesh), mapping.put_batch(batch, mesh, how))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        assert np.abs(a).max() > 1e-3
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_without_an_axis_each_device_has_its_own_statistics():
    """What the synchronised case would look like if its sums did nothing."""
    mesh = mapping.data_mesh(jax.devices()[:2])

    def own(params, batch):
        out, _ = BatchNorm().apply(
            {"params": params, "batch_stats": STATS}, batch, None, train=True, mutable=["batch_stats"]
        )
        return out

    out = mapping.map_encode(own, mesh)(mapping.replicate(PARAMS, mesh), mapping.put_batch(X, mesh))
    for half in (slice(0, 4), slice(4, 8)):
        expected = oracle.batch_norm(X[half].astype(np.float64), PARAMS, None)
        np.testing.assert_allclose(out[half], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("train", [True, False])
def test_mlp_is_linear_norm_relu_linear(train):
    model, x = MLP(hidden=6, features=4, include_padding=False), X - 300.0
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    variables = jax.tree.map(lambda leaf: np.abs(RNG.normal(size=leaf.shape)).astype(np.float32), shapes)
    assert set(variables["params"]) == {"in", "norm", "out"}  # the published dead BatchNorm is left out
    out, _ = jax.jit(functools.partial(model.apply, train=train, mutable="batch_stats"))(variables, x, MASK)
    stats = None if train else variables["batch_stats"]
    np.testing.assert_allclose(out, oracle.mlp(x, variables["params"], stats, MASK), rtol=1e-4, atol=1e-4)
