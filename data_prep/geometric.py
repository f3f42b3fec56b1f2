"""A stand-in for a scene graph where only boxes and classes are known, the "geometric stand-in".

No model has looked at the picture: a relation here says how two boxes lie, never what somebody does. A pair of valid
boxes with a score of at least `least_score` is related by the first of these that holds:

  inside   another class, 90 % of the subject lie within the object, which has at least twice its area;
  on       another class, the subject's centre is higher, its foot lies within the object's height (2 % of the image
           may be missing), and at least half of its width above or in front of the object;
  beside   the subject is the left one, half of the smaller height is shared, and the gap is at most half the mean width
           (nor do they overlap by more than a quarter of the smaller width).

Two boxes of one class with an IoU above 0.5 are taken for the same thing. The pairs with the largest product of the two
scores are kept.
"""

from __future__ import annotations

import numpy as np

PREDICATES = ("inside", "on", "beside")
INSIDE, ON, BESIDE = range(3)

_WITHIN, _LARGER = 0.9, 2.0
_FOOT, _ABOVE = 0.02, 0.5
_LEVEL, _GAP, _OVERLAP = 0.5, 0.5, 0.25
_SAME = 0.5


def geometric_relations(
    boxes: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray,
    valid: np.ndarray,
    *,
    least_score: float,
    rows: int,
) -> np.ndarray:
    """The relations [rows, 3] int32 (subject, predicate, object) of one image; padded rows are -1.

    boxes [K, 4] x1 y1 x2 y2 in 0..1, classes [K], scores [K], valid [K] bool.
    """
    boxes = boxes.astype(np.float64)
    x1, y1, x2, y2 = boxes.T
    width, height = x2 - x1, y2 - y1
    area = width * height
    usable = valid & (scores >= least_score) & (area > 0)
    shared_x = np.minimum(x2[:, None], x2) - np.maximum(x1[:, None], x1)
    shared_y = np.minimum(y2[:, None], y2) - np.maximum(y1[:, None], y1)
    common = np.maximum(shared_x, 0) * np.maximum(shared_y, 0)
    union = area[:, None] + area - common
    same_class = classes[:, None] == classes
    same_thing = same_class & (common > _SAME * union)

    inside = ~same_class & (common >= _WITHIN * area[:, None]) & (area >= _LARGER * area[:, None])
    higher = (y1 + y2)[:, None] < y1 + y2
    foot = (y2[:, None] >= y1 - _FOOT) & (y2[:, None] <= y2)
    on = ~same_class & higher & foot & (shared_x >= _ABOVE * width[:, None])
    left = (x1 + x2)[:, None] < x1 + x2
    level = shared_y >= _LEVEL * np.minimum(height[:, None], height)
    near = (-shared_x <= _GAP * (width[:, None] + width) / 2) & (
        shared_x <= _OVERLAP * np.minimum(width[:, None], width)
    )
    beside = left & level & near

    pairs = usable[:, None] & usable & ~same_thing & ~np.eye(len(boxes), dtype=bool)
    predicate = np.select([inside, on & ~inside.T, beside & ~(inside | on).T], [INSIDE, ON, BESIDE], -1)
    subjects, objects = np.nonzero(pairs & (predicate >= 0))
    order = np.argsort(-(scores[subjects] * scores[objects]), kind="stable")[:rows]
    relations = np.full((rows, 3), -1, np.int32)
    relations[: len(order)] = np.stack([subjects, predicate[subjects, objects], objects], axis=1)[order]
    return relations
