import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.models.layers import GRU
from shnet_jax.models.pooling import GPO
from shnet_jax.ops.positions import sinusoid
from tests.models import image_oracle as oracle
from tests.models.text_oracle import gru

M, D = 6, 4
MODEL = GPO()
QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of the time


@functools.cache
def params():
    """Larger than the initial ones: weights that differ between ranks and lengths."""
    shapes = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, M, D)), jnp.ones((1, M), bool)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), shapes["params"])


@functools.cache
def compiled(method: str | None = None):
    return jax.jit(
        functools.partial(MODEL.apply, method=method), static_argnames=("max_length",), compiler_options=QUICK
    )


def weights(lengths, max_length: int = M) -> np.ndarray:
    return np.asarray(compiled("weights")({"params": params()}, np.asarray(lengths), max_length=max_length))


def sets(lengths):
    rng = np.random.default_rng(1)
    mask = rng.permuted(np.arange(M) < np.asarray(lengths)[:, None], axis=1)
    return np.where(mask[..., None], rng.normal(size=(len(lengths), M, D)), 1e4).astype(np.float32), mask


def test_gru_over_shared_inputs_equals_numpy_forwards_and_backwards():
    """The backward direction starts at each set's own last step, not at the end of the padding."""
    inputs, p = np.asarray(sinusoid(np.arange(M), 32)), params()["forward"]
    lengths = np.array([M, 4, 1])
    active = np.arange(M) < lengths[:, None]
    for reverse in (False, True):
        states = np.asarray(jax.jit(GRU(32, reverse).apply)({"params": p}, inputs, active))
        for i, length in enumerate(lengths):
            rows = inputs[:length].astype(np.float64)
            expected = gru(rows[::-1], p)[::-1] if reverse else gru(rows, p)
            np.testing.assert_allclose(states[i, :length], expected, atol=1e-5)
            assert not states[i, length:].any()


def test_weights_equal_numpy_at_every_length():
    table = weights(np.arange(M + 1))
    assert not table[0].any()
    for length in range(1, M + 1):
        np.testing.assert_allclose(table[length, :length], oracle.gpo_weights(length, params()), atol=2e-5)
        assert not table[length, length:].any()
    np.testing.assert_allclose(table[1:].sum(axis=1), 1.0, atol=1e-6)


def test_weights_depend_on_the_length_alone():
    wide = weights([3, 5, 3], max_length=M + 4)
    np.testing.assert_array_equal(wide[0], wide[2])
    np.testing.assert_allclose(wide[:, :M], weights([3, 5, 3]), atol=1e-6)
    assert not wide[:, M:].any()


@pytest.mark.parametrize("lengths", [[6, 1, 4], [6, 1, 4, 0, 5, 5, 2, 3]])  # direct, and by the table
def test_pooling_equals_numpy(lengths):
    features, mask = sets(lengths)
    assert (len(lengths) > M) is (len(lengths) == 8)
    out = np.asarray(compiled()({"params": params()}, features, mask))
    for i, length in enumerate(lengths):
        rows = features[i][mask[i]].astype(np.float64)
        expected = oracle.pool(rows, oracle.gpo_weights(length, params())) if length else np.zeros(D)
        np.testing.assert_allclose(out[i], expected, atol=5e-5)


@pytest.mark.slow
def test_table_and_direct_path_agree_in_value_and_gradients():
    lengths = [6, 1, 4, 0, 5, 5, 2, 3]
    features, mask = sets(lengths)
    cotangent = np.random.default_rng(2).normal(size=(8, D))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def pulled(params, features, mask, cotangent):
        out, vjp = jax.vjp(lambda p, f: MODEL.apply({"params": p}, f, mask), params, features)
        return out, *vjp(cotangent)

    out, d_params, d_features = pulled(params(), features, mask, cotangent)
    parts = [pulled(params(), features[i : i + 4], mask[i : i + 4], cotangent[i : i + 4]) for i in (0, 4)]
    np.testing.assert_allclose(out, np.concatenate([p[0] for p in parts]), atol=1e-6)
    np.testing.assert_allclose(d_features, np.concatenate([p[2] for p in parts]), atol=1e-6)
    summed = jax.tree.map(np.add, parts[0][1], parts[1][1])
    for a, b in zip(jax.tree.leaves(d_params), jax.tree.leaves(summed), strict=True):
        assert np.abs(b).max() > 1e-4
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))


def test_order_and_padding_do_not_matter():
    features, mask = sets([6, 1, 4])
    plain = compiled()({"params": params()}, features, mask)
    order = np.random.default_rng(3).permutation(M)
    junk = np.where(mask[..., None], features, -7.0)[:, order]
    np.testing.assert_array_equal(compiled()({"params": params()}, junk, mask[:, order]), plain)
