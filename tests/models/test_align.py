"""Heads on frozen vectors against NumPy in float64, and the models whose text side they are."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from shnet_jax import registry
from shnet_jax.models.heads import KINDS, Head

N, D_IN, DIM = 6, 5, 4
ERF = np.vectorize(math.erf)


def dense(p, x):
    return x @ np.asarray(p["kernel"], np.float64) + np.asarray(p["bias"], np.float64)


def normed(p, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * np.asarray(p["scale"], np.float64) + np.asarray(p["bias"], np.float64)


def oracle(kind, p, x):
    """The published equations; for "sharelock" BatchNorm by the statistics of the batch."""
    if kind == "none":
        return x
    x = normed(p["norm"], x)
    if kind == "linear":
        return dense(p["proj"], x)
    if kind == "swiglu":
        gate = dense(p["lin2"], x)
        return dense(p["lin1"], x) * gate / (1 + np.exp(-gate))
    if kind == "mlp":
        inner = dense(p["in"], x)
        return dense(p["out"], inner * (1 + ERF(inner / np.sqrt(2))) / 2)
    if kind == "star":
        one, two = (np.clip(dense(p[name], x), -1e3, 1e3) for name in ("f1", "f2"))
        return dense(p["g"], np.clip(one, 0, 6) * two)
    for layer in range(3):
        x, norm = dense(p[f"hidden_{layer}"], x), p[f"bn_{layer}"]
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * np.asarray(norm["scale"]) + np.asarray(norm["bias"])
        x = np.maximum(x, 0)
    return dense(p["out"], x)


def randomised(variables, seed=0):
    """All parameters at random, so that no bias or scale is passed over; large enough to reach the clips of star."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), variables)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_the_published_equation(kind):
    x = np.random.default_rng(1).normal(size=(N, DIM if kind == "none" else D_IN)) * 3 + 1
    head = Head(kind, DIM, hidden=7 if kind == "sharelock" else 0)
    variables = head.init(jax.random.key(0), jnp.asarray(x, jnp.float32), train=False)
    params = randomised(variables.get("params", {}))
    given = {**variables, "params": params}
    out, _ = head.apply(given, jnp.asarray(x, jnp.float32), train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(out, oracle(kind, params, x), rtol=2e-4, atol=2e-4)


def test_star_clips_both_branches_before_they_meet():
    head, x = Head("star", 2), jnp.ones((1, 3)).at[0, 0].set(2.0)
    params = jax.jit(lambda: head.init(jax.random.key(0), x, train=False))()["params"]
    params = params | {"f1": jax.tree.map(jnp.ones_like, params["f1"]), "g": jax.tree.map(jnp.ones_like, params["g"])}
    params["f2"] = {"kernel": jnp.zeros_like(params["f2"]["kernel"]), "bias": jnp.full((24,), 5e3)}
    relu6 = np.clip(normed(params["norm"], np.asarray(x, np.float64)).sum() + 1, 0, 6)
    np.testing.assert_allclose(head.apply({"params": params}, x, train=False), 24 * relu6 * 1e3 + 1, rtol=1e-6)


def test_published_sizes_and_first_weights():
    def first(kind):
        return jax.jit(lambda: Head(kind, DIM).init(jax.random.key(0), jnp.ones((1, D_IN)), train=False)["params"])

    sizes = {kind: first(kind)() for kind in ("star", "mlp")}
    assert sizes["star"]["f1"]["kernel"].shape == (D_IN, 8 * D_IN) and sizes["star"]["g"]["kernel"].shape[1] == DIM
    assert sizes["mlp"]["in"]["kernel"].shape == (D_IN, 4 * D_IN)
    assert jax.eval_shape(first("sharelock"))["hidden_2"]["kernel"].shape == (4096, 4096)
    for params in sizes.values():
        for name, layer in params.items():
            if "kernel" in layer:
                bound = math.sqrt(6 / sum(layer["kernel"].shape))
                assert 0.9 * bound < np.abs(layer["kernel"]).max() <= bound and not layer["bias"].any(), name


def config(name, **changes):
    c = base.get_config()
    c.model.name, c.model.dim, c.text.tower = name, DIM, "vectors"
    c.text.head.kind = "linear"
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return c


def built(c, batch):
    model = registry.model(c.model.name).build(c)
    return model, jax.jit(lambda: model.init(jax.random.key(0), batch, train=False))()


def batch(**others):
    rng = np.random.default_rng(2)
    mask = np.arange(3) < np.array([[3], [1], [2], [3], [1], [2]])
    fields = {
        "image_index": np.arange(N, dtype=np.int32),
        "image_embedding": rng.normal(size=(N, D_IN)),
        "regions": rng.normal(size=(N, 3, D_IN)) * mask[..., None],
        "region_mask": mask,
        "boxes": np.tile([0.1, 0.1, 0.6, 0.7], (N, 3, 1)),
        "caption_embeddings": rng.normal(size=(N, D_IN)),
    } | others
    return {name: jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else x.dtype) for name, x in fields.items()}


@pytest.mark.parametrize("pool_first", [True, False])
@pytest.mark.parametrize("pool", ["mean", "gpo", "attention"])
def test_pooled_units_ignore_padding_and_their_order(pool, pool_first):
    c = config("align", model__align__source="units", model__align__pool=pool, model__align__pool_first=pool_first)
    given = batch()
    model, variables = built(c, given)
    encode = jax.jit(lambda b: model.apply(variables, b, train=False, method="encode_image").vector)
    vectors = encode(given)
    order = np.array([2, 0, 1])
    padded = jnp.where(given["region_mask"][..., None], given["regions"], 9.0)
    shuffled = given | {"regions": padded[:, order], "region_mask": given["region_mask"][:, order]}
    np.testing.assert_allclose(encode(shuffled), vectors, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    if pool == "mean" and pool_first:
        x = np.asarray(given["regions"], np.float64).sum(1) / np.asarray(given["region_mask"]).sum(1, keepdims=True)
        wanted = oracle("star", variables["params"]["image"]["head"], x)
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        np.testing.assert_allclose(vectors, wanted, atol=1e-5)


UNITS = {"model__align__source": "units"}
ALL = UNITS | {"model__units": ("regions", "grid"), "model__align__vectors": ("coverage", "categories")}


def scene():
    """A batch with cells and categories too, each kind of another width and scale."""
    rng = np.random.default_rng(4)
    return batch(
        grid=rng.normal(size=(N, 4, 7)) * 5 + 1,
        seg_semantic=rng.random((N, 3, 2, 2)) / 9,
        categories=(rng.random((N, 3)) < 0.5).astype(np.int32),
    )


def test_kinds_of_units_and_vectors_are_normalised_apart_and_joined():
    given = scene()
    model, variables = built(config("align", **ALL, model__align__vectors_gain=0.4), given)
    params = randomised(variables["params"])
    vectors = jax.jit(lambda b: model.apply({"params": params}, b, train=False, method="encode_image").vector)(given)
    regions = np.asarray(given["regions"], np.float64).sum(1) / np.asarray(given["region_mask"]).sum(1, keepdims=True)
    parts = {
        "regions": regions,
        "grid": np.asarray(given["grid"], np.float64).mean(1),
        "coverage": np.asarray(given["seg_semantic"], np.float64).mean((2, 3)),
        "categories": np.asarray(given["categories"], np.float64),
    }
    first = variables["params"]["image"]
    assert {name: float(first[f"{name}_norm"]["scale"][0]) for name in parts} == pytest.approx(
        {"regions": 1, "grid": 1, "coverage": 0.4, "categories": 0.4}
    )
    of_image = params["image"]
    wanted = oracle(
        "star", of_image["head"], np.concatenate([normed(of_image[f"{n}_norm"], x) for n, x in parts.items()], 1)
    )
    np.testing.assert_allclose(vectors, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=2e-5)


def test_each_kind_of_units_has_a_pool_of_its_own():
    _, variables = built(config("align", **ALL, model__align__pool="attention"), scene())
    image = variables["params"]["image"]
    assert image["regions_pool"]["query"].shape == (D_IN,) and image["grid_pool"]["query"].shape == (7,)


def test_fields_of_the_image_side():
    fields = registry.model("align").image_fields
    assert fields(config("align")) == ("image_embedding",)
    assert fields(config("align", **ALL)) == ("regions", "grid", "seg_semantic", "categories")


def test_tokens_of_several_widths_are_not_mapped_by_one_head():
    c = config("align", **UNITS, model__units=("regions", "grid"), model__align__pool_first=False)
    with pytest.raises(ValueError, match=r"found regions of 5, grid of 7: .*config\.model\.align\.pool_first=True"):
        built(c, scene())


PLAIN = {
    "model__semantic": False,
    "model__spatial": False,
    "model__scene_tokens": False,
    "model__category_token": False,
}
TOKENS = {"text__source": "caption_tokens"}
USERS = {
    "shnet": PLAIN,
    "user": {"model__user__norm": "layer"},
    "esa": TOKENS,
    "cmsei": TOKENS,
    "align": {},
}


@pytest.mark.parametrize(
    "name", [n if n in ("align", "esa") else pytest.param(n, marks=pytest.mark.slow) for n in USERS]
)
def test_every_model_takes_stored_vectors_as_its_text_side(name):
    mask = np.arange(4) < np.array([[4], [1], [2], [3], [4], [2]])
    tokens = np.random.default_rng(3).normal(size=(N, 4, D_IN))
    given = batch()
    if name in ("esa", "cmsei"):
        given = batch(caption_tokens=tokens, caption_token_mask=mask)
        del given["caption_embeddings"]
    model, variables = built(config(name, **USERS[name]), given)
    encode = jax.jit(lambda given: model.apply(variables, given, train=False, method="encode_text"))
    texts = encode(given)
    np.testing.assert_allclose(np.linalg.norm(texts.vector, axis=1), 1, rtol=1e-5)
    if "caption_tokens" in given:  # what lies behind a mask is free
        other = given | {"caption_tokens": jnp.where(mask[..., None], given["caption_tokens"], 7.0)}
        again = encode(other)
        np.testing.assert_allclose(again.vector, texts.vector, atol=1e-6)
        if name == "esa":  # the first and the last token count: no token begins or ends a caption
            elements = texts.elements
            changed = given | {"caption_tokens": given["caption_tokens"].at[:, 0, 0].add(2.0)}
            assert np.abs(encode(changed).elements - elements).max() > 1e-3


@pytest.mark.parametrize(
    "name, changes, message",
    [
        (
            "align",
            {"model__align__source": "pixels"},
            "config.model.align.source is 'pixels'; choose from vector, units",
        ),
        (
            "align",
            UNITS | {"model__align__vectors": ("depth",)},
            "config.model.align.vectors is .'depth',.; choose from image_embedding, coverage, categories",
        ),
        (
            "align",
            {"model__align__vectors": ("coverage",)},
            "needs source 'units' and pool_first True; found 'vector' and True",
        ),
        ("align", {"model__align__head__kind": "cube"}, "config.model.align.head.kind is 'cube'; choose from star"),
        ("align", {"text__head__dropout": 1.0}, "config.text.head.dropout is 1.0"),
        ("align", UNITS | {"model__feature_dropout": 0.2}, "feature_dropout is 0.2: align has none on its features"),
        ("align", {"text__source": "captions"}, "config.text.source is 'captions'; choose from caption_embeddings"),
        ("cmsei", {}, "one vector a caption, and config.model.cmsei.attend needs words"),
        ("esa", {}, "config.model.esa.text_size is 4: a set is made of tokens"),
        ("esa", {"model__esa__head": "none", **TOKENS}, "config.text.tower is 'vectors'"),
    ],
)
def test_what_does_not_fit_is_refused(name, changes, message):
    c = config(name, **changes)
    if changes.get("model__esa__head") == "none":
        c.text.projection = DIM
    with pytest.raises(ValueError, match=message):
        registry.model(name).build(c)


def test_a_vector_that_nothing_projects_has_the_width_of_the_model():
    c = config("align", model__align__head__kind="none")
    with pytest.raises(ValueError, match=r"the stored vectors are 5 wide and config\.model\.dim is 4"):
        built(c, batch())
