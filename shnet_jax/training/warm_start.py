"""Warm start: a run whose first parameters are those of another run or of an exported folder."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.data.tokenise import kept_vocabulary
from shnet_jax.interop.weights_file import read_weights
from shnet_jax.paths import to_path
from shnet_jax.training.checkpoint import CheckpointError, Checkpoints
from shnet_jax.training.workdir import trained_config

log = logging.getLogger(__name__)

SHOWN = 20  # names of arrays in a message, at most


def warm_start(variables: dict[str, Any], config: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    """The initial variables with the arrays of config.train.init_from in their place.

    config.train.init_from: work folder of a run, whose best checkpoint (its running averages, if it keeps them) is
      taken; a folder of config.convert.to; or a .safetensors file of such a folder.
    config.train.init_partial: arrays that one side lacks, or has in another shape, keep their initial values.

    Raises ValueError with every array that does not fit, unless init_partial is set, and for another vocabulary;
    WorkdirError, CheckpointError or FileNotFoundError where there is nothing to read.
    """
    source = to_path(config.train.init_from)
    if source.is_dir():
        _check_vocabulary(source, config)
    theirs = traverse_util.flatten_dict(_read(source), sep="/")
    ours = traverse_util.flatten_dict(variables, sep="/")
    wrong = [
        f"{name}: {_shape(theirs.get(name))} there, {_shape(ours.get(name))} here"
        for name in sorted(ours.keys() | theirs.keys())
        if _shape(theirs.get(name)) != _shape(ours.get(name))
    ]
    if wrong and not config.train.init_partial:
        more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"config.train.init_from is {source}, a model of other arrays; --config.train.init_partial=True takes "
            f"those that fit:\n  " + "\n  ".join(wrong[:SHOWN]) + more
        )
    fitting = {name: array for name, array in theirs.items() if _shape(array) == _shape(ours.get(name))}
    if not fitting:
        raise ValueError(f"config.train.init_from is {source}: none of its {len(theirs)} arrays fits this model")
    kept = len(ours) - len(fitting)
    log.info("warm start from %s: %d of %d arrays; %d keep their initial values", source, len(fitting), len(ours), kept)
    merged = traverse_util.unflatten_dict({**ours, **fitting}, sep="/")
    return {name: merged.get(name, {}) for name in variables}


def _read(source: Path) -> dict[str, Any]:
    """{"params", "batch_stats"} of a work folder, an exported folder or file."""
    weights = source / "model.safetensors" if source.is_dir() else source
    if weights.is_file() or source.suffix == ".safetensors":
        return read_weights(weights)[0]
    config = trained_config(source)
    with closing(Checkpoints(source)) as checkpoints:
        step = checkpoints.step("best")
        if step is None:
            raise CheckpointError(f"{source}: no checkpoint in {checkpoints.folder}")
        averaged = config.optim.ema > 0
        like = checkpoints.abstract_variables(step, averaged=averaged)
        return checkpoints.restore_variables(step, like, averaged=averaged, on_host=True)


def _check_vocabulary(source: Path, config: ConfigDict | FrozenConfigDict) -> None:
    """Raises ValueError where a token would be another word than in the run that the parameters come from."""
    suffix, contents = kept_vocabulary(config)
    for path in source.glob("vocabulary.*"):
        if path.suffix != suffix or path.read_bytes().strip() != contents.strip():
            raise ValueError(
                f"config.train.init_from is {source}, trained with another vocabulary: take it over with "
                f"--config.tokenizer.path={path}"
            )


def _shape(array: Any) -> str:
    return "absent" if array is None else str(list(array.shape))
