"""Pictures in training: what is drawn, what it does to pixels, and that it is a function of (seed, step)."""

import jax.numpy as jnp
import numpy as np
import pytest

from data_prep import people
from data_prep.builder import write_dataset
from shnet_jax.data.batches import gather, resident_table, train_batches
from shnet_jax.data.pictures import FILL, Views, viewed
from shnet_jax.data.records import open_dataset
from shnet_jax.data.tokenise import tokenise_split


def oracle(picture, view):
    """Flip, pad, crop and erase in NumPy, one after the other."""
    flip, down, right, top, left, h, w = (int(v) for v in view)
    height, width, _ = picture.shape
    pad = 8
    out = np.pad(picture[:, ::-1] if flip else picture, ((pad, pad), (pad, pad), (0, 0)))
    out = out[pad + down : pad + down + height, pad + right : pad + right + width].copy()
    out[top : top + h, left : left + w] = FILL
    return out


def test_pixels():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (6, 11, 7, 3), dtype=np.uint8)
    views = Views(0.5, 8, 0.8, (0.05, 0.5), 11, 7)
    drawn = np.stack([views.draw(rng) for _ in range(6)])
    assert drawn[:, 0].any() and not drawn[:, 0].all() and (drawn[:, 5] > 0).any()
    found = viewed(jnp.asarray(pictures), jnp.asarray(drawn))
    assert found.dtype == jnp.uint8
    for picture, view, ours in zip(pictures, drawn, found, strict=True):
        np.testing.assert_array_equal(ours, oracle(picture, view))


def test_rates():
    rng = np.random.default_rng(0)
    drawn = np.stack([Views(0.5, 10, 0.5, (0.02, 0.4), 384, 128).draw(rng) for _ in range(2000)])
    assert abs(drawn[:, 0].mean() - 0.5) < 0.04
    assert set(drawn[:, 1]) == set(drawn[:, 2]) == set(range(-10, 11))
    erased = drawn[drawn[:, 5] > 0]
    assert abs(len(erased) / 2000 - 0.5) < 0.04
    share = erased[:, 5] * erased[:, 6] / (384 * 128)
    assert share.min() > 0.015 and share.max() < 0.41
    assert (erased[:, 3] + erased[:, 5] <= 384).all() and (erased[:, 4] + erased[:, 6] <= 128).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_flip": 1.5}, "data.image_flip is 1.5"),
        ({"image_pad": -1}, "data.image_pad is -1"),
        ({"image_erase_area": (0.4, 0.02)}, "data.image_erase_area"),
    ],
)
def test_rates_that_are_none_are_told(config, change, message):
    config.data.update(change)
    with pytest.raises(ValueError, match=message):
        Views.from_config(config.data, (8, 8))


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    records = list(people.records(0, 0, 16))
    return open_dataset(write_dataset(tmp_path_factory.mktemp("sets"), "figures", {"train": records}, {"source": ""}))


def test_the_stream(config, tokenizer, figures):
    """Equal seeds give equal views; resident and streamed pictures are the same; persons are numbered from 0."""
    captions = tokenise_split(figures, "train", tokenizer)
    config.data.max_tokens, config.data.token_buckets = 64, (64,)

    def batches(seed, resident=False):
        config.data.resident = resident
        stream = train_batches(config, figures, captions, tokenizer, ("image",), batch_size=8, seed=seed)
        return [next(stream) for _ in range(3)]

    first, again, other = batches(0), batches(0), batches(1)
    assert all((a["image_view"] == b["image_view"]).all() for a, b in zip(first, again, strict=True))
    assert any((a["image_view"] != b["image_view"]).any() for a, b in zip(first, other, strict=True))
    table = resident_table(figures, "train", ("image",))
    for streamed, resident in zip(first, batches(0, resident=True), strict=True):
        assert "image" not in resident
        finished = gather({}, streamed)
        np.testing.assert_array_equal(finished["image"], gather(table, resident)["image"])
        assert "image_view" not in finished
        np.testing.assert_array_equal(streamed["identity"], streamed["image_index"] // people.IMAGES)
    config.data.identity = False
    assert "identity" not in batches(0)[0]


def test_persons_of_a_split(figures):
    np.testing.assert_array_equal(figures.identities("train"), np.arange(16) // people.IMAGES)


def test_a_set_without_persons(tiny):
    assert tiny.identities("train") is None
