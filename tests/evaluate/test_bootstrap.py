"""Intervals against drawing images one by one, and against what a proportion is known to vary."""

import dataclasses

import numpy as np
import pytest

from shnet_jax.evaluation.bootstrap import NAMES, load_queries, recall_intervals, save_queries
from shnet_jax.evaluation.metrics import QueryRanks

N = 400


def run(seed, share=0.5, captions=5, n=N):
    """Ranks of which about `share` are 0."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(n), captions)
    return QueryRanks(*(np.where(rng.random(m) < share, 0, 50) for m in (n, n * captions)), owner)


def test_the_estimate_is_the_recall():
    rng, owner = np.random.default_rng(0), np.random.default_rng(1).permutation(np.repeat(np.arange(N), 3))
    one = QueryRanks(rng.integers(0, 20, N), rng.integers(0, 20, 3 * N), owner)
    found = recall_intervals([one], draws=50)
    assert tuple(found) == NAMES
    for k in (1, 5, 10):
        assert found[f"i2t_r{k}"].estimate == pytest.approx(100 * np.mean(one.i2t < k))
        assert found[f"t2i_r{k}"].estimate == pytest.approx(100 * np.mean(one.t2i < k))
    assert found["rsum"].estimate == pytest.approx(sum(found[name].estimate for name in NAMES[:-1]))
    assert all(i.low <= i.estimate <= i.high for i in found.values())


def test_the_width_is_that_of_a_proportion():
    found = recall_intervals([run(0)])
    share = found["i2t_r1"].estimate / 100
    width = 2 * 1.96 * 100 * np.sqrt(share * (1 - share) / N)
    assert found["i2t_r1"].high - found["i2t_r1"].low == pytest.approx(width, rel=0.1)
    # Five independent captions an image; captions that stand and fall together are worth one.
    independent = found["t2i_r1"].high - found["t2i_r1"].low
    one = run(0)
    together = QueryRanks(one.i2t, one.i2t[one.caption_image], one.caption_image)
    alike = recall_intervals([together])["t2i_r1"]
    assert alike.high - alike.low == pytest.approx(independent * np.sqrt(5), rel=0.15)


def test_equals_drawing_images_with_their_captions_one_by_one():
    one, rng = run(3, n=12, captions=2), np.random.default_rng(0)
    draws = []
    for times in rng.multinomial(12, np.full(12, 1 / 12), size=500):
        images = np.repeat(np.arange(12), times)
        own = np.concatenate([np.flatnonzero(one.caption_image == i) for i in images])
        draws.append(100 * np.mean(one.t2i[own] < 1))
    low, high = np.quantile(draws, [0.025, 0.975])
    found = recall_intervals([one], draws=500, seed=0)["t2i_r1"]
    assert (found.low, found.high) == pytest.approx((low, high))


def test_persons_are_drawn_with_all_their_images(tmp_path):
    """Also the numbers of a person search; a file of them gives the same."""
    one, rng = run(3, n=12, captions=2), np.random.default_rng(0)
    found = rng.random((24, 5))
    one = dataclasses.replace(one, image_person=np.array([7, 7, 3, 3, 3, 9, 1, 1, 9, 4, 4, 4]), person_scores=found)
    draws = []
    for times in np.random.default_rng(0).multinomial(5, np.full(5, 1 / 5), size=500):
        people = np.repeat([1, 3, 4, 7, 9], times)
        images = np.concatenate([np.flatnonzero(one.image_person == p) for p in people])
        own = np.concatenate([np.flatnonzero(one.caption_image == i) for i in images])
        draws.append([100 * np.mean(one.t2i[own] < 1), 100 * np.mean(found[own, 3])])
    save_queries(tmp_path / "queries.npz", one)
    intervals = recall_intervals([load_queries(tmp_path / "queries.npz")], draws=500, seed=0)
    for name, drawn in zip(("t2i_r1", "person_map"), np.transpose(draws), strict=True):
        expected = np.quantile(drawn, [0.025, 0.975])
        assert (intervals[name].low, intervals[name].high) == pytest.approx(tuple(expected)), name
    assert intervals["person_map"].estimate == pytest.approx(100 * found[:, 3].mean())
    gap = recall_intervals([one], [dataclasses.replace(one, person_scores=found - 0.25)])
    assert gap["person_r1"].estimate == pytest.approx(25) and gap["rsum"].high == 0
    assert "person_r1" not in recall_intervals([one], [dataclasses.replace(one, person_scores=None, image_person=None)])
    with pytest.raises(ValueError, match="or these to other persons"):
        recall_intervals([one], [dataclasses.replace(one, image_person=np.arange(12))])


def test_a_difference_is_paired_and_seeds_are_averaged():
    one = run(0)
    better = QueryRanks(np.where(np.arange(N) < 20, 0, one.i2t), one.t2i, one.caption_image)
    gained = 100 * np.mean(one.i2t[:20] > 0) * 20 / N
    found = recall_intervals([better], [one])
    assert found["i2t_r1"].estimate == pytest.approx(gained)
    assert found["i2t_r1"].low > 0 and found["t2i_r1"].low == found["t2i_r1"].high == 0
    unpaired = recall_intervals([run(1)], [one])["i2t_r1"]
    assert found["i2t_r1"].high - found["i2t_r1"].low < 0.5 * (unpaired.high - unpaired.low)
    halved = recall_intervals([better, one], [one])["i2t_r1"]
    assert halved.estimate == pytest.approx(gained / 2)


def test_another_gallery_is_an_error():
    with pytest.raises(ValueError, match="400 images, 2000 captions and 399 images"):
        recall_intervals([run(0)], [run(0, n=399)])


def test_files(tmp_path):
    one = run(0)
    save_queries(tmp_path / "q.npz", one)
    again = load_queries(tmp_path / "q.npz")
    for name in ("i2t", "t2i", "caption_image"):
        np.testing.assert_array_equal(getattr(again, name), getattr(one, name))
    assert [p.name for p in tmp_path.iterdir()] == ["q.npz"]
    np.savez(tmp_path / "other.npz", a=1)
    with pytest.raises(ValueError, match=r"other\.npz: expected the ranks"):
        load_queries(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        load_queries(tmp_path / "none.npz")
