"""What config.eval asks for beyond recalls: hubness, ECCV Caption, Crisscrossed Captions. All of the whole gallery."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.data.records import DataSet
from shnet_jax.evaluate.coco import coco_number, judgements_folder, read_judgements, read_ratings, rows_of
from shnet_jax.evaluate.ensemble import Embedded
from shnet_jax.evaluate.recall import CUTS, Metrics
from shnet_jax.evaluate.relevance import Relevant, hits, hubness, precision_at_r, recall_at, relevant
from shnet_jax.evaluate.tiles import Items, ItemScore, size
from shnet_jax.evaluate.topk import Top, top_items
from shnet_jax.types import Array

OCCURRENCE = 10  # k of the k-occurrence


class CocoRows:
    """Rows of a split by COCO's numbers. Raises ValueError for a data set without caption_ids."""

    def __init__(self, dataset: DataSet, split: str):
        if "caption_ids" not in dataset.features:
            raise ValueError(
                f"{dataset.path}: no field caption_ids, by which these judgements know the captions; import the split "
                f"with a file {split}_capids.txt"
            )
        ids = dataset.open_split(split, ("caption_ids",))
        self.images = rows_of(np.array([coco_number(i) for i in dataset.image_ids(split)]), "image")
        self.captions = rows_of(np.concatenate([record["caption_ids"] for record in ids]), "caption")


def extra_metrics(embedded: Embedded, dataset: DataSet, evaluation: ConfigDict, mesh: Mesh) -> Metrics:
    """Numbers by name, {} when config.eval asks for none.

    hubness_i2t, hubness_t2i: skewness of how often captions (images) are among the first 10 of an image (caption).
    eccv_i2t_map_at_r, _rprecision, _r1 and the same for t2i: ECCV Caption, percent.
    cxc_i2t_r1, _r5, _r10, the same for t2i: Crisscrossed Captions, percent; for i2i and t2t where ratings are given.
    """
    found: Metrics = {}
    judged: dict[str, tuple[Relevant, Relevant]] = {}
    split = embedded.subject.split
    rows = CocoRows(dataset, split) if evaluation.eccv or evaluation.cxc else None
    if evaluation.eccv and rows is not None:
        folder = judgements_folder(evaluation.eccv)
        judged = {name: read_judgements(folder, name, rows.images, rows.captions) for name in ("eccv", "cxc")}
    if judged or evaluation.hubness:
        most = max([OCCURRENCE, CUTS[-1], *(side.most for sides in judged.values() for side in sides)])
        top = top_items(embedded.images, embedded.texts, embedded.score, most, evaluation.tile, mesh)
        if evaluation.hubness:
            found |= {
                "hubness_i2t": hubness(top.i2t[:, :OCCURRENCE], size(embedded.texts)),
                "hubness_t2i": hubness(top.t2i[:, :OCCURRENCE], size(embedded.images)),
            }
        for name, sides in judged.items():
            found |= _judged(name, top, sides)
    if evaluation.cxc and rows is not None:
        found |= _within(embedded, Path(evaluation.cxc), split, rows, evaluation.tile, mesh)
    return found


def _judged(name: str, top: Top, sides: tuple[Relevant, Relevant]) -> Metrics:
    found: Metrics = {}
    for direction, lists, wanted in (("i2t", top.i2t, sides[0]), ("t2i", top.t2i, sides[1])):
        hit = hits(lists, wanted)
        numbers = precision_at_r(hit, wanted.counts) if name == "eccv" else recall_at(hit)
        found |= {f"{name}_{direction}_{number}": value for number, value in numbers.items()}
    return found


def _within(embedded: Embedded, folder: Path, split: str, rows: CocoRows, tile: int, mesh: Mesh) -> Metrics:
    """Recall of captions by captions and of images by images, from sts_{split}.csv and sis_{split}.csv."""
    name = "val" if split.startswith(("val", "dev")) else "test"
    images = relevant(*read_ratings(folder / f"sis_{name}.csv", "image", rows.images))
    query, item = read_ratings(folder / f"sts_{name}.csv", "caption", rows.captions)
    siblings = sibling_captions(embedded.caption_image)
    captions = relevant(np.append(query, siblings[0]), np.append(item, siblings[1]))
    found: Metrics = {}
    for direction, items, wanted in (("i2i", embedded.images, images), ("t2t", embedded.texts, captions)):
        numbers = recall_at(hits(top_within(items, embedded.score, CUTS[-1], tile, mesh), wanted))
        found |= {f"cxc_{direction}_{number}": value for number, value in numbers.items()}
    return found


def sibling_captions(caption_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All ordered pairs of different captions of the same image, [p] each."""
    order = np.argsort(caption_image, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(caption_image[order])) + 1)
    pairs = np.concatenate([np.stack(np.meshgrid(g, g, indexing="ij"), -1).reshape(-1, 2) for g in groups])
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return pairs[:, 0], pairs[:, 1]


def top_within(items: Items, score: ItemScore, k: int, tile: int, mesh: Mesh) -> np.ndarray:
    """[m, k] the first k of the m items for each of them, by the model's score of their embeddings.

    An item scores 0 with itself, as in the code of VSE-infinity, so it is not the first of its own list.
    """
    numbered = (items, np.arange(size(items), dtype=np.int32))
    return top_items(numbered, numbered, _Others(score), k, tile, mesh).i2t


@dataclasses.dataclass(frozen=True)
class _Others:
    """A score of (items, their numbers) that is 0 for an item with itself; equal ones share compiled programs."""

    score: ItemScore

    def __call__(self, queries: Any, others: Any) -> Array:
        same = queries[1][:, None] == others[1][None, :]
        return jnp.where(same, 0.0, self.score(queries[0], others[0]))
