"""Rendered scenes with true captions: a data set that needs no download, of any size.

`scene(seed, index)` is one record, `draw(seed, index)` its picture; `shnet data scenes --out=DIR`
writes a set. A caption states attributes (in the regions), places and relations (in the label map) and nearly
always fits one image only.
"""

from __future__ import annotations

import collections
import concurrent.futures
import multiprocessing
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_prep.scenes import captions as _captions
from data_prep.scenes import features, render, shapes, world
from data_prep.scenes.captions import Facts, holds
from data_prep.scenes.world import CLASS_NAMES, PREDICATES, Scene

__all__ = [
    "CLASS_NAMES",
    "PREDICATES",
    "Facts",
    "Scene",
    "draw",
    "holds",
    "image_id",
    "records",
    "sample",
    "scene",
    "tell",
]

VERSION = 1  # raised when the same (seed, index) gives another record
CAPTIONS = 5
LEAST_REGIONS = 8  # a scene has up to 7 things
RELATIONS = 32  # rows of `relations`; a scene with more keeps the rarer predicates
PIXELS, NOTES, MISTAKES = range(3, 6)  # streams of random numbers; world.py has 0..2
_CHUNK = 32  # images of one task of a worker process; even, so that a pair's scenes are made once

sample = world.sample


def image_id(seed: int, index: int) -> str:
    """The id of a scene's image."""
    return f"scene-{seed}-{index:010d}"


def draw(seed: int, index: int) -> np.ndarray:
    """The picture of a scene, uint8 [128, 128, 3]."""
    return render.render(sample(seed, index), np.random.default_rng([seed, PIXELS, index]))


def tell(seed: int, index: int) -> list[tuple[str, Facts]]:
    """The five captions of a scene, each with the facts that it states."""
    twin = None if world.pair_kind(seed, index) == "independent" else sample(seed, index ^ 1)
    return _captions.captions(sample(seed, index), random.Random(f"{seed} {index}"), CAPTIONS, unlike=twin)


def scene(
    seed: int, index: int, *, label_noise: float = 0.05, regions: int = 16, relation_noise: float = 0.0
) -> dict[str, Any]:
    """The record of scene `index` >= 0 of the world `seed` >= 0, whatever else is generated.

    Args:
      label_noise: share of wrong 4 x 4 blocks in `seg_map` and of wrong labels in `box_classes`.
      regions: K, rows of the region fields; at least LEAST_REGIONS, since all things get a box.
      relation_noise: share of wrong rows in `relations`: their object is another region of the image.

    Returns:
      image_id, captions (5), caption_ids int64 [5]; regions float16 [K, 200], region_mask bool [K],
      boxes float32 [K, 4], box_classes int32 [K], box_scores float32 [K] (descending),
      relations int32 [32, 3]; grid float16 [49, 64], seg_map uint8 [64, 64], seg_semantic float16 [22, 7, 7],
      categories bool [22].
    """
    if regions < LEAST_REGIONS:
        raise ValueError(f"scenes: regions: expected at least {LEAST_REGIONS}, found {regions}")
    for name, share in (("label_noise", label_noise), ("relation_noise", relation_noise)):
        if not 0 <= share < 1:
            raise ValueError(f"scenes: {name}: expected a share in 0 <= share < 1, found {share}")
    made = sample(seed, index)
    rng = np.random.default_rng([seed, NOTES, index])
    source = features.planes(draw(seed, index))
    seg_map = features.noisy_map(made.label_map, label_noise, rng)
    record: dict[str, Any] = {
        "image_id": image_id(seed, index),
        "captions": [text for text, _ in tell(seed, index)],
        "caption_ids": index * CAPTIONS + np.arange(CAPTIONS, dtype=np.int64),
        "grid": features.describe(source, features.grid_boxes(), grid=True),
        "seg_map": seg_map,
        "seg_semantic": features.semantic(seg_map),
        # a wrong block has 16 pixels: what two of them could make is taken for noise
        "categories": np.bincount(seg_map.ravel(), minlength=len(CLASS_NAMES)) >= 36,
    }
    record |= _detections(made, source, rng, regions, label_noise)
    if relation_noise:
        valid = int(record["region_mask"].sum())
        mistakes = np.random.default_rng([seed, MISTAKES, index])
        record["relations"] = _mistaken(record["relations"], valid, relation_noise, mistakes)
    return record


def _mistaken(relations: np.ndarray, regions: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """The rows [R, 3] with the object exchanged, with probability `rate`, for a region that is neither end of it."""
    subject, predicate, thing = relations.T
    wrong = (subject >= 0) & (rng.random(len(relations)) < rate)
    low, high = np.minimum(subject, thing), np.maximum(subject, thing)
    other = rng.integers(0, regions - 2, len(relations))
    other += other >= low
    other += other >= high
    return np.stack([subject, predicate, np.where(wrong, other, thing)], axis=1).astype(np.int32)


def _detections(
    made: Scene, source: dict[str, np.ndarray], rng: np.random.Generator, k: int, label_noise: float
) -> dict[str, np.ndarray]:
    """The region fields: jittered boxes of the things and distractors, by falling score, then padding."""
    things = len(made.boxes)
    distractors = int(rng.integers(min(4, k - things), k - things + 1))
    side = np.tile(made.boxes[:, 2:] - made.boxes[:, :2], 2)
    boxes = np.concatenate(
        [made.boxes + rng.normal(scale=0.04, size=side.shape) * side, _elsewhere(made, rng, distractors)]
    )
    boxes = np.clip(boxes, 0, 1).astype(np.float32)
    scores = np.concatenate([rng.uniform(0.55, 1, things), rng.uniform(0.2, 0.7, distractors)]).astype(np.float32)
    centre = ((boxes[:, :2] + boxes[:, 2:]) / 2 * (shapes.SIDE - 1)).astype(int)
    classes = made.label_map[centre[:, 1], centre[:, 0]].astype(np.int32)
    classes[:things] = [look.shape for look in made.looks]
    wrong = rng.random(len(classes)) < label_noise
    classes = np.where(wrong, rng.integers(0, len(CLASS_NAMES), len(classes)), classes).astype(np.int32)

    order = np.argsort(-scores, kind="stable")
    row_of = np.argsort(order)
    n = len(order)
    fields = {
        "regions": np.zeros((k, features.REGION_SIZE), np.float16),
        "region_mask": np.arange(k) < n,
        "boxes": np.zeros((k, 4), np.float32),
        "box_classes": np.zeros(k, np.int32),
        "box_scores": np.zeros(k, np.float32),
        "relations": np.full((RELATIONS, 3), -1, np.int32),
    }
    fields["regions"][:n] = features.describe(source, boxes[order])
    for name, values in (("boxes", boxes), ("box_classes", classes), ("box_scores", scores)):
        fields[name][:n] = values[order]
    rows = sorted((p, row_of[i], row_of[j]) for i, p, j in made.relations)[:RELATIONS]
    fields["relations"][: len(rows)] = [(i, p, j) for p, i, j in rows]
    return fields


def _elsewhere(made: Scene, rng: np.random.Generator, count: int) -> np.ndarray:
    """Boxes [count, 4] float64 of background or pieces of things: IoU below 0.3 with every thing."""
    accepted = np.empty((0, 4))
    area = np.prod(made.boxes[:, 2:] - made.boxes[:, :2], axis=1)
    while len(accepted) < count:
        size = rng.uniform(0.1, 0.35, (4 * count, 2))
        corner = rng.random(size.shape) * (1 - size)
        boxes = np.concatenate([corner, corner + size], axis=1)
        low = np.maximum(boxes[:, None, :2], made.boxes[:, :2])
        high = np.minimum(boxes[:, None, 2:], made.boxes[:, 2:])
        common = np.prod(np.maximum(high - low, 0), axis=2)
        iou = common / (np.prod(size, axis=1)[:, None] + area - common)
        accepted = np.concatenate([accepted, boxes[iou.max(axis=1) < 0.3]])
    return accepted[:count]


def _chunk(seed: int, start: int, stop: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    return [scene(seed, index, **options) for index in range(start, stop)]


def renderers(count: int | None = None) -> concurrent.futures.ProcessPoolExecutor:
    """Processes that make records, `count` of them (default: one a core). They start when the first is asked for."""
    spawn = multiprocessing.get_context("spawn")  # fork is unsafe once JAX or TFDS have started threads
    return concurrent.futures.ProcessPoolExecutor(count, mp_context=spawn)


def records(
    seed: int, start: int, stop: int, *, pool: concurrent.futures.Executor | None = None, **options: Any
) -> Iterator[dict[str, Any]]:
    """Records start..stop-1 in order, made a few chunks ahead by the `renderers` of a pool; None: in this process.

    `options` are those of `scene`.
    """
    bounds = [(a, min(a + _CHUNK, stop)) for a in range(start, stop, _CHUNK)]
    if pool is None:
        for a, b in bounds:
            yield from _chunk(seed, a, b, options)
        return
    ahead: collections.deque[concurrent.futures.Future[list[dict[str, Any]]]] = collections.deque()
    for a, b in bounds:
        ahead.append(pool.submit(_chunk, seed, a, b, options))
        if len(ahead) > 4 * (os.cpu_count() or 1):  # bounds the memory when the reader is slower
            yield from ahead.popleft().result()
    while ahead:
        yield from ahead.popleft().result()
