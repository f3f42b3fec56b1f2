"""USER's objective at its extremes, and its part without momentum encoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.losses import uto
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Context, Embedding, Keys, Queue
from tests.losses import oracle
from tests.losses.test_triplet import IDS, pairs

OPTIONS = {"scale": 90.0, "offset": 0.5, "batch_weight": 20.0, "mask_same_image": True}


def run(images, texts, ids=IDS, keys=None, **options):
    @jax.jit
    def loss(images, texts):
        ctx = Context(step=jnp.int32(0), params={}, score=RetrievalModel.score, keys=keys)
        return uto.loss(Embedding(images), Embedding(texts), jnp.asarray(ids), ctx, **(OPTIONS | options))

    return loss(jnp.asarray(images, jnp.float32), jnp.asarray(texts, jnp.float32))


@pytest.mark.parametrize("mask", [True, False])
def test_without_keys_it_is_the_in_batch_part(mask):
    images, texts = pairs()
    expected = oracle.uto(images @ texts.T, IDS, scale=90, offset=0.5, weight=20, mask=mask)
    out = run(images, texts, mask_same_image=mask)
    np.testing.assert_allclose([out["uto_batch"], out["uto_queue"]], expected, rtol=1e-5)
    assert out["uto_loss"] == out["uto_batch"]
    np.testing.assert_allclose(out["uto_positive"], np.mean(np.sum(images * texts, axis=1)), rtol=1e-5)


def test_nothing_overflows_when_all_embeddings_are_equal():
    """exp(mu) is beyond float32 for mu 90; every score is 1."""
    same = np.tile(np.float32([1, 0, 0]), (8, 1))
    queue = Queue(jnp.asarray(same), jnp.full((8,), -1, jnp.int32), jnp.int32(0))
    keys = Keys(Embedding(jnp.asarray(same)), Embedding(jnp.asarray(same)), queue, queue)

    def value(images):
        return run(images, same, keys=keys, scale=1000.0, mask_same_image=False)["uto_loss"]

    loss, gradient = jax.value_and_grad(value)(same)
    # h = 0.5 + log(7) / mu in the batch (one partner out of 8), 0.5 + log(8) / mu in the queue.
    expected = 20 * (2 * (0.5 + np.log(7) / 1000) - np.log(2)) + 2 * (0.5 + np.log(8) / 1000 - np.log(2))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0.1


def test_without_any_negative_the_loss_is_the_reward_alone():
    images, texts = pairs()

    def value(images):
        return run(images, texts, ids=np.zeros(8, np.int32))["uto_loss"]

    loss, gradient = jax.value_and_grad(value)(jnp.float32(images))
    np.testing.assert_allclose(loss, -20 * np.log1p(np.maximum(0, np.sum(images * texts, axis=1))).mean(), rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_a_scale_must_be_positive():
    with pytest.raises(ValueError, match="scale must be above 0; it is 0"):
        uto.init_params(**OPTIONS | {"scale": 0.0})
