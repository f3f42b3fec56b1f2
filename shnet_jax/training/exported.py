"""Folders of `shnet export` and of --config.convert.to, read back in the place of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from shnet_jax.data.records import DataSet, Feature
from shnet_jax.data.schema import FIELDS, dtype_of
from shnet_jax.experiment import Experiment, abstract_variables
from shnet_jax.interop.weights_file import WEIGHTS, read_weights
from shnet_jax.untrusted import read_object

PROGRAMS = "programs.json"
"""File of a folder of `shnet export` that describes its programs and the fields that they read."""
FORMAT = 1  # raised when a key of PROGRAMS changes its name or meaning


def is_exported(folder: Path) -> bool:
    """Whether a folder holds exported weights and no checkpoints."""
    return (folder / WEIGHTS).is_file() and not (folder / "checkpoints").exists()


def restore_exported(folder: Path, experiment: Experiment) -> tuple[dict[str, Any], int]:
    """Variables {"params", "batch_stats"} of an exported folder, bit by bit, and their training step.

    Raises ValueError naming each array that the model of `experiment` does not have, or has in another shape.
    """
    variables, step = read_weights(folder / WEIGHTS)
    stored, expected = (
        {name: list(leaf.shape) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
        for tree in (variables, abstract_variables(experiment))
    )
    wrong = [
        f"{name}: {stored.get(name, 'absent')}, expected {expected.get(name, 'absent')}"
        for name in sorted(stored.keys() | expected.keys())
        if stored.get(name) != expected.get(name)
    ]
    if wrong:
        raise ValueError(
            f"{folder / WEIGHTS} does not fit its configuration and {experiment.dataset.path}:\n  "
            + "\n  ".join(wrong[:20])
        )
    return variables, step


def read_dataset(folder: Path, config: ConfigDict) -> DataSet | None:
    """The shapes of the data set that an exported model read, without any images; None where they are not said.

    Raises ValueError for a damaged PROGRAMS, or one of a younger version.
    """
    path = folder / PROGRAMS
    if not path.is_file():
        return None
    about = read_object(path)
    if about.get("format") != FORMAT:
        raise ValueError(f"{path}: format {about.get('format')!r:.80}, expected {FORMAT}: of another version")
    fields, encoder = about.get("fields"), about.get("text_encoder", "")
    if not isinstance(fields, dict) or not isinstance(encoder, str):
        raise ValueError(f"{path}: expected fields and text_encoder as `shnet export` writes them; was it edited?")
    features = {name: _feature(path, name, entry) for name, entry in fields.items()}
    metadata = {"text_encoder": encoder} if encoder else {}
    return DataSet(path, {}, features, config.model.num_classes, metadata)


def _feature(path: Path, name: str, entry: Any) -> Feature:
    match entry:
        case {"shape": list(sides), "dtype": str(dtype)} if name in FIELDS and all(
            side is None or (type(side) is int and side > 0) for side in sides
        ):
            if len(sides) == len(FIELDS[name].shape) and dtype in FIELDS[name].dtypes:
                return Feature(tuple(sides), dtype_of(dtype))
    raise ValueError(f"{path}: field {name!r:.80} is {entry!r:.200}, expected a shape and a dtype of docs/data.md")
