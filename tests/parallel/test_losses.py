"""Losses and gradients equal the float64 oracle whatever the strategy, the number of devices and the mapping.

The parameters are replicated: two linear towers, a factor inside the score, and what the losses learn. A step that lets
autodiff sum their gradients twice gives gradients too large by the number of devices with a correct loss, so each
gradient is compared in full.
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
from shnet_jax.types import DATA, PAIR_STRATEGIES, Context, Embedding
from tests.losses import oracle

IDS = np.array([4, 4, 2, 0, 1, 2, 6, 7, 4, 9, 8, 8, 5, 10, 11, 3], np.int32)  # pairs of one image on different devices
WARMUP_STEPS = 3
STEPS = {"warm-up": 2, "hardest": 3}
TRIPLET = {"margin": 0.2, "warmup_epochs": 1.0, "reduction": "sum", "mask_same_image": False}
MASKED = TRIPLET | {"mask_same_image": True, "reduction": "mean"}
INFONCE = {"temperature": 0.2, "learn_temperature": True, "mask_same_image": True}
SIGMOID = {"scale": 5.0, "bias": -2.0, "mask_same_image": True}
OBJECTIVES = {
    "triplet and infonce": {"weights": {"triplet": 1.0, "infonce": 2.0}, "triplet": TRIPLET, "infonce": INFONCE},
    "third hardest and sigmoid": {
        "weights": {"triplet": 1.0, "sigmoid": 3.0},
        "triplet": MASKED | {"rank": 3},
        "sigmoid": SIGMOID,
    },
    "soft triplet": {"weights": {"triplet": 1.0}, "triplet": MASKED | {"softness": 0.1}},
}
LEARNED = {"infonce": {"log_scale": np.log(5.0)}, "sigmoid": {"log_scale": np.log(5.0), "bias": -2.0}, "triplet": {}}


@functools.cache
def data():
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(16, 5)), "text": rng.normal(size=(16, 4)), "ids": IDS}
    params = {"image": rng.normal(size=(5, 3)), "text": rng.normal(size=(4, 3)), "factor": np.float64(0.9)}
    return batch, params


def reference(objective, step, blocks=1):
    """Loss and gradients of all parameters in float64; `blocks`: independent parts of the batch."""
    batch, params = data()
    config = OBJECTIVES[objective]
    params = params | {f"{k}/{n}": v for k in config["weights"] for n, v in LEARNED[k].items()}

    def value(params):
        images, texts = (oracle.unit(batch[k] @ params[k]) for k in ("image", "text"))
        scores = params["factor"] * images @ texts.T
        parts = [
            _objective(config, step, params, scores[rows][:, rows], IDS[rows])
            for rows in np.split(np.arange(len(IDS)), blocks)
        ]
        return sum(part.get("sum", 0) + part["mean"] / blocks for part in parts)

    grads = {k: oracle.gradient(lambda x, k=k: value(params | {k: x}), params[k]) for k in params}
    return value(params), grads


def _objective(config, step, params, scores, ids):
    options, weights = config["triplet"], config["weights"]
    mean = options["reduction"] == "mean"
    hinge = oracle.triplet(
        scores,
        ids,
        margin=0.2,
        warm=step < WARMUP_STEPS,
        mean=mean,
        mask=options["mask_same_image"],
        rank=options.get("rank", 1),
        softness=options.get("softness", 0),
    )
    means = hinge if mean else 0.0
    if "infonce" in weights:
        means += weights["infonce"] * oracle.infonce(scores, ids, scale=np.exp(params["infonce/log_scale"]), mask=True)
    if "sigmoid" in weights:
        scale, bias = np.exp(params["sigmoid/log_scale"]), params["sigmoid/bias"]
        means += weights["sigmoid"] * oracle.sigmoid(scores, ids, scale=scale, bias=bias, mask=True)
    return {"mean": means} | ({} if mean else {"sum": hinge})


def make_step(objective, strategy, axis_name):
    config = ConfigDict(OBJECTIVES[objective] | {"pairs": {"strategy": strategy, "tile": 5}})  # uneven: 16 = 3 * 5 + 1
    _, compute = total.build(config, steps_per_epoch=WARMUP_STEPS)

    def step(state, batch):
        def share(params):
            images, texts = (
                Embedding(v / jnp.linalg.norm(v, axis=-1, keepdims=True))
                for v in (batch["image"] @ params["image"], batch["text"] @ params["text"])
            )

            def score(images, texts):  # a parameter that only the closure knows, as in a model that scores by layers
                return params["factor"] * RetrievalModel.score(images, texts)

            ctx = Context(step=state["step"], params=params["loss"], score=score, axis=axis_name)
            values = compute(images, texts, batch["ids"], ctx)
            return values["loss"], values

        grads, values = jax.grad(share, has_aux=True)(state["params"])
        return axis.psum((grads, values), axis_name)

    return step


def float32(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32) if np.asarray(x).dtype == np.float64 else x, tree)


def check(found, objective, step, blocks=1):
    grads, values = found
    loss, expected = reference(objective, step, blocks)
    np.testing.assert_allclose(values["loss"], loss, rtol=2e-5)
    assert all(np.isfinite(value) for value in values.values())
    for key, wanted in expected.items():
        ours = functools.reduce(lambda tree, part: tree[part], key.split("/"), {**grads, **grads["loss"]})
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=key)


QUICK = {("gathered", 8, "pmap"), ("streamed", 8, "shard_map"), ("ring", 8, "shard_map"), ("local", 2, "pmap")}
OTHERS = list(OBJECTIVES)[1:]


@pytest.mark.parametrize(
    "objective, strategy, devices, how",
    [("triplet and infonce", "gathered", 1, None)]
    + [
        pytest.param(
            "triplet and infonce",
            strategy,
            devices,
            how,
            marks=[] if (strategy, devices, how) in QUICK else pytest.mark.slow,
        )
        for strategy in PAIR_STRATEGIES
        for devices, how in [(1, None), *((n, how) for n in (2, 8) for how in mapping.MAPPINGS)]
        if (strategy, devices) != ("gathered", 1)
    ]
    + [(objective, "gathered", 1, None) for objective in OTHERS]
    + [
        pytest.param(objective, strategy, 2, "shard_map", marks=pytest.mark.slow)
        for objective in OTHERS
        for strategy in ("streamed", "ring")
    ]
    + [
        pytest.param(objective, strategy, 8, how, marks=pytest.mark.slow)
        for objective in OTHERS
        for strategy, how in (("gathered", "pmap"), ("streamed", "pmap"), ("ring", "pmap"), ("ring", "shard_map"))
    ],
)
def test_loss_and_gradients(objective, strategy, devices, how):
    batch, params = data()
    params = params | {"loss": {name: LEARNED[name] for name in OBJECTIVES[objective]["weights"]}}
    if how is None:
        run = jax.jit(make_step(objective, strategy, None))
    else:
        mesh = mapping.data_mesh(jax.devices()[:devices])
        run = mapping.map_step(make_step(objective, strategy, DATA), mesh, how, donate_state=False)
    for step in STEPS.values():
        state, rows = {"params": float32(params), "step": np.int32(step)}, float32(batch)
        if how is not None:
            state, rows = mapping.replicate(state, mesh), mapping.put_batch(rows, mesh, how)
        check(run(state, rows), objective, step, blocks=devices if strategy == "local" else 1)


def set_score(images, texts):
    """Mean over an image's valid elements of the best match among a text's: a score that looks inside."""
    similar = jnp.einsum("nmd,tkd->ntmk", images.elements, texts.elements)
    best = jnp.where(texts.mask[None, :, None], similar, -1e3).max(-1)
    return jnp.where(images.mask[:, None], best, 0).sum(-1) / images.mask.sum(-1)[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["gathered", "streamed", "ring"])
def test_sets_travel_with_their_masks(strategy):
    rng = np.random.default_rng(1)
    elements = rng.normal(size=(2, 16, 3, 4)).astype(np.float32)
    masks = rng.random((2, 16, 3)) < 0.6
    masks[..., 0] = True
    batch = {"elements": elements.swapaxes(0, 1), "masks": masks.swapaxes(0, 1), "ids": IDS}

    def step(strategy, scale, batch, axis_name):
        config = ConfigDict(OBJECTIVES["triplet and infonce"] | {"pairs": {"strategy": strategy, "tile": 5}})
        params, compute = total.build(config, steps_per_epoch=1)

        def share(scale):
            images, texts = (
                Embedding(vector=scale * e[:, 0], elements=scale * e, mask=m)
                for e, m in zip(batch["elements"].swapaxes(0, 1), batch["masks"].swapaxes(0, 1), strict=True)
            )
            ctx = Context(step=jnp.int32(9), params=params, score=set_score, axis=axis_name)
            return compute(images, texts, batch["ids"], ctx)["loss"]

        return axis.psum(jax.value_and_grad(share)(scale), axis_name)

    mesh = mapping.data_mesh(jax.devices())
    run = mapping.map_step(functools.partial(step, strategy, axis_name=DATA), mesh, donate_state=False)
    found = run(jnp.float32(0.7), mapping.put_batch(batch, mesh))
    whole = jax.jit(functools.partial(step, "gathered", axis_name=None))(jnp.float32(0.7), batch)
    for ours, one in zip(found, whole, strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-4)
        assert np.abs(one) > 1e-3


@pytest.mark.parametrize("pairs, message", [({"strategy": "ringed"}, "ringed"), ({"tile": 0}, "tile is 0")])
def test_unknown_strategies_are_errors(pairs, message):
    with pytest.raises(ValueError, match=message):
        total.build(ConfigDict(OBJECTIVES["soft triplet"] | {"pairs": pairs}), 1)
