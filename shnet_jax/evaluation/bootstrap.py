"""Paired bootstrap over the images of a gallery: confidence intervals of recalls and of differences of two runs.

An image is drawn together with its captions, as these are no independent queries, and in a person search a person with
all images; the gallery that they are ranked in stays whole. The draws are the same for all numbers and, of a
difference, for both runs. An interval says nothing of what another training seed would give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shnet_jax.evaluation.metrics import CUTS, PERSON_METRICS, QueryRanks
from shnet_jax.evaluation.ranks import check_captions
from shnet_jax.observe.files import atomic_path
from shnet_jax.types import DIRECTIONS
from shnet_jax.untrusted import read_npz

LEVEL = 0.95
DRAWS = 2000
NAMES = (*(f"{d}_r{k}" for d in DIRECTIONS for k in CUTS), "rsum")
RANKS, PERSONS = ("i2t", "t2i", "caption_image"), ("image_person", "found")
"""Arrays of a file of queries, in the order of QueryRanks, and those that only a person search has."""
_CHUNK = 1 << 19  # weights drawn at once: 4 MiB


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate in percent points and the bounds of its percentile interval."""

    estimate: float
    low: float
    high: float


def recall_intervals(
    runs: Sequence[QueryRanks], baseline: Sequence[QueryRanks] = (), draws: int = DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """Intervals of NAMES: the recalls of `runs` or, with a baseline, by how much they exceed its recalls.

    Where all runs searched persons, those of `metrics.PERSON_METRICS` too.
    Runs of several seeds are averaged query by query first, and then compared with the average of the baseline's runs.
    Raises ValueError when two runs are not of the same gallery.
    """
    every = [*runs, *baseline]
    first, persons = every[0], [run.image_person for run in every if run.image_person is not None]
    people = persons[0] if len(persons) == len(every) else None
    for k, run in enumerate(every):
        same_people = people is None or np.array_equal(persons[k], people)
        if not same_people or not np.array_equal(run.caption_image, first.caption_image):
            raise ValueError(
                f"paired comparison: {len(first.i2t)} images, {len(first.t2i)} captions and {len(run.i2t)} images, "
                f"{len(run.t2i)} captions, or their captions belong to other images, or these to other persons; "
                "expected the same split"
            )
    names = NAMES if people is None else (*NAMES, *PERSON_METRICS)
    captions = np.bincount(first.caption_image, minlength=len(first.i2t))
    hits = np.mean([_hits(run, people is not None) for run in runs], axis=0)
    if baseline:
        hits = hits - np.mean([_hits(run, people is not None) for run in baseline], axis=0)
    each = np.concatenate([np.ones_like(captions)[:, None], captions[:, None], hits], axis=1).astype(np.float64)
    if people is not None:
        _, person = np.unique(people, return_inverse=True)
        each = np.stack([np.bincount(person, column) for column in each.T], axis=1)
    n, rng = len(each), np.random.default_rng(seed)
    sums = [each.sum(axis=0)[None]]
    for start in range(0, draws, size := max(1, _CHUNK // n)):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=min(size, draws - start))
        sums.append(weights @ each)
    drawn = _recalls(np.concatenate(sums))
    low, high = np.quantile(drawn[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: Interval(*map(float, row)) for name, *row in zip(names, drawn[0], low, high, strict=True)}


def _hits(run: QueryRanks, persons: bool) -> np.ndarray:
    """Hits [n, 6] of each image and its captions: whether its rank is below k, and how many of theirs are.

    persons: [n, 11], with the sums of its captions' person scores.
    """
    columns = [run.t2i < k for k in CUTS]
    if persons and run.person_scores is not None:
        columns += list(run.person_scores.T)
    by_caption = [np.bincount(run.caption_image, column, minlength=len(run.i2t)) for column in columns]
    return np.stack([*(run.i2t < k for k in CUTS), *by_caption], axis=1)


def _recalls(sums: np.ndarray) -> np.ndarray:
    """Metrics in percent [draws, 7 or 12] from sums of images, captions and hits [draws, 8 or 13]."""
    images, captions, cuts = sums[:, :1], sums[:, 1:2], len(CUTS)
    i2t, t2i, persons = np.split(sums[:, 2:], [cuts, 2 * cuts], axis=1)
    recalls = 100.0 * np.concatenate([i2t / images, t2i / captions], axis=1)
    return np.concatenate([recalls, recalls.sum(axis=1, keepdims=True), 100.0 * persons / captions], axis=1)


def save_queries(path: Path, queries: QueryRanks) -> None:
    """Writes the ranks of a run's queries, whole or not at all."""
    with atomic_path(path, shared=True) as temporary, temporary.open("wb") as file:
        arrays = zip((*RANKS, *PERSONS), dataclasses.astuple(queries), strict=True)
        np.savez(file, **{name: array for name, array in arrays if array is not None})


def load_queries(path: Path) -> QueryRanks:
    """Reads a file of `save_queries`. Raises FileNotFoundError, or ValueError for another kind of file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the ranks of a run's queries, as --mode=eval writes them")
    try:
        arrays = read_npz(path)
        queries = QueryRanks(*(arrays[name] for name in RANKS), *(arrays.get(name) for name in PERSONS))
        for name, ranks in (("i2t", queries.i2t), ("t2i", queries.t2i)):
            if ranks.ndim != 1 or ranks.dtype.kind not in "iu":
                raise ValueError(f"{name} is {ranks.dtype} {list(ranks.shape)}, expected whole numbers [n]")
        check_captions(queries.caption_image, len(queries.i2t), len(queries.t2i))
        shapes = [None if array is None else array.shape for array in (queries.image_person, queries.person_scores)]
        if shapes not in ([None, None], [(len(queries.i2t),), (len(queries.t2i), len(PERSON_METRICS))]):
            raise ValueError(
                f"{' and '.join(PERSONS)} are {shapes[0]} and {shapes[1]}, expected [n] and [t, 5], or neither"
            )
        return queries
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: expected the ranks of a run's queries, as --mode=eval writes them: {error}"
        ) from error
