from itertools import islice

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from shnet_jax.data import batches
from tests.data.conftest import FIELDS, IMAGES, REGIONS


@pytest.fixture
def stream(config, tiny, captions, tokenizer):
    """Batches of the tiny set; options are fields of config.data or arguments of train_batches."""

    def make(batch_size=8, seed=3, fields=FIELDS, shard_index=0, shard_count=1, **data):
        config.data.update(data)
        return batches.train_batches(
            config,
            tiny,
            captions,
            tokenizer,
            fields,
            batch_size=batch_size,
            seed=seed,
            shard_index=shard_index,
            shard_count=shard_count,
        )

    return make


@pytest.fixture
def unaltered(config):
    config.data.update(word_change=0.0, region_drop=0.0, grid_drop=0.0)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def caption_rows(captions, tokenizer):
    """Token ids -> captions that have them; within an image of the tiny set all differ."""
    rows = {}
    for t in range(len(captions)):
        rows.setdefault(tuple(tokenizer.enclose(captions.caption(t)[0], 32).tolist()), []).append(t)
    return rows


def ids_of(batch):
    return [tuple(row[mask].tolist()) for row, mask in zip(batch["tokens"], batch["token_mask"], strict=True)]


def test_shapes_and_dtypes(stream):
    batch = next(stream(batch_size=8))
    assert batch["image_index"].shape == (8,) and batch["image_index"].dtype == np.int32
    assert batch["tokens"].shape == batch["token_mask"].shape
    assert batch["tokens"].shape in ((8, 16), (8, 24))
    assert batch["tokens"].dtype == np.int32
    assert (batch["tokens"][~batch["token_mask"]] == 0).all()
    assert (batch["tokens"][batch["token_mask"]] != 0).all()
    assert batch["region_keep"].shape == (8, REGIONS) and batch["region_mask"].shape == (8, REGIONS)
    assert batch["grid_keep"].shape == (8, 5) and "grid_mask" not in batch  # the set has none
    assert batch["regions"].dtype == np.float16  # as stored: widened on the device
    assert batch["categories"].dtype == bool and batch["categories"].shape == (8, 11)


@pytest.mark.parametrize("per_image", [1, 2])
def test_a_step_is_a_function_of_seed_and_step(stream, per_image):
    first = list(islice(stream(captions_per_image=per_image), 12))
    again = list(islice(stream(captions_per_image=per_image, prefetch=0), 12))
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)
    other = next(stream(captions_per_image=per_image, seed=4))
    assert other["image_index"].tolist() != first[0]["image_index"].tolist()


@pytest.mark.usefixtures("unaltered")
def test_each_pass_meets_every_pair_once_in_a_new_order(stream, captions, tokenizer):
    total = len(captions)
    size = 8
    steps = total // size
    rows = caption_rows(captions, tokenizer)
    it = stream(batch_size=size)
    passes = [list(islice(it, steps)) for _ in range(3)]
    for epoch in passes:
        seen = [(int(i), ids) for b in epoch for i, ids in zip(b["image_index"], ids_of(b), strict=True)]
        assert len(seen) == steps * size
        for image, ids in seen:
            assert image in captions.image[rows[ids]]
        pairs = {(int(captions.image[t]), ids) for ids, ts in rows.items() for t in ts}
        counts = {pair: sum(captions.image[t] == pair[0] for t in rows[pair[1]]) for pair in pairs}
        assert all(seen.count(pair) <= counts[pair] for pair in set(seen))
        assert total - len(seen) < size
    orders = [[int(i) for b in epoch for i in b["image_index"]] for epoch in passes]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("per_image", [1, 2])
def test_hosts_together_see_the_batch_of_one_host(stream, per_image):
    # One bucket, as several hosts always use the largest.
    options = {"captions_per_image": per_image, "token_buckets": (32,)}
    whole = stream(batch_size=12, **options)
    hosts = [stream(batch_size=4, shard_index=k, shard_count=3, **options) for k in range(3)]
    for _ in range(15):  # crosses the end of a pass
        one, parts = next(whole), [next(host) for host in hosts]
        for name, values in one.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), values, err_msg=name)


@pytest.mark.parametrize("resident", [False, True])
def test_resume_gives_the_same_next_batches(stream, resident):
    it = stream(resident=resident)
    states, seen = [], []
    for _ in range(14):  # past the end of the first pass
        states.append(it.get_state())
        seen.append(next(it))
    for step in (0, 3, 9, 11):
        resumed = stream(resident=resident)
        next(resumed)
        resumed.set_state(states[step])
        for expected in seen[step : step + 3]:
            assert_same(next(resumed), expected)


@pytest.mark.usefixtures("unaltered")
@pytest.mark.parametrize("per_image", [2, 8])
def test_captions_of_one_image_stay_together(stream, captions, tokenizer, per_image):
    rows = caption_rows(captions, tokenizer)
    it = stream(batch_size=8, captions_per_image=per_image)
    for _ in range(8):
        batch = next(it)
        assert batch["image_index"].shape == (8 // per_image,)
        assert batch["regions"].shape[0] == 8 // per_image
        ids = ids_of(batch)
        for j, image in enumerate(batch["image_index"]):
            drawn = ids[j * per_image : (j + 1) * per_image]
            assert set(drawn) <= {i for i, ts in rows.items() if image in captions.image[ts]}
            available = int(np.count_nonzero(captions.image == image))
            assert len(set(drawn)) == min(available, per_image)  # no caption twice while there are enough
            assert max(map(drawn.count, drawn)) == -(-per_image // available)  # fewer repeat evenly


@pytest.mark.usefixtures("unaltered")
def test_all_captions_of_an_image_come_up(stream, captions):
    it = stream(batch_size=8, captions_per_image=2)
    eight = {int(i) for i in np.flatnonzero(np.diff(captions.first) == 8)}
    drawn = {}
    for batch in islice(it, 120):
        for j, ids in enumerate(ids_of(batch)):
            image = int(batch["image_index"][j // 2])
            drawn.setdefault(image, set()).add(ids)
    most = max(len(drawn[image]) for image in eight)
    assert most > 5


def test_caption_buckets(stream, captions):
    lengths = captions.lengths() + 2
    assert lengths.min() <= 9 < lengths.max() <= 20
    for batch in islice(stream(token_buckets=(9, 20, 32), batch_size=1, word_change=0.0), 40):
        assert batch["tokens"].shape[1] == (9 if batch["token_mask"].sum() <= 9 else 20)
    several = stream(token_buckets=(9, 20, 32), batch_size=1, shard_count=2)
    assert {batch["tokens"].shape[1] for batch in islice(several, 10)} == {32}
    cut = next(stream(max_tokens=4, token_buckets=(4, 8, 16), word_change=0.0))
    assert cut["tokens"].shape[1] == 4 and cut["token_mask"].all()


def test_a_caption_without_words_keeps_its_ends(stream, tokenizer):
    batch = next(stream(word_change=1.0, word_mask=0.0, word_random=0.0, word_delete=1.0))
    assert (batch["token_mask"].sum(axis=1) == 2).all()
    assert (batch["tokens"][:, :2] == [tokenizer.begin_id, tokenizer.end_id]).all()


def test_augmentation_differs_between_passes(stream):
    it = stream(batch_size=48, fields=("regions",), resident=True)
    keep = {}
    for batch in islice(it, 6):
        for image, kept in zip(batch["image_index"], batch["region_keep"], strict=True):
            keep.setdefault(int(image), set()).add(kept.tobytes())
    assert all(len(kept) > 1 for kept in keep.values())


@pytest.mark.parametrize("per_image", [1, 2])
def test_resident_and_streaming_give_the_model_the_same_bits(stream, tiny, per_image):
    table = batches.resident_table(tiny, "train", FIELDS)
    assert {name: len(values) for name, values in table.items()} == dict.fromkeys((*FIELDS, "region_mask"), IMAGES)
    table = jax.tree.map(jnp.asarray, table)
    streamed = stream(captions_per_image=per_image)
    resident = stream(captions_per_image=per_image, resident=True)
    gather = jax.jit(batches.gather)
    for _ in range(4):
        raw = next(resident)
        assert not set(FIELDS) & raw.keys()
        a, b = gather(None, next(streamed)), gather(table, raw)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


def test_gather_against_numpy():
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    keep = np.array([[1, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]], bool)
    regions = np.arange(3 * 4 * 2, dtype=np.float16).reshape(3, 4, 2) + 1
    regions[0, 3] = np.nan  # what lies under a mask must not matter
    batch = {"image_index": np.arange(3, dtype=np.int32), "regions": regions, "region_mask": mask, "region_keep": keep}
    batch |= {"grid": np.ones((3, 2, 2), ml_dtypes.bfloat16), "grid_keep": np.array([[1, 0]] * 3, bool)}
    out = batches.gather(None, batch)
    # Rows 1 and 2 would lose every valid region: they keep all valid ones.
    expected = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(out["region_mask"], expected)
    np.testing.assert_array_equal(out["regions"], np.where(expected[..., None], regions, 0).astype(np.float32))
    np.testing.assert_array_equal(out["grid_mask"], [[True, False]] * 3)
    assert out["regions"].dtype == out["grid"].dtype == np.float32
    assert set(out) == {"image_index", "regions", "region_mask", "grid", "grid_mask"}


def test_gather_without_augmentation_or_masks():
    out = batches.gather({}, {"image_index": np.zeros(2, np.int32), "grid": np.ones((2, 3, 1), np.float32)})
    assert out["grid_mask"].all() and out["grid_mask"].shape == (2, 3)


def test_steps_per_epoch_counts_captions(tiny, captions):
    assert batches.steps_per_epoch(tiny, "train", 8) == len(captions) // 8
    with pytest.raises(ValueError, match=rf"split 'train' has {len(captions)} captions, fewer than a batch of 999"):
        batches.steps_per_epoch(tiny, "train", 999)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9, "captions_per_image": 2}, "9 pairs; expected a multiple of data.captions_per_image, 2"),
        ({"batch_size": 500}, "split 'train' has .* captions, fewer than the 500 of one step"),
        ({"batch_size": 24, "captions_per_image": 2, "shard_count": 2}, "has 23 images, fewer than the 24"),
        ({"max_tokens": 33}, r"token_buckets is \(16, 24, 32\); none holds data.max_tokens = 33"),
        ({"max_tokens": 1}, "data.max_tokens is 1"),
        ({"fields": ("image_embedding",)}, "no field image_embedding"),
        ({"train_split": "dev"}, "no split 'dev'"),
    ],
)
def test_errors_say_what_was_expected(stream, options, message):
    with pytest.raises(ValueError, match=message):
        stream(**options)
