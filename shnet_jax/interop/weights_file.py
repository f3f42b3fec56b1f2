"""Our variables as one safetensors file, and back, bit by bit.

The name of a tensor is its path in the tree, "params/image/regions_linear/kernel".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from shnet_jax.observe.files import atomic_path
from shnet_jax.untrusted import check_kind

FORMAT = "shnet_jax"
WEIGHTS = "model.safetensors"
"""Name of the file in a folder of --config.convert.to or of `shnet export`."""
COLLECTIONS = ("params", "batch_stats")


def write_weights(path: Path, variables: dict[str, Any], step: int) -> None:
    """Writes {"params", "batch_stats"} of training step `step`, whole or not at all."""
    flat = traverse_util.flatten_dict({name: variables[name] for name in COLLECTIONS}, sep="/")
    with atomic_path(path) as temporary:
        save_file(flat, temporary, {"format": FORMAT, "step": str(step)})


def read_weights(path: Path) -> tuple[dict[str, Any], int]:
    """Reads ({"params", "batch_stats"}, step) from a file of `write_weights`.

    Raises FileNotFoundError, and ValueError for a file that is cut off or was written by something else.
    """
    flat, notes = read_safetensors(path)
    step = notes.get("step", "")
    if notes.get("format") != FORMAT or not step.isdecimal():
        raise ValueError(f"{path}: not written by --config.convert.to or shnet export: its header says {notes}")
    if strange := [name for name in flat if name.split("/")[0] not in COLLECTIONS]:
        raise ValueError(f"{path}: tensors that belong to no collection: {', '.join(strange)}")
    tree = traverse_util.unflatten_dict({tuple(name.split("/")): array for name, array in flat.items()})
    return {name: tree.get(name, {}) for name in COLLECTIONS}, int(step)


def read_safetensors(path: Path, prefix: str = "") -> tuple[dict[str, jax.Array], dict[str, str]]:
    """Reads (tensors by name, metadata) of a safetensors file. prefix: of the names of the tensors that are read.

    Raises FileNotFoundError, or ValueError for damage.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    check_kind(path)
    try:
        with safe_open(path, framework="flax") as file:  # NumPy alone has no bfloat16
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (no dict)
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, AttributeError) as error:  # also of 8-bit floats, which it does not know in JAX
        raise ValueError(f"{path}: not a readable safetensors file (cut off?): {error}") from None
