"""Reads photographs."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.files import inside
from shnet_jax.foreign import FORMATS, MAX_PIXELS, PICTURE_FAULTS


class BrokenImage(Exception):
    """A photograph that cannot be read; says which and why."""


def find(folder: Path, file: str) -> Path:
    """The photograph `file` below a folder, or directly in it where the caption file knows subfolders (COCO's).

    Raises DataError for a name that leads out of the folder.
    """
    path = inside(folder, file)
    return path if path.is_file() else inside(folder, Path(file).name)


def load(path: Path) -> Image.Image:
    """An RGB image, turned upright as its EXIF says. Raises BrokenImage."""
    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as image:  # see foreign.read_picture
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(f"{path}: {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise BrokenImage(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise BrokenImage(f"{path}: no {', '.join(FORMATS)}") from error
    except PICTURE_FAULTS as error:
        raise BrokenImage(f"{path}: {error}") from error
