"""GPO against the recording: values, weights and gradients, for sets of full and of shorter length."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from shnet_jax.interop.torch_weights import gpo_params
from shnet_jax.models.pooling import GPO
from shnet_jax.ops.positions import sinusoid
from tests.parity.compare import Fixture, Row, compare, compare_gradient


def check(folder: Path) -> list[Row]:
    """One row per recorded array of gpo.npz."""
    fixture = Fixture(folder / "gpo.npz")
    params = gpo_params(fixture.section("param."))
    model = GPO()
    codes = fixture["out.positional_encoding_32x40"]
    rows = [compare("gpo", "out.positional_encoding_32x40", sinusoid(jnp.arange(40), 32), codes, 2e-5, 1e-4)]
    for case in ("", "short."):
        features, lengths = fixture[case + "in.features"], fixture[case + "in.lengths"]
        mask = jnp.arange(features.shape[1]) < lengths[:, None]
        cotangent = fixture[case + "in.cotangent"]

        def pooled(params, features, mask=mask):
            return model.apply({"params": params}, features, mask)

        recorded = fixture[case + "out.pool_weights"][..., 0]
        weights = model.apply({"params": params}, lengths, recorded.shape[1], method="weights")
        rows.append(compare("gpo", case + "out.pool_weights", weights, recorded, 2e-5, 1e-4))
        out, vjp = jax.vjp(pooled, params, features)
        rows.append(compare("gpo", case + "out.pooled", out, fixture[case + "out.pooled"], 2e-5, 1e-4))
        d_params, d_features = vjp(jnp.asarray(cotangent))
        rows.append(compare_gradient("gpo", case + "grad.in.features", d_features, fixture[case + "grad.in.features"]))
        recorded = gpo_params(fixture.section(case + "grad.param."))
        for path, gradient in jax.tree_util.tree_leaves_with_path(recorded):
            ours = d_params
            for key in path:
                ours = ours[key.key]
            name = case + "grad.param." + "/".join(key.key for key in path)
            rows.append(compare_gradient("gpo", name, ours, gradient))
    return rows
