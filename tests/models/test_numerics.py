"""Every model and text tower where nothing is valid: images without units, captions without tokens, one or all of them.

Embeddings are finite, of unit length or zero, the same whatever stands beside them; gradients are finite.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from configs import cmsei as cmsei_config
from configs import esa as esa_config
from configs import user as user_config
from shnet_jax import registry
from shnet_jax.models.contract import scorer
from tests.models.test_shnet import compiled, random_variables

N, K, G, L, CLASSES, DIM = 3, 4, 5, 6, 7, 8
TEXT = {"vocab_size": 20, "layers": 1, "width": 8, "heads": 2, "mlp_dim": 12, "max_positions": L, "dropout": 0.0}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "3SHNet, BERT": (
        base.get_config,
        {"units": ("regions", "grid"), "num_classes": CLASSES, "map_channels": 4, "bn_include_padding": False},
        {"tower": "bert"},
    ),
    "VSE-infinity, BiGRU": (
        base.get_config,
        {"semantic": False, "spatial": False, "scene_tokens": False, "category_token": False},
        {"tower": "bigru"},
    ),
    "USER, transformer": (
        user_config.get_config,
        {"user": {"norm": "layer"}, "units": ("grid",)},
        {"tower": "transformer"},
    ),
    "CMSEI-style, BiGRU": (
        functools.partial(cmsei_config.get_config, "scenes"),
        {"cmsei": {"geometry_heads": 2, "block": 4}},
        {"tower": "bigru"},
    ),
    "ESA-style, CLIP": (
        esa_config.get_config,
        {"esa": {"size": 2, "text_size": 2, "heads": 2, "depth": 1}},
        {"tower": "clip"},
    ),
}


def config(case: str) -> ConfigDict:
    get_config, model, text = CASES[case]
    c = get_config()
    c.model.update({"dim": DIM, "dtype": "float32"} | model)
    c.model.dropout = 0.0
    c.text.update(TEXT | {"dtype": "float32", "projection": DIM} | text)
    return c


@functools.cache
def batch(empty: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Three images and captions; of those in `empty` nothing is valid, and features and tokens are as padding is."""
    rng = np.random.default_rng(0)
    full = np.array([i not in empty for i in range(N)])
    found: dict[str, np.ndarray] = {
        "regions": rng.normal(size=(N, K, 6)).astype(np.float32),
        "grid": rng.normal(size=(N, G, 6)).astype(np.float32),
        "seg_semantic": rng.random((N, CLASSES, 2, 2), np.float32),
        "seg_map": rng.integers(0, CLASSES, (N, 4, 4)).astype(np.uint8),
        "categories": rng.random((N, CLASSES)) < 0.5,
        "image_embedding": rng.normal(size=(N, 6)).astype(np.float32),
        "boxes": np.tile(np.float32([0.1, 0.2, 0.5, 0.6]), (N, K, 1)),
        "relations": np.tile(np.int32([0, 1, 2]), (N, 1, 1)),
        "tokens": rng.integers(1, 20, (N, L)).astype(np.int32),
    }
    for name, values in found.items():
        values[~full] = -1 if name == "relations" else 0
    for name, size in (("region_mask", K), ("grid_mask", G), ("token_mask", L)):
        found[name] = np.repeat(full[:, None], size, axis=1)
    return found


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (not c.startswith("VSE"))) for c in CASES])
def test_nothing_valid(case):
    c = config(case)
    model = registry.model(c.model.name).build(c)
    variables = random_variables(model, batch())

    @compiled
    def run(params, batch):
        def total(params):
            given = variables | {"params": params}
            (images, texts), _ = model.apply(given, batch, train=True, mutable=["batch_stats"], rngs=rngs)
            return jnp.sum(jnp.square(scorer(model, params)(images, texts))), (images, texts)

        rngs = {"dropout": jax.random.key(0)}
        (value, trained), gradients = jax.value_and_grad(total, has_aux=True)(params)
        return value, trained, gradients, model.apply(variables | {"params": params}, batch, train=False)

    usual, some, none = (run(variables["params"], batch(empty)) for empty in ((), (1,), (0, 1, 2)))
    for found in (usual, some, none):
        for path, x in jax.tree_util.tree_leaves_with_path(found):
            assert np.isfinite(x).all(), jax.tree_util.keystr(path)
    for found in (some, none):
        for side in (*found[1], *found[3]):
            lengths = np.linalg.norm(side.vector, axis=1)
            assert np.all((np.abs(lengths - 1) < 1e-3) | (lengths < 1e-3)), lengths
    for ours, beside, alone in zip(usual[3], some[3], none[3], strict=True):  # evaluated: each item for itself
        wanted = np.where(np.arange(N)[:, None] == 1, alone.vector, ours.vector)
        np.testing.assert_allclose(beside.vector, wanted, atol=1e-4)
