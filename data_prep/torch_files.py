"""Dictionaries by image that `torch.save` wrote, as Oscar's retrieval has its features and captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.files import check_file, data_errors
from data_prep.schema import DataError
from shnet_jax.foreign import parse_json
from shnet_jax.interop.torch_file import TorchFile, open_torch_file

_SCALE = 10
"""Times the usual bounds on a pickle: COCO has 123,287 images, each a tensor, and 616,767 captions."""


def open_by_image(path: Path) -> tuple[TorchFile, dict[Any, Any]]:
    """A file and its dictionary by image. Raises DataError for another value, or other keys."""
    check_file(path)
    with data_errors():
        file = open_torch_file(path, _SCALE)
    if not isinstance(file.content, dict) or not file.content or not all(type(k) in (int, str) for k in file.content):
        raise DataError(f"{path}: expected a dictionary by image, found {described(file.content)}")
    return file, file.content


def described(value: Any) -> str:
    """What a value in a file is, for an error."""
    if not isinstance(value, dict) or not value:
        return f"an empty {type(value).__name__}" if value in ({}, [], ()) else type(value).__name__
    names = [str(key)[:40] for key in list(value)[:6]]
    return f"a dictionary of {', '.join(names)}{', ...' if len(value) > len(names) else ''}"


def read_captions(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """Row, image and caption of a file {image: captions}, where captions are a list of texts or JSON of one.

    The caption is None for an image without any. Raises DataError naming the file and the image.
    """
    for row, (key, captions) in enumerate(open_by_image(path)[1].items()):
        where = f"{path}, image {str(key)!r:.80}"
        if isinstance(captions, str):
            with data_errors():
                captions = parse_json(captions, where)
        if not isinstance(captions, list | tuple) or not all(isinstance(text, str) for text in captions):
            raise DataError(f"{where}: expected a list of captions, or JSON of one, found {described(captions)}")
        for text in captions or (None,):
            yield row, str(key), text
