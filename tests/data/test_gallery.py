import numpy as np
import pytest

from shnet_jax.data import batches
from shnet_jax.data.gallery import open_gallery
from tests.data.conftest import COUNTS, FIELDS


@pytest.fixture
def gallery(config, tiny, tokenizer):
    return open_gallery(config, tiny, "test", tokenizer, FIELDS)


def test_each_image_once_with_the_last_batch_padded(gallery, tiny):
    parts = list(gallery.image_batches(3))
    assert [part.valid for part in parts] == [3, 3, 1]
    assert np.concatenate([part.numbers for part in parts]).tolist() == list(range(7))
    records = tiny.open_split("test", ("regions", "seg_map"))
    for part in parts:
        assert part.batch["regions"].shape[0] == part.batch["image_index"].shape[0] == 3
        for row, number in enumerate(part.numbers):
            assert part.batch["image_index"][row] == number
            np.testing.assert_array_equal(part.batch["regions"][row], records[int(number)]["regions"])
            np.testing.assert_array_equal(part.batch["seg_map"][row], records[int(number)]["seg_map"])
    assert parts[-1].batch["image_index"].tolist() == [6, 6, 6]  # padding repeats the first row
    padding = batches.gather(None, parts[-1].batch)
    assert padding["region_mask"].any(axis=1).all() and "region_keep" not in parts[0].batch


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_captions_come_back_in_order(gallery, batch_size):
    total = len(gallery.caption_image)
    out = np.full(total, -1)
    widths = []
    for batch, valid, numbers in gallery.text_batches(batch_size):
        assert batch["tokens"].shape[0] == batch["token_mask"].shape[0] == batch_size and len(numbers) == valid
        assert (out[numbers] == -1).all()
        out[numbers] = np.where(batch["token_mask"], batch["tokens"], 0).astype(np.int64).sum(axis=1)[:valid]
        widths.append(batch["tokens"].shape[1])
        assert batch["token_mask"].any(axis=1).all()
    expected = [gallery.tokenizer.enclose(gallery.captions.caption(t)[0], 32).sum() for t in range(total)]
    assert out.tolist() == expected
    assert widths == sorted(widths) and set(widths) <= {16, 24, 32}


def test_the_shortest_bucket_is_used(gallery, config):
    config.data.token_buckets = (10, 32)
    widths = [batch["tokens"].shape[1] for batch, _, _ in gallery.text_batches(2)]
    lengths = np.sort(gallery.captions.lengths() + 2)
    longest = [lengths[min(i + 1, len(lengths) - 1)] for i in range(0, len(lengths), 2)]
    assert widths == [10 if length <= 10 else 32 for length in longest]
    assert 10 in widths and 32 in widths


def test_caption_image_maps_to_the_right_image(gallery, tiny):
    assert gallery.images == 7
    assert gallery.caption_image.dtype == np.int32
    counts = [COUNTS[i % len(COUNTS)] for i in range(7)]
    assert gallery.caption_image.tolist() == np.repeat(np.arange(7), counts).tolist()
    record = tiny.open_split("test", ("captions",))[3]
    t = int(np.flatnonzero(gallery.caption_image == 3)[7])
    assert gallery.captions.caption(t)[0].tolist() == gallery.tokenizer.vocabulary.pieces([record["captions"][7]])[0]


def test_batches_left_out_at_the_beginning(gallery):
    for side in (gallery.image_batches, gallery.text_batches):
        for ours, theirs in zip(side(3, first=1), list(side(3))[1:], strict=True):
            np.testing.assert_array_equal(ours.numbers, theirs.numbers)
            for name, values in theirs.batch.items():
                np.testing.assert_array_equal(ours.batch[name], values)
