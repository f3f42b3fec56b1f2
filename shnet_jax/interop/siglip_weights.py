"""Pretrained text towers of SigLIP and SigLIP 2, of a local Hugging Face folder, for `models.siglip`.

A folder has config.json, the weights as model.safetensors (or in shards, or as pytorch_model.bin) and spiece.model or
tokenizer.json. Every tensor of the text tower must be known, present and of the right shape; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shnet_jax.interop.bert_weights import check_size, read_config, read_tensors
from shnet_jax.interop.clip_weights import layer_slots
from shnet_jax.interop.torch_weights import Slot, Slots, linear_slots, norm_slots, to_params
from shnet_jax.models.layers import ACTIVATIONS
from shnet_jax.models.siglip import EPSILON, Text

TEXT = "text_model."
UNUSED = ("text_model.embeddings.position_ids",)
"""Tensors of the text side that the tower does not have: a counter."""

# Hugging Face's names and the values it takes for fields that a config.json leaves out.
_SIZES = {
    "vocab_size": ("vocab_size", 32000),
    "width": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "mlp_dim": ("intermediate_size", 3072),
    "max_positions": ("max_position_embeddings", 64),
}


def sizes(folder: Path) -> dict[str, Any]:
    """Sizes of the text tower by their names in `config.text`.

    Raises FileNotFoundError without a folder or config.json, ValueError for a model that the tower cannot compute.
    """
    path, config = read_config(folder, "SigLIP")
    if config.get("model_type") != "siglip":
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r}; expected 'siglip'")
    given = config.get("text_config") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: text_config is {given!r:.80}, expected an object")
    if (epsilon := given.get("layer_norm_eps", EPSILON)) != EPSILON:
        raise ValueError(f"{path}: text_config.layer_norm_eps is {epsilon!r}; the SigLIP tower has {EPSILON!r}")
    activation = given.get("hidden_act", "gelu_pytorch_tanh")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path}: text_config.hidden_act is {activation!r}; the tower knows {', '.join(ACTIVATIONS)}")
    tower_sizes = {ours: check_size(path, name, given.get(name, default)) for ours, (name, default) in _SIZES.items()}
    projection = given.get("projection_size")
    width = tower_sizes["width"] if projection is None else check_size(path, "projection_size", projection)
    return tower_sizes | {"projection": width, "activation": activation}


def load_siglip(folder: Path) -> dict[str, Any]:
    """Parameters of `Text(**sizes(folder))`, float32; those of the image side are left out.

    Raises FileNotFoundError for a missing file, ValueError naming each tensor that does not fit.
    """
    text = sizes(folder)
    try:
        return siglip_params(read_tensors(folder, TEXT), text)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def siglip_params(arrays: Mapping[str, np.ndarray], text: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of `Text(**text)` from arrays of the text side in torch's names and layouts.

    Raises ValueError naming each tensor that is unknown, missing or misshapen.
    """
    tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    like = jax.eval_shape(lambda: Text(**text).init(jax.random.key(0), tokens, mask, train=False))["params"]
    used = {name: array for name, array in arrays.items() if name not in UNUSED}
    return to_params(used, _slots(text["layers"]), like)


def _slots(layers: int) -> Slots:
    """Slots of the text tower of Hugging Face's `SiglipModel` in our `Text`."""
    slots = {
        f"{TEXT}embeddings.token_embedding.weight": Slot("params", ("words",)),
        f"{TEXT}embeddings.position_embedding.weight": Slot("params", ("positions",)),
    }
    slots |= norm_slots(f"{TEXT}final_layer_norm", "norm")
    slots |= linear_slots(f"{TEXT}head", "projection_head")
    for i in range(layers):
        slots |= layer_slots(f"{TEXT}encoder.layers.{i}.", f"layer_{i}")
    return slots
