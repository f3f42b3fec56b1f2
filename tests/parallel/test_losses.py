"""Losses and gradients do not depend on the number of devices nor on the mapping, and equal the float64
oracle.

The parameters are replicated: two linear towers and the temperature. A step that lets autodiff sum their
gradients twice gives gradients too large by the number of devices with a correct loss, so each gradient is
compared in full.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from shnet_jax.losses import total
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA, Context, Embedding
from tests.losses import oracle

IDS = np.array([4, 4, 2, 0, 1, 2, 6, 7, 4, 9, 8, 8, 5, 10, 11, 3], np.int32)  # pairs of one image on different devices
WARMUP_STEPS = 3
STEPS = {"warm-up": 2, "hardest": 3}
CONFIG = ConfigDict(  # one loss with the mask and one without, one "sum" and one mean
    {
        "weights": {"triplet": 1.0, "infonce": 2.0},
        "triplet": {"margin": 0.2, "warmup_epochs": 1.0, "reduction": "sum", "mask_same_image": False},
        "infonce": {"temperature": 0.2, "learn_temperature": True, "mask_same_image": True},
    }
)


@functools.cache
def data():
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(16, 5)), "text": rng.normal(size=(16, 4)), "ids": IDS}
    return batch, {
        "image": rng.normal(size=(5, 3)),
        "text": rng.normal(size=(4, 3)),
        "log_scale": np.log(5.0),
    }


def reference(step):
    """Loss and gradients of all parameters in float64."""
    batch, params = data()

    def value(params):
        images, texts = (oracle.unit(batch[k] @ params[k]) for k in ("image", "text"))
        scores, warm = images @ texts.T, step < WARMUP_STEPS
        hinge = oracle.triplet(scores, IDS, margin=0.2, warm=warm, mean=False, mask=False)
        return hinge + 2 * oracle.infonce(scores, IDS, scale=np.exp(params["log_scale"]), mask=True)

    grads = {k: oracle.gradient(lambda x, k=k: value(params | {k: x}), params[k]) for k in params}
    return value(params), grads


def make_step(axis_name):
    _, compute = total.build(CONFIG, steps_per_epoch=WARMUP_STEPS)

    def step(state, batch):
        def share(params):
            images, texts = (
                Embedding(v / jnp.linalg.norm(v, axis=-1, keepdims=True))
                for v in (batch["image"] @ params["image"], batch["text"] @ params["text"])
            )
            loss_params = {"triplet": {}, "infonce": {"log_scale": params["log_scale"]}}
            ctx = Context(step=state["step"], params=loss_params, score=RetrievalModel.score, axis=axis_name)
            values = compute(images, texts, batch["ids"], ctx)
            return values["loss"], values

        grads, values = jax.grad(share, has_aux=True)(state["params"])
        return axis.psum((grads, values), axis_name)

    return step


def float32(tree):
    return jax.tree.map(lambda x: x if np.asarray(x).dtype == np.int32 else np.float32(x), tree)


@functools.cache
def unmapped():
    batch, params = data()
    run = jax.jit(make_step(None))
    return {s: run({"params": float32(params), "step": np.int32(s)}, float32(batch)) for s in STEPS.values()}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_unmapped_equals_the_oracle(step):
    grads, values = unmapped()[step]
    loss, expected = reference(step)
    np.testing.assert_allclose(values["loss"], loss, rtol=2e-5)
    for key in expected:
        scale = np.abs(expected[key]).max()
        np.testing.assert_allclose(grads[key], expected[key], atol=1e-4 * scale, err_msg=key)


@pytest.mark.parametrize("how", mapping.MAPPINGS)
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_mapped_equals_unmapped(devices, how):
    batch, params = data()
    mesh = mapping.data_mesh(jax.devices()[:devices])
    run = mapping.map_step(make_step(DATA), mesh, how, donate_state=False)
    for step in STEPS.values():
        state = mapping.replicate({"params": float32(params), "step": np.int32(step)}, mesh)
        found = run(state, mapping.put_batch(float32(batch), mesh, how))
        for ours, one in zip(jax.tree.leaves(found), jax.tree.leaves(unmapped()[step]), strict=True):
            np.testing.assert_allclose(ours, one, rtol=2e-5, atol=5e-6)


def set_score(images, texts):
    """Mean over an image's valid elements of the best match among a text's: a score that looks inside."""
    similar = jnp.einsum("nmd,tkd->ntmk", images.elements, texts.elements)
    best = jnp.where(texts.mask[None, :, None], similar, -1e3).max(-1)
    return jnp.where(images.mask[:, None], best, 0).sum(-1) / images.mask.sum(-1)[:, None]


def test_sets_travel_with_their_masks():
    rng = np.random.default_rng(1)
    elements = rng.normal(size=(2, 16, 3, 4)).astype(np.float32)
    masks = rng.random((2, 16, 3)) < 0.6
    masks[..., 0] = True
    batch = {"elements": elements.swapaxes(0, 1), "masks": masks.swapaxes(0, 1), "ids": IDS}
    params, compute = total.build(CONFIG, steps_per_epoch=1)

    def step(scale, batch, axis_name):
        def share(scale):
            images, texts = (
                Embedding(vector=scale * e[:, 0], elements=scale * e, mask=m)
                for e, m in zip(batch["elements"].swapaxes(0, 1), batch["masks"].swapaxes(0, 1), strict=True)
            )
            ctx = Context(step=jnp.int32(9), params=params, score=set_score, axis=axis_name)
            return compute(images, texts, batch["ids"], ctx)["loss"]

        return axis.psum(jax.value_and_grad(share)(scale), axis_name)

    mesh = mapping.data_mesh(jax.devices())
    run = mapping.map_step(functools.partial(step, axis_name=DATA), mesh, donate_state=False)
    found = run(jnp.float32(0.5), mapping.put_batch(batch, mesh))
    one = jax.jit(functools.partial(step, axis_name=None))(jnp.float32(0.5), batch)
    np.testing.assert_allclose(found, one, rtol=2e-5)
