"""An ensemble ranks as the mean of whole score matrices does, on any number of devices and in folds."""

import dataclasses

import jax
import numpy as np
import pytest

from shnet_jax.evaluation.bf16_screening import check_score_dtype
from shnet_jax.evaluation.ensemble import Embedded, combine
from shnet_jax.evaluation.protocols import Provenance, evaluate
from shnet_jax.evaluation.ranks import Ranks
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.types import Embedding
from tests.evaluate.test_ranks import assert_same, oracle

N, CAPTIONS = 20, 3
OWNER = np.repeat(np.arange(N), CAPTIONS)


def member(seed, score=RetrievalModel.score, dim=8, **changes):
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((N, dim)).astype(np.float32)
    texts = images[OWNER] + rng.standard_normal((len(OWNER), dim)).astype(np.float32)
    subject = Provenance(dataset="set", split="test", checkpoint_step=seed, parameters="trained")
    ids, captions = np.array([f"i{k}" for k in range(N)]), tuple(f"c{k}" for k in range(len(OWNER)))
    found = Embedded(f"m{seed}", Embedding(images), Embedding(texts), score, OWNER, ids, captions, subject)
    return dataclasses.replace(found, **changes)


def dot(a, b):
    """A score of its own beside the default one."""
    return -((a.vector[:, None] - b.vector[None]) ** 2).sum(-1)


def matrix(one):
    return np.asarray(one.score(one.images, one.texts), np.float64)


@pytest.mark.parametrize(("devices", "weights"), [(1, ()), (8, (3.0, 1.0, 0.0))])
def test_ranks_are_those_of_the_mean_matrix(devices, weights):
    members = [member(0), member(1, dim=5), member(2, score=dot)]
    both = combine("all", members, weights)
    results = evaluate(both.images, both.texts, OWNER, both.score, tile=3, mesh=data_mesh(jax.devices()[:devices]))
    mean = np.average([matrix(m) for m in members], axis=0, weights=weights or None)
    assert_same(results.queries, oracle(mean, OWNER))
    assert not np.array_equal(results.queries.i2t, oracle(matrix(members[0]), OWNER).i2t)  # or nothing was averaged


def test_folds_of_an_ensemble():
    members = [member(0), member(1)]
    both = combine("both", members)
    found = evaluate(both.images, both.texts, OWNER, both.score, "folds4", tile=2)
    mean = np.mean([matrix(m) for m in members], axis=0)
    for fold in range(4):
        rows, columns = slice(5 * fold, 5 * fold + 5), slice(15 * fold, 15 * fold + 15)
        queries = Ranks(found.queries.i2t[rows], found.queries.t2i[columns])
        assert_same(queries, oracle(mean[rows, columns], OWNER[:15]))


def test_the_card_says_so():
    card = combine("both", [member(0), member(1)], (1, 3)).provenance
    assert card.ensemble == "mean of the scores of 2 models: m0 (0.25), m1 (0.75)"
    assert (card.checkpoint_step, card.parameters, card.dataset) == ("0, 1", "trained", "set")
    assert member(0).provenance.ensemble == "no, a single model"


SWAPPED = np.array(["i1", "i0", *(f"i{k}" for k in range(2, N))])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_ids": SWAPPED}, r"m0 \(set, test\) and m1 \(set, test\): images row 0 is 'i0' and 'i1'"),
        ({"image_ids": np.array(["i0"])}, "20 and 1 images; expected the same gallery"),
        ({"captions": ("c0", "x", *(f"c{k}" for k in range(2, 60)))}, "captions row 1 is 'c1' and 'x'"),
        ({"caption_image": np.roll(OWNER, 1)}, "caption_image row 0 is 0 and 19"),
    ],
)
def test_members_of_another_gallery(changes, message):
    with pytest.raises(ValueError, match=message):
        combine("both", [member(0), member(1, **changes)])


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (0.0, 0.0), (1.0, float("nan"))])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match=r"config\.eval\.ensemble_weights"):
        combine("both", [member(0), member(1)], weights)


def test_one_member_is_no_ensemble():
    with pytest.raises(ValueError, match="at least 2 members, got 1"):
        combine("one", [member(0)])


def test_bfloat16_scores_are_refused():
    with pytest.raises(ValueError, match=r"score_dtype is bfloat16.*set it to float32"):
        check_score_dtype(combine("both", [member(0), member(1)]).score, "bfloat16")
