import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs.base import get_config
from shnet_jax.models import shnet
from shnet_jax.models.units import UNIT_MASKS
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA
from tests.models import image_oracle as oracle

# The sizes of no published model: nothing may assume 36 regions, 2048 channels, 133 classes or a 64 x 64 map.
DIM, CLASSES, K, G = 16, 7, 4, 3
SIZES: dict[str, Any] = {"dim": DIM, "num_classes": CLASSES, "map_channels": 8, "dropout": 0.0}
ARMS = {name: arm.to_dict().get("model", {}) for name, arm in get_config().study.arms.items()}
# Every arm with the published choices or, spread over them, with the others.
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "semantic": {"units": ("regions", "grid"), "global_residual": True},
    "spatial": {"units": ("grid",), "map_input": "embedding", "map_position": "2d"},
    "none": {},
}


def config_of(arm: str, **options: Any):
    config = get_config()
    config.model.update(SIZES | ARMS[arm] | CASES[arm] | options)
    config.text.update({"tower": "bigru", "vocab_size": 5, "width": 8})
    return config


@functools.cache
def images(n: int = 3) -> dict[str, np.ndarray]:
    """Images of different sizes; masked units hold numbers, so that reading them shows."""
    rng = np.random.default_rng(0)
    return {
        "regions": rng.random((n, K, 12), np.float32),
        "region_mask": np.arange(K) < np.resize([4, 2, 1], n)[:, None],
        "grid": rng.normal(size=(n, G, 10)).astype(np.float32),
        "grid_mask": np.arange(G) < np.resize([2, 3, 1], n)[:, None],
        "seg_semantic": rng.random((n, CLASSES, 2, 2), np.float32),
        "seg_map": rng.integers(0, CLASSES + 1, (n, 8, 6)).astype(np.uint8),  # CLASSES itself is void
        "categories": rng.random((n, CLASSES)) < 0.5,
        "image_embedding": 5 * rng.normal(size=(n, 9)).astype(np.float32),
    }


def fields(arm: str, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The fields that the arm reads, and the masks."""
    wanted = {*shnet.image_fields(config_of(arm)), *UNIT_MASKS.values()}
    return {name: x for name, x in batch.items() if name in wanted}


def random_variables(model, batch, **kwargs: Any):
    """Parameters and statistics of a trained model's size: fresh ones hide whole terms."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, train=False, **kwargs))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        x = rng.normal(0.0, 0.4, leaf.shape).astype(np.float32)
        return np.abs(x) + 0.5 if path[-1].key in ("var", "scale") else x

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def variables_of(arm: str):
    return random_variables(shnet.build(config_of(arm)), fields(arm, images()), method="encode_image")


def compiled(fn):
    # Compiling is most of these tests' time, and half of it XLA's optimisations; tests.parity runs with them.
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def evaluated(arm: str, **options: Any):
    model = shnet.build(config_of(arm, **options))
    return compiled(lambda batch: model.apply(variables_of(arm), batch, train=False, method="encode_image").vector)


def encode(arm: str, batch: dict[str, np.ndarray], **options: Any) -> np.ndarray:
    return np.asarray(evaluated(arm, **options)(fields(arm, batch)))


def oracle_of(arm: str, **options: Any) -> oracle.Encoder:
    variables = variables_of(arm)
    stats = variables["batch_stats"]["image"]
    return oracle.Encoder(variables["params"]["image"], stats, config_of(arm, **options).model)


@pytest.mark.parametrize("arm", [pytest.param(a, marks=[pytest.mark.slow] * (a == "spatial")) for a in ARMS])
def test_equals_numpy(arm):
    vectors = encode(arm, images())
    assert vectors.shape == (3, DIM) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, oracle_of(arm)(images()), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("arm", ARMS)
def test_order_of_units_and_what_masked_ones_hold_are_irrelevant(arm):
    plain, batch = encode(arm, images()), dict(images())
    order = {"regions": [2, 0, 3, 1], "grid": [1, 2, 0]}
    for unit, mask in UNIT_MASKS.items():
        junk = np.where(batch[mask][..., None], batch[unit], 1e4)
        batch[unit], batch[mask] = junk[:, order[unit]], batch[mask][:, order[unit]]
    np.testing.assert_allclose(encode(arm, batch), plain, atol=2e-6)


@pytest.mark.parametrize("arm", ARMS)
def test_every_field_read_matters_to_its_own_image_only(arm):
    plain = encode(arm, images())
    for name in shnet.image_fields(config_of(arm)):
        x = images()[name].copy()
        x[1] = x[1][:, ::-1] if name in UNIT_MASKS else np.roll(x[1], 1, axis=0)
        moved = np.abs(encode(arm, images() | {name: x}) - plain).max(axis=1)
        assert moved[1] > 1e-4 and moved[[0, 2]].max() < 1e-6, name


def test_without_a_mask_all_units_are_valid():
    batch = {name: x for name, x in images().items() if name not in UNIT_MASKS.values()}
    ones = {name: np.ones_like(images()[name]) for name in UNIT_MASKS.values()}
    np.testing.assert_allclose(encode("none", batch), encode("none", images() | ones), atol=1e-6)


def test_image_fields():
    assert shnet.image_fields(config_of("full")) == ("regions", "seg_semantic", "seg_map", "categories")
    assert shnet.image_fields(config_of("none")) == ("regions",)
    assert shnet.image_fields(config_of("semantic")) == (
        *("regions", "grid", "seg_semantic", "categories"),
        "image_embedding",
    )
    # Without VSeM the published ablation still reads the class maps, as tokens.
    assert shnet.image_fields(config_of("spatial")) == ("grid", "seg_semantic", "seg_map", "categories")
    assert shnet.image_fields(config_of("spatial", scene_tokens=False, category_token=False)) == ("grid", "seg_map")


@pytest.mark.parametrize(("arm", "size"), [("full", 2 * K + 4 + 1), ("semantic", 2 * (K + G) + 4 + 1), ("none", K)])
def test_pooled_set(arm, size):
    """The arm without segmentation pools the projected units alone: VSE-infinity."""
    model, batch = shnet.build(config_of(arm)), fields(arm, images())
    run = functools.partial(model.apply, train=False, method="encode_image", mutable=["intermediates"])
    _, sown = jax.eval_shape(run, variables_of(arm), batch)
    sown = sown["intermediates"]["image"]
    assert sown["pooled_set"][0].shape == (3, size, DIM) and sown["pooled_mask"][0].shape == (3, size)
    assert ("fused" in sown) is (arm != "none")
    if arm == "none":
        assert not {"seg_semantic", "seg_map", "categories"} & set(batch)
        assert set(variables_of(arm)["params"]["image"]) == {"regions_linear", "regions_mlp", "pool"}


def test_bfloat16_and_features_as_they_are_stored_stay_near_float32():
    half = images() | {name: images()[name].astype(np.float16) for name in ("regions", "seg_semantic")}
    exact, rounded = encode("full", images()), encode("full", half, dtype="bfloat16")
    assert rounded.dtype == np.float32
    cosine = np.sum(exact * rounded, axis=1)
    assert cosine.min() > 0.999
    assert np.abs(exact - rounded).max() > 5e-4  # float16 alone moves less: the option does something


# Training: batch statistics, gradients.

COTANGENT = np.random.default_rng(2).normal(size=(3, DIM))


@functools.cache
def trained(include_padding: bool):
    """(value, (gradients of parameters and of regions, statistics)) of one training step's image side."""
    model = shnet.build(config_of("full", bn_include_padding=include_padding))

    def value(params, regions, batch):
        variables = variables_of("full") | {"params": params}
        run = functools.partial(model.apply, train=True, method="encode_image", mutable=["batch_stats"])
        out, updated = run(variables, batch | {"regions": regions})
        return jnp.sum(out.vector * COTANGENT), (out.vector, updated["batch_stats"])

    return compiled(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))


def train(batch, include_padding: bool = True):
    batch = fields("full", batch)
    return trained(include_padding)(variables_of("full")["params"], batch["regions"], batch)


@pytest.mark.parametrize("include_padding", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_training_equals_numpy(include_padding):
    (_, (vectors, _)), (gradients, _) = train(images(), include_padding)
    encoder = oracle_of("full", bn_include_padding=include_padding)
    params = encoder.params

    def value(params) -> float:
        return float(np.sum(COTANGENT * oracle.Encoder(params, None, encoder.options)(images())))

    np.testing.assert_allclose(vectors, oracle.Encoder(params, None, encoder.options)(images()), atol=2e-5)
    # Each array's gradient along one random direction, against central differences of the float64 oracle.
    rng, step = np.random.default_rng(3), 1e-6
    flat = {path: np.asarray(x, np.float64) for path, x in traverse_util.flatten_dict(params).items()}
    ours = traverse_util.flatten_dict(gradients["image"])
    assert flat.keys() == ours.keys()
    for path, x in flat.items():
        direction = rng.normal(size=x.shape)
        ends = [value(traverse_util.unflatten_dict(flat | {path: x + sign * step * direction})) for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * step)
        found = float(np.sum(np.asarray(ours[path], np.float64) * direction))
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-4), "/".join(path)


@pytest.mark.slow
def test_padding_reaches_the_statistics_only_if_asked():
    batch = images()
    junk = batch | {"regions": np.where(batch["region_mask"][..., None], batch["regions"], 3.0)}
    for include_padding, reaches in ((True, True), (False, False)):
        (value, (_, stats)), (_, d_regions) = train(batch, include_padding)
        (junk_value, (_, junk_stats)), _ = train(junk, include_padding)
        moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(junk_stats), strict=True)]
        assert bool(max(moved) > 1e-3) is reaches
        assert bool(abs(value - junk_value) > 1e-3) is reaches
        assert bool(np.abs(d_regions[~batch["region_mask"]]).max() > 1e-6) is reaches
        assert all(np.isfinite(x).all() for x in (*jax.tree.leaves(stats), d_regions))


def test_dropout_acts_in_training_only():
    model = shnet.build(config_of("none", category_token=True, dropout=0.5))
    batch = {name: images()[name] for name in ("regions", "region_mask", "categories")}
    variables = random_variables(model, batch, method="encode_image")

    @compiled
    def run(key):
        out, _ = model.apply(
            variables, batch, train=True, rngs={"dropout": key}, method="encode_image", mutable=["batch_stats"]
        )
        return out.vector

    first, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    jax.eval_shape(lambda: model.apply(variables, batch, train=False, method="encode_image"))  # asks for no random key


@pytest.mark.slow
@pytest.mark.parametrize("how", mapping.MAPPINGS)
def test_synchronised_statistics_give_one_device_s_step(how):
    """Value, statistics and gradients of the full encoder on 8 devices equal those of the whole batch on one."""
    batch = fields("full", images(16))
    cotangent = np.random.default_rng(4).normal(size=(16, DIM)).astype(np.float32)

    def step(params, batch, sync, cotangent_of=lambda b: b["cotangent"]):
        model = shnet.build(config_of("full", bn_sync=sync, bn_include_padding=False))

        def value(params):
            variables = variables_of("full") | {"params": params}
            inputs = {name: x for name, x in batch.items() if name != "cotangent"}
            run = functools.partial(model.apply, train=True, method="encode_image", mutable=["batch_stats"])
            out, updated = run(variables, inputs)
            return jnp.sum(out.vector * cotangent_of(batch)), (out.vector, updated["batch_stats"])

        gradients, (vectors, stats) = jax.grad(value, has_aux=True)(params)
        name = DATA if sync else None
        return axis.psum(gradients, name), axis.all_gather(vectors, name), stats

    params, batch = variables_of("full")["params"], batch | {"cotangent": cotangent}
    one = jax.jit(functools.partial(step, sync=False))(params, batch)
    mesh = mapping.data_mesh(jax.devices())
    run = mapping.map_step(functools.partial(step, sync=True), mesh, how, donate_state=False)
    eight = run(mapping.replicate(params, mesh), mapping.put_batch(batch, mesh, how))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        scale = np.abs(a).max()
        np.testing.assert_allclose(b, a, atol=1e-3 * scale + 1e-5)


# The model of a configuration.


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("units", ("patches",), "regions, grid"),
        ("units", (), "regions, grid"),
        ("map_input", "embeddings", "raw_id, embedding"),
        ("map_position", "3d", "1d, 2d"),
        ("dtype", "float16", "float32, bfloat16"),
    ],
)
def test_choices_must_be_known(field, value, choices):
    message = re.escape(f"config.model.{field} is {value!r}; choose from {choices}") + "$"
    with pytest.raises(ValueError, match=message):
        shnet.build(config_of("full", **{field: value}))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("tower", ["bigru", pytest.param("bert", marks=pytest.mark.slow)])
def test_float32_products_are_float32_on_every_platform(tower, platform):
    """By default accelerators round the operands of float32 products, TPUs to bfloat16 and GPUs to TF32."""
    config = config_of("full", dropout=0.1)
    small = {"layers": 1, "heads": 2, "mlp_dim": 8, "max_positions": 8}
    config.text.update({"tower": tower, **small})
    model = shnet.build(config)
    tokens = np.array([[2, 3, 4], [1, 2, 0], [1, 0, 0]], np.int32)
    batch = fields("full", images()) | {"tokens": tokens, "token_mask": tokens > 0}
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, train=False))

    def value(params, others, key):
        run = functools.partial(model.apply, train=True, mutable=["batch_stats"], rngs={"dropout": key})
        embeddings, _ = run({"params": params, **others}, batch)
        return jnp.sum(jnp.square(model.score(*embeddings)))

    others = {"batch_stats": variables["batch_stats"]}
    traced = jax.jit(jax.grad(value)).trace(variables["params"], others, jax.eval_shape(lambda: jax.random.key(0)))
    lines = traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
    products = [line for line in lines if "stablehlo.dot_general" in line or "stablehlo.convolution" in line]
    assert len(products) > 50
    assert [line for line in products if "HIGHEST, HIGHEST" not in line] == []


def test_score_is_the_dot_product_of_both_towers_unit_vectors():
    config = config_of("none")
    model = shnet.build(config)
    tokens = np.array([[2, 3, 4], [1, 2, 0]], np.int32)
    batch = fields("none", images()) | {"tokens": tokens, "token_mask": tokens > 0}
    variables = random_variables(model, batch)
    assert set(variables["params"]) == {"image", "text"}  # the optimiser's groups go by these names
    embedded, texts = compiled(functools.partial(model.apply, train=False))(variables, batch)
    assert embedded.elements is None and embedded.vector.shape == (3, DIM) and texts.vector.shape == (2, DIM)
    np.testing.assert_allclose(
        model.score(embedded, texts), np.asarray(embedded.vector) @ np.asarray(texts.vector).T, atol=1e-6
    )
