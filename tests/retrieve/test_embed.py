"""Embeddings on disk: what they hold, that a killed run ends with the same bytes, sets, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from data_prep.builder import write_dataset
from shnet_jax.data.gallery import open_gallery
from shnet_jax.data.records import open_dataset
from shnet_jax.evaluation.encode import Encoder
from shnet_jax.experiment import assemble, init_variables
from shnet_jax.modes.embed import embed, split_embeddings
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.retrieve import embed as writing
from shnet_jax.retrieve import tensors
from shnet_jax.retrieve.embeddings import make_ids, open_embeddings
from shnet_jax.training.load import load
from tests.retrieve import gallery
from tests.train import tiny


def config(folder, **changes):
    """Batches of 4: 3 parts of images, 13 of captions."""
    return gallery.toy(search__embeddings=str(folder), eval__batch_size=4, **changes)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "embeddings"
    embed(config(folder), gallery.toy_run())
    return folder


def test_vectors_ids_and_what_made_them(whole):
    loaded = load(gallery.toy_run(), config(whole))
    experiment = loaded.experiment
    opened = open_gallery(experiment.config, experiment.dataset, "test", experiment.tokenizer, experiment.fields)
    images, texts = Encoder(experiment, make_mesh(1)).encode(opened, loaded.variables)
    found = open_embeddings(whole)
    np.testing.assert_array_equal(found.images.vector, images.vector)
    np.testing.assert_array_equal(found.texts.vector, texts.vector)
    np.testing.assert_array_equal(load_file(whole / "texts.safetensors")["vector"], texts.vector)  # any reader
    ids = found.ids
    assert ids.image_ids == list(experiment.dataset.image_ids("test"))
    assert [ids.captions_of(i) for i in range(10)] == list(experiment.dataset.captions("test"))
    assert ids.caption_ids[6] == str(experiment.dataset.open_split("test", ["caption_ids"])[1]["caption_ids"][1])
    assert ids.caption_image[6] == 1
    assert found.source["checkpoint_step"] == 2 and found.source["split"] == "test"
    assert len(found.source["config_sha256"]) == len(found.source["dataset_sha256"]) == 64
    assert sorted(p.name for p in whole.iterdir()) == [
        "embeddings.json", "ids.json", "images.safetensors", "texts.safetensors",
    ]  # fmt: skip


def test_a_folder_of_somebody_else_is_not_taken_for_parts(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"parts of embeddings are kept, and holds thesis\.txt, which --mode=embed"):
        embed(config(tmp_path), gallery.toy_run())
    assert (tmp_path / "parts" / "thesis.txt").exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", ["a part of the images", "a part of the captions", "assembling the captions"])
def test_killed_and_begun_again_it_ends_with_the_same_bytes(after, whole, tmp_path, monkeypatch):
    folder, made = tmp_path / "embeddings", []
    original, assemble_ = writing.save_file, writing.assemble

    def save(arrays, path):
        if len(made) == {"a part of the images": 1, "a part of the captions": 8}.get(after):
            path.write_bytes(b"half of a part")
            raise Killed
        original(arrays, path)
        made.append(path.name)

    def put_together(parts, side, count, path):
        if side == "texts" and after.startswith("assembling"):
            path.with_name(f"{path.name}.tmp").write_bytes(b"half of a file")
            raise Killed
        assemble_(parts, side, count, path)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "save_file", save)
        patch.setattr(writing, "assemble", put_together)
        with pytest.raises(Killed):
            embed(config(folder), gallery.toy_run())
    before = len(made)
    monkeypatch.setattr(writing, "save_file", lambda arrays, path: (made.append(path.name), original(arrays, path)))
    embed(config(folder), gallery.toy_run())
    assert contents(folder) == contents(whole)
    assert len(made) == 16 and before in (1, 8, 16)  # no part was encoded twice
    monkeypatch.setattr(writing, "Towers", None)  # called, it would fail
    embed(config(folder), gallery.toy_run())


def test_another_split_or_checkpoint_does_not_go_into_the_same_folder(whole):
    with pytest.raises(ValueError, match=r"choose another folder .*\n  split: 'test' there, 'val' here"):
        embed(config(whole, search__split="val"), gallery.toy_run())
    with pytest.raises(ValueError, match="no split 'dev'; it has"):
        embed(config(whole.parent / "other", search__split="dev"), gallery.toy_run())


def test_sets_of_several_lengths(tmp_path):
    c = tiny.config(
        model__name="tests.retrieve.gallery",
        data__token_buckets=(16, 32), eval__batch_size=8, model__dim=4,
    )  # fmt: skip
    experiment = assemble(c)
    variables, mesh = init_variables(experiment, 0), make_mesh(2)
    found = writing.embed(experiment, variables, "test", mesh, tmp_path, {})
    opened = open_gallery(experiment.config, experiment.dataset, "test", experiment.tokenizer, experiment.fields)
    images, texts = Encoder(experiment, mesh).encode(opened, variables)
    for ours, theirs in ((found.images, images), (found.texts, texts)):
        for name in ("vector", "elements", "mask"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert found.texts.elements.shape == (50, 32, 4) and found.texts.mask.dtype == bool


def test_damaged_folders(whole, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no embeddings.json; make the embeddings with --mode=embed"):
        open_embeddings(tmp_path)
    for name in contents(whole):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    images = (whole / "images.safetensors").read_bytes()
    for damaged, message in (
        (images[:-4], "does not fit into the file; was it copied whole"),
        (b"\xff" * 100, "no safetensors file"),
        ((whole / "texts.safetensors").read_bytes(), "expected a vector for each of 10 images"),
        (save({"vector": np.zeros((10, 4), np.int64)}), r"found {'vector': \('int64', \(10, 4\)\)}"),
        (save({"vector": np.zeros((), np.float32)}), "expected a vector for each of 10 images"),
    ):
        (tmp_path / "images.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            open_embeddings(tmp_path)
    (tmp_path / "embeddings.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="expected format 1, found 99"):
        open_embeddings(tmp_path)


def test_captions_without_numbers_are_called_by_their_images(tmp_path):
    regions = np.ones((2, 4), np.float32)
    records = [{"image_id": name, "captions": ["a disc", "a star"], "regions": regions} for name in ("a", "b")]
    ids = make_ids(open_dataset(write_dataset(tmp_path, "unnumbered", {"val": records}, {"source": "tests"})), "val")
    assert ids.caption_ids == ["a#0", "a#1", "b#0", "b#1"]


def test_an_empty_array_has_a_file_too(tmp_path):
    tensors.create(tmp_path / "empty", {"vector": ((0, 4), np.dtype(np.float32))})
    assert tensors.open_mapped(tmp_path / "empty")["vector"].shape == (0, 4)


def test_the_default_folder_is_named_after_data_set_split_and_step():
    c = gallery.toy(search__split="val")
    found = split_embeddings(load(gallery.toy_run(), c), c, gallery.toy_run(), make_mesh(1))
    assert found.folder == gallery.toy_run() / "embeddings" / "tiny_val_2"
