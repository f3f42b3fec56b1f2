"""Old place of what `modes.evaluate`, `train.load` and `modes.train` hold."""

from __future__ import annotations

from shnet_jax.modes.evaluate import (
    EVALUATION_LOCK,
    TWO_STAGE_ENSEMBLE,
    evaluate,
    evaluate_checkpoint,
    evaluate_loaded,
    evaluate_zero_shot,
)
from shnet_jax.modes.train import train
from shnet_jax.train.load import Loaded, load, load_any

__all__ = ["EVALUATION_LOCK", "TWO_STAGE_ENSEMBLE", "Loaded", "evaluate", "evaluate_checkpoint", "evaluate_loaded"]
__all__ += ["evaluate_zero_shot", "load", "load_any", "train"]
