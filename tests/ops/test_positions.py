import math

import numpy as np
import pytest

from shnet_jax.ops.positions import map_code_1d, map_code_2d, sinusoid


def code(position: float, size: int) -> list[float]:
    frequencies = [10000.0 ** (-2 * j / size) for j in range(size // 2)]
    return [f(position * w) for w in frequencies for f in (math.sin, math.cos)]


@pytest.mark.parametrize("size", [2, 8, 32])
def test_sinusoid(size):
    out = sinusoid(np.arange(200).reshape(2, 100), size)
    assert out.shape == (2, 100, size) and out.dtype == np.float32
    np.testing.assert_allclose(out.reshape(200, size), [code(p, size) for p in range(200)], atol=2e-5)


def test_map_code_1d_counts_row_by_row():
    out = map_code_1d(3, 5, 8)
    np.testing.assert_allclose(out, [code(p, 8) for p in range(15)], atol=2e-6)


def test_far_positions_keep_their_code():
    """64 x 64 positions: the angle of float32 is off by the rounding of its frequency only."""
    np.testing.assert_allclose(map_code_1d(64, 64, 8)[4095], code(4095, 8), atol=3e-4)


def test_map_code_2d_is_row_then_column():
    out = np.asarray(map_code_2d(3, 5, 8)).reshape(3, 5, 8)
    for row, column in np.ndindex(3, 5):
        np.testing.assert_allclose(out[row, column], code(row, 4) + code(column, 4), atol=2e-6)
    assert len(np.unique(out.reshape(15, 8).round(4), axis=0)) == 15
