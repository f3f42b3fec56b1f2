"""The sigmoid loss over the matrix of images and captions: both reductions, several captions, bfloat16 scores."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from shnet_jax.losses import sigmoid, total
from shnet_jax.models.contract import RetrievalModel, rounded_score
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA, Context, Embedding, Pairs
from tests.losses import oracle

IDS = np.array([4, 2, 4, 0, 1, 2, 6, 7], np.int32)
LEARNED = {"log_scale": np.log(5.0), "bias": -2.0}
OPTIONS = {"scale": 5.0, "bias": -2.0}
STRATEGIES = ("gathered", "streamed", "ring", "local")
# (strategy, devices, captions, reduction, mask): every strategy on 1, 2 and 8 devices, every option with several.
CASES = [
    (strategy, devices, (2, 1, 3)[(i + j) % 3], ("pairs", "queries")[(i + j) % 2], bool((i + j) // 2 % 2))
    for i, strategy in enumerate(STRATEGIES)
    for j, devices in enumerate((1, 2, 8))
]
FAST = {CASES[0], CASES[5], CASES[7]}


@functools.cache
def data(captions):
    rng = np.random.default_rng(captions)
    return oracle.unit(rng.normal(size=(8, 4))), oracle.unit(rng.normal(size=(8 * captions, 4)))


def reference(strategy, devices, captions, reduction, mask):
    """Loss and gradients by images, texts and what is learned, in float64."""
    images, texts = data(captions)
    blocks = devices if strategy == "local" else 1

    def value(images, texts, log_scale, bias):
        parts = zip(*(np.split(x, blocks) for x in (images, texts, IDS)), strict=True)
        losses = [
            oracle.sigmoid_matrix(i @ t.T, ids, scale=np.exp(log_scale), bias=bias, mask=mask, reduction=reduction)
            for i, t, ids in parts
        ]
        return np.mean(losses)

    given = {"images": images, "texts": texts} | LEARNED
    return value(**given), {
        name: oracle.gradient(lambda x, name=name: value(**given | {name: x}), given[name]) for name in given
    }


def run(strategy, devices, captions, reduction, mask, score=RetrievalModel.score):
    pairs = Pairs(strategy, tile=3)

    def step(learned, batch, name):
        def local_loss(learned, images, texts):
            ids = jnp.repeat(batch["ids"], captions)
            ctx = Context(jnp.int32(0), learned, score, name, pairs, captions=captions)
            options = OPTIONS | {"mask_same_image": mask, "reduction": reduction}
            values = sigmoid.loss(Embedding(images).repeat(captions), Embedding(texts), ids, ctx, **options)
            return values["sigmoid_loss"], values

        gradient = jax.grad(local_loss, argnums=(0, 1, 2), has_aux=True)
        (of_learned, of_images, of_texts), values = gradient(learned, batch["images"], batch["texts"])
        return axis.psum((of_learned, values), name), (of_images, of_texts)

    images, texts = (np.float32(x) for x in data(captions))
    batch, learned = {"images": images, "texts": texts, "ids": IDS}, jax.tree.map(np.float32, LEARNED)
    if devices == 1:
        (of_learned, values), of_items = jax.jit(functools.partial(step, name=None))(learned, batch)
    else:
        mesh = mapping.data_mesh(jax.devices()[:devices])
        rows, whole = jax.sharding.PartitionSpec(DATA), jax.sharding.PartitionSpec()
        mapped = mapping.map_specs(functools.partial(step, name=DATA), mesh, (whole, rows), (whole, rows))
        (of_learned, values), of_items = mapped(learned, batch)
    return values, dict(zip(("images", "texts"), of_items, strict=True)) | of_learned


@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES], ids=str)
def test_loss_and_gradients(case):
    values, gradients = run(*case)
    loss, expected = reference(*case)
    np.testing.assert_allclose(values["sigmoid_loss"], loss, rtol=2e-5)
    np.testing.assert_allclose(values["sigmoid_positive"] + values["sigmoid_negative"], loss, rtol=2e-5)
    for name, wanted in expected.items():
        np.testing.assert_allclose(gradients[name], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("strategy", ["streamed", "ring"])
def test_the_value_alone(strategy):
    """Without a gradient another program runs; with one, its factor is that of the loss in a sum."""
    images, texts = (np.float32(x) for x in data(1))

    def value(images, strategy):
        ctx = Context(jnp.int32(0), LEARNED, RetrievalModel.score, None, Pairs(strategy, tile=3))
        loss = sigmoid.loss(Embedding(images), Embedding(texts), jnp.asarray(IDS), ctx, **OPTIONS, mask_same_image=True)
        return -3.0 * loss["sigmoid_loss"]

    expected, slope = jax.value_and_grad(value)(images, "gathered")
    np.testing.assert_allclose(value(images, strategy), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(value)(images, strategy), slope, atol=1e-6)


@pytest.mark.parametrize("strategy", ["gathered", pytest.param("streamed", marks=pytest.mark.slow)])
def test_bfloat16_scores_and_their_gradients(strategy):
    """Equal to the loss of rounded embeddings; a gradient is off by no more than the rounding of its three factors."""
    case = (strategy, 1, 2, "pairs", False)
    images, texts = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in data(2))
    options = {"mask": False, "reduction": "pairs"}
    rounded = oracle.sigmoid_matrix(images @ texts.T, IDS, scale=5.0, bias=-2.0, **options)
    values, gradients = run(*case, score=rounded_score)
    exact, expected = reference(*case)
    np.testing.assert_allclose(values["sigmoid_negative"] + values["sigmoid_positive"], rounded, rtol=1e-3)
    assert abs(float(values["sigmoid_loss"]) - exact) > 1e-6  # operands were rounded
    for name, wanted in expected.items():
        atol = 3 * 2.0**-8 * np.abs(wanted).max()
        np.testing.assert_allclose(gradients[name], wanted, rtol=0, atol=atol, err_msg=name)
        assert np.abs(np.asarray(gradients[name]) - wanted).max() > 1e-7 * np.abs(wanted).max(), name


def test_the_scale_stays_within_its_limits():
    config = ConfigDict({"weights": {"sigmoid": 1.0}, "sigmoid": OPTIONS | {"mask_same_image": False}})
    config.sigmoid.scale_limits = (1.0, 100.0)
    project = total.projection(config)
    for before, after in ((-0.1, 0.0), (3.0, 3.0), (4.7, np.log(100.0))):
        params = {"sigmoid": {"log_scale": jnp.float32(before), "bias": jnp.float32(-50.0)}}
        projected = project(params)["sigmoid"]
        np.testing.assert_allclose([projected["log_scale"], projected["bias"]], [after, -50.0], rtol=1e-6)
    config.sigmoid.scale_limits = ()
    assert total.projection(config)(params) == params


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reduction": "mean"}, "loss.sigmoid.reduction is 'mean'; choose from queries, pairs"),
        ({"scale_limits": (6.0, 100.0)}, r"scale_limits must be \(\) or two numbers above 0 around .* = 5.0"),
        ({"scale_limits": (1.0,)}, "it is \\(1.0,\\)"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        sigmoid.init_params(**OPTIONS, **options)
