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

from shnet_jax.interop.bert_weights import check_size, read_config, read_tensors
from shnet_jax.interop.torch_weights import Slot, Slots, linear_slots, norm_slots, to_params
from shnet_jax.models.clip import EPSILON, Text, Vision
from shnet_jax.models.layers import ACTIVATIONS

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

    Raises FileNotFoundError without a folder or config.json, ValueError for a model that the towers cannot compute.
    """
    path, config = read_config(folder, "CLIP")
    if config.get("model_type") != "clip":
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r}; expected 'clip'")
    text, vision = (_section(path, config, part, names) for part, names in (("text", _TEXT), ("vision", _VISION)))
    projection = check_size(path, "projection_dim", config.get("projection_dim", 512))
    side = vision.pop("image_size") // vision["patch"]
    return text | {"projection": projection}, vision | {"projection": projection, "grid": (side, side)}


def _section(path: Path, config: Mapping[str, Any], part: str, names: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    given = config.get(f"{part}_config") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: {part}_config is {given!r:.80}, expected an object")
    if (epsilon := given.get("layer_norm_eps", EPSILON)) != EPSILON:
        raise ValueError(f"{path}: {part}_config.layer_norm_eps is {epsilon!r}; the CLIP towers have {EPSILON!r}")
    values = {ours: given.get(theirs, default) for ours, (theirs, default) in names.items()}
    activation = values.pop("activation")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{path}: {part}_config.hidden_act is {activation!r}; the towers know {', '.join(ACTIVATIONS)}"
        )
    return {ours: check_size(path, names[ours][0], value) for ours, value in values.items()} | {
        "activation": activation
    }


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
    tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    pixels = jnp.zeros((1, vision["patch"], vision["patch"], 3), jnp.uint8)
    key = jax.random.key(0)
    like = {
        "text": jax.eval_shape(lambda: Text(**text).init(key, tokens, mask, train=False))["params"],
        "vision": jax.eval_shape(lambda: Vision(**vision).init(key, pixels, train=False))["params"],
    }
    used = {name: array for name, array in arrays.items() if name not in UNUSED}
    params = to_params(used, _slots(text["layers"], vision["layers"]), like)
    return params["text"], params["vision"]


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
            slots |= layer_slots(f"{prefix}encoder.layers.{i}.", tower, f"layer_{i}")
    return slots


def layer_slots(torch: str, *path: str) -> Slots:
    """Slots of a layer of Hugging Face's `CLIPModel` or `SiglipModel`, names prefixed by `torch`, in ours at `path`."""
    slots: Slots = {}
    for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
        slots |= linear_slots(f"{torch}self_attn.{short}_proj", *path, "attention", name)
    slots |= norm_slots(f"{torch}layer_norm1", *path, "attention_norm")
    slots |= norm_slots(f"{torch}layer_norm2", *path, "mlp_norm")
    slots |= linear_slots(f"{torch}mlp.fc1", *path, "in")
    return slots | linear_slots(f"{torch}mlp.fc2", *path, "out")
