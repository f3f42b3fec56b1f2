import jax
import numpy as np

from shnet_jax.ops.norms import l2norm


def test_epsilon_is_added_after_the_root():
    x = np.array([[3.0, 4.0], [3e-8, 4e-8], [0.0, 0.0]], np.float32)
    wide = x.astype(np.float64)
    expected = wide / (np.sqrt((wide**2).sum(axis=1, keepdims=True)) + 1e-8)
    np.testing.assert_allclose(l2norm(x), expected, rtol=1e-5)
    assert abs(np.linalg.norm(l2norm(x)[1]) - 5 / 6) < 1e-5


def test_any_axis():
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    for axis in (0, 1, -1):
        np.testing.assert_allclose(np.linalg.norm(l2norm(x, axis), axis=axis), 1.0, rtol=1e-5)


def test_gradient_also_at_zero():
    cotangent = np.array([0.3, -0.7], np.float32)

    def gradient(x):
        return jax.grad(lambda x: l2norm(x) @ cotangent)(x)

    np.testing.assert_allclose(gradient(np.zeros(2, np.float32)), cotangent * 1e8, rtol=1e-5)
    x = np.array([3.0, 4.0], np.float64)
    unit = x / 5
    expected = (cotangent - unit * (unit @ cotangent)) / 5
    np.testing.assert_allclose(gradient(x.astype(np.float32)), expected, rtol=1e-5)
