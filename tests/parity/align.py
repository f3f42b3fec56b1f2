"""Heads on frozen features of both sides and their sigmoid loss against SAIL's: embeddings, losses, every gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from shnet_jax.interop.torch_weights import Slots, linear_slots, norm_slots, to_variables
from shnet_jax.losses import sigmoid
from shnet_jax.models.align import Align, build
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Context, Embedding
from tests.parity.compare import Fixture, Row, compare, compare_gradient

GROUP = "heads on frozen features"
KINDS = ("star", "mlp", "linear")
CASES = ("plain", "extra")
LEARNED = {"logit_scale": "log_scale", "logit_bias": "bias"}
SIDES = {"vision": "image", "text": "text"}
_LAYERS = {
    "star": {".f1": "f1", ".f2": "f2", ".g": "g"},
    "mlp": {".proj.0": "in", ".proj.2": "out"},
    "linear": {"": "proj"},
}


def slots(kind: str) -> Slots:
    """Where each array of the published `AlignmentLayer` lives with us."""
    found: Slots = {}
    for torch, ours in SIDES.items():
        found |= norm_slots(f"{torch}_layer_norm", ours, "head", "norm")
        for layer, name in _LAYERS[kind].items():
            found |= linear_slots(f"{torch}_mapping_network{layer}", ours, "head", name)
    return found


def model(kind: str, dim: int, width_factor: int, widths: dict[str, int]) -> tuple[Align, Align]:
    """Models whose hidden layers of "star" are `width_factor` times as wide as the image and as the text vectors."""
    built = []
    for width in (widths["image"], widths["text"]):
        config = base.get_config()
        config.model.dim, config.text.tower = dim, "vectors"
        for head in (config.model.align.head, config.text.head):
            head.kind, head.hidden = kind, width_factor * width if kind == "star" else 0
        built.append(build(config))
    return built[0], built[1]


def check(folder: Path) -> list[Row]:
    """One row per recorded array of align.npz."""
    fixture = Fixture(Path(folder) / "align.npz")
    rows = [row for kind in KINDS for case in CASES for row in _case(fixture, kind, case)]
    if unread := fixture.expected() - fixture.seen:
        raise ValueError(f"align.npz holds results that are not compared: {sorted(unread)}")
    return rows


def _loss(learned: Any, images: Any, texts: Any, captions: int) -> Any:
    """The published loss of embeddings before normalisation; texts: `captions` in a row for each image."""
    ids = jnp.arange(len(texts)) // captions
    context = Context(step=jnp.int32(0), params=learned, score=RetrievalModel.score, captions=captions)
    units = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    pairs = [Embedding(x) for x in units]
    options = {"scale": 20.0, "bias": -10.0, "mask_same_image": False, "reduction": "pairs"}
    return sigmoid.loss(pairs[0].repeat(captions), pairs[1], ids, context, **options)["sigmoid_loss"]


def _case(fixture: Fixture, kind: str, case: str) -> list[Row]:
    prefix = f"{kind}.{case}"
    arrays = fixture.section(f"{prefix}.param.")
    learned = {ours: jnp.asarray(arrays.pop(name)[0]) for name, ours in LEARNED.items()}
    params = to_variables(arrays, slots(kind))["params"]
    inputs = {name: jnp.asarray(value) for name, value in fixture.section(f"{prefix}.in.").items()}
    widths = {"image": inputs["image_features"].shape[1], "text": inputs["text_features"].shape[1]}
    dim = fixture[f"{prefix}.out.image_embedding"].shape[1]
    of_image, of_text = model(kind, dim, int(fixture["meta.width_factor"]), widths)

    def mapped(which: Align, batch: dict[str, Any], method: str, params: Any) -> Any:
        _, sown = which.apply({"params": params}, batch, train=True, method=method, mutable=["intermediates"])
        tree = sown["intermediates"]
        return tree["image"]["mapped"][0] if method == "encode_image" else tree["text"]["pooled"][0]

    def run(params: Any, learned: Any, inputs: Any) -> Any:
        images = mapped(of_image, {"image_embedding": inputs["image_features"]}, "encode_image", params)
        texts = [
            mapped(of_text, {"caption_embeddings": inputs[name]}, "encode_text", params)
            for name in ("text_features", "extra_text_features")
            if name in inputs
        ]
        loss = _loss(learned, images, jnp.stack(texts, axis=1).reshape(-1, dim), len(texts))
        extra = _loss(learned, images, texts[-1], 1)
        return loss, {"image_embedding": images, "text_embedding": texts[0], "loss": loss, "extra_loss": extra}

    (by_params, by_learned, by_inputs), ours = jax.grad(run, argnums=(0, 1, 2), has_aux=True)(params, learned, inputs)
    rows = []
    for name, recorded in fixture.section(f"{prefix}.out.").items():
        tolerance = (1e-5, 1e-5) if name.endswith("loss") else (2e-5, 1e-4)
        key = f"{prefix}.out.{name}"
        rows.append(compare(GROUP, key, ours[name], recorded, *tolerance, fixture.rounding(key)))
    for name, recorded in fixture.section(f"{prefix}.grad.in.").items():
        key = f"{prefix}.grad.in.{name}"
        rows.append(compare_gradient(GROUP, key, by_inputs[name], recorded, rounding=fixture.rounding(key)))
    for name, recorded in fixture.section(f"{prefix}.grad.param.").items():
        key = f"{prefix}.grad.param.{name}"
        if name in LEARNED:
            gradient, recorded = by_learned[LEARNED[name]], recorded[0]
        else:
            slot, gradient = slots(kind)[name], by_params
            for part in slot.path:
                gradient = gradient[part]
            recorded = slot.ours(recorded)
        rows.append(compare_gradient(GROUP, key, np.asarray(gradient), recorded, rounding=fixture.rounding(key)))
    return rows
