"""Encodings as stage one: what they are of a score, on any number of devices, in ranking and in search."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from configs import base
from shnet_jax.evaluation.protocols import evaluate
from shnet_jax.evaluation.ranking_methods import RankingMethods
from shnet_jax.evaluation.ranks import ranks
from shnet_jax.evaluation.stage_one import GLOBAL_VECTORS, Encodings, make_stage_one
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.models.encodings import LIKE_CHAMFER, ScoreEncoding
from shnet_jax.models.esa import SetScore
from shnet_jax.ops.fixed_encoding import EncodingOptions, draw_projections
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.retrieve import stage_one as stored
from shnet_jax.retrieve.embeddings import Embeddings, Ids
from shnet_jax.retrieve.searcher import Searcher
from shnet_jax.types import Embedding
from tests.evaluate.test_ranks import assert_same
from tests.losses.oracle import unit
from tests.ops.test_fixed_encoding import oracle

N, T, D = 30, 70, 8
SCORE = SetScore("chamfer", 16.0, 2.0)
OPTIONS = EncodingOptions(2, 6, 4, 0)


class Sets(RetrievalModel):
    @property
    def score(self):
        return SCORE


def mesh(devices=1):
    return data_mesh(jax.devices()[:devices])


def encodings(score=SCORE, options=OPTIONS, devices=1):
    return Encodings(ScoreEncoding(score, options, 3), mesh(devices))


@functools.cache
def gallery():
    """Images, captions and the image of each caption; global vectors that say little of the sets."""
    rng, owner = np.random.default_rng(0), np.random.default_rng(1).permutation(np.arange(T) % N)
    elements = unit(rng.normal(size=(N, 4, D)))
    captions = unit(elements[owner][:, :3] + 0.5 * rng.normal(size=(T, 3, D)))
    masks = [np.arange(m) < rng.integers(1, m + 1, (n, 1)) for n, m in ((N, 4), (T, 3))]
    vectors = [unit(rng.normal(size=(n, D))) for n in (N, T)]
    sides = zip(vectors, (elements, captions), masks, strict=True)
    return *(Embedding(np.float32(v), np.float32(e), m) for v, e, m in sides), owner


def config(**changes):
    c = base.get_config()
    c.seed, c.eval.tile, c.eval.stage_one = 3, 16, "fde"
    c.eval.fde = dataclasses.asdict(OPTIONS)
    c.eval.update(changes)
    return c


@pytest.mark.parametrize("kind", LIKE_CHAMFER)
def test_products_are_those_of_global_vectors_and_encodings_in_both_roles(kind):
    images, texts, _ = gallery()
    first = encodings(SetScore(kind, 16.0, 0.7), dataclasses.replace(OPTIONS, d_final=16))
    found = [first(*side).vector for side in ((images, "images"), (texts, "texts"))]
    projections = draw_projections(first.encoding.options, D, 3)
    roles = [
        [oracle(np.float64(side.elements), side.mask, projections, 16, document) for document in (False, True)]
        for side in (images, texts)
    ]
    by_images, by_texts = LIKE_CHAMFER[kind]
    (v_query, v_document), (t_query, t_document) = roles
    expected = np.float64(images.vector) @ np.float64(texts.vector).T
    expected += 0.7 / 2 * (by_images * v_query @ t_document.T + by_texts * v_document @ t_query.T)
    np.testing.assert_allclose(found[0] @ found[1].T, expected, atol=2e-6)
    assert first.width(images) == first.width(texts) == found[0].shape[1]


def test_more_partitions_come_nearer_to_the_score():
    images, texts, _ = gallery()
    exact = np.asarray(SCORE(images, texts))
    errors = []
    for reps in (1, 6, 36):
        first = encodings(options=dataclasses.replace(OPTIONS, r_reps=reps, d_proj=0))
        errors.append(np.std(first(images, "images").vector @ first(texts, "texts").vector.T - exact))
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.75 * errors[0], errors
    assert errors[2] < 0.6 * np.std(images.vector @ texts.vector.T - exact)


@pytest.mark.parametrize("devices", [2, 8])
def test_encodings_are_the_same_bits_on_any_number_of_devices(devices, monkeypatch):
    monkeypatch.setattr("shnet_jax.evaluation.stage_one.ROWS", 5)
    for side, items in zip(("images", "texts"), gallery(), strict=False):
        one, more = (encodings(devices=number)(items, side).vector for number in (1, devices))
        np.testing.assert_array_equal(one, more)


def test_candidates_are_those_of_the_encodings_and_the_others_keep_their_order():
    images, texts, owner = gallery()
    first, exact = encodings(), np.asarray(SCORE(images, texts))
    products = first(images, "images").vector @ first(texts, "texts").vector.T
    methods = RankingMethods(Sets(), FrozenConfigDict(config(two_stage=5)), mesh())
    staged = methods.rerank({"params": {}})
    found = staged.rank(images, texts, owner)
    t2i = []
    for j in range(T):
        order = np.argsort(-products[:, j], kind="stable")
        order = [*sorted(order[:5], key=lambda i: (-exact[i, j], i)), *order[5:]]
        t2i.append(order.index(owner[j]))
    np.testing.assert_array_equal(found.ranks.t2i, t2i)
    np.testing.assert_array_equal(found.candidates.index, np.argsort(-products.T, axis=1, kind="stable")[:, :5])
    assert (np.array(t2i) >= 5).any() and "fixed-dimensional encodings (k_sim 2, r_reps 6" in staged.description
    assert [method.name for method in methods.vectors()] == ["global vectors", "encodings"]
    by_vectors = methods.vectors()[1].rank(images, texts, owner).ranks
    assert_same(by_vectors, ranks(first(images, "images"), first(texts, "texts"), owner, RetrievalModel.score, 16))
    everything = RankingMethods(Sets(), FrozenConfigDict(config(two_stage=T)), mesh()).rerank({"params": {}})
    assert_same(everything.rank(images, texts, owner).ranks, ranks(images, texts, owner, SCORE, 16))

    # Persons are searched in the same order: those of one image each are found where their image is.
    persons = np.arange(N)
    results = evaluate(images, texts, owner, SCORE, "whole", tile=16, method=staged, image_person=persons)
    assert results.metrics["person_r10"] == pytest.approx(100 * np.mean(np.array(t2i) < 10))
    assert results.metrics["person_map"] == pytest.approx(100 * np.mean(1 / (np.array(t2i) + 1)), abs=1e-4)


def searcher(embeddings, options=OPTIONS, candidates=6, **search):
    section = base.get_config().search
    section.update(search)
    return Searcher(embeddings, SCORE, 16, mesh(), candidates, section, encodings(options=options))


def test_a_search_reranks_what_the_encodings_find(tmp_path, monkeypatch):
    images, texts, owner = gallery()
    ids = Ids([str(i) for i in range(N)], [str(j) for j in range(T)], ["a"] * T, np.sort(owner).tolist())
    on_disk = Embeddings(tmp_path, {"format": 1, "made": "by the tests"}, ids, images, texts)
    in_memory = dataclasses.replace(on_disk, source={})
    exact, first = np.asarray(SCORE(images, texts)), encodings()
    products = first(images, "images").vector @ first(texts, "texts").vector.T
    for scores, by, name, queries in (
        (exact.T, products.T, "best_images", texts),
        (exact, products, "best_captions", images),
    ):
        candidates = np.sort(np.argsort(-by, axis=1, kind="stable")[:, :6], axis=1)
        of_candidates = np.take_along_axis(scores, candidates, 1)
        expected = np.take_along_axis(candidates, np.argsort(-of_candidates, axis=1, kind="stable")[:, :4], 1)
        for embeddings, search in ((in_memory, {}), (on_disk, {}), (on_disk, {"index": "int8", "rescore": 5})):
            found = getattr(searcher(embeddings, **search), name)(queries, 4)
            np.testing.assert_array_equal(found.index, expected)
            np.testing.assert_allclose(found.score, np.take_along_axis(scores, expected, 1), atol=1e-6)
    report = json.loads((tmp_path / "fde" / "index_int8_images.json").read_text("utf-8"))
    width = first.width(images)
    assert report["bytes_per_vector"] == width + 4 and report["vector_bytes"] == 4 * width
    about = searcher(on_disk).about
    assert about["candidates"] == 6 and about["stage_one"].startswith("fixed-dimensional encodings")

    with monkeypatch.context() as patch:
        patch.setattr(stored, "_write", None)  # called, it would fail
        searcher(on_disk).best_images(texts, 4)
        with pytest.raises(TypeError):
            searcher(on_disk, dataclasses.replace(OPTIONS, r_reps=2)).best_images(texts, 4)
    assert not (tmp_path / "fde" / "embeddings.json").exists()  # until all of the new ones are there
    searcher(on_disk, dataclasses.replace(OPTIONS, r_reps=2)).best_images(texts, 4)
    (tmp_path / "fde" / "texts.safetensors").write_bytes((tmp_path / "fde" / "images.safetensors").read_bytes())
    with pytest.raises(ValueError, match=rf"texts\.safetensors: expected float32 vectors of {T} items; delete"):
        searcher(on_disk, dataclasses.replace(OPTIONS, r_reps=2)).best_images(texts, 4)


@pytest.mark.parametrize(
    ("changes", "score", "message"),
    [
        ({"stage_one": "muvera"}, SCORE, "'muvera'; choose from vectors, fde"),
        ({}, RetrievalModel.score, "this model scores by RetrievalModel.score: set it to 'vectors'"),
        ({}, SetScore("max", 16.0, 1.0), "this model scores by max"),
        ({"fde": {"k_sim": 20}}, SCORE, "0 to 16 hyperplanes"),
    ],
)
def test_what_cannot_be_encoded_is_told(changes, score, message):
    with pytest.raises(ValueError, match=message):
        make_stage_one(config(two_stage=4, **changes).eval, score, 0, mesh())


def test_without_two_stages_nothing_is_encoded():
    assert make_stage_one(config().eval, RetrievalModel.score, 0, mesh()) is GLOBAL_VECTORS
    with pytest.raises(ValueError, match="these embeddings have no elements"):
        encodings()(Embedding(np.ones((2, D), np.float32)), "images")
