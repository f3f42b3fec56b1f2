"""bfloat16 activations: near float32, kept in half the bytes, with statistics and results in float32."""

from __future__ import annotations

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.models import pooling, text
from shnet_jax.models.contract import TwoTowers, check_activations
from shnet_jax.models.layers import GRU, Dense, LayerNorm, SelfAttention, feed_forward
from shnet_jax.models.mlp import BatchNorm
from shnet_jax.ops.matmul import einsum
from shnet_jax.ops.set_pool import set_pool
from shnet_jax.plan.planned_run import describe, random_batch
from tests.models.test_shnet import compiled
from tests.test_plan import small

PAIRS, WIDTH = 6, 128
VSE = {f"model__{name}": False for name in ("semantic", "spatial", "scene_tokens", "category_token")}
SHNET = dict.fromkeys(VSE, True) | {"model__map_channels": 4, "model__num_classes": 5}
CLIP = {"text__tower": "clip", "text__projection": WIDTH, "model__esa__head": "none"}
VECTORS = {"text__tower": "vectors", "text__head__hidden": 64, "plan__caption_embedding": 16}
PICTURE = {"model__esa__source": "picture", "plan__picture": (32, 32)} | {
    f"model__clip__{name}": value
    for name, value in {
        "grid": (2, 2),
        "layers": 1,
        "width": 16,
        "heads": 2,
        "mlp_dim": 32,
        "projection": WIDTH,
    }.items()
}


def heads(kind):
    return VECTORS | {"model__name": "align", "model__align__head__kind": kind, "text__head__kind": kind} | {
        "model__align__head__hidden": 64, "plan__image_embedding": 16
    }  # fmt: skip


MODELS = {
    "shnet, bert": SHNET | {"text__tower": "bert"},
    "vse, bigru": {"text__tower": "bigru"},
    "user": {"model__name": "user", "plan__regions": 36, "model__user__guides": ("sge", "cge")},
    "user, layer norm": {"model__name": "user", "model__user__norm": "layer"},
    "cmsei": {"model__name": "cmsei"},
    "cmsei, not refined": {"model__name": "cmsei", "model__cmsei__refine": False},
    "esa": {"model__name": "esa", "model__units": ("regions",)},
    "esa, merge": {"model__name": "esa", "model__units": ("regions",), "model__esa__mode": "merge"},
    "esa, picture": {"model__name": "esa"} | CLIP | PICTURE,
    "dual": {"model__name": "dual", "text__tower": "siglip", "text__projection": WIDTH, "plan__image_embedding": WIDTH},
    "star": heads("star"),
    "mlp": heads("mlp"),
    "swiglu": heads("swiglu"),
    "sharelock": heads("sharelock"),
    "tokens": heads("mlp")
    | {"model__align__source": "units", "model__align__pool_first": False, "text__source": "caption_tokens"},
}


@functools.cache
def case(name, dtype):
    """(model, batch, variables): no dropout, so that both dtypes compute the same function."""
    fixed = {"model__activation_dtype": dtype, "model__dropout": 0.0, "model__user__dropout": 0.0, "text__dropout": 0.0}
    run = describe(
        small(
            **fixed
            | {"text__mlp_dim": 256, "text__width": 64, "model__dim": WIDTH, "data__region_drop": 0.0}
            | {"model__dtype": "float32", "text__dtype": "float32"}  # auto would depend on the CPU
            | MODELS[name]
        )
    )
    batch = random_batch(run, PAIRS, 0)
    return run.model, batch, drawn(run.model, batch)


def drawn(model, batch):
    """Random variables under which activations keep their size from layer to layer."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, train=False))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return np.float32(1 + 0.1 * np.abs(values) if path[-1].key in ("scale", "var") else values)

    return jax.tree_util.tree_map_with_path(draw, {k: shapes[k] for k in ("params", "batch_stats") if k in shapes})


def embed(name, dtype, params):
    """Embeddings of images and texts in training, the scores, and the new statistics."""
    model, batch, variables = case(name, dtype)
    stats = {"batch_stats": variables.get("batch_stats", {})}
    found, updated = model.apply({"params": params} | stats, batch, train=True, mutable=["batch_stats"])
    return found, updated


def objective(name, dtype, params):
    """A smooth function of all that the towers give."""
    found, updated = embed(name, dtype, params)
    total = sum(jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in floats(found))
    return total, (found, updated)


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def pool_by_place(features, mask, weights):
    """`set_pool` without the sort: rounding swaps ranks, and with them the rows that gradients go to."""
    return einsum("bk,bkd->bd", weights, jnp.where(mask[..., None], features, 0), "float32")


@pytest.fixture
def by_place(monkeypatch):
    monkeypatch.setattr(pooling, "set_pool", pool_by_place)


@functools.cache
def computed(name, dtype):
    params = case(name, dtype)[2]["params"]
    run = compiled(jax.value_and_grad(functools.partial(objective, name, dtype), has_aux=True))
    (_, (found, updated)), gradients = run(params)
    return jax.device_get((found, updated, gradients))


def apart(found, wanted):
    """Length of the difference of two trees, relative to that of the second."""
    one, two = (np.concatenate([np.ravel(x) for x in floats(tree)]) for tree in (found, wanted))
    return np.linalg.norm(one - two) / np.linalg.norm(two)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_embeddings_and_gradients_are_near_those_of_float32(name, by_place):
    (found, stats, gradients), (wanted, exact, slopes) = (computed(name, d) for d in ("bfloat16", "float32"))
    assert {x.dtype for x in floats((found, stats, gradients))} == {np.dtype(np.float32)}
    assert 1e-5 < apart(found, wanted) < EMBEDDINGS
    assert apart(gradients, slopes) < GRADIENTS
    if floats(exact):
        assert apart(stats, exact) < 0.01


def kept(name, dtype):
    """Shapes and dtypes of what the forward pass keeps for the backward one, without parameters."""
    params = case(name, dtype)[2]["params"]
    saved = jax.eval_shape(lambda p: jax.vjp(lambda p: objective(name, dtype, p)[0], p)[1], params)
    parameters = {leaf.shape for leaf in jax.tree.leaves(params)}
    return [leaf for leaf in jax.tree.leaves(saved) if leaf.shape not in parameters]


def size(leaves):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("name", MODELS)
def test_the_backward_pass_keeps_less(name):
    assert size(kept(name, "bfloat16")) < 0.8 * size(kept(name, "float32"))


def test_bert_keeps_nothing_in_float32():
    """Of the arrays of a whole batch of tokens."""
    run = describe(small(**MODELS["shnet, bert"], model__activation_dtype="bfloat16", text__layers=2))
    tower, batch = run.model.text.tower, random_batch(run, PAIRS, 0)
    inputs = batch["tokens"], batch["token_mask"]
    params = jax.eval_shape(lambda: tower.init(jax.random.key(0), *inputs, train=False))

    def run_tower(params):
        return tower.apply(params, *inputs, train=True, rngs={"dropout": jax.random.key(0)})

    out, saved = jax.eval_shape(lambda p: jax.vjp(run_tower, p), params)
    large = [x for x in jax.tree.leaves(saved) if x.size >= batch["tokens"].size * tower.width]
    assert out.dtype == jnp.bfloat16 and large
    assert {x.dtype for x in large if jnp.issubdtype(x.dtype, jnp.floating)} == {np.dtype(jnp.bfloat16)}


class Fed(nn.Module):
    """`feed_forward` as a module."""

    @nn.compact
    def __call__(self, x):
        return feed_forward(x, 32, "float32", nn.initializers.xavier_uniform())


MASK = np.arange(5) < np.array([[5], [3], [4]])
LAYERS = {
    "dense": (Dense(7), {}),
    "norm": (LayerNorm(), {}),
    "feed forward": (Fed(), {}),
    "attention": (SelfAttention(2, 0.0, "float32", nn.initializers.xavier_uniform()), {"mask": MASK, "train": True}),
    "gru": (GRU(6, reverse=True), {"mask": MASK}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_in_float32(name):
    """Of an input that bfloat16 can hold, only the result is rounded, and the gradient that comes to it."""
    layer, given = LAYERS[name]
    x = jax.random.normal(jax.random.key(0), (3, 5, 8)).astype(jnp.bfloat16)
    variables = layer.init(jax.random.key(1), x.astype(jnp.float32), **given)

    def loss(variables, x):
        out = layer.apply(variables, x, **given)
        assert out.dtype == x.dtype
        return jnp.sum(out.astype(jnp.float32) * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (slopes, to_x), out = run(variables, x)
    (exact, exact_x), wanted = run(variables, x.astype(jnp.float32))
    assert to_x.dtype == jnp.bfloat16 and {leaf.dtype for leaf in jax.tree.leaves(slopes)} == {np.dtype(np.float32)}
    scale = float(jnp.abs(wanted).max())
    np.testing.assert_allclose(out.astype(np.float32), wanted, rtol=2**-8, atol=2**-8 * scale)
    assert apart([to_x.astype(jnp.float32)], [exact_x]) < 0.02 and apart(slopes, exact) < 0.02


def test_statistics_of_a_batch_are_those_of_float32():
    """Far from zero, where a sum in bfloat16 would lose all of the variance."""
    x = (jax.random.normal(jax.random.key(0), (300, 40, 4)) + 20).astype(jnp.bfloat16)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(1), x, None, train=False)

    def run(x):
        return norm.apply(variables, x, None, train=True, mutable=["batch_stats"])

    (out, stats), (wanted, exact) = run(x), run(x.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), wanted, rtol=2**-8, atol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), stats, exact)


def test_pooled_sets_are_float32():
    x = jax.random.normal(jax.random.key(0), (3, 5, 8)).astype(jnp.bfloat16)
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(1), (3, 5)))
    out, back = jax.vjp(lambda x: set_pool(x, MASK, weights), x)
    np.testing.assert_allclose(out, set_pool(x.astype(jnp.float32), MASK, weights), rtol=1e-6)
    (slope,) = back(jnp.ones_like(out))
    assert out.dtype == jnp.float32 and slope.dtype == jnp.bfloat16 and not slope[1, 3:].any()


def test_a_product_keeps_its_operands_as_they_came():
    a, b = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 2))
    saved = jax.eval_shape(lambda a, b: jax.vjp(partial(einsum, "ij,jk->ik", dtype="float32"), a, b)[1], a, b)
    assert {x.dtype for x in jax.tree.leaves(saved) if x.shape == a.shape} == {np.dtype(jnp.bfloat16)}


class Mean(nn.Module):
    """An image tower without the option."""

    def __call__(self, batch, *, train):
        return batch["regions"].mean(1)


class Tower(nn.Module):
    """A text tower without the option."""


def build(config):
    return Tower()


def test_what_lacks_the_option_is_named():
    config = small(model__activation_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"config\.model\.activation_dtype is 'bfloat16', and the model 'shnet' has"):
        check_activations(TwoTowers(Mean(), Mean()), config)
    config.text.tower, config.text.dtype = __name__, "float32"
    with pytest.raises(ValueError, match=r"dtype is 'bfloat16', which the text tower 'tests\.models\.test_act"):
        text.build_tower(config)
    with pytest.raises(
        ValueError, match=r"config\.model\.activation_dtype is 'float16'; choose from float32, bfloat16"
    ):
        describe(small(model__activation_dtype="float16"))


EMBEDDINGS, GRADIENTS = 0.03, 0.1
"""Largest relative differences."""
