"""The pixels of a scene: stuff with a pattern, things painted over it from back to front, light and noise."""

from __future__ import annotations

import functools

import numpy as np

from data_prep.scenes.shapes import PIXEL_CENTRES, SHAPES, SIDE
from data_prep.scenes.world import COLOURS, STUFF, TEXTURES, Scene

# Stuff is muted and things are saturated, so that a colour word is about a thing.
STUFF_RGB = {
    "sky": (172, 206, 236),
    "hills": (134, 140, 116),
    "forest": (52, 82, 60),
    "wall": (160, 112, 94),
    "sea": (66, 104, 142),
    "grass": (116, 152, 84),
    "sand": (214, 196, 152),
    "snow": (232, 238, 244),
    "road": (112, 112, 116),
    "floor": (150, 118, 82),
}
COLOUR_RGB = {
    "red": (214, 28, 30),
    "orange": (246, 134, 14),
    "yellow": (246, 222, 26),
    "green": (24, 170, 40),
    "turquoise": (20, 196, 186),
    "blue": (28, 62, 220),
    "purple": (132, 36, 190),
    "pink": (250, 110, 184),
    "white": (250, 250, 250),
    "black": (22, 22, 24),
}
STUFF_TABLE = np.array([(0, 0, 0)] * len(SHAPES) + [STUFF_RGB[s] for s in STUFF], np.float32)
COLOUR_TABLE = np.array([COLOUR_RGB[c] for c in COLOURS], np.float32)
PERIOD = 7.0  # pixels of a stripe and its gap


@functools.cache
def _patterns() -> np.ndarray:
    """Brightness offsets [classes, SIDE, SIDE] float32, of 255, of each pixel of a stuff class."""
    y, x = np.indices((SIDE, SIDE), np.float32)
    rng = np.random.default_rng(0)
    grain = rng.normal(size=(SIDE, SIDE)).astype(np.float32)
    blades = (grain + np.roll(grain, 1, 0) + np.roll(grain, 2, 0)) / 1.7  # short upright streaks
    courses = (y % 8 < 1.5) | ((x + 8 * (y // 8 % 2)) % 16 < 1.5)
    made = {
        "sky": 6 * np.sin(2 * np.pi * (x + 2 * y) / SIDE),
        "hills": 14 * np.sin(x / 9 + 5 * np.sin(y / 23)),
        "forest": 20 * np.sin(x / 1.9) + 6 * grain,
        "wall": -34.0 * courses,
        "sea": 13 * np.sin(y / 1.7 + 0.9 * np.sin(x / 5)),
        "grass": 20 * blades,
        "sand": 7 * grain,
        "snow": 3 * grain,
        "road": 26.0 * ((x % 24 < 12) & (y % 20 < 2.5)),
        "floor": -28.0 * (x % 13 < 1.5),
    }
    return np.stack([np.zeros((SIDE, SIDE), np.float32)] * len(SHAPES) + [made[s].astype(np.float32) for s in STUFF])


def _texture(texture: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Mask of the second tone of a texture at pixel offsets u, v from the thing's centre."""
    match TEXTURES[texture]:
        case "striped":
            return (u + v) % PERIOD < PERIOD * 0.45
        case "dotted":
            du, dv = (u + PERIOD / 2) % PERIOD - PERIOD / 2, (v + PERIOD / 2) % PERIOD - PERIOD / 2
            return du * du + dv * dv < (PERIOD * 0.3) ** 2
        case "checked":
            return (u % PERIOD < PERIOD / 2) ^ (v % PERIOD < PERIOD / 2)
    return np.zeros(np.broadcast_shapes(u.shape, v.shape), bool)


def _inner(alpha: np.ndarray) -> np.ndarray:
    """Alpha without its outermost pixels: what is left of it is painted, the rest is the outline."""
    padded = np.pad(alpha, 1)
    return np.minimum.reduce([alpha, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Picture uint8 [SIDE, SIDE, 3] of a scene; rng gives the light, the shades and the sensor's noise."""
    y, x = PIXEL_CENTRES
    stuff = scene.ground.at(x, y)
    rows, columns = np.ix_(*((np.arange(SIDE) + shift) % SIDE for shift in rng.integers(0, SIDE, 2)))
    shades = STUFF_TABLE + rng.normal(scale=5, size=STUFF_TABLE.shape).astype(np.float32)
    image = shades[stuff] + _patterns()[stuff, rows, columns][..., None]
    for look, spot, (top, left, alpha) in zip(scene.looks, scene.spots, scene.covers, strict=True):
        h, w = alpha.shape
        u = np.arange(left, left + w, dtype=np.float32)[None] - spot.x * SIDE
        v = np.arange(top, top + h, dtype=np.float32)[:, None] - spot.y * SIDE
        tone = COLOUR_TABLE[look.colour] + rng.normal(scale=6, size=3).astype(np.float32)
        second = 0.45 * tone + 0.55 * (255.0 if tone.mean() < 150 else 40.0)
        paint = np.where(_texture(look.texture, u, v)[..., None], second, tone)
        inner = _inner(alpha)[..., None]
        part = image[top : top + h, left : left + w]
        part += alpha[..., None] * (0.35 * tone - part)  # outline: a white disc can be seen on snow
        part += inner * (paint - part)
    image = image * np.float32(rng.uniform(0.88, 1.08)) + rng.standard_normal(image.shape, np.float32) * 4
    return np.clip(image, 0, 255).astype(np.uint8)
