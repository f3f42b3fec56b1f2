"""3SHNet's region image encoder against the recording: every intermediate, gradients, BatchNorm statistics."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from shnet_jax.interop.torch_weights import image_encoder_slots, to_variables
from shnet_jax.models.mlp import MLP
from shnet_jax.models.shnet import ImageEncoder
from tests.parity.compare import Fixture, Row, compare, compare_gradient, skip

GROUP = "shnet image encoder"


def encoder(dim: int) -> ImageEncoder:
    """The published region model of width `dim`, without dropout."""
    return ImageEncoder(
        dim=dim,
        units=("regions",),
        semantic=True,
        spatial=True,
        scene_tokens=True,
        category_token=True,
        global_residual=False,
        num_classes=133,
        map_channels=128,
        map_input="raw_id",
        map_position="1d",
        spatial_scale=4.0,
        dropout=0.0,
        feature_dropout=0.0,
        mlp=partial(MLP),
        axis=None,
        dtype="float32",
    )


def inputs(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Our batch from the recorded inputs."""
    images = arrays["images"]
    return {
        "regions": jnp.asarray(images),
        "region_mask": jnp.arange(images.shape[1]) < arrays["image_lengths"][:, None],
        "seg_map": jnp.asarray(arrays["Seg_results"].astype(np.uint8)),
        "categories": jnp.asarray(arrays["cat_onehots"]) > 0,
        "seg_semantic": jnp.asarray(arrays["Unet_segs"]),
    }


def _intermediates(sown: dict) -> dict[str, np.ndarray]:
    flat = {"/".join(path): value[0] for path, value in traverse_util.flatten_dict(sown).items()}
    patches, kernel, position = flat.pop("spatial/keys")
    keys = np.asarray(jax.nn.relu(patches @ kernel + position))
    flat = {name: np.asarray(value) for name, value in flat.items()}
    return {
        "region_fc": flat["linear"],
        "region_features": flat["projected"],
        "region_mlp": flat["projected"] - flat["linear"],
        "cat_emb": flat["category_features"],
        "seg_grid_linear": flat["scene_linear"],
        "seg_grid_features": flat["scene_features"],
        "seg_grid_mlp": flat["scene_features"] - flat["scene_linear"],
        "sm_attention": flat["semantic/gate"],
        "sm_fusion_features": flat["semantic_features"],
        "sp_map_stats": np.stack([keys.mean(axis=1), keys.max(axis=1)], axis=-1),
        "sp_attention": flat["spatial/attention"],
        "sp_context": flat["spatial/context"],
        "sp_fusion_features": flat["spatial_features"],
        "fusion_features": flat["fused"],
        "gpo_in_lengths": flat["pooled_mask"].sum(axis=1),
        "gpo_pooled": flat["pooled"],
        "gpo_pool_weights": flat["pool/weights"][..., None],
        "gpo_in_features": _as_sets(flat["pooled_set"], flat["pooled_mask"]),
    }


def _as_sets(features: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Each channel of the valid rows sorted, padding zero: what the pooling sees of a set."""
    ordered = -np.sort(-np.where(mask[..., None], features, -np.inf), axis=1)
    return np.where(np.isfinite(ordered), ordered, 0.0)


def check(folder: Path) -> list[Row]:
    """One row per recorded array of shnet_region_image_encoder.npz."""
    fixture = Fixture(folder / "shnet_region_image_encoder.npz")
    slots = image_encoder_slots()
    variables = to_variables(fixture.section("param.") | fixture.section("buffer."), slots)
    batch = inputs(fixture.section("in."))
    model = encoder(fixture["eval.out.embedding"].shape[-1])
    rows: list[Row] = []
    for mode in ("eval", "train"):

        def run(params, images, train=mode == "train"):
            out, updated = model.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                batch | {"regions": images},
                train=train,
                mutable=["batch_stats", "intermediates"],
            )
            return jnp.sum(out * fixture["in.cotangent"]), (out, updated)

        (scalar, (out, updated)), grads = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(
            variables["params"], batch["regions"]
        )
        ours = _intermediates(updated["intermediates"]) | {"embedding": out, "scalar": scalar}
        for name, recorded in fixture.section(f"{mode}.out.").items():
            if name == "gpo_in_features":
                valid = np.arange(recorded.shape[1]) < fixture[f"{mode}.out.gpo_in_lengths"][:, None]
                recorded = _as_sets(recorded, valid)
            atol, rtol = (1e-5, 0.0) if name == "embedding" else (2e-5, 1e-4)
            full = f"{mode}.out.{name}"
            rows.append(compare(GROUP, full, ours[name], recorded, atol, rtol, fixture.rounding(full)))

        for name, recorded in fixture.section(f"{mode}.grad.param.").items():
            gradient = _at(grads[0], slots[name].path)
            rows.append(compare_gradient(GROUP, f"{mode}.grad.param.{name}", gradient, slots[name].ours(recorded)))
        if mode == "train":
            name = "train.grad.in.images"
            rows.append(compare_gradient(GROUP, name, grads[1], fixture[name]))
            for name, recorded in fixture.section("train.buffer_after.").items():
                full = f"train.buffer_after.{name}"
                if name not in slots:
                    rows.append(skip(GROUP, full, "counters and BatchNorms that the published code never applies"))
                    continue
                stat = _at(updated["batch_stats"], slots[name].path)
                rows.append(compare(GROUP, full, stat, recorded, 1e-6, 1e-4, fixture.rounding(full)))
    return rows


def _at(tree: dict, path: tuple[str, ...]) -> jax.Array:
    for key in path:
        tree = tree[key]
    return tree
