"""Pretrained BERT weights of a local Hugging Face folder, for `models.bert.BERT`.

A folder has config.json, vocab.txt or tokenizer.json, and the weights as model.safetensors, in shards with
model.safetensors.index.json, or as pytorch_model.bin, which is a pickle and read safely.
Every tensor must be known, present and of the right shape; nothing is guessed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shnet_jax.data.model_folder import below, read_lines
from shnet_jax.interop import minilm
from shnet_jax.interop.torch_file import open_torch_file
from shnet_jax.interop.torch_weights import Slot, Slots, linear_slots, norm_slots, to_params
from shnet_jax.interop.weights_file import read_safetensors
from shnet_jax.models.bert import BERT, EPSILON, TYPES
from shnet_jax.untrusted import read_object

log = logging.getLogger(__name__)

# Tensors of Hugging Face checkpoints that the tower has no use for: constants, the pooler and task heads.
IGNORED = ("embeddings.position_ids", "pooler.", "cls.", "classifier.", "qa_outputs.")

MAX_SIZE, MAX_LAYERS = 10**6, 1000
"""Upper bounds on sizes in a config.json: each layer costs time and memory before any tensor is read."""

_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))

# What our tower computes; a folder that says otherwise holds another model.
_REQUIRED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": EPSILON,
    "type_vocab_size": TYPES,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
# What Hugging Face takes for fields that a config.json leaves out; model_type has no default.
_DEFAULTS = {name: value for name, value in _REQUIRED.items() if name != "model_type"}

_SIZES = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}


def find_folder(weights: str) -> Path:
    """The folder that `config.text.weights` names: a path, or "minilm" for the optional package."""
    return minilm.folder() if weights == "minilm" else Path(weights).expanduser()


def sizes(folder: Path) -> dict[str, Any]:
    """Sizes of the tower in `folder`, by their names in `config.text`.

    Raises FileNotFoundError without a folder or config.json, ValueError for a model that the tower cannot compute.
    """
    path, config = read_config(folder, "BERT")
    for name, expected in _REQUIRED.items():
        value = config.get(name, _DEFAULTS.get(name))
        if value != expected:
            raise ValueError(f"{path}: {name} is {value!r:.80}; the BERT tower has {expected!r}")
    return {ours: check_size(path, name, config.get(name)) for ours, name in _SIZES.items()}


def read_config(folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """Path and content of the config.json of a folder. Raises FileNotFoundError without one, ValueError for no JSON."""
    path = folder / "config.json"
    if not path.is_file():
        fault = "has no config.json" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(
            f"{folder} {fault}: expected a {kind} as Hugging Face saves it (text.weights){below(folder)}"
        )
    return path, read_object(path)


def check_size(path: Path, name: str, size: Any) -> int:
    """Returns a size in a config.json. Raises ValueError for one that no model has."""
    most = MAX_LAYERS if "layers" in name else MAX_SIZE
    if type(size) is not int or not 1 <= size <= most:
        raise ValueError(f"{path}: {name} is {size!r:.80}, expected a positive integer up to {most}")
    return size


def load_bert(folder: Path) -> dict[str, Any]:
    """Parameters of `BERT(**sizes(folder))` from the folder's weights, float32.

    Raises FileNotFoundError for a missing file, ValueError naming each tensor that does not fit.
    """
    shape = sizes(folder)
    _check_vocabulary(folder, shape["vocab_size"])
    try:
        return bert_params(read_tensors(folder), shape)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def bert_params(arrays: Mapping[str, np.ndarray], shape: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of `BERT(**shape)` from arrays in torch's names and layouts.

    Names may begin with "bert." or not and may be the old ones (gamma, beta). Those in IGNORED are left out
    and logged. Raises ValueError naming each tensor that is unknown, missing or misshapen.
    """
    tower = BERT(**shape)
    tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    init = jax.eval_shape(lambda: tower.init(jax.random.key(0), tokens, mask, train=False))
    return to_params(_canonical(arrays), bert_slots(shape["layers"], ""), init["params"])


def bert_slots(layers: int, torch: str = "bert.", *path: str) -> Slots:
    """Slots of Hugging Face's `BertModel` of this many layers, names prefixed by `torch`, in our `BERT` at `path`."""
    slots = {
        f"{torch}embeddings.{name}_embeddings.weight": Slot("params", (*path, ours))
        for name, ours in (("word", "words"), ("position", "positions"), ("token_type", "types"))
    }
    slots |= norm_slots(f"{torch}embeddings.LayerNorm", *path, "norm")
    for i in range(layers):
        theirs, ours = f"{torch}encoder.layer.{i}.", (*path, f"layer_{i}")
        for name in ("query", "key", "value"):
            slots |= linear_slots(f"{theirs}attention.self.{name}", *ours, "attention", name)
        slots |= linear_slots(f"{theirs}attention.output.dense", *ours, "attention", "out")
        slots |= norm_slots(f"{theirs}attention.output.LayerNorm", *ours, "attention_norm")
        slots |= linear_slots(f"{theirs}intermediate.dense", *ours, "mlp", "in")
        slots |= linear_slots(f"{theirs}output.dense", *ours, "mlp", "out")
        slots |= norm_slots(f"{theirs}output.LayerNorm", *ours, "mlp_norm")
    return slots


def _canonical(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    named, ignored = {}, []
    for name, array in arrays.items():
        short = name.removeprefix("bert.")
        if short.startswith(IGNORED):
            ignored.append(name)
            continue
        for old, new in _OLD_NAMES:
            short = short.replace(old, new)
        if short in named:
            raise ValueError(f"two tensors are {short}; one of them is {name}")
        named[short] = array
    if ignored:
        log.info("BERT weights: %d tensors not used: %s", len(ignored), ", ".join(sorted(ignored)))
    return named


def read_tensors(folder: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Every tensor of the folder's file or files whose name begins with `prefix`, float32 (integers as they are).

    Raises FileNotFoundError for a missing file, ValueError for one that is damaged or against the index of the shards.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _read_file(single, prefix)
    if not index.is_file():
        if (pickled := folder / "pytorch_model.bin").is_file():
            return _read_pickled(pickled, prefix)
        raise FileNotFoundError(f"{folder} has neither {single.name} nor {index.name} nor {pickled.name}")
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{index}: expected JSON with a field weight_map, the file of each tensor")
    arrays: dict[str, np.ndarray] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index}: shard {shard!r} is not a file of this folder")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard} is missing; {index.name} names it")
        tensors = _read_file(folder / shard, prefix)
        listed = {name for name, place in places.items() if place == shard and name.startswith(prefix)}
        if set(tensors) != listed:
            differing = sorted(set(tensors) ^ listed)
            raise ValueError(f"{folder / shard}: tensors {differing} are there or in {index.name}, not in both")
        arrays |= tensors
    return arrays


def _read_file(path: Path, prefix: str) -> dict[str, np.ndarray]:
    return {name: _as_float32(array) for name, array in read_safetensors(path, prefix)[0].items()}


def _read_pickled(path: Path, prefix: str) -> dict[str, np.ndarray]:
    file = open_torch_file(path)
    state = file.state(file.content, "its content")
    return {name: _as_float32(file.array(tensor)) for name, tensor in state.items() if name.startswith(prefix)}


def _as_float32(array: Any) -> np.ndarray:
    return np.asarray(array, np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else np.asarray(array)


def _check_vocabulary(folder: Path, vocab_size: int) -> None:
    """Checks that a vocab.txt has no more pieces than the weights; a tokenizer.json is checked when it is read."""
    path = folder / "vocab.txt"
    if not path.is_file():
        if (folder / "tokenizer.json").is_file():
            return
        raise FileNotFoundError(f"{path} is missing: the weights mean nothing without it, or a tokenizer.json")
    pieces = len(read_lines(path, "a vocab.txt"))
    if pieces > vocab_size:
        raise ValueError(f"{path} has {pieces} pieces, config.json beside it a vocab_size of {vocab_size}")
