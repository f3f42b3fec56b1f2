"""InfoNCE, its mask, its temperature and its gradients against a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.losses import infonce
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Context, Embedding, Pairs
from tests.losses import oracle
from tests.losses.test_triplet import IDS, pairs


def run(images, texts, params, ids=IDS, **options):
    options = {"temperature": 0.1, "learn_temperature": True, "mask_same_image": True} | options

    @jax.jit
    def loss(images, texts, params):
        ctx = Context(step=jnp.int32(0), params=params, score=RetrievalModel.score)
        return infonce.loss(Embedding(images), Embedding(texts), jnp.asarray(ids), ctx, **options)

    return loss(jnp.asarray(images, jnp.float32), jnp.asarray(texts, jnp.float32), params)


@pytest.mark.parametrize("mask", [True, False])
def test_value_and_gradients(mask):
    images, texts = pairs()

    def expected(images, texts, log_scale):
        return oracle.infonce(images @ texts.T, IDS, scale=np.exp(log_scale), mask=mask)

    def ours(images, texts, log_scale):
        return run(images, texts, {"log_scale": log_scale}, mask_same_image=mask)["infonce_loss"]

    at = (images, texts, np.log(10.0))
    value, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*map(jnp.float32, at))
    np.testing.assert_allclose(value, expected(*at), rtol=1e-5)
    for i, grad in enumerate(grads):
        reference = oracle.gradient(lambda x, i=i: expected(*at[:i], x, *at[i + 1 :]), at[i])
        np.testing.assert_allclose(grad, reference, rtol=1e-4, atol=1e-5)


def test_scale_stops_at_its_limit():
    images, texts = pairs()
    at = run(images, texts, {"log_scale": jnp.log(100.0)})
    above = run(images, texts, {"log_scale": jnp.float32(9.0)})
    np.testing.assert_allclose(above["infonce_scale"], 100.0, rtol=1e-6)
    np.testing.assert_allclose(above["infonce_loss"], at["infonce_loss"], rtol=1e-6)


@pytest.mark.slow
def test_scale_comes_back_from_beyond_its_limit():
    def slope(images, texts):
        return jax.grad(lambda x: run(images, texts, {"log_scale": x}, ids=np.arange(4))["infonce_loss"])(
            jnp.float32(9)
        )

    assert slope(np.eye(4), np.eye(4)) == 0  # all is right: a larger scale would be better still
    assert slope(np.eye(4), np.eye(4)[[1, 0, 2, 3]]) > 0  # two are wrong: descent leads back


def test_single_image_leaves_only_the_own_pair():
    images, texts = pairs()
    out, grad = jax.value_and_grad(
        lambda x: run(x, texts, {"log_scale": jnp.float32(2.0)}, ids=np.zeros(8, np.int32))["infonce_loss"]
    )(jnp.float32(images))
    np.testing.assert_allclose(out, 0.0, atol=1e-6)
    np.testing.assert_allclose(grad, 0.0, atol=1e-6)


def test_accuracy_counts_both_directions():
    images, texts = np.eye(4), np.eye(4)[[1, 0, 2, 3]]
    out = run(images, texts, {"log_scale": jnp.float32(0.0)}, ids=np.arange(4))
    assert float(out["infonce_accuracy"]) == 0.5


@pytest.mark.parametrize("strategy", ["gathered", "streamed", "ring"])
def test_accuracy_takes_a_tie_for_wrong_in_every_strategy(strategy):
    images, texts = (Embedding(jnp.eye(4)[jnp.array(rows)]) for rows in ([0, 0, 2, 3], [0, 1, 2, 3]))
    ctx = Context(jnp.int32(0), {}, RetrievalModel.score, pairs=Pairs(strategy, tile=3))
    options = {"temperature": 0.1, "learn_temperature": False, "mask_same_image": True}
    out = jax.jit(lambda: infonce.loss(images, texts, jnp.arange(4), ctx, **options))()
    assert float(out["infonce_accuracy"]) == (3 + 2) / 8  # text 0 has two images, text 1 none


@pytest.mark.parametrize("temperature, learn", [(0.0, False), (-1.0, True), (0.001, True), (float("nan"), False)])
def test_bad_temperature_is_an_error(temperature, learn):
    with pytest.raises(ValueError, match=r"loss\.infonce\.temperature"):
        infonce.init_params(temperature=temperature, learn_temperature=learn)


def test_small_temperature_is_fine_when_it_is_not_learned():
    assert infonce.init_params(temperature=0.001, learn_temperature=False) == {}
