"""Pretrained CLIP weights of a local Hugging Face folder, for the two towers of `models.clip`.

A folder has config.json, the weights as model.safetensors (or in shards) and tokenizer.json or merges.txt. Every tensor
must be known, present and of the right shape; nothing is guessed and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from shnet_jax.data.model_folder import below
from shnet_jax.interop.bert_weights import check_size, read_tensors
from shnet_jax.interop.torch_weights import Slot, Slots, linear_slots, norm_slots, to_variables
from shnet_jax.models.clip import EPSILON, Text, Vision
from shnet_jax.models.layers import ACTIVATIONS
from shnet_jax.untrusted import read_object

UNUSED = ("logit_scale", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
"""Tensors that no tower has: the temperature of CLIP's own loss, and counters."""

# Hugging Face's names and the values it takes for fields that a config.json leaves out.
_COMMON = {
    "layers": ("num_hidden_layers", 12),
    "activation": ("hidden_act", "quick_gelu"),
}
_TEXT = {
    "vocab_size": ("vocab_size", 49408),
    "width": ("hidden_size", 512),
    "heads": ("num_attention_heads", 8),
    "mlp_dim": ("intermediate_size", 2048),
    "max_positions": ("max_position_embeddings", 77),
} | _COMMON
_VISION = {
    "width": ("hidden_size", 768),
    "heads": ("num_attention_heads", 12),
    "mlp_dim": ("intermediate_size", 3072),
    "patch": ("patch_size", 32),
    "image_size": ("image_size", 224),
} | _COMMON


def sizes(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes of the text tower by their names in `config.text`, and of the vision tower in `config.model.clip`.

    Raises FileNotFoundError without a folder or config.json, ValueError when it is no CLIP of our kind.
    """
    path = folder / "config.json"
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(
            f"{folder} {what}: expected a CLIP as Hugging Face saves it (text.weights){below(folder)}"
        )
    config = read_object(path)
    if config.get("model_type") != "clip":
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r}; expected 'clip'")
    text, vision = (_section(path, config, part, names) for part, names in (("text", _TEXT), ("vision", _VISION)))
    projection = _whole(path, "projection_dim", config.get("projection_dim", 512))
    side = vision.pop("image_size") // vision["patch"]
    return text | {"projection": projection}, vision | {"projection": projection, "grid": (side, side)}


def _section(path: Path, config: Mapping[str, Any], part: str, names: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    given = config.get(f"{part}_config") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: {part}_config is {given!r:.80}, expected an object")
    if (epsilon := given.get("layer_norm_eps", EPSILON)) != EPSILON:
        raise ValueError(f"{path}: {part}_config.layer_norm_eps is {epsilon!r}; the CLIP towers have {EPSILON!r}")
    found = {ours: given.get(theirs, default) for ours, (theirs, default) in names.items()}
    if found["activation"] not in ACTIVATIONS:
        raise ValueError(
            f"{path}: {part}_config.hidden_act is {found['activation']!r}; the towers know {', '.join(ACTIVATIONS)}"
        )
    return {ours: v if ours == "activation" else _whole(path, names[ours][0], v) for ours, v in found.items()}


def _whole(path: Path, name: str, value: Any) -> int:
    check_size(path, name, value)
    return value


def load_clip(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of `Text` and of `Vision` of the folder's sizes, float32.

    Raises FileNotFoundError for a missing file, ValueError naming each tensor that does not fit.
    """
    text, vision = sizes(folder)
    try:
        return clip_params(read_tensors(folder), text, vision)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def clip_params(
    arrays: Mapping[str, np.ndarray], text: Mapping[str, Any], vision: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of `Text(**text)` and `Vision(**vision)` from arrays in torch's names and layouts.

    Raises ValueError naming each tensor that is unknown, missing or misshapen.
    """
    used = {name: array for name, array in arrays.items() if name not in UNUSED}
    slots = _slots(text["layers"], vision["layers"])
    shapes = _shapes(text, vision)
    expected = {name: _torch_shape(shapes[slot.path], slot) for name, slot in slots.items()}
    wrong = [
        f"{name} is {np.shape(used[name])}, expected {shape}"
        for name, shape in expected.items()
        if name in used and np.shape(used[name]) != shape
    ]
    if wrong:
        raise ValueError(f"tensors whose shapes are not those of the configuration: {'; '.join(wrong)}")
    params = to_variables(used, slots)["params"]
    params = jax.tree.map(lambda a: np.ascontiguousarray(a, np.float32), params)
    return params["text"], params["vision"]


def _torch_shape(ours: tuple[int, ...], slot: Slot) -> tuple[int, ...]:
    return ours if slot.axes is None else tuple(ours[slot.axes.index(i)] for i in range(len(ours)))


def _shapes(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of every parameter of both towers, by path."""
    tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    side = vision["patch"]
    pixels = jnp.zeros((1, side, side, 3), jnp.uint8)
    key = jax.random.key(0)
    params = {
        "text": jax.eval_shape(lambda: Text(**text).init(key, tokens, mask, train=False))["params"],
        "vision": jax.eval_shape(lambda: Vision(**vision).init(key, pixels, train=False))["params"],
    }
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params).items()}


def _slots(text_layers: int, vision_layers: int) -> Slots:
    """Slots of Hugging Face's `CLIPModel` in {"text": our Text, "vision": our Vision}."""
    text, vision = "text_model.", "vision_model."
    slots = {
        f"{text}embeddings.token_embedding.weight": Slot("params", ("text", "words")),
        f"{text}embeddings.position_embedding.weight": Slot("params", ("text", "positions")),
        "text_projection.weight": Slot("params", ("text", "projection_kernel"), (1, 0)),
        f"{vision}embeddings.class_embedding": Slot("params", ("vision", "class")),
        f"{vision}embeddings.patch_embedding.weight": Slot("params", ("vision", "patches"), (2, 3, 1, 0)),
        f"{vision}embeddings.position_embedding.weight": Slot("params", ("vision", "positions")),
        "visual_projection.weight": Slot("params", ("vision", "projection_kernel"), (1, 0)),
    }
    slots |= norm_slots(f"{text}final_layer_norm", "text", "norm")
    slots |= norm_slots(f"{vision}pre_layrnorm", "vision", "norm_first")  # so misspelt there
    slots |= norm_slots(f"{vision}post_layernorm", "vision", "norm")
    for prefix, tower, layers in ((text, "text", text_layers), (vision, "vision", vision_layers)):
        for i in range(layers):
            theirs, ours = f"{prefix}encoder.layers.{i}.", (tower, f"layer_{i}")
            for name in ("q", "k", "v", "out"):
                own = {"q": "query", "k": "key", "v": "value", "out": "out"}[name]
                slots |= linear_slots(f"{theirs}self_attn.{name}_proj", *ours, "attention", own)
            slots |= norm_slots(f"{theirs}layer_norm1", *ours, "attention_norm")
            slots |= norm_slots(f"{theirs}layer_norm2", *ours, "mlp_norm")
            slots |= linear_slots(f"{theirs}mlp.fc1", *ours, "in")
            slots |= linear_slots(f"{theirs}mlp.fc2", *ours, "out")
    return slots
