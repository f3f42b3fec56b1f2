import numpy as np
import pytest

from configs import base
from shnet_jax.data.augment import Augmentation, alter_words, keep_grid, keep_regions

PUBLISHED = Augmentation.from_config(base.get_config().data)
MASK, RANDOM = 1, (1000, 1100)


def alter(pieces, lengths, rates=PUBLISHED, seed=0):
    return alter_words(pieces, lengths, rates, MASK, RANDOM, np.random.default_rng(seed))


def within(count, n, p):
    """Whether a binomial(n, p) count lies within 5 standard deviations of its mean."""
    return abs(count - n * p) <= 5 * np.sqrt(n * p * (1 - p))


def test_published_rates_per_word():
    n = 50_000
    pieces = np.arange(2000, 2000 + n, dtype=np.int32)
    altered = alter(pieces, np.ones(n, int))
    masked = np.count_nonzero(altered == MASK)
    random = np.count_nonzero((altered >= RANDOM[0]) & (altered < RANDOM[1]))
    deleted = n - len(altered)
    kept = np.count_nonzero(altered >= 2000)
    assert within(masked, n, 0.2 * 0.5)
    assert within(random, n, 0.2 * 0.1)
    assert within(deleted, n, 0.2 * 0.4)
    assert within(kept, n, 0.8)
    assert altered.dtype == np.int32


def test_all_pieces_of_a_word_share_its_fate():
    n = 4000
    pieces = np.repeat(np.arange(2000, 2000 + n, dtype=np.int32), 3)
    altered = alter(pieces, np.full(n, 3))
    assert len(altered) % 3 == 0
    triples = altered.reshape(-1, 3)
    kind = np.where(triples == MASK, 0, np.where(triples < 2000, 1, 2))
    assert (kind == kind[:, :1]).all()
    random = triples[kind[:, 0] == 1]
    assert (random != random[:, :1]).any()  # one draw per piece, not per word
    assert set(random.ravel()) <= set(range(*RANDOM)) and random.min() < 1010 and random.max() > 1089


def test_shares_below_one_leave_words_as_they_are():
    pieces = np.arange(2000, 3000, dtype=np.int32)
    rates = PUBLISHED._replace(word_change=1.0, word_mask=0.0, word_random=0.0, word_delete=0.0)
    np.testing.assert_array_equal(alter(pieces, np.ones(1000, int), rates), pieces)


def test_deleting_every_word_leaves_nothing():
    rates = PUBLISHED._replace(word_change=1.0, word_mask=0.0, word_random=0.0, word_delete=1.0)
    assert alter(np.arange(5, dtype=np.int32), np.array([2, 3]), rates).shape == (0,)
    assert alter(np.zeros(0, np.int32), np.zeros(0, int)).shape == (0,)


def test_input_is_not_changed():
    pieces = np.arange(2000, 2500, dtype=np.int32)
    alter(pieces, np.ones(500, int))
    np.testing.assert_array_equal(pieces, np.arange(2000, 2500))


def test_regions_are_dropped_one_by_one():
    rng = np.random.default_rng(0)
    keep = np.stack([keep_regions(36, PUBLISHED, rng) for _ in range(2000)])
    assert within(np.count_nonzero(~keep), keep.size, 0.2)
    assert np.abs(keep.mean(axis=0) - 0.8).max() < 0.06
    assert keep_regions(36, PUBLISHED._replace(region_drop=0.0), rng).all()
    assert not keep_regions(36, PUBLISHED._replace(region_drop=1.0), rng).any()


def test_grid_cells_are_dropped_in_most_images():
    rng = np.random.default_rng(0)
    dropped = np.stack([~keep_grid(400, PUBLISHED, rng) for _ in range(3000)])
    rate = dropped.mean(axis=1)
    untouched = np.count_nonzero(rate == 0)
    assert within(untouched, 3000, 0.2)  # at p >= 0.04 a touched image of 400 cells has a dropped one
    assert abs(rate[rate > 0].mean() - 0.2 * 0.6) < 0.004  # u uniform in 0.2..1
    assert rate.max() < 0.2 + 5 * np.sqrt(0.2 * 0.8 / 400)
    assert not np.stack([~keep_grid(9, PUBLISHED._replace(grid_drop_image=0.0), rng) for _ in range(200)]).any()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("region_drop", 1.5, r"data\.region_drop is 1\.5"),
        ("word_change", -0.1, r"data\.word_change is -0\.1"),
        ("word_mask", 0.7, r"word_mask \+ data\.word_random \+ data\.word_delete is 1\.2"),
    ],
)
def test_impossible_rates_are_refused(field, value, message):
    data = base.get_config().data
    data[field] = value
    with pytest.raises(ValueError, match=message):
        Augmentation.from_config(data)
