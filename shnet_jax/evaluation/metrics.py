"""Metrics from ranks and rankings: recall, relevance judgements, person search, and their values at chance.

Recalls and precisions are in percent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from shnet_jax.evaluation.ranks import Ranks
from shnet_jax.types import DIRECTIONS

CUTS = (1, 5, 10)
PERSON_METRICS = ("person_r1", "person_r5", "person_r10", "person_map", "person_minp")
Metrics = dict[str, float]
"""Metrics by name: i2t_r1, i2t_r5, i2t_r10 (percent), i2t_medr, i2t_meanr (best is 1), also for t2i; rsum (of 600)."""


@dataclasses.dataclass(frozen=True)
class QueryRanks:
    """Ranks of every query in the order of the data set: enough to compare two runs query by query.

    i2t: [n] int64, t2i: [t] int64, 0-based ranks as `ranks.Ranks` has them, each within its own fold.
    caption_image: [t] int64, image of each caption.
    image_person: [n] integers, equal ones show the same person. person_scores: [t, 5] float64, the values 0..1 of
      PERSON_METRICS for each caption. Both are None where persons are not searched.
    """

    i2t: np.ndarray
    t2i: np.ndarray
    caption_image: np.ndarray
    image_person: np.ndarray | None = None
    person_scores: np.ndarray | None = None


def recalls(ranks: Ranks) -> Metrics:
    """R@1, R@5, R@10, median and mean rank of both directions and rSum.

    The median of 0-based ranks is rounded down before 1 is added, as in the released code of 3SHNet.
    """
    metrics: Metrics = {}
    for direction, rank in (("i2t", ranks.i2t), ("t2i", ranks.t2i)):
        values = [*(100.0 * np.mean(rank < k) for k in CUTS), np.floor(np.median(rank)) + 1, np.mean(rank) + 1]
        metrics |= _named(direction, values)
    return _with_sum(metrics)


def mean(folds: Iterable[Mapping[str, float]]) -> Metrics:
    """Every number averaged over the folds, the median rank too."""
    rows = list(folds)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def chance(caption_counts: np.ndarray) -> Metrics:
    """The metrics of `recalls` for a random order, in expectation; the median is that of the distribution of ranks.

    caption_counts: [n] integers >= 1, captions of each image.
    """
    counts = np.asarray(caption_counts, np.int64)
    n, t = len(counts), int(counts.sum())
    values, weights = np.unique(counts, return_counts=True)
    i2t = np.average([_survival(t, int(c)) for c in values], axis=0, weights=weights)
    metrics: Metrics = {}
    for direction, survival in (("i2t", i2t), ("t2i", _survival(n, 1))):
        recall = (100.0 * (1 - survival[min(k, len(survival) - 1)]) for k in CUTS)
        median = float(np.argmax(survival[1:] <= 0.5 + 1e-9)) + 1
        metrics |= _named(direction, [*recall, median, survival[1:].sum() + 1])
    return _with_sum(metrics)


def _named(direction: str, values: Iterable[float]) -> Metrics:
    names = (*(f"r{k}" for k in CUTS), "medr", "meanr")
    return {f"{direction}_{name}": float(value) for name, value in zip(names, values, strict=True)}


def _survival(size: int, relevant: int) -> np.ndarray:
    """Probability [size + 1] that none of `relevant` items is among the first m = 0 ... size of a random order."""
    m = np.arange(size)
    return np.concatenate([[1.0], np.cumprod(np.maximum(size - m - relevant, 0) / (size - m))])


def _with_sum(metrics: Metrics) -> Metrics:
    return metrics | {"rsum": sum(metrics[f"{d}_r{k}"] for d in DIRECTIONS for k in CUTS)}


@dataclasses.dataclass(frozen=True)
class Relevant:
    """Pairs of a query and an item that is relevant to it, without repetition, sorted by query.

    queries: [q] int64, rows of the queries that count, ascending; each has at least one item.
    counts: [q] int64, relevant items of each of them, R.
    query, item: [p] int64, place in `queries` and row of the item, of each pair.
    """

    queries: np.ndarray
    counts: np.ndarray
    query: np.ndarray
    item: np.ndarray

    @property
    def most(self) -> int:
        """Largest number of items that are relevant to one query, R."""
        return int(self.counts.max())


def relevant(query: np.ndarray, item: np.ndarray) -> Relevant:
    """Relevant items from pairs of rows in any order; repeated pairs count once. Raises ValueError for none."""
    if not len(query):
        raise ValueError("no query has a relevant item")
    pairs = np.unique(np.stack([query, item], axis=1).astype(np.int64), axis=0)
    queries, place, counts = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
    return Relevant(queries, counts, place, pairs[:, 1])


def hits(top: np.ndarray, judged: Relevant) -> np.ndarray:
    """Mask [q, k] bool: whether the item at each place of a query's list, a row of `top` [n, k], is relevant to it."""
    items = top[judged.queries]
    width = max(int(items.max()), int(judged.item.max())) + 1
    pairs = judged.query * width + judged.item
    return np.isin(np.arange(len(items))[:, None] * width + items, pairs)


def recall_at(hit: np.ndarray) -> Metrics:
    """R@1, R@5, R@10 in percent: queries with a relevant item among their first 1, 5, 10; of hits [q, k >= 10]."""
    return {f"r{k}": 100.0 * float(np.mean(hit[:, :k].any(axis=1))) for k in CUTS}


def average_precision(hit: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Average precision [q]: sum of precision@r over the relevant places r of a list, divided by the relevant items.

    hit: [q, k] bool, whether the item at each place is relevant. counts: [q] relevant items of each query.
    """
    places = np.arange(1, hit.shape[1] + 1)
    return (hit * np.cumsum(hit, axis=1) / places).sum(axis=1) / counts


def precision_at_r(hit: np.ndarray, counts: np.ndarray) -> Metrics:
    """mAP@R, R-Precision and R@1 in percent (Musgrave et al., ECCV 2020; Chun et al., ECCV 2022).

    R-Precision is the share of relevant items among the first R, R being the number of relevant items of the query;
    mAP@R the sum of precision@r over the relevant places r <= R, divided by R. Both are averaged over queries.

    Args:
      hit: [q, k] bool with k >= every R, or k all items.
      counts: [q], R of each query.
    """
    inside = hit & (np.arange(1, hit.shape[1] + 1) <= counts[:, None])
    return {
        "map_at_r": 100.0 * float(average_precision(inside, counts).mean()),
        "rprecision": 100.0 * float((inside.sum(axis=1) / counts).mean()),
        "r1": 100.0 * float(hit[:, 0].mean()),
    }


def hubness(top: np.ndarray, items: int) -> float:
    """Skewness of the k-occurrence: how often each of `items` items is among the first k of a query, `top` [q, k].

    0 for a symmetric distribution, large when few items (hubs) are in many lists (Radovanovic et al., JMLR 11, 2010).
    0.0 when all items occur equally often.
    """
    times = np.bincount(top.ravel(), minlength=items).astype(np.float64)
    off = times - times.mean()
    spread = float(np.sqrt(np.mean(off**2)))
    return float(np.mean(off**3)) / spread**3 if spread else 0.0


def person_scores(relevant: np.ndarray) -> np.ndarray:
    """Values [c, 5] in 0..1 of PERSON_METRICS for each caption.

    relevant: [c, n] bool, whether the image at each place of a caption's ranking shows its person; at least one does.
    """
    counts = relevant.sum(axis=1)
    first = relevant.argmax(axis=1) + 1
    last = relevant.shape[1] - relevant[:, ::-1].argmax(axis=1)
    return np.stack([*(first <= k for k in CUTS), average_precision(relevant, counts), counts / last], axis=1)


def person_metrics(scores: np.ndarray) -> Metrics:
    """PERSON_METRICS in percent, the mean over captions of their `person_scores` [t, 5]."""
    return {name: 100.0 * float(value) for name, value in zip(PERSON_METRICS, scores.mean(axis=0), strict=True)}


def person_chance(image_person: np.ndarray, caption_person: np.ndarray) -> Metrics:
    """PERSON_METRICS of a random order, in expectation, in percent."""
    n = len(image_person)
    people, images = np.unique(image_person, return_counts=True)
    of_caption = images[np.searchsorted(people, caption_person)]
    sizes, captions = np.unique(of_caption, return_counts=True)
    rows = [_person_chance(n, int(size)) for size in sizes]
    return {name: float(np.average([row[name] for row in rows], weights=captions)) for name in PERSON_METRICS}


def _person_chance(n: int, size: int) -> Metrics:
    """PERSON_METRICS where `size` of n images are relevant, in percent."""
    survival = _survival(n, size)
    # The last relevant image, counted from the end of the ranking, lies where the first one does from its beginning.
    last = np.arange(n, 0, -1)
    values = {"person_minp": float(np.sum((survival[:-1] - survival[1:]) * size / last))}
    # An image at rank r is relevant with chance size / n, and then so is each before it with (size - 1) / (n - 1).
    harmonic = float(np.sum(1 / np.arange(1, n + 1)))
    values["person_map"] = (harmonic + (size - 1) * (n - harmonic) / max(n - 1, 1)) / n
    values |= {f"person_r{k}": 1 - float(survival[min(k, n)]) for k in CUTS}
    return {name: 100 * value for name, value in values.items()}


def recall_line(metrics: Metrics) -> str:
    """The recalls of both directions and rSum in one line, with those of a person search where there are any."""
    recalls = "".join(
        f"{name} R@1/5/10 {metrics[f'{side}_r1']:.1f} {metrics[f'{side}_r5']:.1f} {metrics[f'{side}_r10']:.1f}  "
        for side, name in DIRECTIONS.items()
    )
    persons = "  person R@1 {person_r1:.1f} mAP {person_map:.1f}".format(**metrics) if "person_r1" in metrics else ""
    return f"{recalls}rSum {metrics['rsum']:.1f}{persons}"
