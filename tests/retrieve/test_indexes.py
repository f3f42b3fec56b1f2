"""Indexes against the exact search; FAISS and Milvus where their packages are installed."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from configs import base
from shnet_jax.evaluation.top_k import TopK, top_k
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.retrieve import approximate, vector_index
from shnet_jax.retrieve.embeddings import Embeddings, Ids
from shnet_jax.types import Embedding

MESH = data_mesh(jax.devices()[:1])


@pytest.fixture
def embeddings(tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 16))
    images, texts = (
        (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)
        for v in (np.repeat(centres, m, 0) + rng.normal(size=(20 * m, 16)) / 2 for m in (15, 30))
    )
    ids = Ids([str(i) for i in range(300)], [str(i) for i in range(600)], ["a"] * 600, [i // 2 for i in range(600)])
    return Embeddings(tmp_path, {"made": "by the tests"}, ids, Embedding(images), Embedding(texts))


def section(**changes):
    search = base.get_config().search
    search.update(changes)
    return search


def check(search, embeddings, at_least):
    for side, other in (("images", embeddings.texts), ("texts", embeddings.images)):
        opened = approximate.open_index(search, embeddings, side, 64, MESH)
        gallery = getattr(embeddings, side)
        exact = top_k(other, gallery, 10, RetrievalModel.score, 64)
        found = approximate.find(opened.index, other.vector, 10, gallery.vector, search.rescore, 64, MESH)
        assert approximate.overlap(found.index, exact.index) >= at_least
        assert opened.report["recall"] >= at_least and opened.report["queries"] == 256
        assert opened.report["queries_of"] == ("texts" if side == "images" else "images")
        same = found.index == exact.index
        np.testing.assert_allclose(found.score[same], exact.score[same], atol=1e-5)
        assert (np.diff(found.score, axis=1) <= 0).all()


@pytest.mark.parametrize(
    ("factory", "visited", "at_least"),
    [("Flat", 64, 1.0), ("HNSW16", 64, 0.95), ("PCA8,IVF10,Flat", 10, 0.3), ("SQ8", 64, 0.99)],
)
def test_faiss(factory, visited, at_least, embeddings):
    pytest.importorskip("faiss")
    check(section(index="faiss", faiss=factory, nprobe=visited, ef_search=visited), embeddings, at_least)


def test_a_faiss_file_is_used_again_and_made_again_for_other_settings(embeddings, monkeypatch):
    pytest.importorskip("faiss")
    first = section(index="faiss", faiss="Flat")
    approximate.open_index(first, embeddings, "images", 64, MESH)
    with monkeypatch.context() as patch:
        patch.setattr(vector_index.FaissIndex, "make", None)  # called, it would fail
        approximate.open_index(first, embeddings, "images", 64, MESH)
        with pytest.raises(TypeError):
            approximate.open_index(section(index="faiss", faiss="HNSW8"), embeddings, "images", 64, MESH)
    with pytest.raises(ValueError, match=r"config.search.faiss is 'Nonsense' for 300 images of 16 numbers; FAISS says"):
        approximate.open_index(section(index="faiss", faiss="Nonsense"), embeddings, "images", 64, MESH)


def test_another_nprobe_is_measured_again_without_a_new_index(embeddings, monkeypatch):
    pytest.importorskip("faiss")
    recalls = []
    for nprobe in (1, 64):
        search = section(index="faiss", faiss="IVF64,Flat", nprobe=nprobe)
        recalls.append(approximate.open_index(search, embeddings, "texts", 64, MESH).report["recall"])
        monkeypatch.setattr(vector_index.FaissIndex, "make", None)
    assert recalls[0] < 0.95 and recalls[1] == 1.0, recalls


def test_milvus_in_a_file(embeddings, monkeypatch):
    pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    search = section(index="milvus", milvus="FLAT")
    check(search, embeddings, 0.999)
    monkeypatch.setattr(vector_index.MilvusIndex, "make", None)
    opened = approximate.open_index(search, embeddings, "texts", 64, MESH)
    nearest = opened.index.search(np.asarray(embeddings.texts.vector[5:6]), 1)
    assert opened.report["vectors"] == 600 and nearest.index[0, 0] == 5


@pytest.mark.parametrize("kind", ["faiss", "milvus"])
def test_a_missing_package_is_named_with_its_command(kind, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(vector_index.importlib, "import_module", absent)
    with pytest.raises(
        ValueError, match=rf"pip install {vector_index.PACKAGES[kind][1]} \(or pip install -e '.\[{kind}\]'"
    ):
        vector_index.require(kind)


def test_an_index_of_dot_products_for_no_other_score():
    approximate.check_index("exact", lambda images, texts: images)
    approximate.check_index("faiss", RetrievalModel.score)
    with pytest.raises(ValueError, match="scores pairs in a way of its own"):
        approximate.check_index("faiss", lambda images, texts: images)
    with pytest.raises(ValueError, match="'annoy'; choose from exact, int8, binary, faiss, milvus"):
        approximate.check_index("annoy", RetrievalModel.score)


def test_overlap_is_the_share_of_the_exact_results():
    assert approximate.overlap(np.array([[1, 2, 9], [4, -1, 3]]), np.array([[1, 2, 3], [3, 4, 5]])) == pytest.approx(
        4 / 6
    )


def test_nan_in_stored_vectors_is_told():
    results = TopK(np.array([[0, 1, -1]]), np.zeros((1, 3), np.float32))
    vectors = np.array([[1.0, 0.0], [np.nan, 0.0]], np.float32)
    with pytest.raises(ValueError, match="1 of 3 scores are NaN"):
        approximate.rescored(results, np.ones((1, 2), np.float32), vectors)
