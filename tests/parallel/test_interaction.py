"""CMSEI-style training over devices: loss and gradients equal the dense float64 oracle, memory is that of the tile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from shnet_jax.losses import total
from shnet_jax.ops.interaction import Interaction, interaction_scores
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA, Context, Embedding
from tests.losses import oracle as losses
from tests.models import cmsei_oracle as oracle

B, K, L, D = 8, 3, 4, 4
IDS = np.array([0, 1, 2, 0, 3, 4, 5, 1], np.int32)
HOW = Interaction(sharpness=(9.0, 4.0), cross_sharpness=3.0, block=3)
OPTIONS = {"margin": 0.2, "warmup_epochs": 1.0, "reduction": "sum", "mask_same_image": True}
WARMUP = 2
DIRECTIONS = np.random.default_rng(6).normal(size=(3, D, D))


@functools.cache
def data():
    rng = np.random.default_rng(5)
    batch = {"image": rng.normal(size=(B, K, D)), "text": rng.normal(size=(B, L, D)), "ids": IDS}
    batch |= {f"{s}_mask": np.arange(m) < rng.integers(1, m + 1, (B, 1)) for s, m in (("image", K), ("text", L))}
    params = {"map": rng.normal(size=(D, D)), "own": rng.normal(size=(D, D)), "other": rng.normal(size=(D, D))}
    return batch, params


def embed(x, mask, params):
    """The towers of this test: one map, the gates, the mean of the valid elements; shared by both sides."""
    x = x @ params["map"]
    mean = (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    vector = mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
    return Embedding(vector, jnp.concatenate([x, x @ params["other"], x @ params["own"]], -1), mask)


def reference(step):
    """The loss in float64, of every pair by itself, and its derivative in each of DIRECTIONS."""
    batch, params = data()

    def value(params):
        sides, gates = [], {"own_gate": params["own"], "other_gate": params["other"]}
        for side in ("image", "text"):
            rows = [x[m] @ params["map"] for x, m in zip(batch[side], batch[f"{side}_mask"], strict=True)]
            sides.append([(x, oracle.unit(x.mean(0))) for x in rows])
        pairs = [[oracle.score(*image, *text, gates, gates) for text in sides[1]] for image in sides[0]]
        scores = np.array(
            [[0.5 * (p["objects"] + p["words"] + p["os"] + p["wi"]) + p["global"] for p in row] for row in pairs]
        )
        whole = np.array([[p["global"] for p in row] for row in pairs])
        options = {"margin": 0.2, "warm": step < WARMUP, "mean": False, "mask": True}
        return sum(losses.triplet(s, IDS, **options) for s in (scores, whole))

    def along(name, direction, by=1e-6):
        up, down = (value(params | {name: params[name] + sign * by * direction}) for sign in (1, -1))
        return (up - down) / (2 * by)

    return value(params), {name: [along(name, d) for d in DIRECTIONS] for name in params}


def make_step(strategy):
    weights = {"triplet": 1.0, "global_triplet": 1.0}
    pairs = {"strategy": strategy, "tile": 3}
    config = ConfigDict({"weights": weights, "triplet": OPTIONS, "global_triplet": OPTIONS, "pairs": pairs})
    loss_params, compute = total.build(config, steps_per_epoch=WARMUP)

    def step(state, batch, axis_name):
        def share(params):
            images, texts = (embed(batch[s], batch[f"{s}_mask"], params) for s in ("image", "text"))
            ctx = Context(
                step=state["step"],
                params=loss_params,
                score=lambda images, texts: interaction_scores(images, texts, HOW),
                axis=axis_name,
            )
            return compute(images, texts, batch["ids"], ctx)["loss"]

        return axis.psum(jax.value_and_grad(share)(state["params"]), axis_name)

    return step


@functools.cache
def expected(step):
    return reference(step)


def float32(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32) if x.dtype == np.float64 else x, tree)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "devices"), [("gathered", 1), ("ring", 8), ("streamed", 2), ("gathered", 8)])
def test_loss_and_gradients_equal_the_dense_oracle(strategy, devices):
    batch, params = (float32(x) for x in data())
    mesh = mapping.data_mesh(jax.devices()[:devices])
    run = mapping.map_step(functools.partial(make_step(strategy), axis_name=DATA), mesh, donate_state=False)
    for step in (WARMUP - 1, WARMUP):
        state = mapping.replicate({"params": params, "step": np.int32(step)}, mesh)
        loss, grads = run(state, mapping.put_batch(batch, mesh))
        wanted, derivatives = expected(step)
        np.testing.assert_allclose(loss, wanted, rtol=2e-5)
        for name, derivative in derivatives.items():
            found = np.tensordot(DIRECTIONS, grads[name], 2)
            tolerance = 2e-4 * np.linalg.norm(grads[name])
            np.testing.assert_allclose(found, derivative, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "streamed"])
def test_memory_of_a_device_is_that_of_the_tile(strategy):
    """By the compiler's account of the gradient: no [b, B, K, D] of this device's pairs, in warm-up or after it."""
    devices, size, k, dim, block = 8, 1024, 16, 64, 16
    mesh = mapping.data_mesh(jax.devices()[:devices])
    pairs = {"strategy": strategy, "tile": 32}
    config = ConfigDict({"weights": {"triplet": 1.0}, "triplet": OPTIONS, "pairs": pairs})
    loss_params, compute = total.build(config, steps_per_epoch=WARMUP)

    def step(step, batch):
        def share(elements):
            images, texts = (Embedding(e[:, 0, :dim], e, m) for e, m in zip(elements, batch["masks"], strict=True))
            score = functools.partial(interaction_scores, how=Interaction(block=block))
            ctx = Context(step=step, params=loss_params, score=score, axis=DATA)
            return compute(images, texts, batch["ids"], ctx)["loss"]

        gradients = jax.grad(share)(batch["elements"])
        return axis.psum(sum(jnp.sum(g) for g in gradients), DATA)

    elements = jax.ShapeDtypeStruct((size, k, 3 * dim), jnp.float32)
    batch = {
        "elements": (elements, elements),
        "masks": (jax.ShapeDtypeStruct((size, k), bool),) * 2,
        "ids": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    compiled = mapping.map_step(step, mesh).lower(jax.ShapeDtypeStruct((), jnp.int32), batch).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    own = size // devices * k * 3 * dim * 4  # one side's elements on a device
    gathered = 0 if strategy == "ring" else 2 * devices * own
    everything = size // devices * size * k * dim * 4
    assert temporary < 2 * gathered + 52 * own < everything / 4, (temporary, own, everything)
