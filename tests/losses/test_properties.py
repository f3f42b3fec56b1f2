"""The engine of pairs against dense float64 sums, whatever the ids and scores, in tiles that do not fit the sizes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shnet_jax.losses.pairs import directions
from shnet_jax.types import DATA, Context, Embedding, Pairs

# devices, pairs of each, strategy, tile, whether pairs of the same image are no negatives
KINDS = [
    (1, 7, "streamed", 3, True),
    (2, 3, "streamed", 4, False),
    (3, 2, "ring", 1, True),
    (2, 2, "gathered", 1, False),
]
RANK = 2


def product(images, texts):
    return images.vector[:, :2] @ texts.vector[:, :2].T


def of_text(images, texts):
    """The last number of each text, as the score with all images: a sum of them says which texts it is of."""
    return jnp.ones_like(images.vector[:, 2:]) * texts.vector[:, 2:].T


def of_image(images, texts):
    return images.vector[:, 2:] * jnp.ones_like(texts.vector[:, 2:]).T


@functools.cache
def program(kind):
    """(images [B, 3], texts [B, 3], ids [B]) -> what both directions say, [B, 4] each, on emulated devices."""
    devices, _, strategy, tile, masked = kind

    def one(images, texts, ids):
        def both(score):
            ctx = Context(jnp.int32(0), {}, score, axis=DATA, pairs=Pairs(strategy, tile))
            return directions(Embedding(images), Embedding(texts), ids, ctx, mask_same_image=masked)

        found = []
        for ours, members in zip(both(product), (both(of_text)[0], both(of_image)[1]), strict=True):
            parts = ours.sum(jnp.square), ours.logsumexp(lambda s: s / 2), ours.hardest(RANK), members.sum(lambda s: s)
            found.append(jnp.stack(parts, 1))
        return found

    def run(*arrays):
        split = [x.reshape(devices, -1, *x.shape[1:]) for x in arrays]
        return [x.reshape(-1, 4) for x in jax.vmap(one, axis_name=DATA)(*split)]

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=12)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_both_directions_are_those_of_the_whole_matrix(kind, data, seed):
    size, masked, rng = kind[0] * kind[1], kind[-1], np.random.default_rng(seed)
    ids = np.array(data.draw(st.lists(st.integers(-1, 3), min_size=size, max_size=size)), np.int32)
    images, texts = rng.integers(-2, 3, (2, size, 3)).astype(np.float64)  # many ties
    images[:, 2] = texts[:, 2] = 2.0 ** np.arange(size)
    wrong = np.array([[i != j and not (masked and a == b) for j, b in enumerate(ids)] for i, a in enumerate(ids)])
    found = program(kind)(images.astype(np.float32), texts.astype(np.float32), ids)
    scores = images[:, :2] @ texts[:, :2].T
    masks = []
    for ours, whole in zip(found, (scores, scores.T), strict=True):
        with np.errstate(divide="ignore"):
            logsumexp = np.log(np.where(wrong, np.exp(whole / 2), 0).sum(1))
        hardest = np.sort(np.where(wrong, whole, -np.inf), 1)[:, -RANK]
        expected = np.stack([np.where(wrong, whole**2, 0).sum(1), logsumexp, hardest], 1)
        np.testing.assert_allclose(ours[:, :3], expected, rtol=1e-5, atol=1e-6)
        masks.append(np.asarray(ours[:, 3]).astype(int)[:, None] >> np.arange(size) & 1)
        np.testing.assert_array_equal(masks[-1], wrong)
    np.testing.assert_array_equal(masks[0], masks[0].T)
    np.testing.assert_array_equal(masks[0], masks[1])
