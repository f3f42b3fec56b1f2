"""USER's image tower against a float64 oracle: values, gradients, statistics, masks and the settings it refuses."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from configs import user as user_config
from shnet_jax import registry
from shnet_jax.experiment import assemble
from shnet_jax.models import user
from shnet_jax.models.units import UNIT_MASKS
from shnet_jax.models.user import SLOTS
from tests.models.test_shnet import compiled, random_variables
from tests.models.user_oracle import Encoder
from tests.train import tiny

DIM, REGIONS, GRID, FEATURES, CLIP = 6, 5, 3, 7, 4
ARMS: dict[str, dict[str, Any]] = {
    "slots": {},
    "layer": {"model.user.norm": "layer", "model.units": ("regions", "grid")},
    "clip": {"model.user.guides": ("cge",)},
    "both": {"model.user.guides": ("sge", "cge"), "model.user.norm": "layer", "model.user.attention_scale": 2.0},
    "nothing": {"model.user.guides": ()},
}


@pytest.fixture(scope="module", autouse=True)
def few_slots():
    """The published 36 regions make a slow oracle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(user, "SLOTS", REGIONS)
        yield


def config_of(arm: str, **changes: Any):
    c = user_config.get_config()
    c.model.dim, c.text.vocab_size, c.text.tower, c.text.width = DIM, 9, "bigru", 4
    c.model.user.dropout = 0.0
    c.update_from_flattened_dict(ARMS[arm] | {name.replace("__", "."): value for name, value in changes.items()})
    return c


@functools.cache
def batch(arm: str):
    rng = np.random.default_rng(0)
    sizes = {"regions": REGIONS, "grid": GRID}
    lengths = {"regions": [REGIONS] * 3 if arm == "slots" else [2, REGIONS, 1], "grid": [3, 2, 3]}
    found = {"image_embedding": rng.normal(size=(3, CLIP)).astype(np.float32)}
    for name, size in sizes.items():
        mask = np.arange(size) < np.array(lengths[name])[:, None]
        x = np.abs(rng.normal(size=(3, size, FEATURES))).astype(np.float32)
        found |= {name: np.where(mask[..., None], x, 0), name.replace("regions", "region") + "_mask": mask}
    return found


@functools.cache
def variables_of(arm: str):
    return random_variables(registry.model("user").build(config_of(arm)), batch(arm), method="encode_image")


def oracle(arm: str, train: bool, params=None):
    """(images, masks) -> vectors."""
    c, own = config_of(arm), variables_of(arm)
    stats = None if train else own["batch_stats"]["image"]
    found = Encoder(
        params or own["params"]["image"], stats, c.model.user.guides, c.model.user.norm, c.model.user.attention_scale
    )
    masks = {name: batch(arm)[UNIT_MASKS[name]] for name in c.model.units}
    return lambda given: found({name: given[name] for name in c.model.units}, masks, given["image_embedding"])


@functools.cache
def trained(arm: str):
    """(vectors, statistics after, gradients of <vectors, COTANGENT> by parameters and regions)."""
    model = registry.model("user").build(config_of(arm))

    def value(params, regions):
        own = {"params": params, "batch_stats": variables_of(arm)["batch_stats"]}
        given = batch(arm) | {"regions": regions}
        out, updated = model.apply(own, given, train=True, method="encode_image", mutable=["batch_stats"])
        return (out.vector * COTANGENT).sum(), (out.vector, updated["batch_stats"])

    step = compiled(jax.grad(value, argnums=(0, 1), has_aux=True))
    gradients, (vectors, stats) = step(variables_of(arm)["params"], batch(arm)["regions"])
    return vectors, stats, gradients


COTANGENT = np.random.default_rng(5).normal(size=(3, DIM)).astype(np.float32)


@pytest.mark.parametrize(
    "arm", [pytest.param(a, marks=[pytest.mark.slow] * (a in ("layer", "both", "clip"))) for a in ARMS]
)
def test_equals_numpy(arm):
    model = registry.model("user").build(config_of(arm))
    encode = compiled(lambda given: model.apply(variables_of(arm), given, train=False, method="encode_image").vector)
    np.testing.assert_allclose(encode(batch(arm)), oracle(arm, train=False)(batch(arm)), atol=3e-6)
    if arm != "nothing":
        np.testing.assert_allclose(trained(arm)[0], oracle(arm, train=True)(batch(arm)), atol=3e-6)
    if arm == "layer":  # masked places may hold anything, here and in the data
        junk = {
            "regions": np.where(batch(arm)["region_mask"][..., None], batch(arm)["regions"], 7.0).astype(np.float32)
        }
        np.testing.assert_allclose(encode(batch(arm) | junk), encode(batch(arm)), atol=1e-6)


@pytest.mark.parametrize("arm", ["slots", pytest.param("both", marks=pytest.mark.slow)])
def test_gradients_equal_differences(arm):
    """Of the regions, and of each parameter along one random direction."""
    gradients = trained(arm)[2]
    rng, step = np.random.default_rng(2), 1e-5
    params = jax.tree.map(np.float64, variables_of(arm)["params"]["image"])

    def slope(move):
        return (move(step) - move(-step)) / (2 * step)

    away = rng.normal(size=batch(arm)["regions"].shape) * batch(arm)["region_mask"][..., None]
    found = slope(
        lambda h: (oracle(arm, True)(batch(arm) | {"regions": batch(arm)["regions"] + h * away}) * COTANGENT).sum()
    )
    np.testing.assert_allclose((gradients[1] * away).sum(), found, rtol=2e-3, atol=1e-4)
    leaves, tree = jax.tree.flatten(params)
    ours = jax.tree.leaves(gradients[0]["image"])
    for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        away = rng.normal(size=leaf.shape)

        def moved(h, number=number, away=away):
            changed = [*leaves[:number], leaves[number] + h * away, *leaves[number + 1 :]]
            return (oracle(arm, True, jax.tree.unflatten(tree, changed))(batch(arm)) * COTANGENT).sum()

        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose((ours[number] * away).sum(), slope(moved), rtol=2e-3, atol=1e-4, err_msg=name)


def test_the_statistics_of_a_place_are_those_of_all_images_and_features():
    own, stats = variables_of("slots"), trained("slots")[1]["image"]["regions_sge"]["local_norm"]
    local = batch("slots")["regions"] @ own["params"]["image"]["regions_sge"]["local"]["kernel"]
    local = np.float64(local + own["params"]["image"]["regions_sge"]["local"]["bias"])
    before = own["batch_stats"]["image"]["regions_sge"]["local_norm"]
    np.testing.assert_allclose(stats["mean"], 0.9 * before["mean"] + 0.1 * local.mean((0, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 * before["var"] + 0.1 * local.var((0, 2), ddof=1), rtol=1e-4)


def test_fields_that_are_read():
    assert user.image_fields(config_of("slots")) == ("regions",)
    assert user.image_fields(config_of("both")) == ("regions", "image_embedding")


@pytest.mark.parametrize(
    "arm, changes, message",
    [
        ("slots", {"model__user__guides": ("self",)}, r"guides is \('self',\); choose from sge, cge"),
        ("slots", {"model__user__norm": "batch"}, "norm is 'batch'; choose from slots, layer"),
        ("slots", {"model__units": ()}, r"units is \(\); choose from regions, grid"),
        ("slots", {"model__units": ("regions", "grid")}, "one BatchNorm channel for each of 5 regions"),
        ("slots", {"data__region_drop": 0.2}, r"region_drop = 0\.2 images differ"),
        ("slots", {"model__dtype": "float16"}, "dtype is 'float16'"),
    ],
)
def test_settings_that_do_not_fit(arm, changes, message):
    with pytest.raises(ValueError, match=message):
        registry.model("user").build(config_of(arm, **changes))


def test_the_published_norm_needs_its_number_of_regions():
    few = batch("slots") | {"regions": batch("slots")["regions"][:, :4], "region_mask": np.ones((3, 4), bool)}
    model = registry.model("user").build(config_of("slots"))
    with pytest.raises(ValueError, match="each of 5 regions, and the data set has 4 regions: set"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), few, train=False, method="encode_image"))
    assert SLOTS == 36


def test_a_data_set_without_image_embeddings_is_refused():
    c = tiny.config(model__name="user")
    c.model.user = config_of("clip").model.user
    with pytest.raises(ValueError, match="reads regions, image_embedding, but this data set has no image_embedding"):
        assemble(c)
