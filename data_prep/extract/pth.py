"""Reads a tensor that PyTorch saved."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch

from data_prep.schema import DataError


def read_tensor(path: Path) -> np.ndarray:
    """The one tensor in a .pth file; nothing but tensors and plain containers is unpickled (`weights_only`)."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(f"{path}: expected a tensor saved by PyTorch: {error}") from error
    if not isinstance(value, torch.Tensor):
        raise DataError(f"{path}: expected a tensor, found {type(value).__name__}")
    return value.float().numpy()
