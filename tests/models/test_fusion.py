import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.models import fusion
from shnet_jax.models.fusion import MapEncoder, SegEmbed, SemanticHighlight, SpatialHighlight
from shnet_jax.models.mlp import MLP
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA
from tests.models import image_oracle as oracle

N, K, DIM, CLASSES, CHANNELS = 8, 3, 6, 7, 4
OPTIONS = {"bn_include_padding": True, "map_input": "raw_id", "map_position": "1d", "spatial_scale": 4.0}
RNG = np.random.default_rng(0)
UNITS = RNG.normal(size=(N, K, DIM)).astype(np.float32)
MASK = np.arange(K) < np.resize([3, 1, 2], N)[:, None]
SEMANTIC = RNG.random((N, CLASSES, 2, 3), np.float32)
MAPS = RNG.integers(0, CLASSES + 1, (N, 5, 4)).astype(np.uint8)


def compiled(fn):
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})  # compiling is most of the time


def random_variables(model, *inputs):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, train=False))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        x = rng.normal(0.0, 0.5, leaf.shape).astype(np.float32)
        return np.abs(x) + 0.5 if path[-1].key in ("var", "scale") else x

    return jax.tree_util.tree_map_with_path(draw, shapes)


def run(model, variables, *inputs, train: bool) -> tuple[np.ndarray, dict[str, Any]]:
    """The result, and what was sown."""
    fn = functools.partial(model.apply, train=train, mutable=["intermediates", "batch_stats"])
    out, updated = compiled(fn)(variables, *inputs)
    return np.asarray(out), updated.get("intermediates", {})


def oracle_of(name: str, variables, train: bool, **options: Any) -> oracle.Encoder:
    stats = None if train else {name: variables["batch_stats"]}
    return oracle.Encoder({name: variables["params"]}, stats, OPTIONS | options)


def test_seg_embed():
    model = SegEmbed(DIM, dropout=0.5)
    variables = random_variables(model, SEMANTIC[:, :, 0, 0])
    out = compiled(functools.partial(model.apply, train=False))(variables, SEMANTIC[:, :, 0, 0])
    expected = oracle.seg_embed(SEMANTIC[:, :, 0, 0].astype(np.float64), variables["params"])
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_semantic_highlight_equals_numpy(train):
    model = SemanticHighlight(DIM, 0.0, functools.partial(MLP), "float32")
    variables = random_variables(model, UNITS, MASK, SEMANTIC)
    out, sown = run(model, variables, UNITS, MASK, SEMANTIC, train=train)
    encoder = oracle_of("semantic", variables, train)
    expected = encoder.semantic(UNITS.astype(np.float64), MASK, SEMANTIC.astype(np.float64), None)
    np.testing.assert_allclose(out, expected, atol=5e-5)
    gate = np.asarray(sown["gate"][0])
    assert not gate[~MASK].any()
    # A sigmoid, not a softmax: every unit is highlighted for itself.
    assert gate[MASK].min() > 0 and gate.max() < 1 and np.abs(gate.sum(axis=1) - 1).max() > 0.05
    padded = np.maximum(variables["params"]["out"]["bias"], 0)
    np.testing.assert_allclose(out[~MASK], np.broadcast_to(padded, out[~MASK].shape), atol=1e-6)


@pytest.mark.parametrize("train", [False, True])
def test_spatial_highlight_equals_numpy(train):
    model = SpatialHighlight(
        DIM, CHANNELS, 4.0, CLASSES, "raw_id", "1d", functools.partial(MLP), axis=None, dtype="float32"
    )
    variables = random_variables(model, UNITS, MASK, MAPS)
    out, sown = run(model, variables, UNITS, MASK, MAPS, train=train)
    encoder = oracle_of("spatial", variables, train)
    np.testing.assert_allclose(out, encoder.spatial(UNITS.astype(np.float64), MASK, MAPS, None), atol=1e-4)
    keys, query = encoder.map_keys(MAPS), oracle.mlp(UNITS, *encoder.at("spatial", "query_mlp"))
    logits = 4.0 * query @ keys.swapaxes(1, 2) / math.sqrt(CHANNELS)
    np.testing.assert_allclose(sown["attention"][0], oracle.softmax(logits), atol=1e-4)


def test_attention_is_made_only_where_somebody_asks_for_it():
    model = SpatialHighlight(
        DIM, CHANNELS, 4.0, CLASSES, "raw_id", "1d", functools.partial(MLP), axis=None, dtype="float32"
    )
    variables = random_variables(model, UNITS, MASK, MAPS)
    for mutable, made in ((False, False), (["intermediates"], True)):
        fn = jax.jit(functools.partial(model.apply, train=False, mutable=mutable))
        assert (f"tensor<{N}x{K}x20xf32>" in fn.lower(variables, UNITS, MASK, MAPS).as_text()) is made


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("inputs", "position"), [("raw_id", "1d"), ("embedding", "2d")])
def test_map_keys_equal_an_explicit_convolution(inputs, position, train):
    model = MapEncoder(CHANNELS, CLASSES, inputs, position, axis=None)
    maps = MAPS.copy()
    maps[0, 0, 0] = 255  # unknown
    variables = random_variables(model, maps)
    fn = functools.partial(model.apply, train=train, mutable=["batch_stats"])
    (patches, kernel, position_part), updated = compiled(fn)(variables, maps)
    keys = np.maximum(np.asarray(patches) @ np.asarray(kernel) + np.asarray(position_part), 0)
    stats = None if train else {"spatial": {"map": variables["batch_stats"]}}
    options = {"map_input": inputs, "map_position": position}
    encoder = oracle.Encoder({"spatial": {"map": variables["params"]}}, stats, options)
    np.testing.assert_allclose(keys, encoder.map_keys(maps), atol=2e-4)
    if train:
        p = variables["params"]
        values = np.stack([oracle.convolve(oracle.map_channels(m, p, inputs, position), p) for m in maps])
        values = values.reshape(-1, CHANNELS)
        for name, batch in (("mean", values.mean(axis=0)), ("var", values.var(axis=0, ddof=1))):
            running = 0.9 * variables["batch_stats"]["norm"][name] + 0.1 * batch
            np.testing.assert_allclose(updated["batch_stats"]["norm"][name], running, rtol=1e-4)


def test_void_and_unknown_classes_share_an_embedding():
    model = MapEncoder(CHANNELS, CLASSES, "embedding", "1d", axis=None)
    void = np.full((1, 3, 3), CLASSES, np.uint8)
    variables = random_variables(model, void)
    assert variables["params"]["classes"]["embedding"].shape == (CLASSES + 1, fusion.CLASS_EMBEDDING)
    fn = compiled(functools.partial(model.apply, train=False))
    patches = [np.asarray(fn(variables, label)[0]) for label in (void, void + 1, void + 200, void - 1)]
    np.testing.assert_array_equal(patches[0], patches[1])
    np.testing.assert_array_equal(patches[0], patches[2])
    assert np.abs(patches[0] - patches[3]).max() > 1e-3


def explicit_moments(patches, kernel, position):
    values = jnp.einsum("npi,ic->npc", patches, kernel) + position
    values = values.reshape(-1, values.shape[-1])
    return values.mean(axis=0), values.var(axis=0)


def test_moments_are_those_of_all_keys_before_the_norm():
    """Values and gradients against keys that are made, in float64; class ids far from zero with little spread."""
    rng = np.random.default_rng(2)
    patches = (rng.integers(0, 3, (4, 20, 9)) + 200.0).astype(np.float32)
    kernel, position = (rng.normal(size=shape).astype(np.float32) for shape in ((9, CHANNELS), (20, CHANNELS)))
    cotangents = rng.normal(size=(2, CHANNELS))

    def ours(*inputs):
        found = fusion._moments(*inputs, axis=None)
        return found.mean, found.var

    def pulled(fn, dtype):
        def run(inputs, cotangents):
            out, vjp = jax.vjp(fn, *inputs)
            return *out, *vjp(tuple(cotangents))

        return compiled(run)([a.astype(dtype) for a in (patches, kernel, position)], cotangents.astype(dtype))

    found = pulled(ours, np.float32)
    with jax.enable_x64(True):
        expected = [np.asarray(a) for a in pulled(explicit_moments, np.float64)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_variance_of_constant_maps_is_that_of_the_positions():
    patches = np.full((2, 6, 9), 133.0, np.float32)
    kernel, position = RNG.normal(size=(9, CHANNELS)), RNG.normal(size=(6, CHANNELS))
    found = fusion._moments(patches, kernel.astype(np.float32), position.astype(np.float32), None)
    var, count = found.var, found.count
    np.testing.assert_allclose(var, position.var(axis=0), rtol=1e-5)
    assert count == 2 * 6


def test_variance_of_a_whole_batch_is_summed_in_parts():
    """131,072 positions: one running float32 sum over them is off by 5e-4 of the variance, these sums by up to 7e-6."""
    rng = np.random.default_rng(5)
    maps = rng.integers(0, 133, (32, 8, 8)).repeat(8, axis=1).repeat(8, axis=2).astype(np.float32)
    patches = np.asarray(fusion._neighbourhoods(maps[..., None]))
    kernel, position = rng.uniform(-1 / 9, 1 / 9, (9, 64)), np.zeros((4096, 64), np.float32)
    found = jax.jit(lambda *x: fusion._moments(*x, None).var)(patches, kernel.astype(np.float32), position)
    rows = patches.reshape(-1, 9).astype(np.float64)
    expected = (kernel.astype(np.float32) * (np.cov(rows.T, bias=True) @ kernel.astype(np.float32))).sum(axis=0)
    np.testing.assert_allclose(found, expected, rtol=3e-5)


def test_map_statistics_of_eight_devices_equal_one():
    """Values, statistics and gradients of the keys, one map a device; test_shnet has the other mapping."""
    cotangent = np.random.default_rng(3).normal(size=(N, 5 * 4, CHANNELS)).astype(np.float32)
    variables = random_variables(MapEncoder(CHANNELS, CLASSES, "embedding", "1d", None), MAPS)

    def step(params, batch, name):
        def share(params):
            model = MapEncoder(CHANNELS, CLASSES, "embedding", "1d", name)
            out, updated = model.apply(
                variables | {"params": params}, batch["map"], train=True, mutable=["batch_stats"]
            )
            patches, kernel, position = out
            keys = jax.nn.relu(jnp.einsum("npi,ic->npc", patches, kernel) + position)
            return jnp.sum(keys * batch["cotangent"]), (keys, updated["batch_stats"])

        gradients, (keys, stats) = jax.grad(share, has_aux=True)(params)
        return axis.all_gather(keys, name), stats, axis.psum(gradients, name)

    params, batch = variables["params"], {"map": MAPS, "cotangent": cotangent}
    one = jax.jit(functools.partial(step, name=None))(params, batch)
    mesh = mapping.data_mesh(jax.devices()[:8])
    mapped = mapping.map_step(functools.partial(step, name=DATA), mesh, donate_state=False)
    eight = mapped(mapping.replicate(params, mesh), mapping.put_batch(batch, mesh))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * np.abs(a).max() + 1e-5)
    assert np.abs(one[2]["classes"]["embedding"]).max() > 1e-3


def test_scene_is_the_mean_over_cells():
    """VSeM sees the scene's classes alone: where they lie is VSpM's."""
    model = SemanticHighlight(DIM, 0.0, functools.partial(MLP), "float32")
    variables = random_variables(model, UNITS, MASK, SEMANTIC)
    fn = compiled(functools.partial(model.apply, train=False))
    mixed = SEMANTIC.reshape(N, CLASSES, 6)[:, :, RNG.permutation(6)].reshape(SEMANTIC.shape)
    np.testing.assert_allclose(fn(variables, UNITS, MASK, mixed), fn(variables, UNITS, MASK, SEMANTIC), atol=1e-5)
