"""Rankings against sets of relevant items: recall, R-Precision and mAP@R, and how unevenly items are retrieved."""

from __future__ import annotations

import dataclasses

import numpy as np

from shnet_jax.evaluate.recall import CUTS, Metrics


@dataclasses.dataclass(frozen=True)
class Relevant:
    """Which items are relevant to which queries, as pairs without repetition, sorted by query.

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
        """The largest R."""
        return int(self.counts.max())


def relevant(query: np.ndarray, item: np.ndarray) -> Relevant:
    """From pairs of rows in any order; pairs that repeat count once. Raises ValueError when there are none."""
    if not len(query):
        raise ValueError("no query has a relevant item")
    pairs = np.unique(np.stack([query, item], axis=1).astype(np.int64), axis=0)
    queries, place, counts = np.unique(pairs[:, 0], return_inverse=True, return_counts=True)
    return Relevant(queries, counts, place, pairs[:, 1])


def hits(top: np.ndarray, wanted: Relevant) -> np.ndarray:
    """[q, k] bool: whether the item at each place of a query's list, a row of `top` [n, k], is relevant to it."""
    items = top[wanted.queries]
    width = max(int(items.max()), int(wanted.item.max())) + 1
    pairs = wanted.query * width + wanted.item
    return np.isin(np.arange(len(items))[:, None] * width + items, pairs)


def recall_at(hit: np.ndarray) -> Metrics:
    """R@1, R@5, R@10 in percent: queries with a relevant item among their first 1, 5, 10; of hits [q, k >= 10]."""
    return {f"r{k}": 100.0 * float(np.mean(hit[:, :k].any(axis=1))) for k in CUTS}


def precision_at_r(hit: np.ndarray, counts: np.ndarray) -> Metrics:
    """mAP@R, R-Precision and R@1 in percent (Musgrave et al., ECCV 2020; Chun et al., ECCV 2022).

    R-Precision is the share of relevant items among the first R, R being the number of relevant items of the query;
    mAP@R the sum of precision@r over the relevant places r <= R, divided by R. Both are averaged over queries.

    Args:
      hit: [q, k] bool with k >= every R, or k all items.
      counts: [q], R of each query.
    """
    found = np.cumsum(hit, axis=1)
    places = np.arange(1, hit.shape[1] + 1)
    inside = hit & (places <= counts[:, None])
    average = (inside * found / places).sum(axis=1) / counts
    last = np.minimum(counts, hit.shape[1]) - 1
    return {
        "map_at_r": 100.0 * float(average.mean()),
        "rprecision": 100.0 * float((found[np.arange(len(hit)), last] / counts).mean()),
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
