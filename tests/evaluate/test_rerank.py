"""Scores in blocks and in two stages, for a set similarity and for a score with parameters of its own."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.evaluation import pair_scores, ranking_methods
from shnet_jax.evaluation.pair_scores import (
    listed_scores,
    make_programs,
    open_folder,
    pair_scorer,
    ranks_of,
    remove_folder,
    score_matrix,
)
from shnet_jax.evaluation.protocols import evaluate
from shnet_jax.evaluation.ranking_methods import RankingMethod, best_candidates, caption_candidates, rerank
from shnet_jax.evaluation.ranks import Ranks, ranks
from shnet_jax.models.contract import RetrievalModel, scorer
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.types import Embedding
from tests.evaluate.test_person_search import brute_force
from tests.evaluate.test_ranks import assert_same
from tests.parallel.test_hosts import as_processes

N, T, K, L, D = 21, 50, 3, 6, 4


class Bilinear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.normal(1.0), (D, D))


class Sets(RetrievalModel):
    """Best match among the valid members, through a matrix that is a parameter of the score."""

    score_params = ("metric",)
    metric: nn.Module

    def score(self, images, texts):
        pairs = jnp.einsum("nkd,tld->ntkl", self.metric(images.elements), texts.elements)
        valid = images.mask[:, None, :, None] & texts.mask[None, :, None, :]
        return jnp.where(valid, pairs, -jnp.inf).max(axis=(2, 3))


def items(count, size, seed):
    rng = np.random.default_rng(seed)
    elements = rng.normal(size=(count, size, D)).astype(np.float32)
    vector = elements[:, 0] / np.linalg.norm(elements[:, 0], axis=1, keepdims=True)
    return Embedding(vector, elements, np.arange(size) < rng.integers(1, size + 1, (count, 1)))


@functools.cache
def gallery():
    owner = np.random.default_rng(2).permutation(np.arange(T) % N)
    return items(N, K, 0), items(T, L, 1), owner


PARAMS = {"metric": {"kernel": np.random.default_rng(3).normal(size=(D, D)).astype(np.float32)}}


@functools.cache
def programs(devices):
    return make_programs(Sets(Bilinear()), data_mesh(jax.devices()[:devices]))


def made(devices=1, tile=8, buckets=(2, 4)):
    mesh = data_mesh(jax.devices()[:devices])
    return pair_scorer(Sets(Bilinear()), programs(devices), PARAMS, mesh, tile, buckets)


@functools.cache
def oracle():
    images, texts, _ = gallery()
    pairs = np.einsum("nkd,tld->ntkl", images.elements @ PARAMS["metric"]["kernel"], texts.elements)
    valid = images.mask[:, None, :, None] & texts.mask[None, :, None, :]
    return np.where(valid, pairs, -np.inf).max(axis=(2, 3))


@pytest.mark.parametrize(("devices", "tile"), [(1, 8), (2, 4), (1, 100)])
def test_blocks_and_lists_give_the_score_of_every_pair(devices, tile):
    images, texts, owner = gallery()
    found = score_matrix(images, texts, made(devices, tile))
    np.testing.assert_allclose(found, oracle(), rtol=1e-5, atol=1e-6)
    pairs = np.random.default_rng(4).permutation(N * T)[:77]
    ours = listed_scores(images, texts, pairs // T, pairs % T, made(devices, tile))
    np.testing.assert_allclose(ours, oracle().ravel()[pairs], rtol=1e-5)
    assert_same(ranks_of(found, owner, 8, data_mesh(jax.devices()[:1])), exact())


def test_processes_share_the_blocks(monkeypatch, tmp_path):
    """Each computes its part alone, with zeros for the others, which add up to all scores."""
    images, texts = gallery()[:2]
    pairs = np.arange(0, N * T, 3)
    jobs = {
        "all": functools.partial(score_matrix, images, texts),
        "listed": functools.partial(listed_scores, images, texts, pairs // T, pairs % T),
    }
    for name, job in jobs.items():
        whole, folder = job(made(1, 8)), open_folder(tmp_path / name, {})
        one, two = as_processes(monkeypatch, 2, lambda job=job, folder=folder: job(made(1, 8), folder))
        np.testing.assert_array_equal(one + two, whole)
        assert ((one == 0) | (two == 0)).all() and one.any() and two.any()
        np.testing.assert_array_equal(job(made(1, 8), folder), whole)  # from the files of both


@functools.cache
def exact():
    images, texts, owner = gallery()
    return ranks(images, texts, owner, scorer(Sets(Bilinear()), PARAMS), 8)


@pytest.mark.parametrize("devices", [1, 2])
def test_two_stages_with_the_whole_gallery_are_exact(devices):
    staged = rerank(*gallery(), max(N, T), made(devices))
    assert_same(staged.ranks, exact())
    assert staged.pairs == N * T


def test_two_stages_rerank_the_candidates_and_leave_the_others():
    images, texts, owner = gallery()
    k = 4
    staged = rerank(images, texts, owner, k, made())
    vectors, scores = images.vector @ texts.vector.T, oracle()

    def ordered(whole, score):
        first = np.argsort(-whole, kind="stable")
        best = sorted(first[:k], key=lambda j: (-score[j], j))
        return [*best, *first[k:]]

    i2t = [min(ordered(vectors[i], scores[i]).index(j) for j in np.flatnonzero(owner == i)) for i in range(N)]
    t2i = [ordered(vectors[:, j], scores[:, j]).index(owner[j]) for j in range(T)]
    assert_same(staged.ranks, Ranks(i2t, t2i))
    assert (np.array(t2i) >= k).any() and (np.array(t2i) < k).any()
    assert max(N, T) * k <= staged.pairs <= (N + T) * k

    people = np.random.default_rng(5).integers(0, 7, N)
    places = np.empty((N, T))  # of each image in the ranking, best the largest
    for j in range(T):
        places[ordered(vectors[:, j], scores[:, j]), j] = -np.arange(N)
    method = RankingMethod(
        "two stages",
        lambda images, texts, owner, fold: rerank(images, texts, owner, k, made()),
        "two stages",
        lambda images, texts: caption_candidates(images, texts, k, made()),
    )
    score, expected = scorer(Sets(Bilinear()), PARAMS), brute_force(places, people, people[owner])
    for protocol in ("whole", "folds3"):  # persons are searched in the whole gallery
        results = evaluate(images, texts, owner, score, protocol, tile=4, method=method, image_person=people)
        assert {name: results.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    exactly = evaluate(images, texts, owner, score, tile=8, image_person=people).metrics
    assert {name: exactly[name] for name in expected} != pytest.approx(expected, abs=1e-4)
    again = caption_candidates(images, texts, k, made())
    np.testing.assert_array_equal(again.index, staged.candidates.index)
    np.testing.assert_allclose(again.score, staged.candidates.score, rtol=1e-5)


@pytest.fixture
def kept(monkeypatch):
    """Files of the blocks that were kept; after the fifth the user stops the run."""
    keep, files = pair_scores.keep, []

    def stopped(path, block):
        keep(path, block)
        files.append(path)
        if len(files) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(pair_scores, "keep", stopped)
    return files


def test_a_stopped_run_goes_on_with_its_blocks(tmp_path, kept):
    images, texts, _ = gallery()
    folder = open_folder(tmp_path / "scores", {"step": 1})
    with pytest.raises(KeyboardInterrupt):
        score_matrix(images, texts, made(), folder)
    assert len(list(folder.glob("block_*.npy"))) == 5
    (folder / "block_9_9.npy.tmp").write_bytes(b"half")
    assert open_folder(tmp_path / "scores", {"step": 1}) == folder
    np.testing.assert_allclose(score_matrix(images, texts, made(), folder), oracle(), rtol=1e-5)
    assert len(kept) == 21 == len(set(kept))  # 3 x 7 blocks, each once
    open_folder(tmp_path / "scores", {"step": 2})
    assert not list(folder.glob("block_*"))


def test_a_stopped_list_goes_on_with_its_pairs(tmp_path, kept):
    images, texts, owner = gallery()
    folder = open_folder(tmp_path / "scores", {"step": 1})
    with pytest.raises(KeyboardInterrupt):
        rerank(images, texts, owner, 4, made(), folder)
    assert sorted(folder.glob("block_*.npy")) == sorted(kept) and len(kept) == 5
    staged, whole = (rerank(images, texts, owner, 4, made(), f) for f in (folder, None))
    assert len(kept) == 21 == len(set(kept))  # 3 x 7 blocks, each once
    np.testing.assert_array_equal(staged.candidates.score, whole.candidates.score)
    np.testing.assert_array_equal(staged.ranks.i2t, whole.ranks.i2t)
    rerank(images, texts, owner, 5, made(), folder)
    assert len(kept) > 35  # other pairs, other files
    assert not remove_folder(folder) and not folder.exists()


def test_only_what_an_evaluation_wrote_is_removed(tmp_path):
    theirs = tmp_path / "scores"
    theirs.mkdir()
    (theirs / "block_0_0.npy").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"scores is where .* holds block_0_0\.npy, which no evaluation wrote"):
        open_folder(theirs, {"step": 1})
    assert remove_folder(theirs) == ["block_0_0.npy"] and (theirs / "block_0_0.npy").exists()
    ours = open_folder(tmp_path / "ours", {"step": 1})
    (ours / "10_images_0").mkdir()
    (ours / "10_images_1").mkdir()  # killed before its first block
    for name in ("block_0_0.npy", "block_0_1.npy.tmp", "10_images_0/block_0_0.npy", "notes.txt"):
        (ours / name).write_bytes(b"x")
    assert remove_folder(ours) == ["notes.txt"] == [path.name for path in ours.iterdir()]
    (tmp_path / "link").symlink_to(open_folder(tmp_path / "elsewhere", {}))
    assert not remove_folder(tmp_path / "link") and (tmp_path / "elsewhere").is_dir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "identity.json.tmp").write_text("killed")  # before it had its name
    assert open_folder(tmp_path / "empty", {"step": 1}).is_dir()


def test_nan_and_no_candidates_are_errors():
    images, texts, owner = gallery()
    broken = Embedding(images.vector, np.where(np.arange(N)[:, None, None] == 2, np.nan, images.elements), images.mask)
    with pytest.raises(ValueError, match="scores of candidates are NaN"):
        rerank(broken, texts, owner, T, made())
    with pytest.raises(ValueError, match="two_stage is 0"):
        rerank(images, texts, owner, 0, made())


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("part", [1, 10**9])
def test_candidates_of_any_number_of_queries(devices, part, monkeypatch):
    """In parts of any size: the highest scores first, of equal ones the smaller row, -1 behind the last candidate."""
    monkeypatch.setattr(ranking_methods, "CANDIDATE_BYTES", part)
    rng = np.random.default_rng(0)
    queries, gallery = (rng.integers(-1, 2, (n, 2)).astype(np.float32) for n in (9, 30))
    items = np.stack([rng.permutation(30)[:7] for _ in queries])
    items[0], items[1, 3:] = -1, -1
    mesh = data_mesh(jax.devices()[:devices])
    best = best_candidates(Embedding(queries), Embedding(gallery), items, 4, RetrievalModel.score, mesh)
    for query, candidates in enumerate(items):
        scores = {row: float(queries[query] @ gallery[row]) for row in candidates if row >= 0}
        expected = sorted(scores, key=lambda row: (-scores[row], row))[:4]
        np.testing.assert_array_equal(best.index[query], np.pad(expected, (0, 4 - len(expected)), constant_values=-1))
        values = [scores[row] for row in expected] + [-np.inf] * (4 - len(expected))
        np.testing.assert_allclose(best.score[query], values)


def test_a_candidate_without_a_score_is_an_error():
    gallery = Embedding(np.array([[1.0, 0.0], [np.nan, 0.0]], np.float32))
    queries, mesh = Embedding(np.ones((1, 2), np.float32)), data_mesh(jax.devices()[:1])
    assert best_candidates(queries, gallery, np.array([[0, -1]]), 1, RetrievalModel.score, mesh).index.item() == 0
    with pytest.raises(ValueError, match="NaN"):
        best_candidates(queries, gallery, np.array([[0, 1]]), 1, RetrievalModel.score, mesh)
