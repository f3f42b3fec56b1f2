"""Makes the pictures of a page as data URIs: small photographs, label maps in colours, heat."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shnet_jax import untrusted

SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".webp")
SIDE = 320  # longest side of a photograph on the page, in pixels
HEAT = (214, 40, 90)  # colour of attention and gates; the opacity is their value

# Colours that most people expect of common classes; the first of these words in a class's name decides.
_EXPECTED = {
    "person": "#e07a5f",
    "sky": "#a9d0ee",
    "sea": "#5b9bd0",
    "water": "#5b9bd0",
    "river": "#6aa8d8",
    "grass": "#93c572",
    "playingfield": "#93c572",
    "forest": "#4f8f55",
    "tree": "#4f8f55",
    "hills": "#8a9a5b",
    "mountain": "#9c8b76",
    "rock": "#8d8479",
    "sand": "#e8d5a4",
    "snow": "#eef3f8",
    "road": "#8e8e96",
    "pavement": "#a9a7ac",
    "gravel": "#b3aca2",
    "dirt": "#b98f66",
    "floor": "#c7a17a",
    "wall": "#cdb4a6",
    "house": "#c08d7c",
    "building": "#b9a3a0",
    "dog": "#8a5a2b",
}
VOID = "#d8d8dc"


def colour(number: int, names: Sequence[str]) -> str:
    """Colour #rrggbb of a class: the expected one, else a hue that differs from those of its neighbours in number."""
    if number >= len(names):
        return VOID if names else _hue(number)
    words = names[number].replace("-", " ").split()
    return next((_EXPECTED[word] for word in words if word in _EXPECTED), _hue(number))


def _hue(number: int) -> str:
    rgb = colorsys.hls_to_rgb((number * 0.61803398875) % 1, 0.45 + 0.1 * (number % 3), 0.55)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _uri(data: bytes, kind: str) -> str:
    """The bytes of a picture as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _png(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return _uri(out.getvalue(), "png")


def photograph(folder: Path, image_id: str) -> tuple[str, float] | None:
    """The photograph of an image made small, and its width / height; None when the folder has none of that name.

    Raises ValueError for a file that is no picture.
    """
    try:
        paths = [untrusted.inside(folder, f"{image_id}{suffix}") for suffix in SUFFIXES]
    except ValueError:  # an id of somebody else's data set must not bring a file from elsewhere into a page
        return None
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    return small(untrusted.read_picture(path))


def small(picture: Image.Image) -> tuple[str, float]:
    """A picture made small as a data URI, and its width / height."""
    aspect, out = picture.width / picture.height, io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(out, "JPEG", quality=82)
    return _uri(out.getvalue(), "jpeg"), aspect


def label_map(seg_map: np.ndarray, names: Sequence[str]) -> str:
    """Picture of a seg_map [H, W] uint8 in the colours of its classes."""
    classes, index = np.unique(seg_map, return_inverse=True)
    picture = Image.fromarray(index.reshape(seg_map.shape).astype(np.uint8), "P")
    picture.putpalette(b"".join(bytes.fromhex(colour(int(c), names)[1:]) for c in classes))
    return _png(picture)


def shares(seg_map: np.ndarray, names: Sequence[str], most: int = 4) -> list[tuple[str, str, float]]:
    """Largest classes of a map, or of a part of it, as (class, colour, share of the pixels)."""
    classes, counts = np.unique(seg_map, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    order = order[counts[order] >= min(0.005 * seg_map.size, int(counts.max()))]
    return [
        (class_name(int(classes[i]), names), colour(int(classes[i]), names), counts[i] / seg_map.size) for i in order
    ]


def class_name(number: int, names: Sequence[str]) -> str:
    """The name of a class for people."""
    if number < len(names):
        return names[number].removesuffix("-merged").removesuffix("-other").replace("-", " ")
    return "unlabelled" if names else f"class {number}"


def inside(seg_map: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The pixels of a map [H, W] in a box x1 y1 x2 y2 in 0..1, at least one."""
    height, width = seg_map.shape
    x1, x2 = _span(box[0], box[2], width)
    y1, y2 = _span(box[1], box[3], height)
    return seg_map[y1:y2, x1:x2]


def _span(first: float, last: float, size: int) -> tuple[int, int]:
    start = min(max(int(first * size), 0), size - 1)
    return start, max(start + 1, min(round(float(last) * size), size))


def heat(values: np.ndarray) -> str:
    """Heat map of values [H, W] >= 0 as opacity of one colour: sqrt(value / largest), so that small values show.

    Each pixel is the largest of its 3 x 3 neighbourhood on a map as fine as a label map, where one could not be seen.
    """
    if min(values.shape) > 16:
        padded = np.pad(values, 1)
        values = np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).max((2, 3))
    top = float(values.max())
    alpha = np.sqrt(np.clip(values / top, 0, 1)) if top > 0 else np.zeros_like(values)
    rgba = np.empty((*values.shape, 4), np.uint8)
    rgba[..., :3], rgba[..., 3] = HEAT, np.round(225 * alpha)
    return _png(Image.fromarray(rgba, "RGBA"))
