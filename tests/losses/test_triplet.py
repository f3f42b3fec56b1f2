"""Triplet loss, its warm-up, its mask and its gradient against a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.losses import triplet
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Context, Embedding, Pairs
from tests.losses import oracle

IDS = np.array([3, 3, 5, 7, 7, 7, 9, 1], np.int32)
OPTIONS = {"margin": 0.2, "warmup_steps": 10, "reduction": "sum", "mask_same_image": True}


def pairs(seed=0, size=8, dim=6):
    draw = np.random.default_rng(seed).normal(size=(2, size, dim))
    return oracle.unit(draw[0]), oracle.unit(draw[0] + 1.5 * draw[1])


def run(images, texts, ids=IDS, step=0, **options):
    @jax.jit
    def loss(images, texts, step):
        ctx = Context(step=step, params={}, score=RetrievalModel.score)
        return triplet.loss(Embedding(images), Embedding(texts), jnp.asarray(ids), ctx, **(OPTIONS | options))

    return loss(jnp.asarray(images, jnp.float32), jnp.asarray(texts, jnp.float32), jnp.int32(step))


@pytest.mark.parametrize(("mask", "reduction"), [(True, "sum"), (False, "mean")])
def test_value_and_gradient(mask, reduction):
    """In the last step of the warm-up and in the first one after it."""
    images, texts = pairs()

    @jax.jit
    def value_and_grad(images, texts, step):
        ours = lambda *sides: run(*sides, step=step, mask_same_image=mask, reduction=reduction)["triplet_loss"]  # noqa: E731
        return jax.value_and_grad(ours, argnums=(0, 1))(images, texts)

    for step in (9, 10):

        def expected(images, texts, warm=step < 10):
            return oracle.triplet(images @ texts.T, IDS, margin=0.2, warm=warm, mean=reduction == "mean", mask=mask)

        value, grads = value_and_grad(*map(jnp.float32, (images, texts)), step)
        np.testing.assert_allclose(value, expected(images, texts), rtol=1e-5)
        for grad, reference in (
            (grads[0], oracle.gradient(lambda x, f=expected: f(x, texts), images)),
            (grads[1], oracle.gradient(lambda x, f=expected: f(images, x), texts)),
        ):
            np.testing.assert_allclose(grad, reference, rtol=1e-4, atol=1e-5)


def test_mask_matters_only_for_equal_ids():
    images, texts = pairs()
    distinct = np.arange(8)
    masked, published = (run(images, texts, distinct, mask_same_image=m)["triplet_loss"] for m in (True, False))
    assert masked == published
    assert run(images, texts)["triplet_loss"] < run(images, texts, mask_same_image=False)["triplet_loss"]


def test_metrics():
    images, texts = np.eye(4), np.eye(4)
    texts[0] = [5 / 13, 12 / 13, 0, 0]  # image 0's caption is nearer to image 1
    out = run(images, texts, ids=np.arange(4), step=99)
    # Text 0 prefers image 1, and to image 1 it comes closer than the margin: 2 of 8 queries.
    np.testing.assert_allclose(out["triplet_violated"], 2 / 8)
    np.testing.assert_allclose(out["triplet_positive"], (5 / 13 + 3) / 4, rtol=1e-6)
    np.testing.assert_allclose(out["triplet_negative"], 2 * (12 / 13) / 8, rtol=1e-6)


@pytest.mark.parametrize("step", [0, 10])
def test_without_any_negative_the_loss_and_its_gradient_are_zero(step):
    images, texts = pairs()

    def ours(images):
        out = run(images, texts, ids=np.zeros(8, np.int32), step=step)
        return out["triplet_loss"], out

    (value, out), grad = jax.value_and_grad(ours, has_aux=True)(jnp.float32(images))
    assert value == 0
    assert out["triplet_negative"] == 0
    np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [(s, options) for s in ("gathered", "streamed") for options in ({}, {"rank": 2}, {"softness": 0.1})]
    + [("ring", {})],
    ids=str,
)
def test_queries_without_a_negative_change_nothing(strategy, options):
    """Pairs of one image beside one other pair: for rank 2 nobody has enough negatives."""
    images, texts = pairs()
    ids = jnp.asarray([0, 0, 0, 0, 0, 0, 0, 1])

    def ours(images):
        ctx = Context(jnp.int32(99), {}, RetrievalModel.score, pairs=Pairs(strategy, tile=3))
        args = (Embedding(images), Embedding(jnp.float32(texts)), ids, ctx)
        return triplet.loss(*args, **(OPTIONS | options))["triplet_loss"]

    value, gradient = jax.jit(jax.value_and_grad(ours))(jnp.float32(images))
    assert np.isfinite(gradient).all()
    if options.get("rank") == 2:  # but the pair of the other image, which has seven
        assert value < 2 * 2.2
    with pytest.raises(ValueError, match="rank is 8; a query meets only 7 others"):
        options = {"rank": 8}
        ours(jnp.float32(images))


def test_unequal_rows_and_unknown_reduction_are_errors():
    images, texts = pairs()
    with pytest.raises(ValueError, match="4 images, 8 texts and 8 ids"):
        run(images[:4], texts)
    with pytest.raises(ValueError, match="not 'median'"):
        run(images, texts, reduction="median")
