"""The weighted sum of losses and the checks of its configuration."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from shnet_jax.losses import infonce, total, triplet
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Context, Embedding
from tests.losses.test_triplet import IDS, pairs


def config(**weights):
    loss = get_config().loss
    with loss.unlocked():
        loss.weights = weights
    return loss


def inputs(params, step=0):
    images, texts = (Embedding(jnp.asarray(x, jnp.float32)) for x in pairs())
    ctx = Context(step=jnp.int32(step), params=params, score=RetrievalModel.score)
    return images, texts, jnp.asarray(IDS), ctx


def test_weighted_sum_of_the_named_losses():
    loss = config(triplet=0.5, infonce=2.0)
    params, compute = total.build(loss, steps_per_epoch=4)
    images, texts, ids, ctx = inputs(params)
    out = compute(images, texts, ids, ctx)
    first = triplet.loss(images, texts, ids, ctx, margin=0.2, warmup_steps=4, reduction="sum", mask_same_image=True)
    second = infonce.loss(images, texts, ids, ctx.replace(params=params["infonce"]), **loss.infonce)
    np.testing.assert_allclose(out["loss"], 0.5 * first["triplet_loss"] + 2.0 * second["infonce_loss"], rtol=1e-6)
    assert set(out) == {"loss", *first, *second}
    assert set(params) == {"triplet", "infonce"}
    assert set(params["infonce"]) == {"log_scale"}


@pytest.mark.parametrize("step, warm", [(5, True), (6, False)])
def test_warmup_epochs_become_steps(step, warm):
    loss = config(triplet=1.0)
    loss.triplet.warmup_epochs = 1.5
    params, compute = total.build(loss, steps_per_epoch=4)
    images, texts, ids, ctx = inputs(params, step)
    options = {"margin": 0.2, "reduction": "sum", "mask_same_image": True}
    expected = triplet.loss(images, texts, ids, ctx, warmup_steps=step + warm, **options)
    np.testing.assert_allclose(compute(images, texts, ids, ctx)["loss"], expected["triplet_loss"], rtol=1e-6)


def test_a_loss_of_weight_zero_is_left_out():
    params, compute = total.build(config(triplet=1.0, infonce=0), steps_per_epoch=4)
    assert set(params) == {"triplet"}
    assert "infonce_loss" not in compute(*inputs(params))


def test_wrong_configurations_are_named():
    loss = config(triplet=1.0)
    with loss.unlocked():
        loss.triplet.margn = 0.3
        del loss.triplet["margin"]
    with pytest.raises(ValueError, match=r"loss\.triplet: unknown margn; missing margin; .* takes margin, mask_same"):
        total.build(loss, 4)
    with pytest.raises(ValueError, match=r"loss\.weights\.triplet must be a finite number >= 0, is -1"):
        total.build(config(triplet=-1.0), 4)
    with pytest.raises(ValueError, match="names no loss"):
        total.build(config(triplet=0.0), 4)
    known = "asm, diversity, global_triplet, identity, infonce, sdm, sigmoid, triplet, uto"  # without their helpers
    with pytest.raises(ValueError, match=rf"unknown loss 'tripelt': no module .*; shnet_jax\.losses has {known}$"):
        total.build(config(tripelt=1.0), 4)
