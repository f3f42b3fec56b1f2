"""Batches of stored vectors: the right rows, every example once a pass, the same on any number of hosts, resumed."""

from __future__ import annotations

import functools
from itertools import islice

import jax
import numpy as np
import pytest

from configs import base
from data_prep.builder import write_dataset
from shnet_jax.data.batches import gather, resident_table, train_batches
from shnet_jax.data.gallery import open_gallery
from shnet_jax.data.records import open_dataset
from shnet_jax.data.vector_batches import WINDOW, Order, RecordRows
from tests.data.test_columns import records
from tests.train import tiny

TEXT = ("caption_embeddings",)


@functools.cache
def dataset():
    return open_dataset(write_dataset(tiny.folder(), "vector_batches", {"train": records()}, {}))


def stream(fields=("image_embedding", "regions"), batch_size=6, shard_index=0, shard_count=1, seed=3, **data):
    c = base.get_config()
    c.data.update({"captions_per_image": 1, "read_threads": 1, "prefetch": 2} | data)
    shard = {"shard_index": shard_index, "shard_count": shard_count}
    return train_batches(c, dataset(), None, None, fields, TEXT, batch_size=batch_size, seed=seed, **shard)


def rows_of(batch):
    """The (image, caption) that each row's vector is of, found by the vectors themselves."""
    found = []
    per_image = len(batch["caption_embeddings"]) // len(batch["image_index"])
    given = list(records())
    for row, vector in enumerate(batch["caption_embeddings"]):
        image = int(batch["image_index"][row // per_image])
        captions = [j for j, of in enumerate(given[image]["caption_embeddings"]) if np.array_equal(of, vector)]
        np.testing.assert_array_equal(batch["image_embedding"][row // per_image], given[image]["image_embedding"])
        assert len(captions) == 1
        found.append((image, captions[0]))
    return found


def seen(it):
    return [row for batch in islice(it, 3) for row in rows_of(batch)]


@pytest.mark.parametrize("block", [0, 4])
def test_a_pass_meets_every_caption_once_beside_its_own_image(block):
    passes = [seen(it) for it in [stream(shuffle_block=block)] for _ in range(3)]
    everything = sorted((i, j) for i, record in enumerate(records()) for j in range(len(record["captions"])))
    assert all(sorted(one) == everything for one in passes)
    assert passes[0] != passes[1] != passes[2]
    other = seen(stream(shuffle_block=block, seed=4))
    assert other != passes[0]


def test_several_captions_of_an_image_are_drawn_without_replacement():
    for batch in islice(stream(batch_size=8, captions_per_image=2), 12):
        pairs = rows_of(batch)
        for image in range(4):
            (one, first), (two, second) = pairs[2 * image : 2 * image + 2]
            assert one == two and (first != second or one % 3 == 0)  # image 0, 3, ... have one caption


@pytest.mark.parametrize("per_image", [1, 2])
def test_hosts_together_see_what_one_sees(per_image):
    alone = list(islice(stream(batch_size=8, captions_per_image=per_image), 4))
    hosts = [
        list(islice(stream(batch_size=4, captions_per_image=per_image, shard_index=i, shard_count=2), 4))
        for i in (0, 1)
    ]
    for step, whole in enumerate(alone):
        for name, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([host[step][name] for host in hosts]), values, err_msg=name)


def test_a_stream_resumes_with_the_next_batch():
    it = stream(shuffle_block=4)
    for _ in range(4):
        next(it)
    state = it.get_state()
    expected = [next(it) for _ in range(5)]
    again = stream(shuffle_block=4)
    again.set_state(state)
    for batch in expected:
        for name, values in next(again).items():
            np.testing.assert_array_equal(values, batch[name], err_msg=name)


@pytest.mark.parametrize("per_image", [1, 2])
def test_resident_features_give_the_model_the_same_inputs(per_image):
    table = resident_table(dataset(), "train", ("image_embedding", "regions"), TEXT)
    assert table["caption_embeddings"].shape == (18, 3) and table["caption_embeddings"].dtype == np.float16
    streams = stream(captions_per_image=per_image), stream(captions_per_image=per_image, resident=True)
    for streamed, resident in islice(zip(*streams, strict=False), 3):
        assert "caption_embeddings" not in resident and "region_keep" in resident
        one, other = jax.jit(gather)({}, streamed), jax.jit(gather)(table, resident)
        assert one.keys() == other.keys() and one["caption_embeddings"].dtype == np.float32
        for name, values in one.items():
            np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_a_gallery_has_the_vectors_in_the_order_of_the_captions():
    gallery = open_gallery(base.get_config(), dataset(), "train", None, ("image_embedding",), TEXT)
    expected = np.concatenate([record["caption_embeddings"] for record in records()])
    assert len(gallery.captions) == 18 and gallery.caption_image.tolist()[:4] == [0, 1, 1, 2]
    for first in (0, 2):
        parts = list(gallery.text_batches(4, first))
        rows = np.concatenate([part.batch["caption_embeddings"][: part.valid] for part in parts])
        np.testing.assert_array_equal(rows, expected[4 * first :])
        assert np.concatenate([part.numbers for part in parts]).tolist() == list(range(4 * first, 18))


def test_vectors_in_records_of_other_tools_are_found_too():
    first = dataset().first_captions("train")
    rows = RecordRows(dataset().open_split("train", TEXT), TEXT[0], first)
    expected = np.concatenate([record["caption_embeddings"] for record in records()])
    np.testing.assert_array_equal(rows.take(np.array([17, 0, 4])), expected[[17, 0, 4]])


@pytest.mark.parametrize("examples, block", [(1000, 10), (1003, 7), (90, 64), (64, 1)])
def test_blocks_are_read_in_windows_and_no_example_is_lost(examples, block):
    order = Order(examples, 9, seed=1, block=block)
    steps = examples // 9
    one = np.concatenate([order.batch(step) for step in range(steps, 2 * steps)])
    assert len(set(one.tolist())) == steps * 9 and one.min() >= 0 and one.max() < examples
    window = one[: min(WINDOW * block, len(one))]
    if len(window) == WINDOW * block:
        blocks = set((window // block).tolist())
        assert len(blocks) <= WINDOW + (examples % block > 0)
        assert (np.diff(window) != 1).mean() > 0.5  # mixed within
    again = np.concatenate([Order(examples, 9, 1, block).batch(step) for step in range(steps)])
    assert not np.array_equal(one, again)


def test_examples_of_the_first_window_are_mixed_otherwise_than_its_blocks():
    examples = Order(16, 16, seed=1, block=1).batch(0)
    blocks = np.random.default_rng((1, 0, 0)).permutation(16)
    assert sorted(examples) == sorted(blocks) and not np.array_equal(
        examples, blocks[np.random.default_rng((1, 0, 0)).permutation(16)]
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shuffle_block": -1}, r"config\.data\.shuffle_block is -1"),
        ({"batch_size": 24}, "has 18 captions, fewer than the 24 of one step"),
        ({"batch_size": 24, "captions_per_image": 2}, "has 9 images, fewer than the 12 of one step"),
        ({"batch_size": 5, "captions_per_image": 2}, r"5 pairs; expected a multiple of data\.captions_per_image"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        stream(**changes)
