"""Grid features of a figure: what a frozen backbone would give, computed from pixels by the scenes' descriptors.

A cell is described by its gradients, colours and patterns (`scenes.features`) and, as a backbone's tokens know it too,
by where it lies.
"""

from __future__ import annotations

import functools

import numpy as np

from data_prep.people.figure import HEIGHT, WIDTH
from data_prep.scenes import features as scenes
from data_prep.scenes.shapes import SIDE

ROWS, COLUMNS = 12, 5
PLACE = 4  # numbers at the end of a descriptor that say where its cell lies
SIZE = scenes.GRID_SIZE + PLACE


@functools.cache
def cells() -> np.ndarray:
    """Boxes [60, 4] in shares of a square picture of side SIDE that holds the figure in its left columns."""
    height, width = 1.3 / ROWS, 1.3 / COLUMNS  # they overlap
    y, x = (np.linspace(0, 1 - side, count) for side, count in ((height, ROWS), (width, COLUMNS)))
    y, x = (a.ravel() for a in np.meshgrid(y, x, indexing="ij"))
    share = WIDTH / SIDE
    return np.stack([x * share, y, (x + width) * share, y + height], axis=1).astype(np.float32)


def describe(picture: np.ndarray) -> np.ndarray:
    """Descriptors float16 [60, SIZE] of a picture uint8 [HEIGHT, WIDTH, 3], row by row."""
    square = np.zeros((SIDE, SIDE, 3), np.uint8)  # the descriptors are written for square pictures
    square[:HEIGHT, :WIDTH] = picture
    descriptors = scenes.describe(scenes.planes(square), cells(), grid=True)
    y, x = np.meshgrid(np.linspace(-1, 1, ROWS), np.linspace(-1, 1, COLUMNS), indexing="ij")
    place = np.stack([2 * y, 2 * x, np.cos(np.pi * y), np.cos(np.pi * x)], axis=-1).reshape(-1, PLACE)
    return np.concatenate([descriptors, place], axis=1).astype(np.float16)
