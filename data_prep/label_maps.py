"""Record fields made from a segmentation: pooled classes, a small label map, the classes present.

NumPy only; every importer and the extraction from photographs come through here, so that their fields mean the same.
"""

from __future__ import annotations

import numpy as np

from data_prep.schema import Record

CELLS = 7  # seg_semantic is [C, 7, 7] in 3SHNet
SIDE = 64  # seg_map is [64, 64] in 3SHNet


def edges(length: int, cells: int) -> list[tuple[int, int]]:
    """First and last-but-one index of each cell along an axis, as torch's AdaptiveAvgPool2d has them.

    Cell i covers floor(i length / cells) to ceil((i + 1) length / cells), so neighbours may share a row.
    """
    return [(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]


def class_shares(labels: np.ndarray, classes: int, cells: int = CELLS) -> np.ndarray:
    """Share of each cell that each class covers, [classes, cells, cells] float32 in 0..1.

    The adaptive average pool of the one-hot map of `labels` [H, W] uint8; pixels of other numbers (void) count to no
    class, so the classes of a cell add up to the share of it that is labelled.
    """
    shares = np.empty((classes, cells, cells), np.float32)
    for row, (top, bottom) in enumerate(edges(labels.shape[0], cells)):
        for column, (left, right) in enumerate(edges(labels.shape[1], cells)):
            cell = labels[top:bottom, left:right]
            counts = np.bincount(cell.ravel(), minlength=256)[:classes]
            shares[:, row, column] = counts / cell.size
    return shares


def shrink(labels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Label map [side, side] from [H, W]: the pixel below the centre of each cell (nearest neighbour)."""
    rows, columns = (((np.arange(side) + 0.5) * length / side).astype(int) for length in labels.shape)
    return labels[np.ix_(rows, columns)]


def present(labels: np.ndarray, classes: int) -> np.ndarray:
    """Mask [classes] bool of the classes that have at least one pixel."""
    return np.bincount(labels.ravel(), minlength=256)[:classes] > 0


def fields(labels: np.ndarray, classes: int) -> Record:
    """seg_semantic [classes, 7, 7] float32, seg_map [64, 64] uint8 and categories [classes] of a label map."""
    return {
        "seg_semantic": class_shares(labels, classes),
        "seg_map": shrink(labels),
        "categories": present(labels, classes),
    }
