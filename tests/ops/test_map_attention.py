from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from shnet_jax.ops.map_attention import attention_weights, map_attention

N, UNITS, PATCH, CHANNELS, POSITIONS = 3, 5, 9, 4, 12
QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of the time


def example(scale: float = 1.0):
    """query, patches, kernel, position, cotangent."""
    rng = np.random.default_rng(0)
    shapes = ((N, UNITS, CHANNELS), (N, POSITIONS, PATCH), (PATCH, CHANNELS), (POSITIONS, CHANNELS))
    arrays = [rng.normal(size=shape) for shape in (*shapes, (N, UNITS, CHANNELS))]
    arrays[0] *= scale
    return [a.astype(np.float32) for a in arrays]


def dense(query, patches, kernel, position):
    """All keys of all images at once, and the textbook softmax."""
    keys = jnp.maximum(jnp.einsum("npi,ic->npc", patches, kernel) + position, 0)
    logits = jnp.einsum("nkc,npc->nkp", query, keys)
    weights = jnp.exp(logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True))
    return jnp.einsum("nkp,npc->nkc", weights, keys), weights


@partial(jax.jit, compiler_options=QUICK)
def dense_pulled(*given):
    *inputs, cotangent = given
    out, vjp, weights = jax.vjp(dense, *inputs, has_aux=True)
    return out, *vjp(cotangent), weights


def expected(given):
    """Value, four gradients and weights in float64."""
    with jax.enable_x64(True):
        return [np.asarray(a) for a in dense_pulled(*(a.astype(np.float64) for a in given))]


def pulled(given, dtype="float32"):
    @partial(jax.jit, compiler_options=QUICK)  # made anew each time: what a test has replaced is seen
    def run(*given):
        *inputs, cotangent = given
        out, vjp = jax.vjp(lambda *a: map_attention(*a, dtype), *inputs)
        return out, *vjp(cotangent), attention_weights(*inputs, dtype)

    return run(*given)


def check(given) -> None:
    # Summed in float32 over positions and images.
    names = ("value", "d query", "d patches", "d kernel", "d position", "weights")
    for name, ours, true in zip(names, pulled(given), expected(given), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, true, rtol=1e-4, atol=2e-5 * max(1.0, np.abs(true).max()), err_msg=name)


def test_value_and_gradients_equal_the_dense_formula_in_float64():
    check(example())


def test_value_and_gradients_off_cpu(monkeypatch):
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    check(example())


def test_logits_of_any_size_are_finite():
    given = example(scale=300.0)
    logits = np.einsum("nkc,pc->nkp", given[0], np.maximum(given[3], 0))
    assert logits.max() > np.log(np.finfo(np.float32).max)  # its exponential overflows
    ours = pulled(given)
    assert all(np.isfinite(a).all() for a in ours)
    np.testing.assert_allclose(ours[0], expected(given)[0], atol=1e-3)


def test_bfloat16_stays_within_its_band():
    """Operands rounded to 8 bits: 0.4% each, and the logits' errors in the exponent."""
    given = example()
    for ours, true in zip(pulled(given, "bfloat16"), expected(given), strict=True):
        assert ours.dtype == jnp.float32
        error = np.abs(np.asarray(ours) - true).max() / np.abs(true).max()
        assert 1e-5 < error < 0.03


def test_weights_sum_to_one():
    np.testing.assert_allclose(pulled(example())[-1].sum(axis=-1), np.ones((N, UNITS)), rtol=1e-5)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="float32 or bfloat16, not float16"):
        map_attention(*example()[:4], "float16")
