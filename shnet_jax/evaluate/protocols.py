"""Named evaluation protocols: what is ranked against what, and a card that says so beside the numbers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from shnet_jax.evaluate.bootstrap import Interval
from shnet_jax.evaluate.rank import Ranks, check_captions, ranks
from shnet_jax.evaluate.recall import Metrics, QueryRanks, chance, mean, recalls
from shnet_jax.evaluate.tiles import Items, ItemScore, size, take

TIE_RULE = "rank = items that score strictly higher + items that score the same and have a smaller index"
UNKNOWN = "not stated"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a gallery is ranked: as a whole (1 fold) or in consecutive blocks of images of equal size."""

    name: str
    folds: int


@dataclasses.dataclass(frozen=True)
class Subject:
    """What was evaluated, as far as the caller knows; part of the protocol card."""

    dataset: str = UNKNOWN
    split: str = UNKNOWN
    checkpoint_step: int | str = UNKNOWN
    parameters: str = UNKNOWN  # "trained" | "running average (decay 0.999)"
    dtype: str = UNKNOWN  # operands of the model's matrix products
    selected_on: str = UNKNOWN  # split that chose the checkpoint; "none" for the last one
    devices: int | str = UNKNOWN  # how many encoded the gallery
    ensemble: str = "no, a single model"
    notes: str = "none"  # on fields of the data set that the model can do without


@dataclasses.dataclass(frozen=True)
class Results:
    """What a gallery gave.

    metrics: see `recall.Metrics`; those of each fold, those of guessing, and the protocol card beside them.
    queries: the rank that each query got; None where only the numbers are known.
    extra: further numbers of the whole gallery by name, see `extra.extra_metrics`.
    intervals: of each recall, see `bootstrap.recall_intervals`.
    """

    metrics: Metrics
    folds: tuple[Metrics, ...]
    chance: Metrics
    card: dict[str, str | int]
    queries: QueryRanks | None = None
    extra: Metrics = dataclasses.field(default_factory=dict)
    intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)


Ranker = Callable[[Any, Any, np.ndarray, int], Ranks]
"""(images, captions, image of each caption, number of the fold) -> ranks."""


def find_protocol(name: str) -> Protocol:
    """The protocol of that name: "whole", or "folds<k>" such as "folds5" (COCO 1K)."""
    if name == "whole":
        return Protocol(name, 1)
    if match := re.fullmatch(r"folds([1-9]\d*)", name):
        return Protocol(name, int(match[1]))
    raise ValueError(f'unknown protocol {name!r}: expected "whole" or "folds<k>" such as "folds5"')


def evaluate(
    images: Items,
    texts: Items,
    caption_image: np.ndarray,
    score: ItemScore,
    protocol: str = "whole",
    subject: Subject | None = None,
    tile: int = 512,
    mesh: Mesh | None = None,
    score_dtype: str = "float32",
    ranker: Ranker | None = None,
) -> Results:
    """Ranks a gallery by a named protocol (see `find_protocol`).

    Several processes call it together, each with a mesh of its own devices, and share the work of `rank.ranks`.
    ranker: ranks instead of `rank.ranks`, whose arguments and errors the others are; ValueError too when the folds are
    unequal.
    """
    plan = find_protocol(protocol)
    n, t = size(images), size(texts)
    owner = check_captions(caption_image, n, t)
    if n % plan.folds:
        raise ValueError(f"protocol {plan.name}: {n} images do not divide into {plan.folds} folds of equal size")
    found, guessed = [], []
    queries = QueryRanks(np.empty(n, np.int64), np.empty(t, np.int64), owner)
    for fold, (rows, captions) in enumerate(_folds(owner, n, plan.folds)):
        whole = plan.folds == 1  # then no copy of what may be gigabytes
        fold_owner = owner[captions] - rows[0]
        sides = (images, texts) if whole else (take(images, rows), take(texts, captions))
        if ranker is None:
            ranked = ranks(*sides, fold_owner, score, tile, mesh, score_dtype, shared=True)
        else:
            ranked = ranker(*sides, fold_owner, fold)
        queries.i2t[rows], queries.t2i[captions] = ranked.i2t, ranked.t2i
        found.append(recalls(ranked))
        guessed.append(chance(np.bincount(fold_owner)))
    card = _card(plan, subject or Subject(), n, t, jax.tree.leaves(images)[0].dtype)
    return Results(mean(found), tuple(found), mean(guessed), card, queries)


def _folds(owner: np.ndarray, n: int, folds: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and captions of each fold."""
    for rows in np.split(np.arange(n), folds):
        yield rows, np.flatnonzero((owner >= rows[0]) & (owner <= rows[-1]))


def _card(plan: Protocol, subject: Subject, n: int, t: int, dtype: np.dtype) -> dict[str, str | int]:
    size = n // plan.folds
    gallery = (
        f"all {n} images and {t} captions together"
        if plan.folds == 1
        else f"mean over {plan.folds} consecutive galleries of {size} images with their captions"
    )
    device = jax.devices()[0]
    return {
        "protocol": plan.name,
        **dataclasses.asdict(subject),
        "images": n,
        "captions": t,
        "folds": plan.folds,
        "gallery": gallery,
        "ranking": "each image once; image to text counts the best-ranked own caption",
        "ties": TIE_RULE,
        "median_rank": "floor(median of 0-based ranks) + 1",
        "embedding_dtype": str(dtype),
        "device": f"{device.device_kind} ({device.platform})",
        "jax": jax.__version__,
        "flax": version("flax"),
    }
