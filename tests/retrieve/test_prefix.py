"""Prefixes of vectors in embed, search and eval: what they hold, how they rank, which sizes are refused."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest

import shnet_jax
from shnet_jax.evaluation.prefix import prefix
from shnet_jax.modes.embed import embed
from shnet_jax.modes.evaluate import evaluate
from shnet_jax.modes.search import search
from shnet_jax.retrieve.embeddings import open_embeddings
from shnet_jax.types import Embedding
from tests.retrieve import gallery

QUERY = "a red star above the sea"


def cut(vectors, size):
    vectors = np.asarray(vectors, np.float64)[:, :size]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_vectors_are_cut_and_at_unit_length():
    vectors = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 1.0]], np.float32)
    found = prefix(Embedding(vectors), 2).vector
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)  # one of zeros has no direction
    assert found.dtype == np.float32 and prefix(Embedding(vectors), 3).vector is vectors


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A copy of the run of 16 numbers, with embeddings of 16 and of 4."""
    workdir = tmp_path_factory.mktemp("prefix") / "run"
    shutil.copytree(gallery.toy_run(), workdir, ignore=shutil.ignore_patterns("embeddings"))
    for size in (0, 4):
        embed(gallery.toy(search__dims=size), workdir)
    return workdir


def test_embeddings_of_a_size_have_a_folder_of_their_own(run):
    whole, small = (open_embeddings(run / "embeddings" / f"tiny_test_2{end}") for end in ("", "_4"))
    for side in ("images", "texts"):
        expected = cut(getattr(whole, side).vector, 4)
        np.testing.assert_allclose(getattr(small, side).vector, expected, rtol=1e-5, atol=1e-6)
    assert "dims" not in whole.source and small.source["dims"] == 4
    with pytest.raises(ValueError, match=r"\n  dims: 4 there, None here"):
        embed(gallery.toy(search__embeddings=str(small.folder)), run)


@pytest.mark.parametrize("index", ["exact", "faiss"])
def test_search_ranks_by_the_prefix(run, index):
    if index == "faiss":
        pytest.importorskip("faiss")
    c = gallery.toy(search__dims=4, search__index=index, search__faiss="Flat")
    model = shnet_jax.load(run, config=gallery.toy())
    query = cut(model.encode_texts(QUERY).vector, 4)
    scores = query @ cut(model.encode_images("test").vector, 4).T
    search(c, run, query=QUERY, top_k=3)
    hits = json.loads((run / "search.json").read_text())["results"][0]["hits"]
    ids = model.dataset.image_ids("test")
    assert [hit["image_id"] for hit in hits] == [ids[row] for row in np.argsort(-scores[0])[:3]]
    np.testing.assert_allclose([hit["score"] for hit in hits], -np.sort(-scores[0])[:3], atol=1e-5)
    by_api = shnet_jax.load(run, config=gallery.toy(search__dims=4)).search(QUERY, top_k=3)[0].hits
    np.testing.assert_allclose([hit.score for hit in by_api], [hit["score"] for hit in hits], atol=1e-5)


def test_evaluation_has_a_row_for_each_size(run):
    evaluate(gallery.toy(eval__dims=(4, 16)), run)
    found = json.loads((run / "results_tiny_test_whole_best_dims_4_16.json").read_text())["arms"]
    name = gallery.toy().name
    assert list(found) == [f"{name}, 4 numbers", f"{name}, 16 numbers", name]
    assert [arm["card"]["embedding_size"] for arm in found.values()] == ["4", "16", "16"]
    assert found[f"{name}, 16 numbers"]["metrics"] == found[name]["metrics"]
    model = shnet_jax.load(run, config=gallery.toy())
    images = cut(model.encode_images("test").vector, 4)
    texts = cut(model.encode_texts([text for of in model.dataset.captions("test") for text in of]).vector, 4)
    scores = texts @ images.T
    first = 100 * np.mean(scores.argmax(1) == np.arange(len(texts)) // 5)
    np.testing.assert_allclose(found[f"{name}, 4 numbers"]["metrics"]["t2i_r1"], first)
    with pytest.raises(ValueError, match=r"config\.eval\.dims and config\.eval\.two_stage: rank by one of them"):
        evaluate(gallery.toy(eval__dims=(4,), eval__two_stage=3), run)


@pytest.mark.parametrize("size", [17, -1])
def test_a_size_that_the_vectors_do_not_have_is_refused(run, size):
    with pytest.raises(ValueError, match=rf"config\.search\.dims is {size}; the vectors of this model have 16 numbers"):
        embed(gallery.toy(search__dims=size), run)


def test_a_size_that_was_not_trained_for_is_told(run, caplog):
    caplog.set_level(logging.WARNING, logger="shnet_jax")
    embed(gallery.toy(search__dims=4), run)
    assert "config.search.dims: 4: this run was trained with no config.loss.matryoshka" in caplog.text
