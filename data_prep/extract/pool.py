"""Boxes around masks and averages of a feature grid inside boxes. NumPy only."""

from __future__ import annotations

import numpy as np


def boxes_of_masks(masks: np.ndarray) -> np.ndarray:
    """Smallest box x1 y1 x2 y2 in 0..1 around each mask, [N, H, W] bool -> [N, 4] float32.

    Pixel (0, 0) alone gives 0, 0, 1/W, 1/H. An empty mask gives the whole image: there is nowhere better to look.
    """
    height, width = masks.shape[1:]
    boxes = np.empty((len(masks), 4), np.float32)
    for mask, box in zip(masks, boxes, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows) == 0:
            box[:] = 0, 0, 1, 1
        else:
            box[:] = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
    return boxes


def box_average(grid: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Average of a feature grid inside each box, [h, w, D] and [N, 4] in 0..1 -> [N, D] float32.

    Cells count by the area that the box covers of them: the exact mean of the piecewise constant map, so a box inside
    one cell gives that cell. A box without area gives the cell at its corner.
    """
    height, width = grid.shape[:2]
    rows = _coverage(boxes[:, 1] * height, boxes[:, 3] * height, height)
    columns = _coverage(boxes[:, 0] * width, boxes[:, 2] * width, width)
    return np.einsum("nh,nw,hwd->nd", rows, columns, grid.astype(np.float32), optimize=True).astype(np.float32)


def _coverage(start: np.ndarray, stop: np.ndarray, cells: int) -> np.ndarray:
    """Weights [N, cells], of sum 1, of the unit cells of an axis under the intervals start..stop."""
    stop = np.minimum(np.maximum(stop, start + 1e-4), cells)
    start = np.maximum(np.minimum(start, stop - 1e-4), 0)
    left = np.arange(cells)
    covered = np.minimum(stop[:, None], left + 1) - np.maximum(start[:, None], left)
    covered = np.maximum(covered, 0)
    return covered / covered.sum(1, keepdims=True)
