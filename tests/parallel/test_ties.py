"""Exact ties: every strategy on every number of devices takes the same negative, that of the lowest row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.losses.candidates import merge_best
from shnet_jax.losses.pairs import _best, directions
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA, Context, Embedding, Pairs


@functools.cache
def gradients(strategy, devices, rank):
    """Of the sum of the rank-th hardest scores, by 8 images and texts of which several are the same vector."""
    rng = np.random.default_rng(0)
    few = rng.standard_normal((2, 4)).astype(np.float32)
    batch = {"images": few[[0, 1, 0, 1, 0, 0, 1, 0]], "texts": few[[1, 0, 0, 1, 1, 0, 0, 1]], "ids": np.arange(8)}

    def per_device(_, batch):
        def share(both):
            images, texts = map(Embedding, both)
            ctx = Context(jnp.int32(0), {}, RetrievalModel.score, DATA, Pairs(strategy, 3))
            sides = directions(images, texts, batch["ids"], ctx, mask_same_image=False)
            return sum(side.hardest(rank).sum() for side in sides)

        return axis.all_gather(jax.grad(share)((batch["images"], batch["texts"])), DATA)

    mesh = mapping.data_mesh(jax.devices()[:devices])
    return mapping.map_step(per_device, mesh, donate_state=False)({}, mapping.put_batch(batch, mesh))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("strategy", "devices"), [("gathered", 4), ("streamed", 2), ("ring", 2), ("ring", 8)])
def test_the_same_negatives_get_the_gradient(strategy, devices, rank):
    for ours, expected in zip(gradients(strategy, devices, rank), gradients("gathered", 1, rank), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2])
def test_zeros_of_either_sign_are_a_tie(rank):
    scores, columns = _best(jnp.array([[-1.0, -0.0, 0.0], [0.0, -0.0, -1.0]]), rank)
    np.testing.assert_array_equal(columns, np.array([[1, 2], [0, 1]])[:, :rank])
    np.testing.assert_array_equal(scores, np.zeros((2, rank)))


def test_of_equal_scores_the_lowest_row_is_kept():
    best = jnp.array([[0.5, 0.5], [2.0, -jnp.inf], [1.0, 0.0]]), jnp.array([[4, 7], [3, 0], [5, 6]], jnp.int32)
    found = jnp.array([[0.5], [2.0], [jnp.nan]]), jnp.array([[1], [2], [9]], jnp.int32)
    scores, rows = merge_best(best, found, 2)
    np.testing.assert_array_equal(rows, [[1, 4], [2, 3], [9, 5]])
    np.testing.assert_array_equal(scores, [[0.5, 0.5], [2, 2], [np.nan, 1]])
