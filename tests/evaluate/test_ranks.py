"""Ranks against an oracle that sorts the whole matrix, on scores with many ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shnet_jax.evaluation.ranks import Ranks, best_captions, count, match_scores, ranks
from shnet_jax.evaluation.tiles import Tiling, make_tiling, prefetch_one
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.types import Embedding
from tests.parallel.test_hosts import as_processes


def recorded(images, texts):
    """A matrix as a score function: an image's vector is its row, a caption's its column number."""
    return images.vector[:, texts.vector[:, 0]]


def ranked(scores, owner, tile=512, devices=1):
    columns = np.arange(scores.shape[1])[:, None]
    return ranks(Embedding(scores), Embedding(columns), owner, recorded, tile, data_mesh(jax.devices()[:devices]))


def oracle(scores, owner):
    """Stable sort of every row and column; ties keep the order of the index."""
    n, t = scores.shape
    by_text = np.argsort(-scores, axis=1, kind="stable")
    by_image = np.argsort(-scores, axis=0, kind="stable")
    i2t = [next(r for r in range(t) if owner[by_text[i, r]] == i) for i in range(n)]
    t2i = [int(np.flatnonzero(by_image[:, j] == owner[j])[0]) for j in range(t)]
    return Ranks(np.array(i2t), np.array(t2i))


def assert_same(ranks, expected):
    np.testing.assert_array_equal(ranks.i2t, expected.i2t)
    np.testing.assert_array_equal(ranks.t2i, expected.t2i)


# Captions of each image: each further shape costs a compilation.
COUNTS = ((1,), (3,), (1, 2, 4, 3, 1), (2, 1, 4, 1, 3, 1, 2, 2, 4))


@st.composite
def galleries(draw, levels=4, counts=COUNTS):
    """Scores with few different values, one to four captions for each image, in any order."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    captions = draw(st.sampled_from(counts))
    owner = rng.permutation(np.repeat(np.arange(len(captions)), captions))
    return rng.integers(0, levels, (len(captions), len(owner))).astype(np.float32), owner


@pytest.mark.parametrize("devices", [1, 3])
@settings(max_examples=20)
@given(galleries(), st.sampled_from([1, 2, 100]))
def test_equals_sorting_whatever_the_ties_sizes_and_tiles(devices, gallery, tile):
    result = ranked(*gallery, tile, devices)
    assert_same(result, oracle(*gallery))
    assert result.i2t.dtype == result.t2i.dtype == np.int64


@settings(max_examples=15)
@given(galleries(levels=1000_000, counts=COUNTS[2:]), st.integers(0, 1000))
def test_the_order_of_items_changes_nothing_when_no_scores_are_equal(gallery, seed):
    scores, owner = gallery
    n, t = scores.shape
    scores = scores + np.linspace(0, 0.5, n * t, dtype=np.float32).reshape(n, t)
    rng = np.random.default_rng(seed)
    p, q = rng.permutation(n), rng.permutation(t)  # the image in row i was in row p[i]
    before, after = ranked(scores, owner, 2), ranked(scores[p][:, q], np.argsort(p)[owner[q]], 2)
    assert_same(after, Ranks(before.i2t[p], before.t2i[q]))


@pytest.mark.parametrize("score_dtype", ["float32", "bfloat16"])
def test_processes_share_the_tiles(score_dtype, monkeypatch):
    """The counts of three processes add up to the ranks; captions fill two tiles, so that the third has none."""
    rng = np.random.default_rng(4)
    images, texts = (Embedding(rng.standard_normal((count, 8)).astype(np.float32)) for count in (6, 12))
    given = images, texts, np.arange(12) // 2, RetrievalModel.score, 1, None, score_dtype
    whole = ranks(*given)
    parts = list(as_processes(monkeypatch, 3, lambda: ranks(*given)))
    for side in ("i2t", "t2i"):
        own = [getattr(part, side) for part in parts]
        np.testing.assert_array_equal(sum(own), getattr(whole, side))
        assert own[0].any() and own[1].any() and not own[2].any() and own[0].dtype == np.int64


def test_constant_scores_give_chance():
    owner = np.arange(100) // 5
    assert_same(
        ranked(np.ones((20, 100), np.float32), owner, 8), Ranks(np.arange(20) * 5, owner)
    )  # one of 20 at rank 0


def test_collapsed_embeddings_give_chance_through_a_real_product():
    # Equal vectors must tie exactly although their product is computed in tiles, some of them padded.
    one = np.random.default_rng(0).standard_normal(257).astype(np.float32)
    images, texts = (Embedding(np.tile(one, (count, 1))) for count in (37, 111))
    owner = np.arange(111) // 3
    result = ranks(images, texts, owner, lambda a, b: a.vector @ b.vector.T, 8)
    assert_same(result, Ranks(np.arange(37) * 3, owner))


def test_bfloat16_scores_are_compared_as_they_are():
    scores = np.random.default_rng(3).standard_normal((30, 60)).astype(jnp.bfloat16)
    owner = np.arange(60) // 2
    assert_same(ranked(scores, owner, 4), oracle(scores.astype(np.float64), owner))


def test_sets_are_cut_with_their_masks():
    rng = np.random.default_rng(1)

    def items(count):
        return Embedding(
            np.zeros((count, 1), np.float32),
            rng.standard_normal((count, 4, 8)).astype(np.float32),
            np.arange(4) < rng.integers(1, 5, (count, 1)),
        )

    def chamfer(images, texts):
        pairs = jnp.einsum("imd,tkd->itmk", images.elements, texts.elements)
        pairs = jnp.where(images.mask[:, None, :, None] & texts.mask[None, :, None, :], pairs, -jnp.inf)
        return pairs.max(axis=(2, 3))

    images, texts, owner = items(11), items(33), np.arange(33) % 11
    assert_same(ranks(images, texts, owner, chamfer, 2), oracle(np.asarray(chamfer(images, texts)), owner))


@pytest.mark.parametrize(("tile", "devices"), [(4, 1), (2, 8)])
def test_nan_is_an_error_that_counts(tile, devices):
    scores = np.zeros((7, 14), np.float32)
    scores[2, 3] = scores[6, 13] = scores[6, 0] = np.nan  # the last row and column stand beside padding
    with pytest.raises(ValueError, match="3 of 98 scores are NaN"):
        ranked(scores, np.arange(14) // 2, tile, devices)


@settings(max_examples=25)
@given(galleries(counts=COUNTS[2:3]))
def test_infinite_scores_are_numbers_like_others(gallery):
    levels = np.array([-np.inf, -1.0, 2.0, np.inf], np.float32)  # a score of sets without members is -inf
    scores = levels[gallery[0].astype(int)]
    assert_same(ranked(scores, gallery[1], 2), oracle(scores, gallery[1]))


@settings(max_examples=20)
@given(
    galleries(counts=COUNTS[2:3]),
    st.sampled_from([np.nan, np.inf, -np.inf, 3e38]),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_embeddings_that_are_not_finite_are_an_error_or_ranked_by_their_scores(gallery, value, score_dtype):
    scores, owner = gallery
    images, texts = np.ones((len(scores), 3), np.float32), np.arange(3.0 * len(owner), dtype=np.float32).reshape(-1, 3)
    images[0, 1] = value
    with np.errstate(all="ignore"):
        product = images @ texts.T

    def rank():
        return ranks(Embedding(images), Embedding(texts), owner, RetrievalModel.score, 4, score_dtype=score_dtype)

    if np.isnan(product).any():
        with pytest.raises(ValueError, match=rf"{np.isnan(product).sum()} of {product.size} scores are NaN"):
            rank()
        return
    assert_same(rank(), oracle(product, owner))


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        (np.array([0, 1, 3, 2]), "row 2 says 3, expected 0 to 2"),
        (np.array([0, 1, 1, 0]), r"1 of 3 images have no caption \(rows \[2\]\)"),
        (np.array([0, 1, 2]), "one integer for each of 4 captions"),
        (np.array([0.0, 1, 2, 2]), "found float64"),
    ],
)
def test_wrong_caption_owners_are_named(owner, message):
    with pytest.raises(ValueError, match=message):
        ranked(np.zeros((3, 4), np.float32), owner)


def test_a_score_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"\(4, 2\) for 2 images and 4 captions"):
        ranks(
            Embedding(np.zeros((2, 3), np.float32)),
            Embedding(np.zeros((4, 3), np.float32)),
            np.arange(4) // 2,
            lambda images, texts: texts.vector @ images.vector.T,
        )


def test_set_members_stay_where_they_are_when_the_score_is_of_vectors(monkeypatch):
    sent = []
    put = Tiling.put_split
    monkeypatch.setattr(Tiling, "put_split", lambda self, tree: sent.append(tree) or put(self, tree))
    rng = np.random.default_rng(0)
    items = Embedding(rng.standard_normal((6, 4)), rng.standard_normal((6, 3, 4)), np.ones((6, 3), bool))
    ranks(items, items, np.arange(6), RetrievalModel.score, 2)
    images = [tree for tree in sent if isinstance(tree, Embedding)]
    assert images and all(tree.elements is None and tree.mask is None for tree in images)


@pytest.mark.parametrize(("n", "tile", "devices"), [(37, 4, 8), (5, 3, 2), (24, 8, 2)])
def test_any_number_of_devices_gives_bitwise_the_same(n, tile, devices):
    rng = np.random.default_rng(n)
    owner = rng.permutation(np.repeat(np.arange(n), rng.integers(1, 5, n)))
    images, texts = (Embedding(rng.standard_normal((m, 33)).astype(np.float32)) for m in (n, len(owner)))
    texts.vector[::3] = texts.vector[0]  # ties
    meshes = [data_mesh(jax.devices()[:k]) for k in (1, devices)]
    one, many = (ranks(images, texts, owner, RetrievalModel.score, tile, mesh) for mesh in meshes)
    assert_same(many, one)
    order = np.argsort(owner, kind="stable")
    one, many = (
        match_scores(make_tiling(images, texts, tile, mesh, owner, order), RetrievalModel.score) for mesh in meshes
    )
    np.testing.assert_array_equal(many, one)


@pytest.mark.parametrize("devices", [1, 2])
def test_images_that_fit_on_the_devices_are_sent_once(devices, monkeypatch):
    rng = np.random.default_rng(0)
    images, texts = (Embedding(rng.normal(size=(count, 3)).astype(np.float32)) for count in (13, 40))
    sent, put_images, free = [], Tiling.put_images, 4 * images.vector.nbytes

    def counted(self, rows):
        sent.append(rows[0])
        return put_images(self, rows)

    monkeypatch.setattr(Tiling, "put_images", counted)
    mesh, found, times = data_mesh(jax.devices()[:devices]), [], []
    for room in (0, free // devices - 1, free // devices):
        monkeypatch.setattr("shnet_jax.evaluation.tiles.free_bytes", lambda mesh, room=room: room)
        sent.clear()
        found.append(ranks(images, texts, np.arange(40) % 13, RetrievalModel.score, 2, mesh))
        times.append(len(sent))
    rounds = -(-13 // (2 * devices))
    assert times[0] == times[1] > times[2] == rounds
    for one in found[1:]:
        np.testing.assert_array_equal(one.i2t, found[0].i2t)
        np.testing.assert_array_equal(one.t2i, found[0].t2i)


def test_the_counts_of_parts_add_up():
    scores = np.random.default_rng(4).integers(0, 5, (9, 27)).astype(np.float32)
    owner, columns = np.arange(27) % 9, np.arange(27)[:, None]
    tiling = make_tiling(
        Embedding(scores), Embedding(columns), 1, data_mesh(jax.devices()[:2]), owner, np.argsort(owner)
    )
    positive = match_scores(tiling, recorded)
    best = best_captions(positive, owner)
    assert tiling.caption_tiles == 4
    parts = [count(tiling, recorded, positive, best, tiles) for tiles in ([0], range(1, 3), [3])]
    assert_same(Ranks(sum(part.i2t for part in parts), sum(part.t2i for part in parts)), oracle(scores, owner))


def test_results_are_read_after_the_next_dispatch():
    events = []

    def dispatched():
        for i in range(3):
            events.append(f"dispatch {i}")
            yield i

    for i in prefetch_one(dispatched()):
        events.append(f"collect {i}")
    assert events == ["dispatch 0", "dispatch 1", "collect 0", "dispatch 2", "collect 1", "collect 2"]


def test_a_tile_without_images_is_named():
    with pytest.raises(ValueError, match=r"config\.eval\.tile.*got 0"):
        ranked(np.zeros((2, 4), np.float32), np.arange(4) // 2, 0)
