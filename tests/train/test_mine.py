"""`shnet mine`: its lists equal those of a dense computation, a killed one ends alike, and runs train with them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from data_prep.builder import write_dataset
from shnet_jax.data import negatives as files
from shnet_jax.data.errors import DataError
from shnet_jax.data.records import open_dataset
from shnet_jax.data.vector_batches import images_of
from shnet_jax.modes import mine as mode
from shnet_jax.modes.mine import mine
from shnet_jax.retrieve.embeddings import open_embeddings
from shnet_jax.training.loop import train_and_evaluate
from shnet_jax.training.workdir import WorkdirError
from tests.data.test_columns import records
from tests.train import tiny
from tests.train.test_vectors_run import config as vectors_config

K = 4


def config(**changes):
    """Blocks of 3 images, or 24 captions."""
    c = vectors_config()
    c.loss.sigmoid.mask_same_image, c.train.microbatch, c.train.steps = True, 0, 2
    c.mine.per_item, c.eval.tile, c.eval.batch_size = K, 3, 8
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return c


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 2 steps, on a set with persons too."""
    folder = tmp_path_factory.mktemp("mine")
    rng, with_persons = np.random.default_rng(0), []
    for number, record in enumerate(list(records(np.float32)) * 4):
        for name in ("image_embedding", "caption_embeddings"):
            record = record | {name: record[name] + rng.normal(size=record[name].shape).astype(np.float32)}
        with_persons.append(record | {"image_id": f"image {number}", "identity": np.int64(number // 2)})
    path = write_dataset(folder, "persons", {"train": with_persons}, {"source": "made by the tests"})
    with tiny.quick():
        train_and_evaluate(config(data__dir=str(path)), folder / "run")
    return folder / "run", path


def mined(run, folder, **changes):
    workdir, path = run
    mine(config(data__dir=str(path), mine__folder=str(folder), **changes), workdir)
    source = json.loads((folder / files.SOURCE).read_text())
    return source, np.load(folder / files.IMAGES), np.load(folder / files.CAPTIONS)


def oracle(run, share, by_person=True):
    """Lists of the captions and of the images, from all scores in float64."""
    (embeddings,) = (run[0] / "embeddings").iterdir()
    opened, dataset = open_embeddings(embeddings), open_dataset(run[1])
    images, texts = (np.asarray(side.vector, np.float64) for side in (opened.images, opened.texts))
    first = dataset.first_captions("train")
    owner = images_of(first, np.arange(first[-1]))
    ids = dataset.identities("train") if by_person else np.arange(len(images))
    scores = texts @ images.T
    own = scores[np.arange(len(texts)), owner]
    means = np.array([own[owner == image].mean() for image in range(len(images))])
    found = []
    limit = (lambda own: np.minimum(own, share * own)) if share < 1 else (lambda own: share * own)
    for each, limits, negative in (
        (scores, limit(own), ids[owner][:, None] != ids),
        (scores.T, limit(means), ids[:, None] != ids[owner]),
    ):
        allowed = negative & (each <= limits[:, None])
        order = [sorted(np.flatnonzero(a), key=lambda i, s=s: -s[i])[:K] for s, a in zip(each, allowed, strict=True)]
        found.append(np.array([[*row, *[-1] * (K - len(row))] for row in order]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("share", "by_person"), [(0.95, True), (0.95, False), (2.0, True)])
def test_lists_equal_those_of_all_scores(run, tmp_path, share, by_person):
    how = {"mine__max_relative_score": share, "data__identity": by_person}
    source, images, captions = mined(run, tmp_path / "lists", **how)
    assert share > 1 or (images == -1).any()  # the rule leaves some lists short
    for ours, expected in zip((images, captions), oracle(run, share, by_person), strict=True):
        assert ours.dtype == np.int32
        np.testing.assert_array_equal(ours, expected)
    assert source["ids"] == ("identity" if by_person else "image")
    assert len(source["weights_sha256"]) == len(source["dataset_sha256"]) == 64
    assert source["summary"][files.IMAGES]["lists"] == len(images)
    other = mined(run, tmp_path / "other", **how | {"mine__max_relative_score": 0.5})[1]
    assert (other != images).any()


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("parts", [0, 2, 4])
def test_killed_and_begun_again_it_ends_with_the_same_bytes(run, tmp_path, monkeypatch, parts):
    mined(run, tmp_path / "whole")
    original, computed = mode.Mining.block, []

    def block(mining, number, advance):
        if len(computed) == parts:
            raise Killed
        computed.append(number)
        return original(mining, number, advance)

    folder = tmp_path / "lists"
    with monkeypatch.context() as patch:
        patch.setattr(mode.Mining, "block", block)
        with pytest.raises(Killed):
            mined(run, folder)
    assert not (folder / files.SOURCE).exists() and len(list((folder / "parts").glob("*.npy"))) == parts
    with pytest.raises(ValueError, match=r"choose another folder \(config\.mine\.folder\)[\s\S]*per_item: 4 there, 5"):
        mined(run, folder, mine__per_item=5)
    rest = []
    monkeypatch.setattr(
        mode.Mining, "block", lambda self, number, advance: (rest.append(number), original(self, number, advance))[1]
    )
    mined(run, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([files.SOURCE, files.IMAGES, files.CAPTIONS])
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes(), path.name
    monkeypatch.setattr(mode.Mining, "block", None)  # called, it would fail
    mined(run, folder)
    assert rest and len(computed) == parts


@pytest.mark.slow
def test_a_run_with_hard_negatives_resumes_bitwise(run, tmp_path):
    mined(run, tmp_path / "lists", mine__max_relative_score=2.0)
    c = config(
        data__dir=str(run[1]),
        data__negatives__folder=str(tmp_path / "lists"),
        data__negatives__count=1,
        train__steps=6,
        train__checkpoint_steps=3,
    )
    with tiny.quick():
        train_and_evaluate(c, tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "6")
        train_and_evaluate(c, tmp_path / "resumed")
        whole, resumed = (tiny.arrays(tmp_path / name, 6) for name in ("whole", "resumed"))
        for name, array in whole.items():
            np.testing.assert_array_equal(array, resumed[name], err_msg=name)
        c.data.negatives.folder = str((tmp_path / "lists").rename(tmp_path / "moved"))
        train_and_evaluate(c, tmp_path / "whole")
        mined(run, tmp_path / "others", mine__max_relative_score=0.5)
        c.data.negatives.folder = str(tmp_path / "others")
        with pytest.raises(WorkdirError, match="the hard negatives were mined anew"):
            train_and_evaluate(c, tmp_path / "whole")
        c.data.negatives.folder, c.data.negatives.count = "", 0
        train_and_evaluate(c, tmp_path / "without")
    without = tiny.arrays(tmp_path / "without", 6)
    assert any((without[name] != array).any() for name, array in whole.items() if "kernel" in name)


@pytest.mark.slow
def test_what_does_not_fit_is_refused(run, tmp_path):
    folder = tmp_path / "lists"
    mined(run, folder)
    with_lists = {"data__negatives__folder": str(folder), "data__negatives__count": 1}
    for number, (changes, kind, message) in enumerate(
        (
            ({"loss__sigmoid__mask_same_image": False}, ValueError, r"loss\.sigmoid\.mask_same_image is False"),
            ({"data__dir": vectors_config().data.dir}, DataError, r"of another data set or split"),
            (
                {"train__batch_size": 6, "train__steps": 1},
                ValueError,
                r"has 6 pairs; expected a multiple of .* 2 times 2",
            ),
        )
    ):
        with pytest.raises(kind, match=message):
            train_and_evaluate(config(**{"data__dir": str(run[1])} | with_lists | changes), tmp_path / f"run {number}")
    for changes in ({"mine__per_item": 0}, {"mine__max_relative_score": 0.0}):
        with pytest.raises(ValueError, match="per_item must be at least 1, max_relative_score above 0"):
            mined(run, tmp_path / "other", **changes)
