"""Hard negatives in batches: which rows follow an example, on both paths of data; lists that do not fit are refused."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest

from configs import base
from shnet_jax.data import negatives as files
from shnet_jax.data.batches import train_batches
from shnet_jax.data.checksums import CHECKSUMS, sha256
from shnet_jax.data.errors import DataError
from shnet_jax.data.negatives import Negatives, open_negatives
from shnet_jax.data.vector_batches import images_of, with_first
from tests.data.test_batches import caption_rows, ids_of
from tests.data.test_vector_batches import TEXT, dataset, rows_of

K = 3


def lists(dataset):
    """Random lists of other images and their captions, some shorter, one of each side empty."""
    rng = np.random.default_rng(0)
    first = dataset.first_captions("train")
    owner = images_of(first, np.arange(first[-1]))
    images = np.array([rng.permutation(np.delete(np.arange(len(first) - 1), image))[:K] for image in owner])
    captions = np.array([rng.permutation(np.flatnonzero(owner != image))[:K] for image in range(len(first) - 1)])
    images[::4, 1:], captions[1::4, 2:] = files.NONE, files.NONE
    images[3], captions[0] = files.NONE, files.NONE
    return images.astype(np.int32), captions.astype(np.int32)


def write(folder, dataset, **changes):
    folder.mkdir()
    for name, values in zip((files.IMAGES, files.CAPTIONS), lists(dataset), strict=True):
        np.save(folder / name, values)
    first = dataset.first_captions("train")
    source = {
        "format": files.FORMAT,
        "split": "train",
        "images": len(first) - 1,
        "captions": int(first[-1]),
        "dataset_sha256": sha256(dataset.path / CHECKSUMS),
        "files": {name: sha256(folder / name) for name in (files.IMAGES, files.CAPTIONS)},
    }
    (folder / files.SOURCE).write_text(json.dumps(source | changes))
    return folder


def section(folder, count=1, **changes):
    data = base.get_config().data
    data.update({"captions_per_image": 1, "read_threads": 1, "prefetch": 2} | changes)
    data.negatives.update({"folder": str(folder), "count": count})
    return data


def stream(data, batch_size=8, host=0, hosts=1):
    c = base.get_config()
    c.data = data
    shard = {"shard_index": host, "shard_count": hosts}
    fields = ("image_embedding", "regions")
    return train_batches(c, dataset(), None, None, fields, TEXT, batch_size=batch_size, seed=3, **shard)


@pytest.mark.parametrize(("per_image", "count"), [(1, 1), (1, 3), (2, 1)])
def test_each_example_is_followed_by_its_hard_negatives(tmp_path, per_image, count):
    folder, (images, captions) = write(tmp_path / "lists", dataset()), lists(dataset())
    first, seen = dataset().first_captions("train"), set()
    size = 4 * per_image * (1 + count)
    for batch in islice(stream(section(folder, count, captions_per_image=per_image), size), 20):
        rows = [(image, first[image] + caption) for image, caption in rows_of(batch)]
        groups = np.array(rows).reshape(-1, 1 + count, per_image, 2)
        for group in groups:
            anchor_image, anchor_caption = group[0, 0]
            assert (group[:, :, 0] == group[:, :1, 0]).all()  # captions stand beside their own image
            for place, (image, caption) in enumerate(group[1:, 0]):
                allowed, found = (captions[anchor_image], caption) if place % 2 else (images[anchor_caption], image)
                allowed = allowed[allowed != files.NONE]
                assert found in allowed or not len(allowed)
                seen.add((place, len(allowed), int(found)))
    assert {length for _, length, _ in seen} >= {0, 1, K}  # empty, short and full lists were drawn from
    assert len({found for place, _, found in seen if place == 0}) > 4


def test_the_examples_are_a_pass_over_the_split(tmp_path):
    folder = write(tmp_path / "lists", dataset())
    anchors = [row for batch in islice(stream(section(folder, 2), 9), 6) for row in rows_of(batch)[::3]]
    assert len(set(anchors)) == len(anchors) == 18


@pytest.mark.parametrize(("per_image", "count"), [(1, 2), (2, 1)])
def test_examples_of_tokens_are_followed_by_their_hard_negatives(
    tmp_path, config, tiny, captions, tokenizer, per_image, count
):
    hard_images, hard_captions = lists(tiny)
    config.data.update(word_change=0.0, captions_per_image=per_image, read_threads=1)

    def tokens(groups, count, host=0, hosts=1):
        config.data.negatives.update({"folder": str(tmp_path / "lists") if count else "", "count": count})
        size = groups * per_image * (1 + count)
        how = {"batch_size": size, "seed": 3, "shard_index": host, "shard_count": hosts}
        return islice(train_batches(config, tiny, captions, tokenizer, ("regions",), **how), 6)

    write(tmp_path / "lists", tiny)
    rows = {text: numbers[0] for text, numbers in caption_rows(captions, tokenizer).items()}
    alone, found = list(tokens(4, 0)), list(tokens(4, count))
    for batch, without in zip(found, alone, strict=True):
        of = np.array([rows[text] for text in ids_of(batch)]).reshape(4, 1 + count, per_image)
        images = batch["image_index"].reshape(4, 1 + count)
        np.testing.assert_array_equal(images[:, 0], without["image_index"])  # the examples are those of a run without
        np.testing.assert_array_equal(of[:, 0].reshape(-1), [rows[text] for text in ids_of(without)])
        np.testing.assert_array_equal(captions.image[of], np.repeat(images[..., None], per_image, -1))
        for group, (image, *hard) in zip(of, images, strict=True):
            for place in range(count):
                allowed = hard_captions[image] if place % 2 else hard_images[group[0, 0]]
                assert (group[1 + place, 0] if place % 2 else hard[place]) in allowed or (allowed == files.NONE).all()
    hosts = [list(tokens(2, count, host, 2)) for host in (0, 1)]
    for step, batch in enumerate(found):
        both = np.concatenate([host[step]["image_index"] for host in hosts])
        np.testing.assert_array_equal(both, batch["image_index"])


@pytest.mark.parametrize("per_image", [1, 2])
def test_hosts_together_see_what_one_sees_and_a_stream_resumes(tmp_path, per_image):
    data = section(write(tmp_path / "lists", dataset()), captions_per_image=per_image)
    alone = list(islice(stream(data), 4))
    hosts = [list(islice(stream(data, 4, host, 2), 4)) for host in (0, 1)]
    for step, whole in enumerate(alone):
        for name, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([host[step][name] for host in hosts]), values, err_msg=name)
    it, again = stream(data), stream(data)
    next(it)
    again.set_state(it.get_state())
    for name, values in next(again).items():
        np.testing.assert_array_equal(values, alone[1][name], err_msg=name)


def test_the_first_caption_is_the_hard_one_and_none_stands_twice():
    found = with_first(np.array([[5, 6, 7], [5, 6, 7], [5, 6, 7]]), np.array([7, 5, 9]))
    np.testing.assert_array_equal(found, [[7, 6, 5], [5, 6, 7], [9, 6, 7]])


def test_captions_of_a_hard_image_are_all_drawn():
    first = np.array([0, 1, 4])
    drawn = Negatives(first, np.array([[1], [0], [0], [0]]), np.array([[3], [0]]), 1)
    found = drawn.draw(np.zeros(60, int), np.zeros(60, int), np.random.default_rng(0))
    assert {*found.reshape(-1).tolist()} == {1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_sha256": "0" * 64}, r"negatives\.json: dataset_sha256: expected '.*' of .*, found '0000"),
        ({"split": "val"}, r"split: expected 'train' of .*, found 'val'.*; make them anew with shnet mine"),
        ({"images": 4}, r"images: expected \d+ of .*, found 4"),
        ({"format": 2}, r"expected format 1, found 2"),
        ({"files": {}}, rf"{files.IMAGES}: expected sha256 None, found"),
    ],
    ids=str,
)
def test_lists_of_something_else_are_refused(tmp_path, changes, message):
    folder = write(tmp_path / "lists", dataset(), **changes)
    with pytest.raises(DataError, match=message):
        open_negatives(section(folder), dataset())


def test_damaged_lists_are_refused(tmp_path):
    folder = write(tmp_path / "lists", dataset())
    source = json.loads((folder / files.SOURCE).read_text())
    images, captions = lists(dataset())
    for name, values, message in (
        (files.IMAGES, images[1:], r"images_for_captions\.npy: expected int32 \[18, k\], found int32 \[17, 3\]"),
        (files.CAPTIONS, captions.astype(float), r"expected int32 \[\d+, k\], found float64"),
        (files.CAPTIONS, captions + 100, r"expected rows from -1 to 17, found 0 to \d+"),
    ):
        for each, good in ((files.IMAGES, images), (files.CAPTIONS, captions)):
            np.save(folder / each, values if each == name else good)
        with pytest.raises(DataError, match="expected sha256"):
            open_negatives(section(folder), dataset())
        sums = {each: sha256(folder / each) for each in (files.IMAGES, files.CAPTIONS)}
        (folder / files.SOURCE).write_text(json.dumps(source | {"files": sums}))
        with pytest.raises(DataError, match=message):
            open_negatives(section(folder), dataset())
        (folder / files.SOURCE).write_text(json.dumps(source))
    with pytest.raises(FileNotFoundError, match=r"no negatives\.json; make hard negatives with shnet mine"):
        open_negatives(section(tmp_path), dataset())


@pytest.mark.parametrize(("folder", "count"), [("", 1), ("there", 0), ("there", -1)])
def test_a_folder_and_a_count_belong_together(folder, count):
    with pytest.raises(ValueError, match=r"give the folder that shnet mine made and a count of at least 1"):
        open_negatives(section(folder, count), dataset())


def test_a_batch_has_whole_groups(tmp_path):
    with pytest.raises(ValueError, match=r"has 8 pairs; expected a multiple of data.captions_per_image, 1 times 3"):
        stream(section(write(tmp_path / "lists", dataset()), 2))
