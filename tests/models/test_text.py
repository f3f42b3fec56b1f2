"""What holds for every text tower behind the common interface, and the encoder around them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from shnet_jax.models.text import TOWERS, TextEncoder, build_tower

LENGTHS = np.array([9, 2, 5, 7])
every_tower = pytest.mark.parametrize("name", TOWERS)


def tower_of(name: str, dtype: str = "float32"):
    config = get_config()
    small = {"vocab_size": 40, "layers": 1, "width": 32, "heads": 4, "mlp_dim": 48, "max_positions": 16}
    config.text.update({"tower": name, "dtype": dtype, "dropout": 0.3, **small})
    return build_tower(config)


def captions(length: int = 9) -> tuple[jax.Array, jax.Array]:
    """The same four captions, 0 beyond their lengths, padded to any length."""
    tokens = np.random.default_rng(0).integers(1, 40, (4, 9))
    tokens = np.pad(np.where(np.arange(9) < LENGTHS[:, None], tokens, 0), ((0, 0), (0, length - 9)))
    return jnp.asarray(tokens, jnp.int32), jnp.arange(length) < LENGTHS[:, None]


@functools.cache
def params_of(model):
    """Random parameters of a trained model's size: fresh towers hardly react to their input."""
    tokens, mask = captions()
    params = jax.eval_shape(lambda: model.init(jax.random.key(1), tokens, mask, train=False))["params"]
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0.0, 0.3, p.shape), jnp.float32), params)


@functools.cache
def evaluated(model):
    """The compiled model: needs no random key in evaluation."""

    def run(params, tokens, mask):
        return model.apply({"params": params}, tokens, mask, train=False)

    return jax.jit(run)


@every_tower
def test_padding_has_no_effect(name):
    tower = tower_of(name)
    params = params_of(tower)
    tokens, mask = captions()
    plain = np.asarray(evaluated(tower)(params, tokens, mask))
    assert plain.dtype == np.float32
    junk = evaluated(tower)(params, jnp.where(mask, tokens, 17), mask)
    np.testing.assert_allclose(junk[mask], plain[mask], atol=1e-6)
    longer, longer_mask = captions(14)
    out = evaluated(tower)(params, longer, longer_mask)
    np.testing.assert_allclose(out[longer_mask], plain[mask], atol=1e-5)


@every_tower
def test_every_valid_token_and_its_place_matter_within_its_caption(name):
    tower = tower_of(name)
    params = params_of(tower)
    tokens, mask = captions()
    plain = np.asarray(evaluated(tower)(params, tokens, mask))
    last, swapped = tokens.at[2, 4].set(tokens[2, 4] % 39 + 1), tokens.at[2, 1:3].set(tokens[2, 2:0:-1])
    before = 4 if name == "clip" else 0  # CLIP's words see those before them only
    for changed, seen_at in ((last, before), (swapped, 3)):
        moved = np.abs(np.asarray(evaluated(tower)(params, changed, mask)) - plain)
        assert moved[2, seen_at].max() > 1e-3
        assert moved[[0, 1, 3]].max() < 1e-6


@every_tower
def test_bfloat16_stays_near_float32(name):
    params = params_of(tower_of(name))
    tokens, mask = captions()
    exact = np.asarray(evaluated(tower_of(name))(params, tokens, mask))[mask]
    rounded = evaluated(tower_of(name, "bfloat16"))(params, tokens, mask)[mask]
    assert rounded.dtype == jnp.float32
    difference = np.abs(np.asarray(rounded) - exact).max() / np.abs(exact).max()
    assert 1e-5 < difference < 0.03  # equal results would mean that the option does nothing


@every_tower
def test_gradients_are_finite_and_none_reaches_padding(name):
    tower = tower_of(name)
    tokens, mask = captions()
    width = evaluated(tower)(params_of(tower), tokens, mask).shape[-1]
    target = mask[..., None] * jax.random.normal(jax.random.key(5), (4, 9, width))

    def loss(params):
        return jnp.sum(target * tower.apply({"params": params}, tokens, mask, train=False))

    gradients = jax.jit(jax.grad(loss))(params_of(tower))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    words = np.asarray(gradients["words"])
    assert not words[0].any()
    used = np.unique(np.asarray(tokens)[np.asarray(mask)])
    assert np.abs(words[used]).max(axis=1).min() > 0


@pytest.mark.parametrize("name", [name for name in TOWERS if name not in ("clip", "siglip")])  # trained without
def test_dropout_in_training(name):
    tower = tower_of(name)
    params = params_of(tower)
    tokens, mask = captions()

    @jax.jit
    def trained(key):
        return tower.apply({"params": params}, tokens, mask, train=True, rngs={"dropout": key})

    first, second = (np.asarray(trained(jax.random.key(seed, impl="rbg"))) for seed in (0, 1))
    plain = np.asarray(evaluated(tower)(params, tokens, mask))
    assert np.abs(first - second).max() > 1e-3 and np.abs(first - plain).max() > 1e-3


@every_tower
def test_a_token_outside_the_vocabulary_gives_nan(name):
    tower = tower_of(name)
    tokens, mask = captions()
    out = np.asarray(evaluated(tower)(params_of(tower), tokens.at[1, 1].set(40), mask))
    assert np.isnan(out[1, 1]).any() and np.isfinite(out[[0, 2, 3]]).all()


def test_encoder_gives_unit_vectors_and_elements_on_request():
    model = TextEncoder(tower_of("bigru"), dim=24)
    params = params_of(model)
    assert set(params) == {"tower", "head", "pool"}  # the optimiser's groups go by these names
    results = []
    for tokens, mask in (captions(), captions(14)):
        run = jax.jit(functools.partial(model.apply, train=False, with_elements=True))
        results.append(run({"params": params}, tokens, mask))
        np.testing.assert_array_equal(results[-1].mask, mask)
    short, long = results
    assert short.elements.shape == (4, 9, 24)
    np.testing.assert_allclose(np.linalg.norm(short.vector, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(long.vector, short.vector, atol=1e-5)
    np.testing.assert_allclose(long.elements[long.mask], short.elements[short.mask], atol=1e-5)
    plain = jax.eval_shape(lambda: model.apply({"params": params}, *captions(), train=False))
    assert plain.elements is None and plain.mask is None and plain.vector.shape == (4, 24)


def test_towers_are_chosen_by_name():
    config = get_config()
    config.text.vocab_size = 10
    config.text.tower = "shnet_jax.models.bigru"
    assert type(build_tower(config)).__name__ == "BiGRU"
    config.text.tower = "lstm"
    with pytest.raises(ValueError, match="'lstm'; choose from bert, bigru, transformer"):
        build_tower(config)
    config.text.update({"tower": "bert", "vocab_size": 0})
    with pytest.raises(ValueError, match=r"config\.text\.vocab_size is 0"):
        build_tower(config)
    config.text.update({"vocab_size": 10, "dtype": "float16"})
    with pytest.raises(ValueError, match=r"config\.text\.dtype is 'float16'; choose from float32, bfloat16"):
        build_tower(config)


@pytest.mark.parametrize("name", ["bigru", "transformer", "shnet_jax.models.bigru"])
def test_only_bert_has_frozen_layers(name):
    config = get_config()
    config.text.update({"tower": name, "vocab_size": 10, "frozen_layers": 2})
    with pytest.raises(ValueError, match=rf"frozen_layers is 2 and config\.text\.tower '{name}'"):
        build_tower(config)
    for bert in ("bert", "shnet_jax.models.bert"):
        config.text.tower = bert
        assert build_tower(config).frozen_layers == 2
