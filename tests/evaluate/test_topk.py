"""Streamed lists against sorting the whole matrix, ties and padding included."""

import jax
import numpy as np
import pytest

from shnet_jax.evaluate.topk import top_items
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.types import Embedding
from tests.evaluate.test_rank import recorded


def found(scores, k, tile, devices=1):
    columns = np.arange(scores.shape[1])[:, None]
    mesh = data_mesh(jax.devices()[:devices])
    return top_items(Embedding(scores), Embedding(columns), recorded, k, tile, mesh)


@pytest.mark.parametrize(
    ("n", "t", "k", "tile", "devices"), [(13, 31, 4, 1, 1), (13, 31, 10, 2, 3), (40, 200, 7, 4, 8), (5, 9, 50, 100, 8)]
)
@pytest.mark.parametrize("levels", [3, 10**6])
def test_equals_a_stable_sort(n, t, k, tile, devices, levels):
    scores = np.random.default_rng(n + k).integers(-levels, levels, (n, t)).astype(np.float32)
    top = found(scores, k, tile, devices)
    np.testing.assert_array_equal(top.i2t, np.argsort(-scores, axis=1, kind="stable")[:, :k])
    np.testing.assert_array_equal(top.t2i, np.argsort(-scores, axis=0, kind="stable").T[:, :k])


@pytest.mark.parametrize("tile", [1, 100])
def test_zeros_of_either_sign_are_a_tie(tile):
    scores = np.where(np.random.default_rng(0).random((6, 40)) < 0.5, -0.0, 0.0).astype(np.float32)
    top = found(scores, 4, tile, devices=2)
    np.testing.assert_array_equal(top.i2t, np.tile(np.arange(4), (6, 1)))
    np.testing.assert_array_equal(top.t2i, np.tile(np.arange(4), (40, 1)))


def test_scores_of_minus_infinity_come_last_and_are_no_padding():
    scores = np.full((5, 9), -np.inf, np.float32)
    scores[:, 6] = 1.0
    np.testing.assert_array_equal(found(scores, 3, 1, 2).i2t, np.tile([6, 0, 1], (5, 1)))


def test_nan_and_a_list_of_nothing_are_errors():
    scores = np.zeros((3, 9), np.float32)
    with pytest.raises(ValueError, match="first 0 items"):
        found(scores, 0, 2)
    scores[2, 8] = np.nan
    with pytest.raises(ValueError, match="1 of 27 scores are NaN"):
        found(scores, 2, 2)
