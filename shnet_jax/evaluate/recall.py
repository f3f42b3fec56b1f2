"""From ranks to the numbers that papers report, and what guessing would give. Recalls are in percent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from shnet_jax.evaluate.rank import Ranks

CUTS = (1, 5, 10)
DIRECTIONS = ("i2t", "t2i")
Metrics = dict[str, float]
"""i2t_r1, i2t_r5, i2t_r10 (percent), i2t_medr, i2t_meanr (best is 1), the same for t2i, and rsum (of 600)."""


@dataclasses.dataclass(frozen=True)
class QueryRanks:
    """What each query of a gallery got, in the order of the data set: enough to compare two runs query by query.

    i2t: [n] int64, t2i: [t] int64, 0-based ranks as `rank.Ranks` has them, each within its own fold.
    caption_image: [t] int64, image of each caption.
    image_person: [n] integers, equal ones show the same person; found: [t, 5] float64, what each caption gives to the
      numbers of a person search (`person.NAMES`, 0..1). None where persons are not searched.
    """

    i2t: np.ndarray
    t2i: np.ndarray
    caption_image: np.ndarray
    image_person: np.ndarray | None = None
    found: np.ndarray | None = None


def recalls(ranks: Ranks) -> Metrics:
    """R@1, R@5, R@10, median and mean rank of both directions and rSum.

    The median of 0-based ranks is rounded down before 1 is added, as in the released code of 3SHNet.
    """
    found: Metrics = {}
    for direction, rank in (("i2t", ranks.i2t), ("t2i", ranks.t2i)):
        found |= {f"{direction}_r{k}": 100.0 * float(np.mean(rank < k)) for k in CUTS}
        found |= {
            f"{direction}_medr": float(np.floor(np.median(rank))) + 1,
            f"{direction}_meanr": float(np.mean(rank)) + 1,
        }
    return _with_sum(found)


def mean(folds: Iterable[Mapping[str, float]]) -> Metrics:
    """Every number averaged over the folds, the median rank too."""
    rows = list(folds)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def chance(caption_counts: np.ndarray) -> Metrics:
    """The same numbers for a random order, in expectation; the median is that of the distribution of ranks.

    caption_counts: [n] integers >= 1, captions of each image.
    """
    counts = np.asarray(caption_counts, np.int64)
    n, t = len(counts), int(counts.sum())
    values, weights = np.unique(counts, return_counts=True)
    i2t = np.average([_survival(t, int(c)) for c in values], axis=0, weights=weights)
    found: Metrics = {}
    for direction, survival in (("i2t", i2t), ("t2i", _survival(n, 1))):
        found |= {f"{direction}_r{k}": 100.0 * float(1 - survival[min(k, len(survival) - 1)]) for k in CUTS}
        found |= {
            f"{direction}_medr": float(np.argmax(survival[1:] <= 0.5 + 1e-9)) + 1,
            f"{direction}_meanr": float(survival[1:].sum()) + 1,
        }
    return _with_sum(found)


def _survival(size: int, own: int) -> np.ndarray:
    """[size + 1] chance that none of `own` items is among the first m = 0 ... size of a random order."""
    m = np.arange(size)
    return np.concatenate([[1.0], np.cumprod(np.maximum(size - m - own, 0) / (size - m))])


def _with_sum(found: Metrics) -> Metrics:
    return found | {"rsum": sum(found[f"{d}_r{k}"] for d in DIRECTIONS for k in CUTS)}
