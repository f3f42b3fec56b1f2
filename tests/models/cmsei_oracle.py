"""CMSEI-style equations in NumPy float64 (docs/models.md): one image, one sentence, one pair at a time.

Sets are compacted to their valid rows, gates are one product with the concatenation [X; C], nothing is tabled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.models.image_oracle import gpo_weights, pool
from tests.models.text_oracle import dense, layer_norm, softmax

Tree = Mapping[str, Any]


def cos(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0.0) * max(height, 0.0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def spatial_graph(boxes: np.ndarray, threshold: float) -> np.ndarray:
    k = len(boxes)
    graph = np.array([[iou(boxes[i], boxes[j]) > threshold or i == j for j in range(k)] for i in range(k)], float)
    return graph / graph.sum(1, keepdims=True)


def semantic_graph(k: int, edges: list[tuple[int, int]]) -> np.ndarray:
    graph = np.eye(k)
    for i, j in edges:
        graph[i, j] = graph[j, i] = 1
    return graph / graph.sum(1, keepdims=True)


def geometry(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where b lies seen from a."""
    offset = (b[:2] + b[2:] - a[:2] - a[2:]) / 2
    distance = np.linalg.norm(offset)
    ratio = np.log((b[2:] - b[:2]) / (a[2:] - a[:2]))
    return np.array([*(offset / distance if distance else offset), distance, *ratio, iou(a, b)])


def head_weights(boxes: np.ndarray, p: Tree) -> np.ndarray:
    """[K, K, heads]"""
    pairs = np.array([[geometry(a, b) for b in boxes] for a in boxes])
    return 1 / (1 + np.exp(-dense(np.maximum(dense(pairs, p["in"]), 0), p["out"])))


def reason(v: np.ndarray, graph: np.ndarray, p: Tree, heads: np.ndarray | None = None) -> np.ndarray:
    gather, out = (np.asarray(p[n], np.float64) for n in ("gather", "out"))
    messages = v @ gather
    if heads is None:
        mixed = graph @ messages
    else:
        parts = np.split(messages, heads.shape[2], axis=1)
        mixed = np.concatenate([(graph * heads[..., h]) @ part for h, part in enumerate(parts)], axis=1)
    return v + np.maximum(mixed, 0) @ out


def encode_image(x: np.ndarray, spatial: np.ndarray, semantic: np.ndarray, p: Tree, heads: Any = None) -> Any:
    """Valid regions x [k, Dx] and both graphs -> enhanced regions [k, d], their unit vector [d]."""
    v = dense(x, p["regions_linear"])
    both = [reason(v, spatial, p["spatial"], heads), reason(v, semantic, p["semantic"])]
    enhanced = layer_norm(dense(np.concatenate(both, axis=1), p["combine"]) + v, p["norm"], 1e-5)
    return enhanced, unit(pool(enhanced, gpo_weights(len(enhanced), p["pool"])))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def side(
    own: np.ndarray, other: np.ndarray, whole: np.ndarray, w_own: Any, w_context: Any, sharpness: float, cross: float
) -> tuple[float, float]:
    """(alignment, cross-level term) of own [k, d] that attend to other [l, d]; gates None: no refinement."""
    positive = np.array([[max(cos(a, b), 0.0) for b in other] for a in own])
    sizes = np.sqrt((positive**2).sum(0))
    weights = softmax(sharpness * positive / np.where(sizes > 0, sizes, 1))
    context = weights @ other
    refined = own
    if w_own is not None:
        gate = np.concatenate([own, context], 1) @ np.concatenate([w_own, w_context])
        refined = own + context / (1 + np.exp(-gate))
    aligned = float(np.mean([cos(a, b) for a, b in zip(refined, context, strict=True)]))
    shares = softmax(cross * np.array([cos(a, whole) for a in refined]))
    return aligned, cos(shares @ refined, whole)


def score(
    regions: np.ndarray, image: np.ndarray, words: np.ndarray, sentence: np.ndarray, image_gates: Any, text_gates: Any
) -> dict[str, float]:
    """The terms of the score of one pair at sharpness 9 and 4, cross 3; gates: {"own_gate", "other_gate"} or None."""
    own, other = (
        None if g is None else {k: np.asarray(w, np.float64) for k, w in g.items()} for g in (image_gates, text_gates)
    )
    objects = (None, None) if own is None else (own["own_gate"], other["other_gate"])
    sentences = (None, None) if own is None else (other["own_gate"], own["other_gate"])
    i2t = side(regions, words, sentence, *objects, 9.0, 3.0)
    t2i = side(words, regions, image, *sentences, 4.0, 3.0)
    return {"objects": i2t[0], "words": t2i[0], "os": i2t[1], "wi": t2i[1], "global": float(image @ sentence)}
