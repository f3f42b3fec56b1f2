"""Dictionaries by image that `torch.save` wrote, as Oscar's retrieval has its features and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.files import data_errors
from data_prep.schema import DataError
from shnet_jax.interop.torch_file import TorchFile, open_torch_file

_SCALE = 10
"""Times the usual bounds on a pickle: COCO has 123,287 images, each a tensor, and 616,767 captions."""


def open_by_image(path: Path) -> tuple[TorchFile, dict[Any, Any]]:
    """A file and its dictionary by image. Raises DataError for another value, or other keys."""
    try:
        with data_errors():
            file = open_torch_file(path, _SCALE)
    except FileNotFoundError as error:
        raise DataError(str(error)) from None
    if not isinstance(file.content, dict) or not file.content or not all(type(k) in (int, str) for k in file.content):
        raise DataError(f"{path}: expected a dictionary by image, found {described(file.content)}")
    return file, file.content


def described(value: Any) -> str:
    """What a value in a file is, for an error."""
    if not isinstance(value, dict) or not value:
        return f"an empty {type(value).__name__}" if value in ({}, [], ()) else type(value).__name__
    names = [str(key)[:40] for key in list(value)[:6]]
    return f"a dictionary of {', '.join(names)}{', ...' if len(value) > len(names) else ''}"
