"""Paired bootstrap over the images of a gallery: how far recalls, and differences of two runs, may be chance.

An image is drawn together with its captions, as these are no independent queries; the gallery that they are ranked in
stays whole. The draws are the same for all numbers and, of a difference, for both runs. An interval says nothing of
what another training seed would give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shnet_jax.evaluate.rank import check_captions
from shnet_jax.evaluate.recall import CUTS, DIRECTIONS, QueryRanks
from shnet_jax.foreign import read_npz

LEVEL = 0.95
DRAWS = 2000
NAMES = (*(f"{d}_r{k}" for d in DIRECTIONS for k in CUTS), "rsum")
_CHUNK = 1 << 22  # weights drawn at once: 32 MiB


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

    Runs of several seeds are averaged query by query first, and then compared with the average of the baseline's runs.
    Raises ValueError when two runs are not of the same gallery.
    """
    both = [*runs, *baseline]
    for run in both[1:]:
        if not np.array_equal(run.caption_image, both[0].caption_image):
            raise ValueError(
                f"paired comparison: {len(both[0].i2t)} images, {len(both[0].t2i)} captions and {len(run.i2t)} images, "
                f"{len(run.t2i)} captions, or their captions belong to other images; expected the same split"
            )
    captions = np.bincount(both[0].caption_image, minlength=len(both[0].i2t))
    ours = np.mean([_found(run) for run in runs], axis=0)
    if baseline:
        ours = ours - np.mean([_found(run) for run in baseline], axis=0)
    each = np.concatenate([np.ones_like(captions)[:, None], captions[:, None], ours], axis=1).astype(np.float64)
    n, rng = len(each), np.random.default_rng(seed)
    sums = [each.sum(axis=0)[None]]
    for start in range(0, draws, size := max(1, _CHUNK // n)):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=min(size, draws - start))
        sums.append(weights @ each)
    drawn = _recalls(np.concatenate(sums))
    low, high = np.quantile(drawn[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: Interval(*map(float, row)) for name, *row in zip(NAMES, drawn[0], low, high, strict=True)}


def _found(run: QueryRanks) -> np.ndarray:
    """[n, 6] whether the image found a caption among the first k, and how many of its captions found the image."""
    own = [np.bincount(run.caption_image, run.t2i < k, minlength=len(run.i2t)) for k in CUTS]
    return np.stack([*(run.i2t < k for k in CUTS), *own], axis=1)


def _recalls(sums: np.ndarray) -> np.ndarray:
    """[draws, 8] sums of images, captions and what was found -> [draws, 7] recalls and rSum in percent."""
    cuts = len(CUTS)
    found = [sums[:, 2 : 2 + cuts] / sums[:, :1], sums[:, 2 + cuts :] / sums[:, 1:2]]
    recalls = 100.0 * np.concatenate(found, axis=1)
    return np.concatenate([recalls, recalls.sum(axis=1, keepdims=True)], axis=1)


def save_queries(path: Path, queries: QueryRanks) -> None:
    """Writes the ranks of a run's queries, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **dataclasses.asdict(queries))
    temporary.replace(path)


def load_queries(path: Path) -> QueryRanks:
    """What `save_queries` wrote. Raises FileNotFoundError, or ValueError for another kind of file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the ranks of a run's queries, as --mode=eval writes them")
    try:
        arrays = read_npz(path)
        found = QueryRanks(**{field.name: arrays[field.name] for field in dataclasses.fields(QueryRanks)})
        for name, ranks in (("i2t", found.i2t), ("t2i", found.t2i)):
            if ranks.ndim != 1 or ranks.dtype.kind not in "iu":
                raise ValueError(f"{name} is {ranks.dtype} {list(ranks.shape)}, expected whole numbers [n]")
        check_captions(found.caption_image, len(found.i2t), len(found.t2i))
        return found
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: expected the ranks of a run's queries, as --mode=eval writes them: {error}"
        ) from error
