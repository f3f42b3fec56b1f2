"""The text towers with random weights against NumPy float64 (CLIP's: tests/interop/test_clip_weights.py)."""

import contextlib
import io
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from shnet_jax.models import transformer
from shnet_jax.models.bert import BERT, EPSILON
from shnet_jax.models.bigru import BiGRU
from shnet_jax.models.transformer import Transformer
from tests.models import text_oracle as oracle

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "layers": 2,
    "width": 16,
    "heads": 4,
    "mlp_dim": 24,
    "max_positions": 12,
}


def bert(x, params):
    """Post-norm layers on x, the embeddings of the words."""
    x = x + np.asarray(params["positions"], np.float64)[: len(x)]
    x = oracle.layer_norm(x + np.asarray(params["types"], np.float64)[0], params["norm"], EPSILON)
    for k in range(2):
        p = params[f"layer_{k}"]
        x = oracle.layer_norm(x + oracle.attention(x, p["attention"], 4), p["attention_norm"], EPSILON)
        x = oracle.layer_norm(x + oracle.mlp(x, p["mlp"]), p["mlp_norm"], EPSILON)
    return x


def pre_norm(x, params):
    x = x + np.asarray(params["positions"], np.float64)[: len(x)]
    for k in range(2):
        p = params[f"layer_{k}"]
        normed = oracle.layer_norm(x, p["attention_norm"], transformer.EPSILON)
        x = x + oracle.attention(normed, p["attention"], 4)
        x = x + oracle.mlp(oracle.layer_norm(x, p["mlp_norm"], transformer.EPSILON), p["mlp"])
    return oracle.layer_norm(x, params["norm"], transformer.EPSILON)


def both_directions(x, params):
    """Each direction of the GRU runs over the true length."""
    backward = oracle.gru(x[::-1], params["backward"])[::-1]
    return np.concatenate([oracle.gru(x, params["forward"]), backward], axis=-1)


def random_params(model, length: int):
    """Parameters far from their initial values, so that no term is too small to see."""
    tokens = jnp.zeros((1, length), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, tokens == 0, train=False))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0.0, 0.5, p.shape), jnp.float32), params)


@pytest.mark.parametrize(
    ("model", "reference"),
    [(BERT(**SIZES), bert), (Transformer(**SIZES), pre_norm), (BiGRU(vocab_size=30, width=10), both_directions)],
)
def test_equals_numpy_caption_by_caption(model, reference):
    params = random_params(model, 7)
    rng = np.random.default_rng(2)
    tokens, lengths = rng.integers(1, 30, (4, 7)), (7, 2, 1, 4)
    mask = np.arange(7) < np.array(lengths)[:, None]
    out = np.asarray(jax.jit(partial(model.apply, train=False))({"params": params}, tokens, mask))
    assert out.dtype == np.float32
    for i, length in enumerate(lengths):
        words = np.asarray(params["words"], np.float64)[tokens[i, :length]]
        expected = reference(words, params)
        np.testing.assert_allclose(out[i, :length], expected, rtol=1e-4, atol=1e-4)
        if isinstance(model, BiGRU):
            assert not out[i, length:].any()


@pytest.mark.parametrize("train", [False, True])
def test_a_gru_reads_a_small_vocabulary_once(train):
    """Fewer words than tokens: a product over the words, not over the tokens, with the same states and gradient."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 9, (4, 7)).astype(np.int32)
    mask = np.arange(7) < np.array((7, 2, 1, 4))[:, None]
    small, large = (BiGRU(vocab_size=size, width=10, dropout=0.0) for size in (9, 30))
    params = random_params(small, 7)
    padded = params | {"words": jnp.pad(params["words"], ((0, 21), (0, 0)))}

    def states(model, params):
        return model.apply({"params": params}, tokens, mask, train=train)

    def gradient_of(model, params):
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(states(model, params)))))(params)

    np.testing.assert_allclose(states(small, params), states(large, padded), rtol=1e-5, atol=1e-5)
    once, each = gradient_of(small, params), gradient_of(large, padded)
    each["words"] = each["words"][:9]
    for name, value in jax.tree.leaves_with_path(once):
        expected = dict(jax.tree.leaves_with_path(each))[name]
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4, err_msg=str(name))
    rows = {
        model: f"f32[{model.vocab_size},15]" in str(jax.make_jaxpr(partial(states, model))(tree))
        for model, tree in ((small, params), (large, padded))
    }
    assert rows == {small: True, large: False}


def test_dropout_of_a_gru_is_drawn_for_each_token():
    tokens = jnp.ones((2, 7), jnp.int32)
    model = BiGRU(vocab_size=9, width=10, dropout=0.5)
    params = random_params(model, 7)
    first, second = model.apply({"params": params}, tokens, tokens > 0, train=True, rngs={"dropout": jax.random.key(0)})
    assert np.abs(np.asarray(first[0] - second[0])).max() > 1e-3


@pytest.mark.parametrize("tower", [BERT, Transformer])
def test_captions_longer_than_the_positions_are_refused(tower):
    tokens = jnp.ones((1, 13), jnp.int32)
    with pytest.raises(ValueError, match=r"13 tokens.*12 positions"):
        jax.eval_shape(lambda: tower(**SIZES).init(jax.random.key(0), tokens, tokens > 0, train=False))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (BERT(**SIZES | {"heads": 5}), r"width 16 .* 5 attention heads"),
        (BiGRU(vocab_size=5, width=7), r"width 7 .* odd"),
    ],
)
def test_widths_that_do_not_divide(model, message):
    tokens = jnp.ones((1, 3), jnp.int32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, tokens > 0, train=False))


def test_only_the_first_token_type_learns():
    model = BERT(**SIZES | {"layers": 1})
    params = random_params(model, 4)
    tokens = jnp.ones((2, 4), jnp.int32)

    @jax.jit
    @jax.grad
    def gradient_of(params):
        return jnp.sum(model.apply({"params": params}, tokens, tokens > 0, train=False)[..., 0])

    gradient = gradient_of(params)
    assert np.any(np.asarray(gradient["types"][0])) and not np.any(np.asarray(gradient["types"][1]))


@pytest.mark.slow
def test_remat_gives_the_same_gradient_for_less_memory():
    tokens = np.random.default_rng(0).integers(1, 20, (64, 16)).astype(np.int32)
    mask = np.ones_like(tokens, bool)
    models = [
        BERT(vocab_size=20, layers=4, width=16, heads=2, mlp_dim=64, max_positions=16, dropout=0.3, remat=remat)
        for remat in (False, True)
    ]
    params = jax.jit(partial(models[0].init, train=False))(jax.random.key(0), tokens, mask)

    def total(model, params):
        out = model.apply(params, tokens, mask, train=True, rngs={"dropout": jax.random.key(1)})
        return jnp.sum(jnp.sin(out))

    def kept(model):
        """What the forward pass leaves to the backward pass. (The CPU's compiler would not show it.)"""
        with contextlib.redirect_stdout(io.StringIO()) as lines:
            print_saved_residuals(partial(total, model), params)
        return len(lines.getvalue().splitlines())

    one, ours = (jax.jit(jax.grad(partial(total, model)))(params) for model in models)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert kept(models[1]) < 0.5 * kept(models[0])
