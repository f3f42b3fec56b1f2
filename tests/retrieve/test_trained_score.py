"""A model whose score has parameters is searched and shown by what was trained of it, not by its vectors."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from shnet_jax.api import Retriever
from shnet_jax.evaluation.evaluator import provenance
from shnet_jax.experiment import assemble, init_variables
from shnet_jax.modes import search as search_mode
from shnet_jax.modes.embed import split_embeddings
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.retrieve.examples import collect
from shnet_jax.training.load import Loaded
from tests.train import tiny

FACTORS = np.linspace(-3.0, 2.0, 16).astype(np.float32)


TWO_STAGES = {"eval__exact": False, "eval__two_stage": 4}


def changed(**changes):
    return tiny.config(model__name="tests.train.test_score_params", eval__tile=4, page__highlights=0, **changes)


@pytest.fixture
def config():
    return changed()


@pytest.fixture(scope="module")
def loaded():
    experiment = assemble(changed())
    variables = init_variables(experiment, 0)
    variables["params"]["weights"]["factor"] = jnp.asarray(FACTORS)
    return Loaded(experiment, variables, 3, "none")


@pytest.fixture(scope="module")
def model(loaded):
    return Retriever(loaded, changed())


@pytest.fixture(scope="module")
def captions(model):
    return [caption for own in model.dataset.captions("test") for caption in own]


@pytest.fixture(scope="module")
def ids(model):
    return model.dataset.image_ids("test")


@pytest.fixture(scope="module")
def vectors(model, captions):
    """Those of the 10 images and of the 50 captions, in float64."""
    encoded = model.encode_images("test"), model.encode_texts(captions)
    return [embedding.vector.astype(np.float64) for embedding in encoded]


@pytest.fixture(scope="module")
def scores(vectors):
    """[10, 50] in float64; the dot product would put other items first."""
    images, texts = vectors
    trained = (images * FACTORS) @ texts.T
    assert (trained.argmax(0) != (images @ texts.T).argmax(0)).mean() > 0.5
    return trained


def best(scores, k):
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def image_ids(answers):
    return [[hit.image_id for hit in answer.hits] for answer in answers]


def test_from_python(model, ids, captions, scores):
    answers = model.search(captions[:4], top_k=3)
    assert image_ids(answers) == ids[best(scores[:, :4].T, 3)].tolist()
    np.testing.assert_allclose(answers[1].hits[0].score, scores[:, 1].max(), atol=1e-5)
    (by_image,) = model.search_by_image(ids[6], top_k=3)
    assert [hit.caption for hit in by_image.hits] == [captions[i] for i in best(scores[6], 3)]


def staged(scores, vectors, k, shown):
    """Ranking of each query [q, n]: k candidates by the vectors, of them the best `shown` by the score."""
    candidates = np.sort(best(vectors, k), axis=1)
    return np.take_along_axis(candidates, best(np.take_along_axis(scores, candidates, 1), shown), 1)


def test_two_stages(loaded, model, ids, captions, vectors, scores):
    everything = Retriever(loaded, changed(**TWO_STAGES | {"eval__two_stage": 50}))
    few = Retriever(loaded, changed(**TWO_STAGES))
    few._towers = everything._towers = model._towers  # the variables are the same
    answers = everything.search(captions[:5], top_k=7)
    assert image_ids(answers) == image_ids(model.search(captions[:5], top_k=7))
    (one,), (other,) = (m.search_by_image(ids[2]) for m in (everything, model))
    assert [hit.caption_id for hit in one.hits] == [hit.caption_id for hit in other.hits]

    products = vectors[0] @ vectors[1].T
    expected = staged(scores.T, products.T, 4, 3)
    assert (expected != best(scores.T, 3)).any(), "the candidates hold all that matters"
    answers = few.search(captions, top_k=3)
    assert image_ids(answers) == ids[expected].tolist()
    np.testing.assert_allclose(answers[7].hits[1].score, scores[expected[7, 1], 7], atol=1e-5)
    by_image = [[hit.caption for hit in answer.hits] for answer in few.search_by_image(ids, top_k=3)]
    assert by_image == [[captions[i] for i in row] for row in staged(scores, products, 4, 3)]
    # More are asked for than there are candidates: as many candidates.
    answers = few.search(captions[:9], top_k=6)
    assert image_ids(answers) == ids[staged(scores.T[:9], products.T[:9], 6, 6)].tolist()


@pytest.fixture
def workdir(tmp_path, loaded, monkeypatch):
    """A work folder whose run is `loaded`."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(search_mode, "load", lambda workdir, config: loaded)
    return tmp_path


def test_candidates_of_an_index(ids, captions, vectors, scores, workdir):
    pytest.importorskip("faiss")
    few = changed(**TWO_STAGES, search__index="faiss", search__faiss="Flat")
    search_mode.search(few, workdir, captions[3], top_k=3)
    written = json.loads((workdir / "search.json").read_text("utf-8"))
    expected = staged(scores.T, vectors[1] @ vectors[0].T, 4, 3)[3]
    assert [hit["image_id"] for hit in written["results"][0]["hits"]] == ids[expected].tolist()
    assert written["index"]["candidates"] == 4 and written["index"]["sides"]["images"]["kind"] == "faiss"


def test_by_the_command(config, ids, scores, workdir):
    search_mode.search(config, workdir, image_id=str(ids[2]), top_k=4)
    (answer,) = json.loads((workdir / "search.json").read_text("utf-8"))["results"]
    np.testing.assert_allclose([hit["score"] for hit in answer["hits"]], np.sort(scores[2])[:-5:-1], atol=1e-5)
    config.search.index = "faiss"
    with pytest.raises(ValueError, match=r"this model scores pairs in a way of its own \(Weighted\.score\)"):
        search_mode.search(config, workdir, "words")


@pytest.mark.slow
def test_on_the_page(loaded, config, scores, workdir):
    mesh = make_mesh(1)
    embeddings = split_embeddings(loaded, config, workdir, mesh)
    about = provenance(loaded.experiment, "test", 3, "none", 1)
    config.eval.protocols = ("folds2",)
    contents = collect(loaded.experiment, loaded.variables, embeddings, config, about, mesh)
    owner = np.arange(50) // 5
    np.testing.assert_array_equal(contents.ranks.t2i, (scores > scores[owner, np.arange(50)]).sum(0))
    assert contents.results.card["protocol"] == "folds2" and contents.results.queries.t2i.max() < 5
    two_stages = changed(**TWO_STAGES | {"eval__two_stage": 1000})
    experiment = dataclasses.replace(loaded.experiment, config=FrozenConfigDict(two_stages))
    again = collect(experiment, loaded.variables, embeddings, two_stages, about, mesh)
    assert again.results.card["ranking"].startswith("two stages")
    for shown in contents.captions:
        assert [row for row, _ in shown.best] == best(scores[:, shown.query], config.page.results).tolist()
