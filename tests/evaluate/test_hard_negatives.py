"""The hardest negatives of each query equal those of a dense sort, whatever the tile and the devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from shnet_jax.evaluation.hard_negatives import make_mining
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.types import Embedding

N, Q = 23, 41


def data():
    """Small whole numbers: many ties, and products that are exact in any order."""
    rng = np.random.default_rng(0)
    vectors = [rng.integers(-2, 3, (count, 6)).astype(np.float32) for count in (N, Q)]
    ids = [rng.integers(0, 8, count).astype(np.int32) for count in (N, Q)]
    return vectors, ids, rng.integers(-3, 9, Q).astype(np.float32)


def oracle(k):
    (gallery, queries), (rows, columns), limits = data()
    scores = queries.astype(np.float64) @ gallery.T
    negative = (columns[:, None] != rows[None]) & (scores <= limits[:, None])
    lists = [
        sorted(np.flatnonzero(n), key=lambda i, s=s: (-s[i], i))[:k] for s, n in zip(scores, negative, strict=True)
    ]
    return [[*found, *[-1] * (k - len(found))] for found in lists], negative


def mined(k, tile, devices):
    (gallery, queries), ids, limits = data()
    mesh = data_mesh(jax.devices()[:devices])
    how = ids, lambda rows: limits[rows], k, tile, mesh
    mining = make_mining(Embedding(gallery), Embedding(queries), *how)
    return [mining.block(number) for number in range(mining.blocks)]


@pytest.mark.parametrize(("k", "tile", "devices"), [(4, 2, 1), (4, 3, 2), (30, 2, 8), (2, 100, 8)])
def test_lists_equal_those_of_a_dense_sort(k, tile, devices):
    expected, negative = oracle(k)
    blocks = mined(k, tile, devices)
    assert len(blocks) == -(-Q // min(8 * tile, Q))
    np.testing.assert_array_equal(np.concatenate([block.index for block in blocks]), expected)
    counts = negative.sum(1)
    assert counts.min() < 4 < counts.max()  # lists of 4 that are not full, and cut ones
    scores = np.concatenate([block.score for block in blocks])
    assert (np.isneginf(scores) == (np.array(expected) == -1)).all()


def test_nan_is_an_error():
    vectors = np.ones((3, 2), np.float32)
    bad = vectors.copy()
    bad[1] = np.nan
    ids = np.arange(3), np.arange(3) + 5
    mining = make_mining(
        Embedding(bad),
        Embedding(vectors),
        ids,
        lambda rows: np.ones(len(rows), np.float32),
        1,
        4,
        data_mesh(jax.devices()[:1]),
    )
    with pytest.raises(ValueError, match="3 of 9 scores are NaN"):
        mining.block(0)
