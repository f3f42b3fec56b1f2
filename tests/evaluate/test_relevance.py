"""Sets of relevant items: against the published scoring code and against plain loops."""

import math
import warnings

import numpy as np
import pytest

from shnet_jax.evaluation.metrics import hits, hubness, precision_at_r, recall_at, relevant
from shnet_jax.evaluation.protocols import evaluate
from shnet_jax.types import Embedding
from tests.evaluate.test_ranks import recorded

IMAGES, CAPTIONS = np.arange(40) * 7 + 3, np.arange(200) * 11 + 5  # numbers as of COCO: neither rows nor dense


def rankings(kind, rng):
    """(captions of each image, images of each caption), all of them, best first, as rows."""
    n, t = len(IMAGES), len(CAPTIONS)
    scores = rng.standard_normal((n, t))
    if kind == "structured":  # captions near their image, and near those of its group
        scores += 2.0 * (np.arange(n)[:, None] == np.arange(t) // 5) + (
            np.arange(n)[:, None] // 4 == np.arange(t) // 20
        )
    if kind == "ties":
        scores = np.round(scores)
    return np.argsort(-scores, axis=1, kind="stable"), np.argsort(-scores.T, axis=1, kind="stable")


def judgements(rng, queries, items):
    """Relevant items of some of the queries, 1 to 12 of each."""
    some = rng.choice(len(queries), len(queries) // 2, replace=False)
    return {int(q): rng.choice(len(items), rng.integers(1, 13), replace=False).tolist() for q in some}


def pairs(judged):
    return relevant(*np.array([(q, i) for q, items in judged.items() for i in items]).T)


@pytest.fixture
def metric():
    """The published scoring code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its optional imports
        package = pytest.importorskip("eccv_caption", reason="the published scoring code: pip install eccv_caption")
        return package.Metrics()


def by_number(i2t, t2i):
    """Rankings as the package takes them."""
    return (
        {int(q): CAPTIONS[row].tolist() for q, row in zip(IMAGES, i2t, strict=True)},
        {int(q): IMAGES[row].tolist() for q, row in zip(CAPTIONS, t2i, strict=True)},
    )


def test_whole_and_folds_equal_the_published_package(metric):
    scores = np.random.default_rng(2).standard_normal((40, 200)) + 2 * (np.arange(40)[:, None] == np.arange(200) // 5)
    scores = scores.astype(np.float32)
    owner = np.arange(200) // 5
    metric.coco_ids = CAPTIONS
    metric.coco_gts = {
        "i2t": {int(q): CAPTIONS[owner == row].tolist() for row, q in enumerate(IMAGES)},
        "t2i": {int(q): [int(IMAGES[owner[row]])] for row, q in enumerate(CAPTIONS)},
    }
    theirs = metric.compute_all_metrics(
        *by_number(np.argsort(-scores, axis=1), np.argsort(-scores.T, axis=1)),
        target_metrics=("coco_1k_recalls", "coco_5k_recalls"),
    )
    gallery = Embedding(scores), Embedding(np.arange(200)[:, None]), owner
    for protocol, name in (("whole", "coco_5k"), ("folds5", "coco_1k")):
        found = evaluate(*gallery, recorded, protocol).metrics
        for cut in ("r1", "r5", "r10"):
            for direction in ("i2t", "t2i"):
                assert found[f"{direction}_{cut}"] == pytest.approx(100 * theirs[f"{name}_{cut}"][direction])


@pytest.mark.parametrize("kind", ["random", "structured", "ties"])
def test_equals_the_published_package(kind, metric):
    rng = np.random.default_rng(1)
    i2t, t2i = rankings(kind, rng)
    judged = {"i2t": judgements(rng, IMAGES, CAPTIONS), "t2i": judgements(rng, CAPTIONS, IMAGES)}
    metric.eccv_gts = metric.cxc_gts = {
        "i2t": {int(IMAGES[q]): CAPTIONS[items].tolist() for q, items in judged["i2t"].items()},
        "t2i": {int(CAPTIONS[q]): IMAGES[items].tolist() for q, items in judged["t2i"].items()},
    }
    theirs = metric.compute_all_metrics(
        *by_number(i2t, t2i),
        target_metrics=("eccv_map_at_r", "eccv_rprecision", "eccv_r1", "cxc_recalls"),
        Ks=(1, 5, 10),
    )
    for direction, lists in (("i2t", i2t), ("t2i", t2i)):
        wanted = pairs(judged[direction])
        hit = hits(lists[:, : max(10, wanted.most)], wanted)
        for name, value in precision_at_r(hit, wanted.counts).items():
            assert value == pytest.approx(100 * theirs[f"eccv_{name}"][direction], abs=1e-9)
        for name, value in recall_at(hit).items():
            assert value == pytest.approx(100 * theirs[f"cxc_{name}"][direction], abs=1e-9)


def test_precision_against_loops():
    rng = np.random.default_rng(0)
    lists, _ = rankings("random", rng)
    judged = judgements(rng, IMAGES, CAPTIONS)
    wanted = pairs(judged)
    found = precision_at_r(hits(lists[:, : wanted.most], wanted), wanted.counts)
    averages, precisions = [], []
    for q, items in judged.items():
        hit = [item in items for item in lists[q, : len(items)]]
        averages.append(sum(hit[r] * sum(hit[: r + 1]) / (r + 1) for r in range(len(items))) / len(items))
        precisions.append(sum(hit) / len(items))
    assert found["map_at_r"] == pytest.approx(100 * math.fsum(averages) / len(averages))
    assert found["rprecision"] == pytest.approx(100 * math.fsum(precisions) / len(precisions))


def test_a_perfect_list_and_pairs_given_twice():
    wanted = relevant(np.array([4, 4, 4, 2]), np.array([7, 7, 1, 0]))
    assert wanted.queries.tolist() == [2, 4] and wanted.counts.tolist() == [1, 2]
    top = np.zeros((5, 3), np.int64)
    top[4], top[2] = [1, 7, 3], [0, 7, 3]
    hit = hits(top, wanted)
    assert set(precision_at_r(hit, wanted.counts).values()) == {100.0}
    with pytest.raises(ValueError, match="no query"):
        relevant(np.empty(0, int), np.empty(0, int))


def test_hubness():
    even = np.arange(40).reshape(20, 2) % 40
    assert hubness(even, 40) == 0.0
    hub = np.stack([np.zeros(20, int), np.arange(1, 21)], 1)  # item 0 is in every list
    times = np.bincount(hub.ravel(), minlength=40)
    off = times - times.mean()
    assert hubness(hub, 40) == pytest.approx((off**3).mean() / (off**2).mean() ** 1.5)
    assert hubness(hub, 40) > 5
