"""Ranks from bfloat16 scores with a float32 re-check are those of float32, whatever lies how close to what."""

import logging

import jax
import numpy as np
import pytest

from shnet_jax.evaluation.bf16_screening import error_bound, rounded_scores
from shnet_jax.evaluation.ranks import ranks
from shnet_jax.evaluation.tiles import programs
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.types import Embedding
from tests.evaluate.test_ranks import assert_same

SCORE = RetrievalModel.score


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def spread(n, t, dim, rng):
    """Captions near their image, others far."""
    images = unit(rng.standard_normal((n, dim)))
    owner = np.arange(t) % n
    return images, unit(images[owner] + 0.1 * rng.standard_normal((t, dim))), owner


def ulps(n, t, dim, rng):
    """All images and captions the same vector, some off by a few last bits of float32: bfloat16 sees no difference."""
    one = unit(rng.standard_normal((1, dim)))
    off = 1 + 2.0**-23 * rng.integers(-2, 3, (n + t, dim))
    vectors = (one * off).astype(np.float32)
    return vectors[:n], vectors[n:], rng.permutation(np.arange(t) % n)


def ties(n, t, dim, rng):
    """A few different vectors, each many times."""
    few = unit(rng.standard_normal((3, dim)))
    return few[rng.integers(0, 3, n)], few[rng.integers(0, 3, t)], rng.permutation(np.arange(t) % n)


def edges(n, t, dim, rng):
    """Numbers half-way between two of bfloat16, where the rounding is largest, all lost parts in one direction."""
    vectors = np.full((n + t, dim), (1 + 2.0**-8) / np.sqrt(dim), np.float32)
    vectors *= np.where(rng.random((n + t, dim)) < 0.5, 1, 1 - 2.0**-7).astype(np.float32)
    return vectors[:n], vectors[n:], np.arange(t) % n


def sizes(n, t, dim, rng):
    """No unit vectors: lengths from 1e-15 to 1e15, and zeros."""
    vectors = rng.standard_normal((n + t, dim)) * 10.0 ** rng.integers(-15, 16, (n + t, 1))
    vectors[::5] = 0
    return vectors[:n].astype(np.float32), vectors[n:].astype(np.float32), rng.permutation(np.arange(t) % n)


GALLERIES = [spread, ulps, ties, edges, sizes]


@pytest.mark.parametrize("make", GALLERIES)
@pytest.mark.parametrize(("n", "t", "dim", "tile", "devices"), [(24, 72, 64, 4, 1), (37, 111, 33, 3, 2)])
def test_ranks_are_exactly_those_of_float32(make, n, t, dim, tile, devices):
    images, texts, owner = make(n, t, dim, np.random.default_rng(0))
    gallery = Embedding(images), Embedding(texts), owner, SCORE, tile
    screened = ranks(*gallery, mesh=data_mesh(jax.devices()[:devices]), score_dtype="bfloat16")
    assert_same(screened, ranks(*gallery))


@pytest.mark.parametrize("make", GALLERIES)
@pytest.mark.parametrize("dim", [1, 7, 512, 3000])
def test_no_score_is_further_off_than_the_bound(make, dim):
    images, texts, _ = make(20, 30, dim, np.random.default_rng(1))
    scores, *of_both = jax.jit(rounded_scores)(Embedding(images), Embedding(texts))
    bound = np.asarray(error_bound(*of_both), np.float64)
    exact = images.astype(np.float64) @ texts.astype(np.float64).T
    off = np.abs(np.asarray(scores, np.float64) - exact)
    assert (off <= bound).all()
    if make is not sizes:  # and it is of use: a small part of the range of a score
        assert (bound <= 0.012).all()


def test_the_bound_is_nearly_reached():
    """Rounding that moves every product in the same direction: a bound that is too small would not hold here."""
    a = np.full((1, 256), (1 + 2.0**-8 - 2.0**-20) / 16, np.float32)
    scores, *of_both = jax.jit(rounded_scores)(Embedding(a), Embedding(a))
    off = float((a.astype(np.float64) ** 2).sum()) - float(scores[0, 0])
    bound = float(error_bound(*of_both)[0, 0])
    assert 0.9 * bound < off <= bound


@pytest.mark.parametrize(("n", "t", "dim"), [(37, 111, 257), (8, 64, 100), (5, 7, 1024)])
def test_a_pair_scores_the_same_in_every_column(n, t, dim):
    """What setting captions aside rests on: the tile they are scored again in has them at other places."""
    rng = np.random.default_rng(2)
    images, texts = (rng.standard_normal((m, dim)).astype(np.float32) for m in (n, t))
    run, moved = programs(SCORE, data_mesh(jax.devices()[:1])).scores, rng.permutation(t)
    before, after = (np.asarray(run(Embedding(images), Embedding(x))) for x in (texts, texts[moved]))
    np.testing.assert_array_equal(after, before[:, moved])


def test_the_share_that_was_checked_again_is_logged(caplog):
    rng = np.random.default_rng(0)
    with caplog.at_level(logging.INFO, logger="shnet_jax.evaluation.ranks"):
        for make in (spread, ulps):
            images, texts, owner = make(20, 40, 64, rng)
            ranks(Embedding(images), Embedding(texts), owner, SCORE, 4, score_dtype="bfloat16")
    clear, hopeless = caplog.messages
    assert clear.startswith("bfloat16 scores left the order of 0.00% of 800 pairs in doubt; 0.00% were scored")
    # A caption's own image is known to be its own; every other pair is in doubt.
    assert hopeless.startswith("bfloat16 scores left the order of 95.00% of 800 pairs in doubt; 100.00% were scored")


def test_nan_is_counted_as_in_float32():
    images, texts, owner = spread(6, 12, 8, np.random.default_rng(0))
    images[2, 3] = np.nan
    texts[5, 0] = np.inf  # meets a zero
    images[:, 0] = 0
    gallery = Embedding(images), Embedding(texts), owner, SCORE, 2
    for score_dtype in ("float32", "bfloat16"):
        with pytest.raises(ValueError, match=r"17 of 72 scores are NaN \(6 x 12 items\)"):
            ranks(*gallery, score_dtype=score_dtype)
    one = Embedding(np.full((1, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match="1 of 1 scores are NaN"):
        ranks(one, one, np.zeros(1, int), SCORE, score_dtype="bfloat16")


def test_what_does_not_fit_is_named():
    gallery = [Embedding(np.eye(2, dtype=np.float32))] * 2
    with pytest.raises(ValueError, match=r"score_dtype is 'float16'; choose from float32, bfloat16"):
        ranks(*gallery, np.arange(2), SCORE, score_dtype="float16")

    def own_score(images, texts):
        return images.vector @ texts.vector.T

    with pytest.raises(ValueError, match=r"score of its own \(.*own_score\): set it to float32"):
        ranks(*gallery, np.arange(2), own_score, score_dtype="bfloat16")
