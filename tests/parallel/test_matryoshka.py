"""The loss averaged over prefixes of the embeddings equals its float64 oracle, whatever strategy and devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from shnet_jax.experiment import assemble
from shnet_jax.losses import matryoshka, total
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel import axis, mapping
from shnet_jax.training.setup import setup_training
from shnet_jax.types import DATA, Context, Embedding, Keys, Queue
from tests.losses import oracle
from tests.train import test_microbatch as microbatches
from tests.train import tiny

SIZES = (2, 3, 5)
IDS = np.array([4, 2, 4, 0, 1, 2, 6, 7], np.int32)
QUEUE_IDS = np.array([4, -1, 3, 7, 2], np.int32)
INFONCE = {"temperature": 0.2, "learn_temperature": True, "mask_same_image": True}
SIGMOID = {"scale": 5.0, "bias": -2.0, "mask_same_image": True}
TRIPLET = {"margin": 0.2, "warmup_steps": 0, "reduction": "mean", "mask_same_image": True}
CONFIG = {
    "weights": {"infonce": 1.0, "sigmoid": 2.0, "triplet": 0.5},
    "infonce": INFONCE,
    "sigmoid": SIGMOID,
    "triplet": TRIPLET,
}
LEARNED = {"infonce": {"log_scale": np.log(5.0)}, "sigmoid": {"log_scale": np.log(5.0), "bias": -2.0}}
CASES = [(strategy, devices, False) for strategy in ("gathered", "streamed", "ring") for devices in (1, 2, 8)]
CASES += [("gathered", 1, True), ("streamed", 2, True)]
FAST = {CASES[0], CASES[4], CASES[8], CASES[9]}


@functools.cache
def data():
    rng = np.random.default_rng(0)
    items = {name: oracle.unit(rng.normal(size=(8, 5))) for name in ("images", "texts", "image_keys", "text_keys")}
    return items, [oracle.unit(rng.normal(size=(len(QUEUE_IDS), 5))) for _ in range(2)]


@functools.cache
def reference(queued=False):
    """Loss of each size, and gradients of the mean by images, texts and the temperature of InfoNCE, in float64."""
    items, queues = data()

    def of_size(size, images, texts, log_scale):
        def cut(x):
            return oracle.unit(x[:, :size])

        scores, held = cut(images) @ cut(texts).T, None
        if queued:
            sides = (images, items["text_keys"], queues[1]), (texts, items["image_keys"], queues[0])
            held = [((cut(x) * cut(keys)).sum(1), cut(x) @ cut(queue).T, QUEUE_IDS) for x, keys, queue in sides]
        infonce = oracle.infonce(scores, IDS, scale=np.exp(log_scale), mask=True, queues=held)
        sigmoid = oracle.sigmoid(scores, IDS, scale=5.0, bias=-2.0, mask=True)
        triplet = oracle.triplet(scores, IDS, margin=0.2, warm=False, mean=True, mask=True, queues=held)
        return infonce + 2.0 * sigmoid + 0.5 * triplet

    given = {"images": items["images"], "texts": items["texts"], "log_scale": np.log(5.0)}
    gradients = {}
    for name in given:

        def mean(x, name=name):
            return np.mean([of_size(size, **given | {name: x}) for size in SIZES])

        gradients[name] = oracle.gradient(mean, given[name])
    return {size: of_size(size, **given) for size in SIZES}, gradients


def run(strategy, devices, queued=False):
    pairs = {"strategy": strategy, "tile": 3}
    _, compute = total.build(ConfigDict(CONFIG | {"pairs": pairs, "matryoshka": SIZES}), 1, queues=queued)
    held = [Queue(np.float32(vectors), QUEUE_IDS, jnp.int32(0)) for vectors in data()[1]]

    def step(learned, batch, name):
        keys = Keys(Embedding(batch["image_keys"]), Embedding(batch["text_keys"]), *held) if queued else None

        def local_loss(learned, images, texts):
            ctx = Context(jnp.int32(0), learned | {"triplet": {}}, RetrievalModel.score, name, keys=keys)
            values = compute(Embedding(images), Embedding(texts), batch["ids"], ctx)
            return values["loss"], values

        gradient = jax.grad(local_loss, argnums=(0, 1, 2), has_aux=True)
        (of_learned, of_images, of_texts), values = gradient(learned, batch["images"], batch["texts"])
        return axis.psum((of_learned, values), name), (of_images, of_texts)

    batch = jax.tree.map(np.float32, data()[0]) | {"ids": IDS}
    learned = jax.tree.map(np.float32, LEARNED)
    if devices == 1:
        (of_learned, values), of_items = jax.jit(functools.partial(step, name=None))(learned, batch)
    else:
        mesh = mapping.data_mesh(jax.devices()[:devices])
        rows, whole = jax.sharding.PartitionSpec(DATA), jax.sharding.PartitionSpec()
        mapped = mapping.map_specs(functools.partial(step, name=DATA), mesh, (whole, rows), (whole, rows))
        (of_learned, values), of_items = mapped(learned, batch)
    return values, dict(zip(("images", "texts"), of_items, strict=True)) | of_learned["infonce"]


@pytest.mark.parametrize(
    "strategy, devices, queued",
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_loss_and_gradients(strategy, devices, queued):
    values, gradients = run(strategy, devices, queued)
    by_size, expected = reference(queued)
    np.testing.assert_allclose(values["loss"], np.mean([*by_size.values()]), rtol=2e-5)
    for size, loss in by_size.items():
        np.testing.assert_allclose(values[f"matryoshka_{size}"], loss, rtol=2e-5)
    parts = values["infonce_loss"] + 2 * values["sigmoid_loss"] + 0.5 * values["triplet_loss"]
    np.testing.assert_allclose(parts, values["loss"], rtol=1e-6)
    for name, wanted in expected.items():
        np.testing.assert_allclose(gradients[name], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_microbatches_have_the_gradient_of_the_whole_batch(devices):
    loss_params, total_loss = total.build(ConfigDict(microbatches.LOSS.to_dict() | {"matryoshka": (2, 6)}), 3)
    model, values, examples = microbatches.Nested(), microbatches.variables(), microbatches.batch()
    whole, parts = (
        microbatches.taken(model, loss_params, total_loss, values, examples, optax.sgd(1.0), devices, size, "exact")
        for size in (0, 4)
    )
    microbatches.agree(parts, whole)
    assert whole[2]["matryoshka_2"] != whole[2]["matryoshka_6"]


def test_a_prefix_of_zeros_stays_zeros_and_has_no_gradient():
    vectors = jnp.array([[0.0, 0.0, 1.0], [3.0, 4.0, 0.0]])
    cut, slopes = (
        matryoshka.prefix(Embedding(vectors), 2).vector,
        jax.grad(lambda v: jnp.sum(matryoshka.prefix(Embedding(v), 2).vector * jnp.array([1.0, 2.0])))(vectors),
    )
    np.testing.assert_allclose(cut, [[0.0, 0.0], [0.6, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(slopes[0], [0.0, 0.0, 0.0])
    np.testing.assert_allclose(slopes[1], [(1 - 0.6 * 2.2) / 5, (2 - 0.8 * 2.2) / 5, 0.0], rtol=1e-5)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 4), (8, 4), (2.0, 4.0), (True, 4)], ids=str)
def test_sizes_that_do_not_rise_are_refused(sizes):
    with pytest.raises(ValueError, match=r"config\.loss\.matryoshka is \(.*\); expected rising sizes"):
        total.build(ConfigDict(CONFIG | {"matryoshka": sizes}), 1)


def test_a_classifier_of_whole_vectors_is_refused():
    config = {"weights": {"identity": 1.0}, "identity": {"classes": 3, "dim": 5}, "matryoshka": (2, 5)}
    with pytest.raises(ValueError, match=r"config\.loss\.weights\.identity reads whole ones"):
        total.build(ConfigDict(config), 1)


@pytest.mark.parametrize(
    "model, sizes, message",
    [
        ("tests.train.toy", (4, 8), r"the model's vectors have 16 numbers: its last size must be 16"),
        ("tests.retrieve.gallery", (4, 16), r"the score of Sets is not the dot product of two vectors"),
    ],
)
def test_models_and_sizes_that_do_not_fit_are_refused_before_the_first_step(model, sizes, message):
    with pytest.raises(ValueError, match=message):
        setup_training(assemble(tiny.config(model__name=model, loss__matryoshka=sizes)))
