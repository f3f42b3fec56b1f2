"""Person search against a brute-force ranking of every caption, and what guessing gives against many random orders."""

import jax
import numpy as np
import pytest

from shnet_jax.evaluation.ensemble import MeanScore
from shnet_jax.evaluation.metrics import PERSON_METRICS, person_chance, person_metrics
from shnet_jax.evaluation.person_search import _order, search_persons
from shnet_jax.evaluation.top_k import TopK
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.models.esa import SetScore
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.types import Embedding
from tests.losses.oracle import unit
from tests.parallel.test_hosts import as_processes

PERSONS = np.array([5, 5, 9, 9, 9, 2, 7, 7, 5, 2, 9, 1, 1])
CAPTIONS = np.array([9, 2, 5, 1, 7, 5, 9, 1, 2, 9, 5])


def brute_force(scores, image_person, caption_person):
    """scores [n, t]; one caption, one image at a time."""
    rows = []
    for t, person in enumerate(caption_person):
        order = sorted(range(len(scores)), key=lambda i: (-scores[i, t], i))
        ranks = [place for place, i in enumerate(order, 1) if image_person[i] == person]
        precision = [number / rank for number, rank in enumerate(ranks, 1)]
        rows.append([*(float(ranks[0] <= k) for k in (1, 5, 10)), np.mean(precision), len(ranks) / ranks[-1]])
    return dict(zip(PERSON_METRICS, 100 * np.mean(rows, axis=0), strict=True))


def embeddings(ties):
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=(len(p), 4)) for p in (PERSONS, CAPTIONS)]
    # With ties the scores are 0, 1, 2, ...: most are equal.
    vectors = [(v > 0).astype(float) if ties else unit(v) for v in vectors]
    elements = [unit(rng.normal(size=(len(p), m, 4))) for p, m in ((PERSONS, 3), (CAPTIONS, 2))]
    return [Embedding(np.float32(v), np.float32(e)) for v, e in zip(vectors, elements, strict=True)]


@pytest.mark.parametrize("tile, devices", [(512, 1), (1, 2), (4, 3)])
@pytest.mark.parametrize("score", [RetrievalModel.score, SetScore("chamfer", 16.0, 0.5)], ids=["vectors", "sets"])
@pytest.mark.parametrize("ties", [False, True])
def test_it_is_what_brute_force_finds(tile, devices, score, ties):
    images, texts = embeddings(ties)
    if score is RetrievalModel.score:
        images, texts = (e.replace(elements=None) for e in (images, texts))
    found = search_persons(images, texts, PERSONS, CAPTIONS, score, tile, data_mesh(jax.devices()[:devices]))
    expected = brute_force(np.asarray(score(images, texts)), PERSONS, CAPTIONS)
    assert person_metrics(found) == pytest.approx(expected, abs=1e-4)


def test_processes_share_the_tiles(monkeypatch):
    images, texts = (e.replace(elements=None) for e in embeddings(ties=False))
    given = images, texts, PERSONS, CAPTIONS, RetrievalModel.score, 1, data_mesh(jax.devices()[:1])
    whole = search_persons(*given)
    one, two = as_processes(monkeypatch, 2, lambda: search_persons(*given))
    np.testing.assert_array_equal(one + two, whole)
    assert one.any(axis=1).sum() == 8 and two.any(axis=1).sum() == 3  # tiles of 8 captions


def test_an_ensemble_of_models():
    images, texts = embeddings(ties=False)
    vectors = [e.replace(elements=None) for e in (images, texts)]
    both = MeanScore((SetScore("chamfer", 16.0, 0.5), RetrievalModel.score), (0.25, 0.75))
    found = search_persons((images, vectors[0]), (texts, vectors[1]), PERSONS, CAPTIONS, both, 4)
    scores = 0.25 * both.scores[0](images, texts) + 0.75 * RetrievalModel.score(*vectors)
    assert person_metrics(found) == pytest.approx(brute_force(np.asarray(scores), PERSONS, CAPTIONS), abs=1e-4)


def test_a_constant_score_gives_no_more_than_the_order_of_the_images():
    images, texts = (Embedding(np.zeros((len(p), 2), np.float32)) for p in (PERSONS, CAPTIONS))
    found = person_metrics(search_persons(images, texts, PERSONS, CAPTIONS, RetrievalModel.score))
    assert found["person_r1"] == pytest.approx(100 * np.mean(PERSONS[0] == CAPTIONS))


def test_images_that_come_first_are_in_the_order_of_their_second_score_alone():
    """Two stages: equal second scores rank by the smaller index, whatever the first ones say."""
    scores = np.float32([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6], [0.4, 0.5]])
    first = TopK(np.array([[3, 0, 1], [4, 2, 1]]), np.float32([[-2.0, -1.0, -1.0], [5.0, 5.0, 6.0]]))
    np.testing.assert_array_equal(_order(scores.T, first), [[0, 1, 3, 4, 2], [1, 2, 4, 0, 3]])
    np.testing.assert_array_equal(_order(scores.T, None), [[3, 4, 2, 1, 0], [0, 1, 2, 3, 4]])


def test_chance():
    rng = np.random.default_rng(0)
    drawn = [brute_force(rng.random((len(PERSONS), len(CAPTIONS))), PERSONS, CAPTIONS) for _ in range(400)]
    expected = person_chance(PERSONS, CAPTIONS)
    for name in PERSON_METRICS:
        assert expected[name] == pytest.approx(np.mean([d[name] for d in drawn]), abs=2.0), name


def test_faults_are_told():
    images, texts = embeddings(False)
    with pytest.raises(ValueError, match="1 captions describe persons without image; row 3 is of person 4"):
        search_persons(images, texts, PERSONS, np.where(np.arange(11) == 3, 4, CAPTIONS), RetrievalModel.score)
    with pytest.raises(ValueError, match="are NaN"):
        search_persons(images.replace(vector=images.vector * np.nan), texts, PERSONS, CAPTIONS, RetrievalModel.score)
    with pytest.raises(ValueError, match="expected a person for each"):
        search_persons(images, texts, PERSONS[:-1], CAPTIONS, RetrievalModel.score)
