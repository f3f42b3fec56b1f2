"""A gallery whose images have no captions, or some of them: searched, served and shown, but not trained on."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest

import shnet_jax
from data_prep import verify
from data_prep.builder import write_dataset
from data_prep.schema import DataError
from shnet_jax.data.records import open_dataset
from shnet_jax.modes.evaluate import evaluate_checkpoint
from shnet_jax.modes.page import page
from shnet_jax.modes.search import open_search, search
from shnet_jax.modes.train import train
from shnet_jax.retrieve import server
from tests.retrieve import gallery
from tests.train import tiny


def bare(record, captions=()):
    return {name: value for name, value in record.items() if name != "caption_ids"} | {"captions": list(captions)}


@functools.cache
def photos():
    """Two splits: photographs without any caption, and some of which one has a caption."""
    without = [bare(record) for record in tiny.records("test")]
    some = [bare(record, ["a red star"] * (row == 3)) for row, record in enumerate(tiny.records("val"))]
    splits = {"photos": without, "some": some}
    return write_dataset(tiny.folder(), "photos_alone", splits, {"source": "made by the tests"}, least_captions=0)


@pytest.fixture(autouse=True, scope="module")
def quick():
    with tiny.quick():
        yield


def config(split="photos", **changes):
    return gallery.toy(data__dir=str(photos()), search__split=split, **changes)


def test_the_set_says_what_it_lacks():
    dataset = open_dataset(photos())
    assert dataset.caption_counts("photos").tolist() == [0] * 10
    assert dataset.caption_counts("some").sum() == 1 and list(dataset.captions("some"))[3] == ["a red star"]
    assert dataset.open_split("photos", ["captions"])[0]["captions"] == []
    report = verify.verify(photos())
    assert not report.problems
    assert "split some: 9 of 10 images have no caption: they are searched, not trained on" in report.notes


def test_an_import_still_demands_captions():
    records = {"train": [bare(record) for record in tiny.records("test")]}
    with pytest.raises(DataError, match=r"field 'captions': expected a list of at least 1 string, found \[\]"):
        write_dataset(tiny.folder(), "photos_refused", records, {"source": "made by the tests"})


@pytest.mark.parametrize("split", ["photos", "some"])
def test_words_and_an_image_find_images(split, capsys):
    workdir, name = gallery.toy_run(), str(open_dataset(photos()).image_ids(split)[0])
    search(config(split), workdir, query="a red star", image_id=name, top_k=3)
    capsys.readouterr()
    words, *by_image = json.loads((workdir / "search.json").read_text())["results"]
    assert len(words["hits"]) == 3 and words["target"] == "images"
    assert [answer["target"] for answer in by_image] == (["images"] if split == "photos" else ["captions", "images"])
    assert name not in [hit["image_id"] for hit in by_image[-1]["hits"]]
    model = shnet_jax.load(workdir, data_dir=photos())
    assert [hit.image_id for hit in model.search("a red star", split, 3)[0].hits] == [
        hit["image_id"] for hit in words["hits"]
    ]


def test_an_index_finds_them_too(capsys):
    pytest.importorskip("faiss")
    c = config(search__index="faiss", search__faiss="Flat")
    search(c, gallery.toy_run(), query="a red star", top_k=3)
    document = json.loads((gallery.toy_run() / "search.json").read_text())
    found, about = document["results"][0]["hits"], document["index"]["sides"]["images"]
    search(config(), gallery.toy_run(), query="a red star", top_k=3)
    assert (about["recall"], about["queries"], about["queries_of"]) == (1, 10, "images")
    exact = json.loads((gallery.toy_run() / "search.json").read_text())["results"][0]["hits"]
    assert [hit["image_id"] for hit in found] == [hit["image_id"] for hit in exact]
    np.testing.assert_allclose([hit["score"] for hit in found], [hit["score"] for hit in exact], atol=1e-6)
    capsys.readouterr()


@pytest.mark.parametrize("split", ["photos", "some"])
def test_the_page_shows_images_like_each_other(split):
    c, workdir = config(split, page__queries=2, page__results=3), gallery.toy_run()
    page(c, workdir)
    text = (workdir / f"page_photos_alone_{split}.html").read_text()
    assert text.count('class="query"') == 2 and text.count('class="card"') == 2 * (1 + 3)
    assert "Recalls need captions of every image" in text


def test_it_is_served():
    loaded, tower, searcher = open_search(config(), gallery.toy_run())
    engine = server.Engine(loaded.experiment, loaded.variables, tower, searcher)
    server.warm_up(engine)
    name = searcher.embeddings.ids.image_ids[0]
    (answer,) = engine.by_words(["a red star"])
    found = server._search_page(engine, "a red star", answer)
    assert all(hit.image_id in found for hit in answer.hits)  # in place of a caption
    shown = server._image_page(engine, name, engine.by_image(name))
    assert "Images like it" in shown and "Captions that fit it best" not in shown


def test_training_and_evaluation_are_refused(tmp_path):
    expected = r"split 'photos': 10 of 10 images have no caption, as '.*': they are for shnet search, serve and page"
    c = config(data__train_split="photos", data__val_split="photos", eval__split="photos")
    c.tokenizer.path = str(next(gallery.toy_run().glob("vocabulary.*")))
    with pytest.raises(ValueError, match=expected):
        train(c, tmp_path / "run")
    with pytest.raises(ValueError, match=expected):
        evaluate_checkpoint(c, gallery.toy_run())
