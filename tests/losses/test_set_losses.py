"""Losses of sets and identities: values and gradients against float64 oracles, on one device and on many.

The parameters are two linear maps that give vectors and elements of both sides, and the classifier of identities; they
are replicated, and their gradients are compared in full (see tests/parallel/test_losses.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from shnet_jax.losses import asm, diversity, identity, sdm, total
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.models.esa import SetScore
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA, Context, Embedding, Pairs
from tests.losses import oracle, set_oracle
from tests.parallel.test_losses import WAYS

IDS = np.array([3, 3, 2, 0, 1, 2, 0, 1], np.int32)  # pairs of one person on different devices
ETA, DIM, SIZES = 0.7, 5, {"image": 3, "text": 2}
OPTIONS = {
    "asm": {"margin": 0.2, "sign": -1, "scale": 1.0, "of": "set"},
    "sdm": {"temperature": 0.1},
    "identity": {"classes": 4, "dim": DIM},
    "diversity": {"sharpness": 2.0, "gamma": 0.3},
}
WEIGHTS = {"asm": 1.0, "sdm": 0.5, "identity": 2.0, "diversity": 3.0}
OTHER = {"asm": {"margin": 0.2, "sign": 1, "scale": 0.5, "of": "score"}}


@functools.cache
def data():
    rng = np.random.default_rng(0)
    batch = {side: rng.normal(size=(8, 6)) for side in SIZES} | {"ids": IDS}
    params = {side: rng.normal(size=(6, (1 + m) * DIM)) for side, m in SIZES.items()}
    return batch, params | {"kernel": rng.normal(size=(DIM, 4)), "bias": rng.normal(size=4)}


def embed(batch, params, side, xp):
    """Vectors [b, d] and elements [b, m, d], all of unit length; the elements lean to the vector."""
    parts = (batch[side] @ params[side]).reshape(len(batch[side]), 1 + SIZES[side], DIM)
    parts = xp.concatenate([parts[:, :1], parts[:, 1:] + 0.5 * parts[:, :1]], axis=1)
    parts = parts / xp.sqrt((parts**2).sum(-1, keepdims=True))
    return parts[:, 0], parts[:, 1:]


@functools.cache
def reference(blocks, other=False, kind="smooth_chamfer"):
    """Loss and the gradients of all parameters in float64; `blocks`: independent parts of the batch."""
    batch, params = data()
    of_asm = (OTHER if other else OPTIONS)["asm"]
    constant = [embed(batch, params, side, np)[0] for side in SIZES]

    def value(params):
        sides = [embed(batch, params, side, np) for side in SIZES]
        parts = []
        for rows in np.split(np.arange(len(IDS)), blocks):
            images, texts = (tuple(x[rows] for x in side) for side in sides)
            ids = IDS[rows]
            whole = set_oracle.scores(images, texts, ETA, kind)
            hinge = whole if of_asm["of"] == "score" else whole - images[0] @ texts[0].T
            options = {k: v for k, v in of_asm.items() if k != "of"}
            parts.append(
                WEIGHTS["asm"] * set_oracle.asm(hinge, [c[rows] for c in constant], ids, **options)
                + WEIGHTS["sdm"] * set_oracle.sdm(images[0] @ texts[0].T, ids, temperature=0.1)
                + WEIGHTS["identity"] * set_oracle.identity(images[0], texts[0], ids, params["kernel"], params["bias"])
                + WEIGHTS["diversity"] * set_oracle.diversity(images, texts, **OPTIONS["diversity"])
            )
        return np.mean(parts)

    grads = {k: oracle.gradient(lambda x, k=k: value(params | {k: x}), params[k]) for k in params}
    return value(params), grads


def make_step(strategy, axis_name, other=False, kind="smooth_chamfer"):
    options = OPTIONS | (OTHER if other else {})
    config = ConfigDict({"weights": WEIGHTS, "pairs": {"strategy": strategy, "tile": 3}, **options})
    _, compute = total.build(config, steps_per_epoch=1)

    def step(params, batch):
        def share(params):
            images, texts = (Embedding(*embed(batch, params, side, jnp)) for side in SIZES)
            own = {"asm": {}, "sdm": {}, "diversity": {}, "identity": {k: params[k] for k in ("kernel", "bias")}}
            score = SetScore(kind, 16.0, ETA)
            values = compute(images, texts, batch["ids"], Context(jnp.int32(0), own, score, axis=axis_name))
            return values["loss"], values

        grads, values = jax.grad(share, has_aux=True)(params)
        return axis.psum((grads, values), axis_name)

    return step


def check(found, expected):
    grads, values = found
    np.testing.assert_allclose(values["loss"], expected[0], rtol=2e-5)
    assert all(np.isfinite(value) for value in values.values())
    assert 0 < values["asm_violated"] <= 1 and 0 <= values["identity_accuracy"] <= 1 and 0 < values["sdm_matched"] < 1
    for key, wanted in expected[1].items():
        np.testing.assert_allclose(grads[key], wanted, rtol=0, atol=2e-4 * np.abs(wanted).max(), err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy, devices, how",
    [WAYS[i] for i in (0, 5, 7, 8, 10)],
)
def test_loss_and_gradients(strategy, devices, how):
    check(run_step(strategy, devices, how), reference(devices if strategy == "local" else 1))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "devices"), [("gathered", 1), ("streamed", 2), ("ring", 8)])
def test_late_interaction(strategy, devices):
    check(run_step(strategy, devices, "shard_map", "maxsim_texts"), reference(1, kind="maxsim_texts"))


def run_step(strategy, devices, how, kind="smooth_chamfer"):
    batch, params = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, data())
    if how is None:
        run = jax.jit(make_step(strategy, None, kind=kind))
    else:
        mesh = mapping.data_mesh(jax.devices()[:devices])
        run = mapping.map_step(make_step(strategy, DATA, kind=kind), mesh, how, donate_state=False)
        batch, params = mapping.put_batch(batch, mesh, how), mapping.replicate(params, mesh)
    return run(params, batch)


@pytest.mark.slow
def test_the_other_sign_and_the_whole_score():
    batch, params = jax.tree.map(jnp.asarray, data())
    check(jax.jit(make_step("gathered", None, other=True))(params, batch), reference(1, other=True))


def embeddings(sets=True):
    batch, params = data()
    return [
        Embedding(jnp.float32(v), jnp.float32(e) if sets else None)
        for v, e in (embed(batch, params, s, np) for s in SIZES)
    ]


def test_a_scale_of_zero_is_a_fixed_margin_and_one_id_has_no_negative():
    images, texts = embeddings(sets=False)
    ctx = Context(jnp.int32(0), {}, RetrievalModel.score, pairs=Pairs())
    options = {"margin": 0.2, "sign": -1, "scale": 0.0, "of": "score"}
    margin = jax.jit(lambda: asm.loss(images, texts, jnp.asarray(IDS), ctx, **options)["asm_loss"])()
    dense = np.asarray(images.vector) @ np.asarray(texts.vector).T
    expected = oracle.triplet(dense, IDS, margin=0.2, warm=False, mean=True, mask=True)
    np.testing.assert_allclose(margin, expected, rtol=1e-5)

    @jax.jit
    @jax.value_and_grad
    def alone(images):
        return asm.loss(images, texts, jnp.zeros(8, jnp.int32), ctx, **options)["asm_loss"]

    value, gradient = alone(images)
    assert value == 0 and (gradient.vector == 0).all()


def test_what_does_not_fit_is_told():
    images, texts = embeddings(sets=False)
    ctx = Context(jnp.int32(0), {}, RetrievalModel.score)
    with pytest.raises(ValueError, match=r"loss.asm.of is 'set', and this model's embeddings have no elements"):
        asm.loss(images, texts, jnp.asarray(IDS), ctx, **OPTIONS["asm"])
    with pytest.raises(ValueError, match="sign is -1 or 1"):
        asm.loss(images, texts, jnp.asarray(IDS), ctx, **(OPTIONS["asm"] | {"sign": 0}))
    with pytest.raises(ValueError, match=r"loss.diversity is about sets"):
        diversity.loss(images, texts, jnp.asarray(IDS), ctx, **OPTIONS["diversity"])
    with pytest.raises(ValueError, match="temperature must be above 0"):
        sdm.loss(images, texts, jnp.asarray(IDS), ctx, temperature=0.0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        identity.init_params(classes=0, dim=8)
