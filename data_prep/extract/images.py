"""Reads photographs."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps


class BrokenImage(Exception):
    """A photograph that cannot be read; says which and why."""


def find(folder: Path, file: str) -> Path:
    """The photograph `file` below a folder, or directly in it where the caption file knows subfolders (COCO's)."""
    path = folder / file
    return path if path.is_file() else folder / Path(file).name


def load(path: Path) -> Image.Image:
    """An RGB image, turned upright as its EXIF says. Raises BrokenImage."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise BrokenImage(f"{path}: no such file") from error
    # Pillow's decoders: truncated or unknown files, damaged PNG chunks, sizes that would fill the memory
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"{path}: {error}") from error
