"""Microbatches give the gradient of the whole batch, whatever their size, and leave the right statistics behind."""

from __future__ import annotations

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from shnet_jax import registry
from shnet_jax.data.batches import gather
from shnet_jax.losses import total
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.models.mlp import MLP, merge, running_moments
from shnet_jax.ops.norms import l2norm
from shnet_jax.parallel.mapping import data_mesh, map_step, put_batch, replicate
from shnet_jax.training.microbatch import Splitting, cached_gradients, embed_in_parts
from shnet_jax.training.state import create_state
from shnet_jax.training.step import make_step
from shnet_jax.types import DATA, Context, Embedding
from tests.train import test_parallel_step as whole_model

IMAGES, CAPTIONS, DIM = 8, 2, 6
PAIRS = IMAGES * CAPTIONS
LOSS = ConfigDict(
    {
        "weights": {"infonce": 1.0},
        "infonce": {"temperature": 0.2, "learn_temperature": True, "mask_same_image": True},
    }
)


class Nested(RetrievalModel):
    """Two BatchNorms one behind the other, and dropout before the first."""

    dropout: float = 0.0
    include_padding: bool = True
    axis: str | None = None

    norm_depth = 2

    @nn.compact
    def __call__(self, batch, *, train):
        mlp = partial(MLP, 5, DIM, include_padding=self.include_padding, axis=self.axis)
        drop = partial(nn.Dropout, self.dropout, deterministic=not train)
        x, mask = batch["regions"], batch["region_mask"]
        x = mlp(name="first")(drop()(x), mask, train=train)
        x = jnp.sum(jnp.where(mask[..., None], mlp(name="second")(x, mask, train=train), 0), axis=1)
        words = drop()(nn.Embed(9, DIM, name="words")(batch["tokens"]))
        return Embedding(l2norm(x)), Embedding(l2norm(words.mean(1)))


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    return {
        "image_index": np.array([0, 1, 2, 3, 4, 1, 6, 0], np.int32),  # equal images in different microbatches
        "regions": rng.normal(size=(IMAGES, 3, 4)).astype(np.float32),
        "region_mask": np.arange(3) < rng.integers(1, 4, (IMAGES, 1)),
        "tokens": rng.integers(0, 9, (PAIRS, 3)).astype(np.int32),
        "token_mask": np.ones((PAIRS, 3), bool),
    }


@functools.cache
def variables():
    found = jax.jit(partial(Nested().init, train=False))(jax.random.key(0), batch())
    rng = np.random.default_rng(1)  # running statistics that are not those of a fresh model
    stats = jax.tree.map(lambda x: np.float32(1 + 0.3 * rng.random(x.shape)), found["batch_stats"])
    return {"params": found["params"], "batch_stats": stats}


@functools.cache
def one_step(devices, microbatch, statistics="exact", **options):
    """(parameters, statistics, metrics) after a step of plain descent with rate 1; `microbatch`: pairs, 0: all."""
    model, (loss_params, total_loss), tx = Nested(**options), total.build(LOSS, 3), optax.sgd(1.0)
    return taken(model, loss_params, total_loss, variables(), batch(), tx, devices, microbatch, statistics)


def taken(model, loss_params, total_loss, values, examples, tx, devices, microbatch, statistics):
    mesh = data_mesh(jax.devices()[:devices])
    how = {"prepare_batch": gather, "microbatch": microbatch, "statistics": statistics, "axis_name": DATA}
    state = replicate(create_state(values, loss_params, tx, ema=False, seed=0), mesh)
    step = map_step(make_step(model, total_loss, tx, **how), mesh)
    state, metrics = step(state, put_batch(examples, mesh), {})
    return jax.device_get((state.params, state.batch_stats, metrics))


def agree(found, expected):
    for (path, ours), one in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        scale = max(5e-2, np.abs(one).max())  # the bias before a BatchNorm has no gradient, but rounding
        np.testing.assert_allclose(ours, one, rtol=0, atol=3e-5 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "microbatch, include_padding",
    [(4, False), *(pytest.param(*how, marks=pytest.mark.slow) for how in ((2, True), (8, True)))],
)
def test_exact_equals_the_whole_batch(microbatch, include_padding):
    options = {"include_padding": include_padding}
    agree(one_step(1, microbatch, **options), one_step(1, 0, **options))


@pytest.mark.slow
@pytest.mark.parametrize("axis", [None, DATA], ids=["own statistics", "common statistics"])
def test_exact_equals_the_whole_batch_on_two_devices(axis):
    agree(one_step(2, 4, axis=axis), one_step(2, 0, axis=axis))


@pytest.mark.slow
def test_local_statistics_are_those_of_as_many_devices():
    agree(one_step(1, PAIRS // 4, "local"), one_step(4, 0))


@pytest.mark.slow
def test_statistics_matter():
    local, running = (one_step(1, 4, how)[0]["model"] for how in ("local", "running"))
    exact = one_step(1, 0)[0]["model"]
    for one, other in ((exact, local), (exact, running), (local, running)):
        with pytest.raises(AssertionError):
            agree(one, other)


def local_loss(params, embeddings):
    images, texts = embeddings
    ctx = Context(step=jnp.int32(0), params=params["loss"], score=RetrievalModel.score)
    ids = jnp.repeat(batch()["image_index"], CAPTIONS)
    terms = total.build(LOSS, 3)[1](images.repeat(CAPTIONS), texts, ids, ctx)
    return terms["loss"], terms


@pytest.mark.slow
def test_running_statistics_normalise_and_take_up_the_batch():
    params, stats, _ = one_step(1, 4, "running")
    loss_params = total.build(LOSS, 3)[0]
    given = running_moments(variables()["batch_stats"])

    def value(weights):
        found = variables() | {"params": weights, "given_moments": given}
        return local_loss({"model": weights, "loss": loss_params}, Nested().apply(found, batch(), train=True))[0]

    weights = variables()["params"]
    agree(params["model"], jax.tree.map(jnp.subtract, weights, jax.jit(jax.grad(value))(weights)))
    # The first BatchNorm sees the same batch in every mode, the second what running statistics made of it.
    exact = one_step(1, 0)[1]
    agree(stats["first"], exact["first"])
    with pytest.raises(AssertionError):
        agree(stats["second"], exact["second"])


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["local", "exact"])
def test_dropout_is_the_same_in_all_passes(statistics):
    """Against differentiating the microbatches without any cache, with the very keys."""
    model, key, count = Nested(dropout=0.4), jax.random.key(3), 4
    params = {"model": variables()["params"], "loss": total.build(LOSS, 3)[0]}

    def encode(params, part, key, given):
        found = variables() | {"params": params["model"], "given_moments": given}
        embeddings, updated = model.apply(found, part, train=True, rngs={"dropout": key}, mutable=["moments"])
        return embeddings, updated["moments"]

    def direct(params):
        cut = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch())
        parts = [(jax.tree.map(lambda x, i=i: x[i], cut), jax.random.fold_in(key, i)) for i in range(count)]
        given = {}
        for _ in range(model.norm_depth if statistics == "exact" else 0):
            given = merge(jax.tree.map(lambda *x: jnp.stack(x), *[encode(params, *part, given)[1] for part in parts]))
        embeddings = [encode(params, *part, given)[0] for part in parts]
        return local_loss(params, jax.tree.map(lambda *x: jnp.concatenate(x), *embeddings))[0]

    splitting = Splitting(count, statistics, model.norm_depth)
    run = partial(cached_gradients, encode, local_loss, splitting=splitting)
    found, _, _ = jax.jit(lambda params: run(params, variables()["batch_stats"], batch(), key))(params)
    agree(found, jax.jit(jax.grad(direct))(params))


@pytest.mark.slow
def test_memory_follows_the_microbatch():
    many = jax.tree.map(lambda x: np.tile(x, (512, *[1] * (x.ndim - 1))), batch())
    tx = optax.sgd(1.0)
    state = create_state(variables(), {}, tx, ema=False, seed=0)

    def matched(images, texts, ids, ctx):  # cheap, so that only the towers count
        del ids, ctx
        return {"loss": -jnp.vdot(images.vector, texts.vector)}

    def temporary(microbatch):
        step = make_step(Nested(), matched, tx, prepare_batch=gather, microbatch=microbatch)
        return jax.jit(step).lower(state, many, {}).compile().memory_analysis().temp_size_in_bytes

    assert temporary(PAIRS) < 0.4 * temporary(0)


def small_3shnet(**arm):
    """(configuration, model, variables) of an arm of 3SHNet."""
    config = whole_model.configuration(bn_sync=False)
    config.model.update(arm)
    model = registry.model("shnet").build(config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), whole_model.batch(), train=False))
    return config, model, _of(dict(shapes), whole_model.variables(False))


@pytest.mark.slow
def test_a_step_of_3shnet_in_microbatches():
    config, model, values = small_3shnet()
    rest = (model, *total.build(config.loss, 3), values, whole_model.batch(), optax.sgd(1.0), 1)
    agree(taken(*rest, 4, "exact"), taken(*rest, 0, "exact"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arm",
    [{"bn_include_padding": False}, {"spatial": False}, {"semantic": False}, {"spatial": False, "semantic": False}],
    ids=str,
)
def test_3shnet_declares_the_depth_of_its_norms(arm):
    """With too few passes embeddings would be normalised by other moments than those of the whole batch."""
    _, model, values = small_3shnet(**arm)

    def encode(params, batch, key, given):
        variables = {"params": params, "batch_stats": values["batch_stats"], "given_moments": given}
        embeddings, updated = model.apply(
            variables, gather({}, batch), train=True, rngs={"dropout": key}, mutable=["moments"]
        )
        return embeddings, updated["moments"]

    splitting = Splitting(4, "exact", model.norm_depth)
    rest = values["params"], values["batch_stats"], whole_model.batch(), jax.random.key(0)
    embeddings, stats = jax.jit(partial(embed_in_parts, encode, splitting=splitting))(*rest)
    whole, updated = jax.jit(
        lambda: model.apply(
            values, gather({}, whole_model.batch()), train=True, rngs={"dropout": rest[-1]}, mutable=["batch_stats"]
        )
    )()
    agree(
        (embeddings[0].vector, embeddings[1].vector, stats), (whole[0].vector, whole[1].vector, updated["batch_stats"])
    )


def _of(like, values):
    """The values of what an arm has."""
    return {k: _of(v, values[k]) if isinstance(v, dict) else values[k] for k, v in like.items()}
