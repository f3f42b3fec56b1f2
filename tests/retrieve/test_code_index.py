"""int8 and binary indexes against codes and scores computed densely in NumPy."""

import jax
import numpy as np
import pytest

from shnet_jax.evaluation.top_k import TopK, top_k
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.retrieve import approximate, code_index
from shnet_jax.retrieve.code_index import BinaryIndex, Int8Index
from shnet_jax.retrieve.embeddings import Embeddings, Ids, open_embeddings
from shnet_jax.types import Embedding
from tests.retrieve.test_indexes import section

N, T, D = 300, 90, 40
KINDS = {
    "int8": {"index": "int8"},
    "asymmetric": {"index": "binary", "binary": "asymmetric"},
    "hamming": {"index": "binary", "binary": "hamming"},
}
ONE = data_mesh(jax.devices()[:1])


def unit(n, seed, dim=D):
    vectors = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def gallery(folder, images=None):
    images = unit(N, 0) if images is None else images
    ids = Ids([str(i) for i in range(len(images))], [str(i) for i in range(T)], ["a"] * T, list(range(T)))
    return Embeddings(folder, {"made": "by the tests"}, ids, Embedding(images), Embedding(unit(T, 1)))


def oracle(kind, images, queries):
    """Scores [q, n] of the codes, in float64."""
    images, queries = np.float64(images), np.float64(queries)
    if kind == "int8":
        step = np.abs(images).max(1, keepdims=True) / 127
        return queries @ (np.rint(images / step) * step).T
    signs = np.where(images > 0, 1.0, -1.0)
    if kind == "asymmetric":
        return queries @ signs.T / np.sqrt(D)
    return -(np.where(queries > 0, 1.0, -1.0)[:, None] != signs[None]).sum(-1).astype(float)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_scored_and_ordered_as_everything_is(kind, tmp_path):
    """The smaller row of equal scores comes first; the results are the same bits on any number of devices."""
    images = unit(N, 0)
    images[200:] = images[100:200]  # ties
    embeddings, search = gallery(tmp_path, images), section(**KINDS[kind])
    index = approximate.BUILDERS[search.index].make(search, embeddings, "images")
    queries, expected = embeddings.texts.vector, oracle(kind, images, embeddings.texts.vector)
    found = index.search(queries, 20, 16, ONE)
    np.testing.assert_allclose(found.score, np.take_along_axis(expected, found.index, 1), atol=2e-6)
    np.testing.assert_allclose(found.score, -np.sort(-expected, axis=1)[:, :20], atol=2e-6)
    tied = np.diff(found.score, axis=1) == 0
    assert tied.any() and (np.diff(found.index, axis=1)[tied] > 0).all()
    for devices in (2, 8):
        again = index.search(queries, 20, 16, data_mesh(jax.devices()[:devices]))
        np.testing.assert_array_equal(again.index, found.index)
        np.testing.assert_array_equal(again.score, found.score)


@pytest.mark.parametrize(
    ("kind", "rescore", "at_least"), [("int8", 1, 0.95), ("asymmetric", 8, 0.9), ("hamming", 8, 0.8)]
)
def test_recall_is_that_of_the_results_after_the_stored_vectors_chose(kind, rescore, at_least, tmp_path):
    embeddings, search = gallery(tmp_path), section(**KINDS[kind], rescore=rescore)
    opened = approximate.open_index(search, embeddings, "images", 64, ONE)
    queries, vectors = embeddings.texts.vector, embeddings.images.vector
    exact = top_k(Embedding(queries), Embedding(vectors), 10, RetrievalModel.score, 64)
    found = approximate.find(opened.index, queries, 10, vectors, rescore, 64, ONE)
    assert opened.report["recall"] == approximate.overlap(found.index, exact.index) >= at_least
    same = found.index == exact.index
    np.testing.assert_allclose(found.score[same], exact.score[same], atol=1e-6)
    everything = approximate.find(opened.index, queries, 10, vectors, N, 64, ONE)
    np.testing.assert_array_equal(everything.index, exact.index)


@pytest.mark.parametrize("count", [3, 10, 11, 33])
def test_equal_vectors_tie_whatever_their_place_among_the_candidates(count):
    vectors, queries = unit(count, 3, 257), unit(8, 4, 257)
    for twin in range(1, count):
        vectors[twin] = vectors[0]
    index = np.random.default_rng(5).permuted(np.tile(np.arange(count), (8, 1)), axis=1)
    results = approximate.rescored(TopK(index, np.zeros(index.shape, np.float32)), queries, vectors)
    np.testing.assert_array_equal(results.index, np.tile(np.arange(count), (8, 1)))


def test_more_candidates_need_no_new_codes(tmp_path, monkeypatch):
    embeddings, reports = gallery(tmp_path), []
    for rescore in (1, 8):
        search = section(index="binary", rescore=rescore)
        reports.append(approximate.open_index(search, embeddings, "images", 64, ONE).report)
        monkeypatch.setattr(BinaryIndex, "make", None)  # called, it would fail
    assert reports[0]["recall"] < 0.8 < reports[1]["recall"]
    assert reports[0]["bytes_per_vector"] == 8 and reports[0]["vector_bytes"] == 4 * D  # 40 bits in two words


def test_int8_errs_by_half_a_step_at_most():
    vectors = unit(50, 3) * np.float32(7)
    vectors[3] = 0
    codes, scale = code_index.to_int8(vectors)
    assert codes.dtype == np.int8 and scale[3] == 0 and (np.abs(codes[:3]).max(1) == 127).all()
    assert (np.abs(codes * scale[:, None] - vectors) <= scale[:, None] / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("index", ["int8", "binary"])
def test_vectors_that_are_not_finite_have_no_code(index, tmp_path):
    images = unit(N, 0)
    images[7, 2] = np.nan
    with pytest.raises(ValueError, match=r"images\.safetensors: vector of row 7 is not finite"):
        approximate.open_index(section(index=index), gallery(tmp_path, images), "images", 64, ONE)
    assert not [path.name for path in tmp_path.iterdir() if not path.name.endswith("lock")]  # nothing half-written
    search, embeddings = section(index=index), gallery(tmp_path)
    opened = approximate.open_index(search, embeddings, "images", 64, ONE)
    for binary in code_index.BINARY_QUERIES:
        search.binary = binary
        codes = type(opened.index).open(search, embeddings, "images")
        with pytest.raises(ValueError, match="are NaN"):
            approximate.find(codes, np.full((1, D), np.nan, np.float32), 3, embeddings.images.vector, 2, 64, ONE)


def test_a_file_of_other_shapes_is_an_error(tmp_path):
    Int8Index.make(section(), gallery(tmp_path, unit(5, 0)), "images")
    with pytest.raises(
        ValueError, match=r"images\.int8\.safetensors: expected .*300, 40.*, found .*5, 40.*; delete it"
    ):
        Int8Index.open(section(), gallery(tmp_path), "images")
    (tmp_path / "images.int8.safetensors").rename(tmp_path / "images.safetensors")
    (tmp_path / "embeddings.json").write_text('{"format": 1}')
    ids = '{"image_ids": ["a", "b", "c", "d", "e"], "caption_ids": [], "captions": [], "caption_image": []}'
    (tmp_path / "ids.json").write_text(ids)
    with pytest.raises(ValueError, match=r"images\.safetensors: expected a vector for each of 5 images"):
        open_embeddings(tmp_path)  # codes are no embeddings


@pytest.mark.parametrize(
    ("field", "value", "message"), [("rescore", 0, "rescore is 0"), ("binary", "xor", "'xor'; choose from asymmetric")]
)
def test_options_are_checked(field, value, message):
    with pytest.raises(ValueError, match=message):
        approximate.check_options(section(**{field: value}))
