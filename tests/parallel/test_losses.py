"""Losses and gradients equal the float64 oracle, with queues and without, whatever strategy, devices and mapping.

The parameters are replicated: two linear towers, a factor inside the score, and what the losses learn. A step that lets
autodiff sum their gradients twice gives gradients too large by the number of devices with a correct loss, so each
gradient is compared in full.
"""

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
from shnet_jax.types import DATA, Context, Embedding, Keys, Queue, SetQueue
from tests.losses import oracle

IDS = np.array([4, 4, 2, 0, 1, 2, 6, 7, 4, 9, 8, 8, 5, 10, 11, 3], np.int32)  # pairs of one image on different devices
QUEUE = 11  # two tiles of 5 and one left over
QUEUE_IDS = np.array([4, -1, 2, 9, -1, 12, 13, 0, 8, -1, 14], np.int32)  # some are of images in the batch
WARMUP_STEPS = 3
STEPS = {"warm-up": 2, "hardest": 3}
PUBLISHED = {"margin": 0.2, "warmup_epochs": 1.0, "reduction": "sum", "mask_same_image": False}
MASKED = PUBLISHED | {"mask_same_image": True, "reduction": "mean"}
INFONCE = {"temperature": 0.2, "learn_temperature": True, "mask_same_image": True}
FIXED = INFONCE | {"learn_temperature": False}
SIGMOID = {"scale": 5.0, "bias": -2.0, "mask_same_image": True}
UTO = {"scale": 90.0, "offset": 0.5, "batch_weight": 3.0, "mask_same_image": True}
OBJECTIVES = {
    "triplet and infonce": {"weights": {"triplet": 1.0, "infonce": 2.0}, "triplet": PUBLISHED, "infonce": INFONCE},
    "rank, softness and sigmoid": {
        "weights": {"triplet": 1.0, "global_triplet": 2.0, "sigmoid": 3.0},
        "triplet": MASKED | {"rank": 3},
        "global_triplet": MASKED | {"softness": 0.1},
        "sigmoid": SIGMOID,
    },
}
QUEUED = {
    "uto, rank and infonce": {
        "weights": {"uto": 1.0, "triplet": 1.0, "infonce": 2.0},
        "uto": UTO,
        "triplet": MASKED | {"rank": 3},
        "infonce": INFONCE,
    },
    "published": {
        "weights": {"uto": 1.0, "triplet": 1.0},
        "uto": UTO | {"mask_same_image": False},
        "triplet": PUBLISHED | {"reduction": "mean"},
    },
    "softness": {"weights": {"triplet": 1.0}, "triplet": MASKED | {"softness": 0.1}},
}
LEARNED = {"infonce": {"log_scale": np.log(5.0)}, "sigmoid": {"log_scale": np.log(5.0), "bias": -2.0}}

# (strategy, devices, mapping). Every strategy on 1, 2 and 8 devices, and on several devices under both mappings.
WAYS = [
    *((strategy, 1, None) for strategy in ("gathered", "streamed", "ring", "local")),
    *(("gathered", 2, "shard_map"), ("streamed", 2, "pmap"), ("ring", 2, "pmap"), ("local", 2, "pmap")),
    *(("gathered", 8, "pmap"), ("streamed", 8, "shard_map"), ("ring", 8, "shard_map"), ("local", 8, "shard_map")),
]
# Every reduction of every objective meets every strategy, and every strategy for queues (at once, in tiles).
CASES = [("triplet and infonce", *way) for way in WAYS]
CASES += [("rank, softness and sigmoid", *WAYS[i]) for i in (0, 5, 10)]
CASES += [("uto, rank and infonce", *WAYS[i]) for i in (0, 6, 7, 9)]
CASES += [("published", *WAYS[0]), ("published", *WAYS[10]), ("softness", *WAYS[5])]
FAST = {
    *(("triplet and infonce", *WAYS[i]) for i in (0, 7, 9, 10)),
    ("rank, softness and sigmoid", *WAYS[0]),
    ("uto, rank and infonce", *WAYS[0]),
}


@functools.cache
def data():
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(16, 5)), "text": rng.normal(size=(16, 4)), "ids": IDS}
    params = {"image": rng.normal(size=(5, 3)), "text": rng.normal(size=(4, 3)), "factor": np.float64(0.9)}
    batch |= {name: oracle.unit(rng.normal(size=(16, 3))) for name in ("image_keys", "text_keys")}
    return batch, params, [oracle.unit(rng.normal(size=(QUEUE, 3))) for _ in range(2)]


@functools.cache
def reference(objective, step, blocks=1):
    """Loss and gradients of all parameters in float64; `blocks`: parts of the batch, each with the whole queues."""
    batch, params, queues = data()
    config = (OBJECTIVES | QUEUED)[objective]
    params = params | {f"{k}/{n}": v for k in config["weights"] for n, v in LEARNED.get(k, {}).items()}

    def part(rows, params, images, texts):
        products, held = images[rows] @ texts[rows].T, None
        if objective in QUEUED:
            sides = (images, batch["text_keys"], queues[1]), (texts, batch["image_keys"], queues[0])
            scores = [((x[rows] * keys[rows]).sum(1), x[rows] @ queue.T) for x, keys, queue in sides]
            held = [(params["factor"] * own, params["factor"] * of_queue, QUEUE_IDS) for own, of_queue in scores]
        return _oracle(config, step, params, products, IDS[rows], held, blocks)

    def value(params):
        images, texts = (oracle.unit(batch[k] @ params[k]) for k in ("image", "text"))
        return sum(part(rows, params, images, texts) for rows in np.split(np.arange(len(IDS)), blocks))

    return value(params), {k: oracle.gradient(lambda x, k=k: value(params | {k: x}), params[k]) for k in params}


def _oracle(config, step, params, products, ids, queues, blocks):
    """A block's part of the loss."""
    loss, scores = 0.0, params["factor"] * products
    for name, weight in config["weights"].items():
        options = {"ids": ids, "mask": config[name]["mask_same_image"]}
        if "triplet" in name:
            mean = config[name]["reduction"] == "mean"
            options |= {k: config[name][k] for k in ("margin", "rank", "softness") if k in config[name]}
            options |= {"warm": step < WARMUP_STEPS, "mean": mean, "queues": queues}
            part = oracle.triplet(products if name == "global_triplet" else scores, **options) * (1 if mean else blocks)
        elif name == "infonce":
            part = oracle.infonce(scores, scale=np.exp(params["infonce/log_scale"]), queues=queues, **options)
        elif name == "sigmoid":
            scale, bias = np.exp(params["sigmoid/log_scale"]), params["sigmoid/bias"]
            part = oracle.sigmoid(scores, scale=scale, bias=bias, **options)
        else:
            part = sum(oracle.uto(scores, scale=90.0, offset=0.5, weight=3.0, queues=queues, **options))
        loss += weight * part / blocks
    return loss


def make_step(objective, strategy, axis_name):
    queued = objective in QUEUED
    config = ConfigDict(
        (OBJECTIVES | QUEUED)[objective] | {"pairs": {"strategy": strategy, "tile": 5}}
    )  # 16 = 3 * 5 + 1
    _, compute = total.build(config, steps_per_epoch=WARMUP_STEPS, queues=queued)

    def step(state, batch):
        images, texts = (Queue(vectors, QUEUE_IDS, jnp.int32(0)) for vectors in state["queues"])
        keys = Keys(Embedding(batch["image_keys"]), Embedding(batch["text_keys"]), images, texts) if queued else None

        def local_loss(params):
            images, texts = (
                Embedding(v / jnp.linalg.norm(v, axis=-1, keepdims=True))
                for v in (batch["image"] @ params["image"], batch["text"] @ params["text"])
            )

            def score(images, texts):  # a parameter that only the closure knows, as in a model that scores by layers
                return params["factor"] * RetrievalModel.score(images, texts)

            ctx = Context(step=state["step"], params=params["loss"], score=score, axis=axis_name, keys=keys)
            values = compute(images, texts, batch["ids"], ctx)
            return values["loss"], values

        grads, values = jax.grad(local_loss, has_aux=True)(state["params"])
        return axis.psum((grads, values), axis_name)

    return step


def float32(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32) if np.asarray(x).dtype == np.float64 else x, tree)


@pytest.mark.parametrize(
    "objective, strategy, devices, how",
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_loss_and_gradients(objective, strategy, devices, how):
    batch, params, queues = data()
    params = params | {"loss": {name: LEARNED.get(name, {}) for name in (OBJECTIVES | QUEUED)[objective]["weights"]}}
    if how is None:
        run = jax.jit(make_step(objective, strategy, None))
    else:
        mesh = mapping.data_mesh(jax.devices()[:devices])
        run = mapping.map_step(make_step(objective, strategy, DATA), mesh, how, donate_state=False)
    for step in STEPS.values():
        state, rows = float32({"params": params, "queues": queues}) | {"step": np.int32(step)}, float32(batch)
        if how is not None:
            state, rows = mapping.replicate(state, mesh), mapping.put_batch(rows, mesh, how)
        grads, values = run(state, rows)
        loss, expected = reference(objective, step, devices if strategy == "local" else 1)
        np.testing.assert_allclose(values["loss"], loss, rtol=2e-5)
        assert all(np.isfinite(value) for value in values.values())
        for key, wanted in expected.items():
            ours = functools.reduce(lambda tree, part: tree[part], key.split("/"), {**grads, **grads["loss"]})
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=key)


def test_the_mask_reaches_the_queue():
    """Entries of the query's own image are no negatives."""
    batch, _, queues = data()
    scores = np.zeros(16), batch["text_keys"] @ queues[1].T, QUEUE_IDS
    masked, published = (
        oracle.uto(np.eye(16), IDS, scale=5, offset=0.5, weight=1, mask=mask, queues=[scores])[1] for mask in (1, 0)
    )
    assert published > masked + 1e-3


def test_queues_that_no_loss_takes_are_refused():
    config = ConfigDict({"weights": {"uto": 0.0, "sigmoid": 0.5}, "uto": UTO, "sigmoid": SIGMOID})
    with pytest.raises(ValueError, match=r"of the losses of config\.loss\.weights, sigmoid, none takes queues"):
        total.build(config, 1, queues=True)


@pytest.mark.slow
def test_queues_that_do_not_take_part():
    """Queues that are not active yet change nothing, and losses that take none see the batch alone."""
    batch, _, queues = data()
    rows = [jnp.float32(batch[name]) for name in ("image_keys", "text_keys")]
    held = [Queue(jnp.float32(vectors), QUEUE_IDS, jnp.int32(0)) for vectors in queues]
    objective = QUEUED["uto, rank and infonce"]
    objective = objective | {"weights": objective["weights"] | {"sigmoid": 0.5}, "sigmoid": SIGMOID}
    params, compute = total.build(ConfigDict(objective), 1, queues=True)
    known = [Embedding(vectors[::-1]) for vectors in rows]

    @jax.jit
    def value_and_grad(rows, active):
        def value(rows):
            keys = None if active is None else Keys(*known, *held, active)
            ctx = Context(jnp.int32(9), params, RetrievalModel.score, keys=keys)
            values = compute(*map(Embedding, rows), IDS, ctx)
            return values["loss"], values

        return jax.value_and_grad(value, has_aux=True)(rows)

    (without, terms), gradient = value_and_grad(rows, None)
    (inactive, _), of_inactive = value_and_grad(rows, jnp.bool_(False))
    (active, with_queues), _ = value_and_grad(rows, jnp.bool_(True))
    np.testing.assert_allclose(inactive, without, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), of_inactive, gradient)
    assert active > without + 1e-3 and with_queues["sigmoid_loss"] == terms["sigmoid_loss"]
    for name in ("uto", "triplet", "infonce"):
        assert abs(with_queues[f"{name}_queue"]) > 1e-3 and with_queues[f"{name}_loss"] != terms[f"{name}_loss"]


def set_score(images, texts):
    """Mean over an image's valid elements of the best match among a text's: a score that looks inside."""
    similar = jnp.einsum("nmd,tkd->ntmk", images.elements, texts.elements)
    best = jnp.where(texts.mask[None, :, None], similar, -1e3).max(-1)
    return jnp.where(images.mask[:, None], best, 0).sum(-1) / images.mask.sum(-1)[:, None]


@functools.cache
def of_masked_sets(strategy, devices):
    """Loss of sets with masks, and its derivative by a factor of all elements."""
    rng = np.random.default_rng(1)
    elements = rng.normal(size=(2, 16, 3, 4)).astype(np.float32)
    masks = rng.random((2, 16, 3)) < 0.6
    masks[..., 0] = True
    batch = {"elements": elements.swapaxes(0, 1), "masks": masks.swapaxes(0, 1), "ids": IDS}
    config = ConfigDict(OBJECTIVES["triplet and infonce"] | {"pairs": {"strategy": strategy, "tile": 5}})
    params, compute = total.build(config, steps_per_epoch=0)

    def step(factor, batch):
        def local_loss(factor):
            images, texts = (
                Embedding(vector=factor * e[:, 0], elements=factor * e, mask=m)
                for e, m in zip(batch["elements"].swapaxes(0, 1), batch["masks"].swapaxes(0, 1), strict=True)
            )
            ctx = Context(step=jnp.int32(9), params=params, score=set_score, axis=DATA)
            return compute(images, texts, batch["ids"], ctx)["loss"]

        return axis.psum(jax.value_and_grad(local_loss)(factor), DATA)

    mesh = mapping.data_mesh(jax.devices()[:devices])
    run = mapping.map_step(step, mesh, donate_state=False)
    return run(jnp.float32(0.7), mapping.put_batch(batch, mesh))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["gathered", "streamed", "ring"])
def test_sets_travel_with_their_masks(strategy):
    for ours, one in zip(of_masked_sets(strategy, 8), of_masked_sets("gathered", 1), strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-4)
        assert np.abs(one) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "devices"), [("streamed", 8), ("gathered", 1), ("ring", 2)])
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

    config = ConfigDict({"weights": {"infonce": 1.0}, "infonce": FIXED, "pairs": {"strategy": strategy, "tile": 5}})
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


@pytest.mark.parametrize("pairs, message", [({"strategy": "ringed"}, "ringed"), ({"tile": -1}, "tile is -1")])
def test_unknown_strategies_are_errors(pairs, message):
    with pytest.raises(ValueError, match=message):
        total.build(ConfigDict(OBJECTIVES["triplet and infonce"] | {"pairs": pairs}), 1)
