"""Losses with the queues of momentum encoders equal the float64 oracle, whatever strategy, devices and mapping."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from shnet_jax.losses import total
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.models.esa import SetScore
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA, PAIR_STRATEGIES, Context, Embedding, Keys, Queue, SetQueue
from tests.losses import oracle
from tests.parallel.test_losses import IDS, float32

QUEUE = 11  # two tiles of 5 and one left over
QUEUE_IDS = np.array([4, -1, 2, 9, -1, 12, 13, 0, 8, -1, 14], np.int32)  # some are of images in the batch
UTO = {"scale": 90.0, "offset": 0.5, "batch_weight": 3.0, "mask_same_image": True}
TRIPLET = {"margin": 0.2, "warmup_epochs": 1.0, "reduction": "mean", "mask_same_image": True}
INFONCE = {"temperature": 0.2, "learn_temperature": False, "mask_same_image": True}
OBJECTIVES = {
    "uto": {"weights": {"uto": 1.0}, "uto": UTO},
    "uto as published": {"weights": {"uto": 1.0}, "uto": UTO | {"mask_same_image": False}},
    "third hardest and infonce": {
        "weights": {"triplet": 1.0, "infonce": 2.0},
        "triplet": TRIPLET | {"rank": 3},
        "infonce": INFONCE,
    },
    "hardest": {"weights": {"triplet": 1.0}, "triplet": TRIPLET | {"mask_same_image": False}},
    "soft triplet": {"weights": {"triplet": 1.0}, "triplet": TRIPLET | {"softness": 0.1}},
}
STEP, WARMUP_STEPS = 3, 3


@functools.cache
def data():
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(16, 5)), "text": rng.normal(size=(16, 4)), "ids": IDS}
    batch |= {name: oracle.unit(rng.normal(size=(16, 3))) for name in ("image_keys", "text_keys")}
    params = {"image": rng.normal(size=(5, 3)), "text": rng.normal(size=(4, 3))}
    return batch, params, [oracle.unit(rng.normal(size=(QUEUE, 3))) for _ in range(2)]


@functools.cache
def reference(objective, step, blocks):
    """Loss and gradients of both towers in float64; `blocks`: parts of the batch, each with the whole queues."""
    batch, params, queues = data()
    config = OBJECTIVES[objective]

    def part(rows, images, texts):
        scores, ids = images[rows] @ texts[rows].T, IDS[rows]
        sides = (images, batch["text_keys"], queues[1]), (texts, batch["image_keys"], queues[0])
        held = [((x[rows] * keys[rows]).sum(1), x[rows] @ queue.T, QUEUE_IDS) for x, keys, queue in sides]
        value = 0.0
        if "uto" in config["weights"]:
            mask = config["uto"]["mask_same_image"]
            options = {"scale": 90.0, "offset": 0.5, "weight": 3.0, "mask": mask}
            value += sum(oracle.uto(scores, ids, **options, queues=held))
        if "triplet" in config["weights"]:
            own = config["triplet"]
            options = {name: own[name] for name in ("margin", "rank", "softness") if name in own}
            warm, mask = step < WARMUP_STEPS, own["mask_same_image"]
            value += oracle.triplet(scores, ids, warm=warm, mean=True, mask=mask, queues=held, **options)
        if "infonce" in config["weights"]:
            value += 2.0 * oracle.infonce(scores, ids, scale=5.0, mask=True, queues=held)
        return value

    def value(params):
        images, texts = (oracle.unit(batch[k] @ params[k]) for k in ("image", "text"))
        return sum(part(rows, images, texts) for rows in np.split(np.arange(len(IDS)), blocks)) / blocks

    return value(params), {k: oracle.gradient(lambda x, k=k: value(params | {k: x}), params[k]) for k in params}


def make_step(objective, strategy, axis_name):
    config = ConfigDict(OBJECTIVES[objective] | {"pairs": {"strategy": strategy, "tile": 5}})
    loss_params, compute = total.build(config, steps_per_epoch=WARMUP_STEPS, queues=True)

    def step(state, batch):
        images, texts = (Queue(vectors, QUEUE_IDS, jnp.int32(0)) for vectors in state["queues"])
        keys = Keys(Embedding(batch["image_keys"]), Embedding(batch["text_keys"]), images, texts)

        def share(params):
            images, texts = (
                Embedding(v / jnp.linalg.norm(v, axis=-1, keepdims=True))
                for v in (batch["image"] @ params["image"], batch["text"] @ params["text"])
            )
            ctx = Context(state["step"], loss_params, RetrievalModel.score, axis=axis_name, keys=keys)
            values = compute(images, texts, batch["ids"], ctx)
            return values["loss"], values

        grads, values = jax.grad(share, has_aux=True)(state["params"])
        return axis.psum((grads, values), axis_name)

    return step


FAST = {
    ("uto", "gathered", 1, None),
    ("uto", "streamed", 8, "shard_map"),
    ("uto", "ring", 8, "shard_map"),
    ("uto", "local", 2, "pmap"),
    ("third hardest and infonce", "gathered", 1, None),
    ("third hardest and infonce", "ring", 2, "shard_map"),
    ("uto as published", "gathered", 1, None),
    ("hardest", "gathered", 1, None),
}
WAYS = [(1, None), *((devices, how) for devices in (2, 8) for how in mapping.MAPPINGS)]
CASES = [("uto", strategy, *way) for strategy in PAIR_STRATEGIES for way in WAYS]
CASES += [(objective, "gathered", 1, None) for objective in OBJECTIVES if objective != "uto"]
CASES += [(o, s, 2, "shard_map") for o in list(OBJECTIVES)[2:] for s in PAIR_STRATEGIES]


@pytest.mark.parametrize(
    "objective, strategy, devices, how",
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_loss_and_gradients(objective, strategy, devices, how):
    batch, params, queues = data()
    if how is None:
        run = jax.jit(make_step(objective, strategy, None))
    else:
        mesh = mapping.data_mesh(jax.devices()[:devices])
        run = mapping.map_step(make_step(objective, strategy, DATA), mesh, how, donate_state=False)
    for step in (STEP,) if "uto" in objective else (STEP - 1, STEP):
        state = float32({"params": params, "queues": queues}) | {"step": np.int32(step)}
        rows = float32(batch)
        if how is not None:
            state, rows = mapping.replicate(state, mesh), mapping.put_batch(rows, mesh, how)
        grads, values = run(state, rows)
        loss, expected = reference(objective, step, devices if strategy == "local" else 1)
        np.testing.assert_allclose(values["loss"], loss, rtol=2e-5)
        for name, wanted in expected.items():
            np.testing.assert_allclose(grads[name], wanted, rtol=0, atol=2e-4 * np.abs(wanted).max(), err_msg=name)


def test_the_mask_reaches_the_queue():
    masked, published = (reference(objective, STEP, 1)[0] for objective in ("uto", "uto as published"))
    assert published > masked + 1e-3


SIGMOID = {"scale": 5.0, "bias": -2.0, "mask_same_image": True}


def test_queues_that_no_loss_takes_are_refused():
    config = ConfigDict({"weights": {"uto": 0.0, "sigmoid": 0.5}, "uto": UTO, "sigmoid": SIGMOID})
    with pytest.raises(ValueError, match=r"of the losses of config\.loss\.weights, sigmoid, none takes queues"):
        total.build(config, 1, queues=True)


@pytest.mark.slow
def test_a_loss_that_takes_no_queues_sees_the_batch_alone():
    batch, _, queues = data()
    rows = [Embedding(jnp.float32(batch[name])) for name in ("image_keys", "text_keys")]
    held = [Queue(jnp.float32(vectors), QUEUE_IDS, jnp.int32(0)) for vectors in queues]
    config = ConfigDict({"weights": {"infonce": 1.0, "sigmoid": 0.5}, "infonce": INFONCE, "sigmoid": SIGMOID})
    params, compute = total.build(config, 1, queues=True)
    with_queues, without = (
        compute(*rows, IDS, Context(jnp.int32(0), params, RetrievalModel.score, keys=keys))
        for keys in (Keys(*rows, *held), None)
    )
    assert with_queues["sigmoid_loss"] == without["sigmoid_loss"]
    assert with_queues["infonce_loss"] > without["infonce_loss"] + 1e-3


@pytest.mark.parametrize(
    "objective",
    ["soft triplet", *(pytest.param(o, marks=pytest.mark.slow) for o in ("uto", "third hardest and infonce"))],
)
def test_queues_that_do_not_take_part_yet(objective):
    batch, _, queues = data()
    rows = [jnp.float32(batch[name]) for name in ("image_keys", "text_keys")]
    held = [Queue(jnp.float32(vectors), QUEUE_IDS, jnp.int32(0)) for vectors in queues]
    params, compute = total.build(ConfigDict(OBJECTIVES[objective]), 1, queues=True)

    def value(rows, keys):
        sides = [Embedding(vectors) for vectors in rows]
        return compute(*sides, IDS, Context(jnp.int32(9), params, RetrievalModel.score, keys=keys))["loss"]

    known = [Embedding(vectors[::-1]) for vectors in rows]
    found = {active: jax.value_and_grad(value)(rows, Keys(*known, *held, jnp.bool_(active))) for active in (0, 1)}
    without = jax.value_and_grad(value)(rows, None)
    jax.tree.map(np.testing.assert_array_equal, found[0], without)
    assert abs(found[1][0] - without[0]) > 1e-3


@pytest.mark.parametrize(
    "strategy, devices",
    [("streamed", 8), *(pytest.param(*way, marks=pytest.mark.slow) for way in (("gathered", 1), ("ring", 2)))],
)
def test_queues_of_sets(strategy, devices):
    """Loss and gradients of sets and global vectors equal those of the scores computed by pairs in float64."""
    rng = np.random.default_rng(2)
    shapes = {"image": (3,), "image_set": (2, 3), "text": (3,), "text_set": (4, 3)}
    given, key, held = (
        {name: oracle.unit(rng.normal(size=(count, *shape))) for name, shape in shapes.items()}
        for count in (16, 16, QUEUE)
    )

    def scores(images, texts):
        exponents = 4.0 * np.einsum("nad,tbd->ntab", images["image_set"], texts["text_set"])
        within = sum(np.log(np.exp(exponents).sum(axis)).mean(-1) / 8.0 for axis in (-1, -2))
        return images["image"] @ texts["text"].T + 0.5 * within

    def value(given):
        with_text_keys, with_image_keys = (np.diag(scores(*x)) for x in ((given, key), (key, given)))
        queues = [
            (with_text_keys, scores(given, held), QUEUE_IDS),
            (with_image_keys, scores(held, given).T, QUEUE_IDS),
        ]
        return oracle.infonce(scores(given, given), IDS, scale=5.0, mask=True, queues=queues)

    config = ConfigDict({"weights": {"infonce": 1.0}, "infonce": INFONCE, "pairs": {"strategy": strategy, "tile": 5}})
    loss_params, compute = total.build(config, 1, queues=True)

    def step(state, batch):
        queues = [SetQueue(state[n], QUEUE_IDS, jnp.int32(0), state[f"{n}_set"]) for n in ("image", "text")]

        def share(items, ids):
            images, texts = (Embedding(items[n], items[f"{n}_set"]) for n in ("image", "text"))
            keys = Keys(*(Embedding(batch[f"key_{n}"], batch[f"key_{n}_set"]) for n in ("image", "text")), *queues)
            ctx = Context(jnp.int32(0), loss_params, SetScore("smooth_chamfer", 4.0, 0.5), axis=DATA, keys=keys)
            return compute(images, texts, ids, ctx)["loss"]

        loss, grads = jax.value_and_grad(share)({n: batch[n] for n in shapes}, batch["ids"])
        return axis.psum(loss, DATA), axis.all_gather(grads, DATA)

    mesh = mapping.data_mesh(jax.devices()[:devices])
    run = mapping.map_step(step, mesh, "shard_map", donate_state=False)
    rows = mapping.put_batch(float32(given | {f"key_{n}": x for n, x in key.items()} | {"ids": IDS}), mesh, "shard_map")
    loss, grads = run(mapping.replicate(float32(held), mesh), rows)
    np.testing.assert_allclose(loss, value(given), rtol=2e-5)
    for name in shapes:
        wanted = oracle.gradient(lambda x, name=name: value(given | {name: x}), given[name])
        np.testing.assert_allclose(grads[name], wanted, rtol=0, atol=2e-4 * np.abs(wanted).max(), err_msg=name)
