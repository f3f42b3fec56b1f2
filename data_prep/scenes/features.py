"""Substitute for the outputs of a detector and a segmentation network, computed from the pixels and the label map.

A region is described by a histogram of oriented gradients, soft colour histograms and histograms of uniform
local binary patterns of its own crop: nothing in it tells where the crop came from.
"""

from __future__ import annotations

import functools

import numpy as np
from skimage.feature import local_binary_pattern

from data_prep.scenes.shapes import SIDE
from data_prep.scenes.world import CLASS_NAMES

CELL, ORIENTATIONS = 8, 9  # pixels of a HOG cell after resizing, orientation bins
HUES, GREYS, PATTERNS = 12, 6, 10  # bins of the colour histogram; uniform patterns of 8 neighbours
REGION_CELLS, GRID_CELLS = 4, 2  # HOG cells of a side of the crop
REGION_SIZE = REGION_CELLS**2 * ORIENTATIONS + 2 * (HUES + GREYS + PATTERNS)
GRID_SIZE = GRID_CELLS**2 * ORIENTATIONS + HUES + GREYS + PATTERNS
GRID = 7  # cells of a side of `grid` and of `seg_semantic`
MAP = 64  # pixels of a side of `seg_map`
# Mean and deviation over 512 scenes of each part, (regions, grid): every part gets a mean square near 1.
SCALES = {
    "hog": ((0.054, 0.063), (0.127, 0.108)),
    "colour": ((0.13, 0.20), (0.12, 0.20)),
    "lbp": ((0.30, 0.092), (0.30, 0.091)),
}


def crop(plane: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """Bilinear crops [K, size, size] float32 of a plane [H, W] inside boxes [K, 4] (x1 y1 x2 y2 in 0..1)."""
    at = (np.arange(size, dtype=np.float32) + 0.5) / size
    low_high = []
    for axis, length in ((1, plane.shape[0]), (0, plane.shape[1])):
        start, stop = boxes[:, axis, None], boxes[:, axis + 2, None]
        position = np.clip((start + (stop - start) * at) * length - 0.5, 0, length - 1)
        low = np.minimum(position.astype(np.intp), length - 2)
        low_high.append((low, (position - low).astype(np.float32)))
    (y, fy), (x, fx) = low_high
    y, fy, x, fx = y[:, :, None], fy[:, :, None], x[:, None], fx[:, None]
    flat, width = plane.ravel(), plane.shape[1]
    i = y * width + x
    upper = flat[i] * (1 - fx) + flat[i + 1] * fx
    lower = flat[i + width] * (1 - fx) + flat[i + width + 1] * fx
    return upper * (1 - fy) + lower * fy


def hog(crops: np.ndarray) -> np.ndarray:
    """HOG of square crops [K, S, S] -> [K, (S / CELL)^2 * ORIENTATIONS], one block over the crop, L2-Hys.

    The same numbers as `skimage.feature.hog(crop, cells_per_block=(S // CELL, S // CELL))`, which takes one crop at a
    time: 3.5 ms for the 16 regions and 49 grid cells of a picture, together 0.5 ms.
    """
    k, size, _ = crops.shape
    cells = size // CELL
    gy, gx = np.zeros_like(crops), np.zeros_like(crops)
    gy[:, 1:-1] = crops[:, 2:] - crops[:, :-2]
    gx[:, :, 1:-1] = crops[:, :, 2:] - crops[:, :, :-2]
    angle = np.arctan2(gy, gx) * np.float32(ORIENTATIONS / np.pi)
    bins = np.floor(angle).astype(np.intp) % ORIENTATIONS
    cell = np.arange(size) // CELL
    place = (np.arange(k)[:, None, None] * cells + cell[:, None]) * cells + cell
    counts = np.bincount((place * ORIENTATIONS + bins).ravel(), np.hypot(gy, gx).ravel(), k * cells**2 * ORIENTATIONS)
    block = counts.reshape(k, -1) / CELL**2
    block = np.minimum(block / np.sqrt((block**2).sum(1, keepdims=True) + 1e-10), 0.2)
    return block / np.sqrt((block**2).sum(1, keepdims=True) + 1e-10)


def _histogram(bins: np.ndarray, weights: np.ndarray | None, count: int) -> np.ndarray:
    """Histograms [K, count] of bins [K, ...]."""
    k = len(bins)
    offset = np.arange(k).reshape(k, *[1] * (bins.ndim - 1)) * count
    flat_weights = None if weights is None else weights.ravel()
    return np.bincount((bins + offset).ravel(), flat_weights, k * count).reshape(k, count)


def _colour(hue: np.ndarray, chroma: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Roots of soft shares [K, HUES + GREYS]: hues weighted by chroma, grey levels by what is left."""
    position = hue * HUES
    low, part = position.astype(np.intp), position % 1
    hues = _histogram(low % HUES, chroma * (1 - part), HUES) + _histogram((low + 1) % HUES, chroma * part, HUES)
    position = value * (GREYS - 1)
    low = np.minimum(position.astype(np.intp), GREYS - 2)
    part = position - low
    greys = _histogram(low, (1 - chroma) * (1 - part), GREYS) + _histogram(low + 1, (1 - chroma) * part, GREYS)
    return np.sqrt(np.concatenate([hues, greys], axis=1) / hue[0].size)


def _scaled(part: np.ndarray, name: str, grid: bool) -> np.ndarray:
    mean, deviation = SCALES[name][grid]
    return (part - mean) / deviation


def planes(image: np.ndarray) -> dict[str, np.ndarray]:
    """Planes of a picture uint8 [H, W, 3] that `describe` reads: grey, hue, chroma, value, lbp, each [H, W]."""
    # A contiguous plane a channel: 0.2 ms, where skimage.color.rgb2hsv, which reduces over the last axis, takes 2.7 ms.
    red, green, blue = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / 255
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    hue = np.arctan2(np.float32(3**0.5) * (green - blue), 2 * red - green - blue) / np.float32(2 * np.pi) % 1
    lbp = local_binary_pattern((grey * 255).astype(np.uint8), P=8, R=1, method="uniform").astype(np.intp)
    return {"grey": grey, "hue": hue, "chroma": chroma, "value": value, "lbp": lbp}


def describe(source: dict[str, np.ndarray], boxes: np.ndarray, *, grid: bool = False) -> np.ndarray:
    """Descriptors float16 [K, REGION_SIZE] (of grid cells [K, GRID_SIZE]) of boxes [K, 4] in `planes`.

    HOG of the resized crop, then colour and pattern histograms of the crop; a region has the histograms of
    its central half too, where there is less background.
    """
    size = CELL * (GRID_CELLS if grid else REGION_CELLS)
    parts = [_scaled(hog(crop(source["grey"], boxes, size)), "hog", grid)]
    at = (np.arange(size) + 0.5) / size
    x = ((boxes[:, :1] + (boxes[:, 2:3] - boxes[:, :1]) * at) * SIDE).astype(np.intp)
    y = ((boxes[:, 1:2] + (boxes[:, 3:] - boxes[:, 1:2]) * at) * SIDE).astype(np.intp)
    pixel = y[:, :, None] * SIDE + x[:, None]
    half = slice(size // 4, size - size // 4)
    for pick in (pixel,) if grid else (pixel, pixel[:, half, half]):
        parts.append(
            _scaled(_colour(*(source[name].ravel()[pick] for name in ("hue", "chroma", "value"))), "colour", grid)
        )
        patterns = _histogram(source["lbp"].ravel()[pick], None, PATTERNS) / pick[0].size
        parts.append(_scaled(np.sqrt(patterns), "lbp", grid))
    return np.concatenate(parts, axis=1).astype(np.float16)


@functools.cache
def grid_boxes() -> np.ndarray:
    """Boxes [49, 4] of the grid's cells, row by row."""
    row, column = np.divmod(np.arange(GRID * GRID), GRID)
    return (np.stack([column, row, column + 1, row + 1], axis=1) / GRID).astype(np.float32)


def noisy_map(label_map: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """`seg_map` [MAP, MAP] uint8: the label map at half size with errors.

    Each block of 4 x 4 pixels has its classes exchanged for others with probability `rate`: errors of a
    segmentation network are connected, too.
    """
    small = label_map[::2, ::2]
    blocks = MAP // 4
    wrong = rng.random((blocks, blocks)) < rate
    step = rng.integers(1, len(CLASS_NAMES), (blocks, blocks))
    turn = np.where(wrong, step, 0).repeat(4, 0).repeat(4, 1)
    return ((small + turn) % len(CLASS_NAMES)).astype(np.uint8)


@functools.cache
def _overlap() -> np.ndarray:
    """Overlap [GRID, MAP] float32: the share of each grid row that each map row makes up (64 is no multiple of 7)."""
    edges, rows = np.arange(GRID + 1) * MAP / GRID, np.arange(MAP)
    covered = np.minimum(edges[1:, None], rows + 1) - np.maximum(edges[:-1, None], rows)
    return (np.maximum(covered, 0) * GRID / MAP).astype(np.float32)


def semantic(seg_map: np.ndarray) -> np.ndarray:
    """`seg_semantic` [C, 7, 7] float16: the share of each class in each cell of a map [MAP, MAP]."""
    one_hot = (seg_map == np.arange(len(CLASS_NAMES), dtype=np.uint8)[:, None, None]).astype(np.float32)
    return (_overlap() @ one_hot @ _overlap().T).astype(np.float16)
