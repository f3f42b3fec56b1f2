"""Scene graphs in the layout of Visual Genome's scene_graphs.json, annotated or predicted, as relations of regions.

A list with one entry an image:

    {"image_id": 391895, "width": 640, "height": 360,
     "objects": [{"object_id": 7, "x": 10, "y": 20, "w": 30, "h": 40}, ...],
     "relationships": [{"subject_id": 7, "predicate": "wears", "object_id": 9, "score": 0.8}, ...]}

Boxes are in pixels of `width` and `height` (which Visual Genome keeps in image_data.json) or, without these, in 0..1.
An object is the region whose box overlaps it most, if the IoU is large enough; `score` is 1 where it is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import read_json
from data_prep.names import Names
from data_prep.schema import DataError, refuse


@dataclass(frozen=True)
class Graph:
    """boxes [objects, 4] float64 in 0..1; edges: (subject, predicate, object, score) by falling score."""

    boxes: np.ndarray
    edges: tuple[tuple[int, str, int, float], ...]


Graphs = Names[Graph]


def read_graphs(path: Path, image_data: Path | None = None) -> Graphs:
    """The graph of each image, found by its name or number.

    image_data: file with {"image_id", "width", "height"} of each image, for graphs without sizes.
    Raises DataError naming file, image and key of what is missing or wrong.
    """
    sizes = {}
    for entry in _entries(image_data) if image_data else ():
        sizes[str(_key(entry, "image_id", image_data))] = entry
    graphs: Graphs = Names(path)
    for entry in _entries(path):
        image_id = str(_key(entry, "image_id", path))
        refuse(image_id in graphs, f"{path}: image {image_id}", "one entry", "two")
        graphs.add(image_id, _graph(entry, sizes.get(image_id, entry), f"{path}: image {image_id}"))
    return graphs


def predicates(graphs: Graphs) -> list[str]:
    """All predicates, the most frequent first."""
    counts = Counter(edge[1] for graph in graphs for edge in graph.edges)
    return sorted(counts, key=lambda name: (-counts[name], name))


def region_relations(
    graph: Graph,
    boxes: np.ndarray,
    valid: np.ndarray,
    names: Mapping[str, int],
    *,
    least_iou: float,
    least_score: float,
    rows: int,
) -> np.ndarray:
    """The relations [rows, 3] int32 (subject, predicate, object) between regions with boxes [K, 4]; padded with -1."""
    overlap = np.where(valid, _iou(graph.boxes, boxes.astype(np.float64)), -1.0)
    region = overlap.argmax(axis=1) if len(graph.boxes) else np.empty(0, int)
    matched = overlap.max(axis=1, initial=-1.0) >= least_iou
    kept: dict[tuple[int, int], int] = {}
    for subject, name, target, score in graph.edges:
        if score < least_score or not (matched[subject] and matched[target]):
            continue
        pair = int(region[subject]), int(region[target])
        if pair[0] != pair[1] and len(kept) < rows:
            kept.setdefault(pair, names[name])
    relations = np.full((rows, 3), -1, np.int32)
    for row, ((i, j), predicate) in enumerate(kept.items()):
        relations[row] = i, predicate, j
    return relations


def _entries(path: Path) -> list[Any]:
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: expected a list with an object for each image, found {type(entries).__name__}")
    return entries


def _key(entry: Mapping[str, Any], name: str, where: Any) -> Any:
    if name not in entry:
        raise DataError(f"{where}: expected the key {name!r}, found {sorted(entry)}")
    return entry[name]


def _graph(entry: Mapping[str, Any], sized: Mapping[str, Any], where: str) -> Graph:
    try:
        return _parsed(entry, sized, where)
    except DataError:
        raise
    except (TypeError, AttributeError, ValueError, OverflowError) as error:  # text or a list in place of a number
        raise DataError(f"{where}: expected objects and relationships as in Visual Genome: {error}") from error


def _parsed(entry: Mapping[str, Any], sized: Mapping[str, Any], where: str) -> Graph:
    objects = _key(entry, "objects", where)
    number = {_key(thing, "object_id", where): i for i, thing in enumerate(objects)}
    corners = np.array([[float(_key(thing, key, where)) for key in "xywh"] for thing in objects]).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    refuse(not np.isfinite(corners).all(), where, "boxes of finite numbers", "others")
    if "width" in sized and "height" in sized:
        if not min(float(sized["width"]), float(sized["height"])) > 0:
            raise DataError(f"{where}: expected width and height above 0, found {sized['width']}, {sized['height']}")
        corners /= np.tile([float(sized["width"]), float(sized["height"])], 2)
    elif corners.max(initial=0) > 1.01:
        raise DataError(
            f"{where}: expected boxes in 0..1, or width and height of the image (--image_data), "
            f"found a box that ends at {corners.max():g}"
        )
    edges = []
    for relation in _key(entry, "relationships", where):
        ends = [_key(relation, key, where) for key in ("subject_id", "object_id")]
        unknown = [end for end in ends if end not in number]
        if unknown:
            raise DataError(f"{where}: relationships: object {unknown[0]!r} is not among its {len(number)} objects")
        name = " ".join(str(_key(relation, "predicate", where)).lower().split())
        edges.append((number[ends[0]], name, number[ends[1]], float(relation.get("score", 1.0))))
    return Graph(corners, tuple(sorted(edges, key=lambda edge: -edge[3])))


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    common = np.prod(np.maximum(size, 0), axis=2)
    areas = (np.prod(x[:, 2:] - x[:, :2], axis=1) for x in (a, b))
    union = np.add.outer(*areas) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)
