from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from shnet_jax.ops import set_pool as module
from shnet_jax.ops.set_pool import set_pool

N, D = 4, 3
# Compiling the networks is most of the time here, and half of it XLA's optimisations.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def example(m: int, seed: int = 0):
    """Sets of all, no, one and about half of the rows; masked rows hold what would win every comparison."""
    rng = np.random.default_rng(seed)
    lengths = np.array([m, 0, 1, (m + 1) // 2])
    mask = rng.permuted(np.arange(m) < lengths[:, None], axis=1)
    features = np.where(mask[..., None], rng.normal(size=(N, m, D)), 1e30).astype(np.float32)
    weights = rng.random((N, m), np.float32)
    return features, mask, weights, rng.normal(size=(N, D)).astype(np.float32)


def oracle(features, mask, weights, cotangent):
    """Value, gradient of the features and of the weights in float64, value by value."""
    out, d_features, d_weights = np.zeros((N, D)), np.zeros(features.shape), np.zeros(weights.shape)
    for b, c in np.ndindex(N, D):
        rows = np.flatnonzero(mask[b])
        ranked = sorted(rows, key=lambda row: -features[b, row, c])
        for rank, row in enumerate(ranked):
            out[b, c] += float(weights[b, rank]) * float(features[b, row, c])
            d_features[b, row, c] = float(weights[b, rank]) * float(cotangent[b, c])
            d_weights[b, rank] += float(features[b, row, c]) * float(cotangent[b, c])
    return out, d_features, d_weights


@pytest.fixture(scope="module", params=["cpu", "elsewhere"])
def pulled(request):
    """(features, mask, weights, cotangent) -> value, value while differentiating, both gradients; by either sort."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "elsewhere":  # take the code of accelerators
            patch.setattr(lax, "platform_dependent", lambda *args, cpu, default: default(*args))

        def run(features, mask, weights, cotangent):
            out, vjp = jax.vjp(lambda f, w: set_pool(f, mask, w), features, weights)
            return set_pool(features, mask, weights), out, *vjp(cotangent)

        yield compiled(run)


# Up to 127 rows the saved ranks are int8; the network on CPU pads to a power of two.
@pytest.mark.parametrize("m", [1, 3, 37, 130])
def test_value_and_gradients_equal_a_float64_sort(m, pulled):
    given = example(m)
    plain, out, d_features, d_weights = pulled(*given)
    expected = oracle(*given)
    np.testing.assert_allclose(plain, expected[0], rtol=1e-5, atol=1e-5)
    for ours, true in zip((out, d_features, d_weights), expected, strict=True):
        np.testing.assert_allclose(ours, true, rtol=1e-5, atol=1e-5)
    assert not np.asarray(out)[1].any() and not np.asarray(d_weights)[1].any()  # the empty set
    assert not np.asarray(d_features)[~given[1]].any()


def test_ranks_are_kept_in_few_bytes():
    sizes = {m: module._index_dtype(m) for m in (127, 128, 32767, 32768)}
    assert sizes == {127: jnp.int8, 128: jnp.int16, 32767: jnp.int16, 32768: jnp.int32}
    for sort in (module._sort_cpu, module._sort_wide):
        index = jax.eval_shape(partial(sort, with_index=True), jnp.zeros((2, 40, 3)))[1]
        assert index.dtype == jnp.int8 and index.shape == (2, 40, 3)


@pytest.mark.parametrize("m", [1, 6])
def test_both_sorts_agree(m):
    x = np.random.default_rng(1).normal(size=(3, m, 5)).astype(np.float32)
    for with_index in (False, True):
        (a, i), (b, j) = (compiled(partial(f, with_index=with_index))(x) for f in (module._sort_cpu, module._sort_wide))
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, -np.sort(-x, axis=1))
        if with_index:
            np.testing.assert_array_equal(i, j)
            np.testing.assert_array_equal(np.take_along_axis(x, np.asarray(i, np.int64), axis=1), a)
        else:
            assert i is None and j is None


@pytest.mark.parametrize("branch", ["cpu", "default"])
def test_unsort_undoes_the_sort(branch, monkeypatch):
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, **branches: branches[branch](*args))
    x = np.random.default_rng(2).normal(size=(3, 9, 5)).astype(np.float32)
    values, index = module._sort_wide(x, with_index=True)
    np.testing.assert_array_equal(compiled(lambda *a: module._unsort(*a))(values, index), x)


def test_ties(pulled):
    """Whole columns of equal values, and pairs: whichever row it is, each rank's gradient goes to exactly one."""
    rng = np.random.default_rng(3)
    features = rng.integers(0, 3, (N, 8, D)).astype(np.float32)
    features[0] = 1.0
    mask = np.arange(8) < np.array([8, 7, 2, 1])[:, None]
    weights = rng.random((N, 8), np.float32)
    cotangent = np.ones((N, D), np.float32)
    _, out, d_features, d_weights = pulled(features, mask, weights, cotangent)
    true, _, true_weights = oracle(features, mask, weights, cotangent)
    np.testing.assert_allclose(out, true, rtol=1e-5)
    np.testing.assert_allclose(d_weights, true_weights, rtol=1e-5)
    for b, c in np.ndindex(N, D):
        given = np.asarray(d_features)[b, mask[b], c]
        np.testing.assert_array_equal(np.sort(given), np.sort(weights[b, : mask[b].sum()]))
        order = np.argsort(-features[b, mask[b], c], kind="stable")  # equal values share a block of ranks
        for value in np.unique(features[b, mask[b], c]):
            ranks = np.flatnonzero(features[b, mask[b], c][order] == value)
            block = given[features[b, mask[b], c] == value]
            np.testing.assert_array_equal(np.sort(block), np.sort(weights[b, ranks]))


def test_order_of_rows_and_weights_beyond_the_length_do_not_matter(pulled):
    features, mask, weights, cotangent = example(8)
    plain, _, _, d_weights = pulled(features, mask, weights, cotangent)
    order = np.random.default_rng(4).permutation(8)
    beyond = np.arange(8) >= mask.sum(axis=1, keepdims=True)
    other, *_ = pulled(features[:, order], mask[:, order], np.where(beyond, 1e20, weights), cotangent)
    np.testing.assert_array_equal(plain, other)
    assert not np.asarray(d_weights)[beyond].any()


def test_masked_rows_may_hold_anything(pulled):
    features, mask, weights, cotangent = example(8)
    for junk in (np.nan, np.inf, -np.inf, -3e38):
        filled = np.where(mask[..., None], features, np.float32(junk))
        for a, b in zip(
            pulled(features, mask, weights, cotangent), pulled(filled, mask, weights, cotangent), strict=True
        ):
            np.testing.assert_array_equal(a, b)
