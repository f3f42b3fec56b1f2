"""Recalls and ranks of the released 3SHNet (the same code is in USER) on recorded score matrices."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from shnet_jax.evaluation.ensemble import mean_score
from shnet_jax.evaluation.extra_metrics import CXC_POSITIVE, sibling_captions, top_within
from shnet_jax.evaluation.metrics import CUTS, Metrics, hits, recall_at, recalls, relevant
from shnet_jax.evaluation.protocols import evaluate
from shnet_jax.evaluation.ranks import Ranks, ranks
from shnet_jax.evaluation.top_k import top_k_both
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.types import DIRECTIONS, Array, Embedding
from tests.parity.compare import Fixture, Row, compare, skip

GROUP = "metrics"
FIVE = ("r1", "r5", "r10", "medr", "meanr")
# Recorded as float32: half a unit in the last place of 100 is 4e-6, of the rank sums 4e-5.
PERCENT, RSUM = 1e-5, 1e-4


def check(folder: Path) -> list[Row]:
    """Compares every recorded array that belongs to recalls between images and captions."""
    fixture = Fixture(folder / "metrics.npz")
    sims = {case: fixture[f"{case}.in.sims"] for case in ("a", "b", "one2one", "tied")}
    sims["ensemble"] = _mean(sims["a"], sims["b"])
    rows = []
    for case in ("a", "b", "ensemble", "one2one"):
        rows += _recalls(fixture, case, sims[case])
    for case in ("a", "b"):
        rows += _ranks(fixture, case, sims[case])
    for case in ("a", "b", "ensemble"):
        rows += _folds(fixture, case, sims[case])
    rows += _tied(fixture, sims["tied"])
    rows += _crisscrossed(fixture)
    return rows


def recorded(images: Embedding, texts: Embedding) -> Array:
    """A score matrix as a score: an image's vector is its row, a caption's is its column number."""
    return images.vector[:, texts.vector[:, 0]]


def _mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The scores of an ensemble whose members have these."""
    images, texts, _ = zip(_gallery(a), _gallery(b), strict=True)
    return np.asarray(mean_score([recorded, recorded])(images, texts))


def _gallery(sims: np.ndarray) -> tuple[Embedding, Embedding, np.ndarray]:
    n, t = sims.shape
    return Embedding(jnp.asarray(sims)), Embedding(jnp.arange(t)[:, None]), np.arange(t) // (t // n)


def _ranked(sims: np.ndarray) -> Ranks:
    return ranks(*_gallery(sims), score=recorded, tile=16)


def _five(metrics: Metrics, direction: str) -> list[float]:
    return [metrics[f"{direction}_{name}"] for name in FIVE]


def _thirteen(metrics: Metrics) -> list[float]:
    means = [sum(metrics[f"{d}_{name}"] for name in FIVE[:3]) / 3 for d in DIRECTIONS]
    return [*_five(metrics, "i2t"), *_five(metrics, "t2i"), *means, metrics["rsum"]]


def _recalls(fixture: Fixture, case: str, sims: np.ndarray) -> list[Row]:
    found = recalls(_ranked(sims))
    names = {d: f"{case}.out.{d}" for d in DIRECTIONS}
    return [compare(GROUP, names[d], _five(found, d), fixture[names[d]], PERCENT) for d in DIRECTIONS]


def _ranks(fixture: Fixture, case: str, sims: np.ndarray) -> list[Row]:
    images, texts, _ = _gallery(sims)
    found, best = _ranked(sims), top_k_both(images, texts, recorded, k=1, tile=16)
    rows = []
    for direction in DIRECTIONS:
        name, top = f"{case}.out.{direction}_ranks", f"{case}.out.{direction}_top1"
        rows.append(compare(GROUP, name, getattr(found, direction), fixture[name], 0.0))
        rows.append(compare(GROUP, top, getattr(best, direction).index[:, 0], fixture[top], 0.0))
    return rows


def _folds(fixture: Fixture, case: str, sims: np.ndarray) -> list[Row]:
    found = evaluate(*_gallery(sims), score=recorded, protocol="folds5", tile=16)
    each, mean = f"{case}.out.fold5_each", f"{case}.out.fold5_mean"
    return [
        compare(GROUP, each, [_thirteen(fold) for fold in found.folds], fixture[each], RSUM),
        compare(GROUP, mean, _thirteen(found.metrics), fixture[mean], RSUM),
    ]


def _crisscrossed(fixture: Fixture) -> list[Row]:
    """Recalls between and within images and captions; rows of the annotations are (query, item, rating)."""
    images, texts = (Embedding(fixture[f"cxc.in.{side}_emb"]) for side in ("image", "caption"))
    annotated = {d: fixture[f"cxc.in.annot_{d}"] for d in ("i2t", "t2i", "i2i", "t2t")}
    pairs = {d: rows[:, :2].astype(np.int64) for d, rows in annotated.items()}  # between: every annotated item counts
    for direction, kind in (("i2i", "image"), ("t2t", "caption")):
        pairs[direction] = pairs[direction][annotated[direction][:, 2] >= CXC_POSITIVE[kind]]
    siblings = np.stack(sibling_captions(np.arange(len(texts.vector)) // 5), axis=1)
    pairs["t2t"] = np.concatenate([pairs["t2t"], siblings])
    score, k, mesh = RetrievalModel.score, CUTS[-1], make_mesh(1)
    between = top_k_both(images, texts, score, k, 16, mesh)
    lists = {"i2t": between.i2t.index, "t2i": between.t2i.index}
    lists |= {d: top_within(side, score, k, 16, mesh) for d, side in (("i2i", images), ("t2t", texts))}
    rows = []
    for direction, wanted in pairs.items():
        found = recall_at(hits(lists[direction], relevant(*wanted.T)))
        name = f"cxc.out.{direction}"
        rows.append(compare(GROUP, name, list(found.values()), fixture[name], PERCENT))
    return rows


def _tied(fixture: Fixture, sims: np.ndarray) -> list[Row]:
    """Equal scores were ordered by accident: our rank must lie within the bounds, which both hold of it."""
    found = _ranked(sims)
    rows = []
    for direction in DIRECTIONS:
        rank = getattr(found, direction)
        low, high = (f"tied.out.{direction}_rank_{bound}" for bound in ("low", "high"))
        rows.append(compare(GROUP, low, np.minimum(rank - fixture[low], 0), np.zeros(len(rank)), 0.0))
        rows.append(compare(GROUP, high, np.maximum(rank - fixture[high], 0), np.zeros(len(rank)), 0.0))
        for name in (f"tied.out.{direction}_as_observed", f"tied.out.{direction}_ranks_as_observed"):
            fixture.seen.add(name)
            rows.append(skip(GROUP, name, "the order of equal scores was an accident of one NumPy build"))
    return rows
