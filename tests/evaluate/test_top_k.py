"""Top-k against a stable sort of the whole matrix in NumPy, on several numbers of devices and with many ties."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.evaluation.top_k import is_dot_product, top_k, top_k_both, transpose_score
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel import hosts
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.types import Embedding
from tests.evaluate.test_ranks import recorded

DOT = RetrievalModel.score


def oracle(queries, gallery, k):
    scores = queries.astype(np.float64) @ gallery.T.astype(np.float64)
    index = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return index, np.take_along_axis(scores, index, 1)


@pytest.mark.parametrize(
    ("n", "q", "k", "tile", "devices"),
    [(37, 5, 4, 3, 1), (37, 5, 4, 3, 8), (37, 21, 37, 2, 1), (37, 21, 37, 2, 2), (3, 1, 10, 512, 8), (64, 9, 7, 4, 2)],
)
def test_equals_sorting_whatever_the_ties_sizes_and_tiles(n, q, k, tile, devices):
    rng = np.random.default_rng([n, q])
    gallery, queries = (rng.integers(-1, 2, (m, 4)).astype(np.float32) for m in (n, q))  # scores -4 .. 4: ties, zeros
    found = top_k(Embedding(queries), Embedding(gallery), k, DOT, tile, data_mesh(jax.devices()[:devices]))
    index, score = oracle(queries, gallery, min(k, n))
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_array_equal(found.score, score)


def test_equal_items_of_real_vectors_keep_their_order_on_any_number_of_devices():
    rng = np.random.default_rng(0)
    gallery = np.tile(rng.normal(size=(11, 24)).astype(np.float32), (7, 1))  # each item 7 times, in many tiles
    queries = rng.normal(size=(6, 24)).astype(np.float32)
    one, many = (top_k(Embedding(queries), Embedding(gallery), 9, DOT, 5, data_mesh(jax.devices()[:d])) for d in (1, 8))
    np.testing.assert_array_equal(many.index, one.index)
    np.testing.assert_array_equal(many.score, one.score)  # bitwise
    np.testing.assert_array_equal(one.index[:, :7], np.arange(0, 77, 11) + one.index[:, :1])


def test_a_score_of_sets_and_its_turned_form():
    def score(images, texts):  # best pair of members: no dot product of two vectors
        return (images.elements[:, None, :, None] * texts.elements[None, :, None, :]).sum(-1).max((2, 3))

    rng = np.random.default_rng(1)
    images, texts = (
        Embedding(np.zeros((n, 1), np.float32), rng.normal(size=(n, 3, 2)).astype(np.float32)) for n in (13, 10)
    )
    table = (images.elements[:, None, :, None] * texts.elements[None, :, None, :]).sum(-1).max((2, 3))
    by_text = top_k(texts, images, 3, score, 2, data_mesh(jax.devices()[:2]))
    by_image = top_k(images, texts, 3, transpose_score(score), 2, data_mesh(jax.devices()[:2]))
    np.testing.assert_array_equal(by_text.index, np.argsort(-table.T, axis=1, kind="stable")[:, :3])
    np.testing.assert_array_equal(by_image.index, np.argsort(-table, axis=1, kind="stable")[:, :3])
    assert is_dot_product(DOT) and not is_dot_product(score) and transpose_score(score) is transpose_score(score)


def test_a_gallery_in_a_file_and_many_queries_at_a_small_tile(tmp_path):
    rng = np.random.default_rng(2)
    vectors = np.memmap(tmp_path / "vectors", np.float32, "w+", shape=(50, 6))
    vectors[:] = rng.integers(-2, 3, vectors.shape)
    queries = rng.integers(-2, 3, (40, 6)).astype(np.float32)  # 40 queries, 16 at a time
    found = top_k(Embedding(queries), Embedding(vectors), 5, DOT, 2)
    np.testing.assert_array_equal(found.index, oracle(queries, np.asarray(vectors), 5)[0])


def in_processes(monkeypatch, count, search):
    """The results of all processes; each is a thread here."""
    number, barrier, arrays = threading.local(), threading.Barrier(count, timeout=60), [None] * count

    def from_all(x):
        arrays[number.value] = x
        barrier.wait()
        everybody = np.stack(arrays)
        barrier.wait()
        return everybody

    def run(process):
        number.value = process
        return search()

    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: number.value)
    monkeypatch.setattr(hosts, "from_all", from_all)
    monkeypatch.setattr(hosts, "meet_all", barrier.wait)
    monkeypatch.setattr(hosts, "CHUNK", 12 * 6 * 5 * count)  # five images at once
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_processes_share_the_tiles_and_get_the_same(monkeypatch, count):
    """Some captions score -inf with every image, some images with every caption; some processes have no tile."""
    rng = np.random.default_rng(count)
    table = rng.integers(-2, 3, (13, 27)).astype(np.float32)
    table[:, 4], table[6], table[2, ::2] = -np.inf, -np.inf, -0.0

    def score(images, texts):
        return jnp.asarray(table)[images[:, None], texts[None, :]]

    images, texts = np.arange(13), np.arange(27)
    whole = top_k_both(images, texts, score, 6, 1)
    for shared in in_processes(monkeypatch, count, lambda: top_k_both(images, texts, score, 6, 1, shared=True)):
        for ours, theirs in zip(shared, whole, strict=True):
            np.testing.assert_array_equal(ours.index, theirs.index)
            np.testing.assert_array_equal(ours.score, theirs.score)
    for found in in_processes(monkeypatch, count, lambda: top_k(texts, images, 4, score, 1, shared=True)):
        np.testing.assert_array_equal(found.index, whole.t2i.index[:, :4])
    with pytest.raises(ValueError, match="27 of 351 scores are NaN"):
        in_processes(monkeypatch, count, lambda: top_k_both(images, texts, _nan_row(score), 2, 1, shared=True))


@functools.cache
def _nan_row(score):
    return lambda images, texts: jnp.where(images[:, None] == 3, jnp.nan, score(images, texts))


def test_what_cannot_be_searched():
    good, empty = Embedding(np.ones((3, 2), np.float32)), Embedding(np.ones((0, 2), np.float32))
    with pytest.raises(ValueError, match="top_k is 0"):
        top_k(good, good, 0, DOT)
    with pytest.raises(ValueError, match="gallery is empty"):
        top_k(good, empty, 1, DOT)
    with pytest.raises(ValueError, match="3 of 3 scores are NaN"):
        top_k(Embedding(np.full((1, 2), np.nan, np.float32)), good, 1, DOT)
    assert top_k(empty, good, 2, DOT).index.shape == (0, 2)


def both(scores, k, tile, devices=1):
    columns = np.arange(scores.shape[1])[:, None]
    mesh = data_mesh(jax.devices()[:devices])
    return top_k_both(Embedding(scores), Embedding(columns), recorded, k, tile, mesh)


@pytest.mark.parametrize(
    ("n", "t", "k", "tile", "devices"), [(13, 31, 4, 1, 1), (13, 31, 10, 2, 3), (5, 9, 50, 100, 8)]
)
@pytest.mark.parametrize("levels", [3, 10**6])
def test_both_directions_equal_a_stable_sort(n, t, k, tile, devices, levels):
    scores = np.random.default_rng(n + k).integers(-levels, levels, (n, t)).astype(np.float32)
    top = both(scores, k, tile, devices)
    np.testing.assert_array_equal(top.i2t.index, np.argsort(-scores, axis=1, kind="stable")[:, :k])
    np.testing.assert_array_equal(top.t2i.index, np.argsort(-scores, axis=0, kind="stable").T[:, :k])


@pytest.mark.parametrize("tile", [1, 100])
def test_zeros_of_either_sign_are_a_tie_in_both_directions(tile):
    scores = np.where(np.random.default_rng(0).random((6, 40)) < 0.5, -0.0, 0.0).astype(np.float32)
    top = both(scores, 4, tile, devices=2)
    np.testing.assert_array_equal(top.i2t.index, np.tile(np.arange(4), (6, 1)))
    np.testing.assert_array_equal(top.t2i.index, np.tile(np.arange(4), (40, 1)))


def test_scores_of_minus_infinity_tie_come_last_and_are_no_padding():
    scores = np.full((5, 9), -np.inf, np.float32)
    scores[:, 6] = 1.0
    np.testing.assert_array_equal(both(scores, 3, 1, 2).i2t.index, np.tile([6, 0, 1], (5, 1)))
    scores = np.full((9, 2), -np.inf, np.float32)
    scores[6, 0] = 1.0
    best = top_k(Embedding(np.arange(2)[:, None]), Embedding(scores), 3, recorded, 1, data_mesh(jax.devices()[:2]))
    np.testing.assert_array_equal(best.index, [[6, 0, 1], [0, 1, 2]])
    np.testing.assert_array_equal(best.score, [[1.0, -np.inf, -np.inf], [-np.inf] * 3])


def test_nan_and_a_list_of_nothing_are_errors():
    scores = np.zeros((3, 9), np.float32)
    with pytest.raises(ValueError, match="first 0 items"):
        both(scores, 0, 2)
    scores[2, 8] = np.nan
    with pytest.raises(ValueError, match="1 of 27 scores are NaN"):
        both(scores, 2, 2)
