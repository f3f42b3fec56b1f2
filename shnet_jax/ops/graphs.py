"""Graphs over the regions of an image: who overlaps whom, who relates to whom, and how the two lie to each other.

Adjacencies are [n, K, K] bool, row i holding the neighbours of region i. `normalised` adds the self-loops, removes
masked regions and makes every row a mean; a dropped region therefore leaves the graph with its edges.
"""

from __future__ import annotations

import jax.numpy as jnp

from shnet_jax.types import Array

_SMALL = 1e-3  # of the image's side: boxes without extent have no ratio of sizes


def box_iou(boxes: Array) -> Array:
    """Intersection over union of all pairs: boxes [n, K, 4] x1 y1 x2 y2 -> [n, K, K]; 0 where both have no area."""
    low = jnp.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = jnp.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    common = jnp.prod(jnp.maximum(high - low, 0.0), axis=-1)
    area = jnp.prod(jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0), axis=-1)
    union = area[:, :, None] + area[:, None, :] - common
    return jnp.where(union > 0, common / jnp.where(union > 0, union, 1.0), 0.0)


def overlap_graph(boxes: Array, threshold: float) -> Array:
    """Pairs of boxes [n, K, 4] with an IoU above the threshold; a negative one connects all pairs."""
    return box_iou(boxes) > threshold


def relation_graph(relations: Array, regions: int) -> Array:
    """Pairs that a relation names, in either order: relations [n, R, 3] int32, padded rows -1 -> [n, regions, regions].

    The predicate says only that there is a relation (docs/models.md).
    """
    n = relations.shape[0]
    subject, target = relations[..., 0], relations[..., 2]
    # Out of bounds, and so dropped, where the row is padding: a negative index would count from the end.
    at = (jnp.arange(n)[:, None], jnp.where(subject < 0, regions, subject), jnp.where(target < 0, regions, target))
    directed = jnp.zeros((n, regions, regions), bool).at[at].set(True, mode="drop")
    return directed | directed.swapaxes(1, 2)


def confident_graph(scores: Array, threshold: float) -> Array:
    """Pairs with max(P_ij, P_ji) above the threshold: P [n, K, K], predicate confidences of ordered pairs."""
    return jnp.maximum(scores, scores.swapaxes(1, 2)) > threshold


def normalised(graph: Array, mask: Array) -> Array:
    """Row-normalised adjacency with self-loops [n, K, K] float32 of a graph [n, K, K] bool; mask [n, K] bool.

    Rows and columns of masked regions are 0, all other rows sum to 1.
    """
    valid = mask[:, :, None] & mask[:, None, :]
    edges = ((graph | jnp.eye(mask.shape[1], dtype=bool)) & valid).astype(jnp.float32)
    return edges / jnp.maximum(jnp.sum(edges, axis=-1, keepdims=True), 1.0)


def pair_geometry(boxes: Array) -> Array:
    """Position and size of box j relative to box i: boxes [n, K, 4] -> [n, K, K, 6].

    Direction (unit vector x, y; 0 at equal centres), distance of the centres in units of the image's side, logarithms
    of the ratios of width and height (j to i), IoU.
    """
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, jnp.maximum(boxes[..., 2:] - boxes[..., :2], _SMALL)
    offset = centre[:, None, :, :] - centre[:, :, None, :]
    squared = jnp.sum(jnp.square(offset), axis=-1, keepdims=True)
    apart = squared > 0
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)
    direction = offset / jnp.where(apart, distance, 1.0)
    ratio = jnp.log(size[:, None, :, :]) - jnp.log(size[:, :, None, :])
    return jnp.concatenate([direction, distance, ratio, box_iou(boxes)[..., None]], axis=-1)
