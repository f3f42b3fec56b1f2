"""The shapes of things: which points they cover, and which pixels of the picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPES = (
    "disc",
    "ring",
    "square",
    "triangle",
    "diamond",
    "star",
    "cross",
    "heart",
    "crescent",
    "hexagon",
    "arrow",
    "flower",
)
SIDE = 128  # pixels of a side of the picture
_centres = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
PIXEL_CENTRES = (_centres[:, None], _centres[None])  # y [SIDE, 1], x [1, SIDE]

Cover = tuple[int, int, np.ndarray]  # top, left, alpha float32 [h, w]


@dataclass(frozen=True)
class Spot:
    """Centre (y points down) and radius in shares of the picture's side, angle in radians."""

    x: float
    y: float
    radius: float
    angle: float


def inside(shape: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points of the square [-1, 1]^2 (v points down) lie in the shape -> bool."""
    name = SHAPES[shape]
    au, av = np.abs(u), np.abs(v)
    r2 = u * u + v * v
    match name:
        case "disc":
            return r2 < 1
        case "ring":
            return (r2 < 1) & (r2 > 0.3)
        case "square":
            return np.maximum(au, av) < 0.9
        case "triangle":
            return (v < 0.85) & (au < (v + 1) / 1.85)
        case "diamond":
            return au / 0.75 + av < 1
        case "cross":
            return (np.minimum(au, av) < 0.33) & (np.maximum(au, av) < 1)
        case "heart":
            a, b = 1.2 * u, 0.15 - 1.2 * v
            q = a * a + b * b - 1
            return q * q * q < a * a * b * b * b
        case "crescent":
            return (r2 < 1) & ((u - 0.5) ** 2 + v * v > 0.64)
        case "hexagon":
            return (av < 0.866) & (au + av * 0.5774 < 1)
        case "arrow":
            return ((v < 0) & (au < (v + 1) * 0.95)) | ((v >= 0) & (v < 1) & (au < 0.35))
    theta, r = np.arctan2(u, -v), np.sqrt(r2)
    if name == "flower":
        return r < 0.5 + 0.5 * np.abs(np.cos(2.5 * theta))
    # star: edges from a tip (radius 1) to a notch (radius 0.42), written as a line in polar coordinates
    fold = np.abs((theta + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    notch = 0.42
    height, base = notch * np.sin(np.pi / 5), 1 - notch * np.cos(np.pi / 5)
    edge = height / (np.sin(fold) * base + height * np.cos(fold))
    return r < edge


def cover(shape: int, spot: Spot) -> Cover:
    """Pixels of a shape at a spot: (top, left, alpha [h, w]), averaged over 2 x 2 points a pixel."""
    reach = spot.radius * 1.2  # corners of a turned square
    top, left = (max(0, int((c - reach) * SIDE)) for c in (spot.y, spot.x))
    bottom, right = (min(SIDE, int((c + reach) * SIDE) + 1) for c in (spot.y, spot.x))
    dy = ((np.arange(2 * top, 2 * bottom, dtype=np.float32) + 0.5) / (2 * SIDE) - spot.y) / spot.radius
    dx = ((np.arange(2 * left, 2 * right, dtype=np.float32) + 0.5) / (2 * SIDE) - spot.x) / spot.radius
    cos, sin = np.float32(np.cos(spot.angle)), np.float32(np.sin(spot.angle))
    u, v = dx[None] * cos + dy[:, None] * sin, dy[:, None] * cos - dx[None] * sin
    hit = inside(shape, u, v).astype(np.float32)
    return top, left, (hit[::2, ::2] + hit[1::2, ::2] + hit[::2, 1::2] + hit[1::2, 1::2]) / 4
