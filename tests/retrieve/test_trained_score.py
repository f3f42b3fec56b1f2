"""A model whose score has parameters is searched and shown by what was trained of it, not by its vectors."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from shnet_jax.api import Retriever
from shnet_jax.evaluate.evaluator import provenance
from shnet_jax.experiment import assemble, init_variables
from shnet_jax.modes import search as search_mode
from shnet_jax.modes.embed import split_embeddings
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.retrieve.examples import collect
from shnet_jax.train.load import Loaded
from tests.train import tiny

FACTORS = np.linspace(-3.0, 2.0, 16).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick():
        yield


@pytest.fixture(scope="module")
def config():
    return tiny.config(model__name="tests.train.test_score_params", eval__tile=4, page__highlights=0)


@pytest.fixture(scope="module")
def loaded(config):
    experiment = assemble(config)
    variables = init_variables(experiment, 0)
    variables["params"]["weights"]["factor"] = jnp.asarray(FACTORS)
    return Loaded(experiment, variables, 3, "none")


@pytest.fixture(scope="module")
def scores(loaded, config):
    """[10, 50] in float64; the dot product would put other items first."""
    model = Retriever(loaded, config)
    captions = captions_of(model)
    images = model.encode_images("test").vector.astype(np.float64)
    texts = model.encode_texts(captions).vector.astype(np.float64)
    found = (images * FACTORS) @ texts.T
    assert (found.argmax(0) != (images @ texts.T).argmax(0)).mean() > 0.5
    return found


def captions_of(model):
    return [caption for own in model.dataset.captions("test") for caption in own]


def best(scores, k):
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def test_from_python(loaded, config, scores):
    model = Retriever(loaded, config)
    ids = model.dataset.image_ids("test")
    captions = captions_of(model)
    found = model.search(captions[:4], top_k=3)
    assert [[hit.image_id for hit in answer.hits] for answer in found] == ids[best(scores[:, :4].T, 3)].tolist()
    np.testing.assert_allclose(found[1].hits[0].score, scores[:, 1].max(), atol=1e-5)
    (by_image,) = model.search_by_image(ids[6], top_k=3)
    assert [hit.caption for hit in by_image.hits] == [captions[i] for i in best(scores[6], 3)]


def staged(scores, vectors, k, shown):
    """Ranking of each query [q, n]: k candidates by the vectors, of them the best `shown` by the score."""
    found = np.sort(best(vectors, k), axis=1)
    return np.take_along_axis(found, best(np.take_along_axis(scores, found, 1), shown), 1)


def test_two_stages(loaded, config, scores):
    whole = tiny.config(
        model__name="tests.train.test_score_params", eval__tile=4, eval__two_stage=50, eval__exact=False
    )
    few = whole.copy_and_resolve_references()
    few.eval.two_stage = 4
    exact, everything, model = (Retriever(loaded, c) for c in (config, whole, few))
    ids = model.dataset.image_ids("test")
    captions = captions_of(model)
    for one, other in zip(everything.search(captions[:5], top_k=7), exact.search(captions[:5], top_k=7), strict=True):
        assert [hit.image_id for hit in one.hits] == [hit.image_id for hit in other.hits]
    (one,), (other,) = (m.search_by_image(ids[2]) for m in (everything, exact))
    assert [hit.caption_id for hit in one.hits] == [hit.caption_id for hit in other.hits]

    products = model.encode_images("test").vector @ model.encode_texts(captions).vector.T
    expected = staged(scores.T, products.T, 4, 3)
    assert (expected != best(scores.T, 3)).any(), "the candidates hold all that matters"
    found = model.search(captions, top_k=3)
    assert [[hit.image_id for hit in answer.hits] for answer in found] == ids[expected].tolist()
    np.testing.assert_allclose(found[7].hits[1].score, scores[expected[7, 1], 7], atol=1e-5)
    found = [[hit.caption for hit in answer.hits] for answer in model.search_by_image(ids, top_k=3)]
    assert found == [[captions[i] for i in row] for row in staged(scores, products, 4, 3)]
    # More are asked for than there are candidates: as many candidates.
    found = model.search(captions[:9], top_k=6)
    expected = staged(scores.T[:9], products.T[:9], 6, 6)
    assert [[hit.image_id for hit in answer.hits] for answer in found] == ids[expected].tolist()


def test_candidates_of_an_index(loaded, scores, tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    few = tiny.config(model__name="tests.train.test_score_params", eval__tile=4, eval__two_stage=4, eval__exact=False)
    model = Retriever(loaded, few)
    ids = model.dataset.image_ids("test")
    captions = captions_of(model)
    products = model.encode_images("test").vector @ model.encode_texts(captions).vector.T
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(search_mode, "load", lambda workdir, config: loaded)
    few.search.index, few.search.faiss = "faiss", "Flat"
    search_mode.search(few, tmp_path, captions[3], top_k=3)
    written = json.loads((tmp_path / "search.json").read_text("utf-8"))
    assert [hit["image_id"] for hit in written["results"][0]["hits"]] == ids[
        staged(scores.T, products.T, 4, 3)[3]
    ].tolist()
    assert written["index"]["candidates"] == 4 and written["index"]["sides"]["images"]["kind"] == "faiss"


def test_by_the_command(loaded, config, scores, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(search_mode, "load", lambda workdir, config: loaded)
    ids = loaded.experiment.dataset.image_ids("test")
    search_mode.search(config, tmp_path, image_id=str(ids[2]), top_k=4)
    (answer,) = json.loads((tmp_path / "search.json").read_text("utf-8"))["results"]
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], np.sort(scores[2])[:-5:-1], atol=1e-5)
    config.search.index = "faiss"
    with pytest.raises(ValueError, match=r"this model scores pairs in a way of its own \(Weighted\.score\)"):
        search_mode.search(config, tmp_path, "words")
    config.search.index = "exact"


@pytest.mark.slow
def test_on_the_page(loaded, config, scores, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    mesh = make_mesh(1)
    embeddings = split_embeddings(loaded, config, tmp_path, mesh)
    about = provenance(loaded.experiment, "test", 3, "none", 1)
    config.eval.protocols = ("folds2",)
    found = collect(loaded.experiment, loaded.variables, embeddings, config, about, mesh)
    config.eval.protocols = ("whole",)
    owner = np.arange(50) // 5
    np.testing.assert_array_equal(found.ranks.t2i, (scores > scores[owner, np.arange(50)]).sum(0))
    assert found.results.card["protocol"] == "folds2" and found.results.queries.t2i.max() < 5
    staged = tiny.config(model__name="tests.train.test_score_params", eval__two_stage=1000, eval__exact=False)
    experiment = dataclasses.replace(loaded.experiment, config=FrozenConfigDict(staged))
    again = collect(experiment, loaded.variables, embeddings, staged, about, mesh)
    assert again.results.card["ranking"].startswith("two stages")
    for shown in found.captions:
        assert [row for row, _ in shown.best] == best(scores[:, shown.query], config.page.results).tolist()
