"""Queries to results, by command line function and by Python, on a run of a toy model."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import shnet_jax
from shnet_jax.api import Retriever
from shnet_jax.data.records import open_dataset
from shnet_jax.experiment import assemble, init_variables
from shnet_jax.modes.embed import split_embeddings
from shnet_jax.modes.page import page
from shnet_jax.modes.search import read_queries, search
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.retrieve.embed import embed
from shnet_jax.retrieve.searcher import Searcher
from tests.patience import PATIENCE
from tests.retrieve import gallery
from tests.train import tiny


@pytest.fixture(scope="module")
def model():
    return shnet_jax.load(gallery.toy_run())


def test_the_lines_of_the_readme(monkeypatch, capsys):
    (gallery.toy_run().parent / "runs/demo/full").mkdir(parents=True, exist_ok=True)
    link = gallery.toy_run().parent / "runs/demo/full/seed_0"
    if not link.exists():
        link.symlink_to(gallery.toy_run())
    monkeypatch.chdir(gallery.toy_run().parent)
    capsys.readouterr()  # what the training has printed
    lines = Path(__file__).parents[2].joinpath("docs/search.md").read_text("utf-8")
    code = lines.split("```python\n")[1].split("```")[0]
    exec(compile(code, "docs/search.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_importing_the_package_is_light():
    code = "import sys, shnet_jax; assert not {'jax', 'flax', 'numpy'} & {*sys.modules}; shnet_jax.loda"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert "AttributeError: module 'shnet_jax' has no attribute 'loda'" in done.stderr


def test_a_search_imports_nothing_to_draw_or_log_with():
    code = "import sys, shnet_jax.modes.search; print({'matplotlib', 'tensorboardX', 'tensorflow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.stdout == "set()\n", done.stderr


def test_vectors_do_not_depend_on_how_they_are_asked_for(model):
    records = model.dataset.open_split("test", ["regions", "region_mask"])
    fields = {name: np.stack([record[name] for record in records]) for name in records.fields}
    images = model.encode_images("test").vector
    np.testing.assert_array_equal(model.encode_images(fields).vector, images)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-5)
    captions = [caption for of_image in model.dataset.captions("test") for caption in of_image]
    texts = model.encode_texts(captions).vector
    np.testing.assert_allclose(model.encode_texts(captions[7:8]).vector, texts[7:8], atol=1e-6)
    found = model.search(captions[:3], top_k=4)
    best = np.argsort(-(texts[:3] @ images.T), axis=1, kind="stable")[:, :4]
    ids = model.dataset.image_ids("test")
    assert [[hit.image_id for hit in answer.hits] for answer in found] == ids[best].tolist()
    with pytest.raises(ValueError, match="the model reads regions, region_mask of each image; found grid of 2"):
        model.encode_images({"grid": np.zeros((2, 3))})
    with pytest.raises(ValueError, match="query 2 of 2 has no words"):
        model.encode_texts(["a dog", "  "])
    np.testing.assert_array_equal(model.encode_texts("a dog").vector, model.encode_texts(["a dog"]).vector)
    with pytest.raises(ValueError, match="query 2 of 2: expected text, found 3"):
        model.encode_texts(["a dog", 3])
    with pytest.raises(ValueError, match=r"query 1 of 1: expected text in UTF-8, found 'caf\\udce9'"):
        model.encode_texts("caf\udce9")


def test_a_checkpoint_by_its_folder():
    assert shnet_jax.load(gallery.toy_run() / "checkpoints" / "2").loaded.step == 2
    with pytest.raises(RuntimeError, match=r"no checkpoint 7 in"):
        shnet_jax.load(gallery.toy_run() / "checkpoints" / "7")


def test_embeddings_of_another_run_are_refused(model):
    """The configuration and step are the same: only the weights tell them apart."""
    made = split_embeddings(model.loaded, gallery.toy(), gallery.toy_run(), make_mesh(1))
    model.open(made.folder)
    variables = jax.tree.map(lambda leaf: leaf + 1, model.loaded.variables)
    other = Retriever(dataclasses.replace(model.loaded, variables=variables), model.config)
    with pytest.raises(ValueError, match=r"weights_sha256 is '\w{64}' in its embeddings\.json, '\w{64}' of this model"):
        other.open(made.folder)
    later = Retriever(dataclasses.replace(model.loaded, step=7), model.config)
    with pytest.raises(ValueError, match="checkpoint_step is 2 in its"):
        later.open(made.folder)


def test_the_command_writes_and_prints_what_it_found(model, capsys, tmp_path):
    (tmp_path / "queries.txt").write_text("\ufeffa disc on the sand\n\n  a | star \n")
    name = model.dataset.image_ids("test")[3]
    search(gallery.toy(), gallery.toy_run(), "snow", str(tmp_path / "queries.txt"), name, top_k=3)
    out = capsys.readouterr().out
    assert "'snow' -> images" in out and "'a | star' -> images" in out and f"image {str(name)!r} -> captions" in out
    document = json.loads((gallery.toy_run() / "search.json").read_text("utf-8"))
    results = document["results"]
    assert document["format"] == 1 and document["gallery"]["checkpoint_step"] == 2
    assert [(r["query"], r["kind"], r["target"]) for r in results] == [
        ("snow", "text", "images"), ("a disc on the sand", "text", "images"), ("a | star", "text", "images"),
        (name, "image", "captions"), (name, "image", "images"),
    ]  # fmt: skip
    for result in results:
        scores = [hit["score"] for hit in result["hits"]]
        assert [hit["rank"] for hit in result["hits"]] == [1, 2, 3] and scores == sorted(scores, reverse=True)
    assert set(results[0]["hits"][0]) == {"rank", "score", "image_id", "captions"}
    assert set(results[3]["hits"][0]) == {"rank", "score", "image_id", "caption_id", "caption"}
    assert name not in [hit["image_id"] for hit in results[4]["hits"]]
    again = model.search("snow", top_k=3)[0]
    assert [hit.image_id for hit in again.hits] == [hit["image_id"] for hit in results[0]["hits"]]


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="needs --query, --query_file, --query_vectors, --image_id or --photo"):
        search(gallery.toy(), gallery.toy_run())
    with pytest.raises(ValueError, match="--top_k is 0"):
        search(gallery.toy(), gallery.toy_run(), "snow", top_k=0)
    with pytest.raises(ValueError, match=r"no image 'scene' among 10; (near it|the first is)"):
        search(gallery.toy(), gallery.toy_run(), image_id="scene")
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ValueError, match="empty: no query, expected one a line"):
        read_queries("", str(tmp_path / "empty"))


def test_a_model_with_a_score_of_its_own(tmp_path):
    c = tiny.config(model__name="tests.retrieve.gallery", model__dim=4)
    experiment = assemble(c)
    found = embed(experiment, init_variables(experiment, 0), "test", make_mesh(1), tmp_path, {})
    scores = np.asarray(experiment.model.score(found.images, found.texts))
    searcher = Searcher(found, experiment.model.score, 3, make_mesh(2), search=c.search)
    (answer,) = searcher.by_image([found.ids.image_ids[4]], 6)  # no images: they are compared with captions only
    best = np.argsort(-scores[4], kind="stable")[:6]
    assert [hit.caption_id for hit in answer.hits] == [found.ids.caption_ids[i] for i in best]
    c.search.index = "faiss"
    with pytest.raises(ValueError, match="this model scores pairs in a way of its own"):
        Searcher(found, experiment.model.score, 3, make_mesh(2), search=c.search)


def test_a_run_of_a_model_that_shows_nothing_and_photographs(tmp_path, capsys):
    def toy(**changes):
        return gallery.toy(page__pictures=str(tmp_path), page__queries=2, page__failures=1, **changes)

    workdir = gallery.toy_run()
    page(toy(), workdir)
    out, path = capsys.readouterr().out, workdir / "page_tiny_test.html"
    assert "no photograph in" in out and f"{path} (" in out
    text = path.read_text("utf-8")
    assert "What it looks at" not in text and "There are no photographs here" in text and "How it learned" in text
    for name in open_dataset(tiny.dataset()).image_ids("test"):
        Image.new("RGB", (90, 60), "red").save(tmp_path / f"{name}.jpg")
    page(toy(), workdir)
    text = path.read_text("utf-8")
    assert "data:image/jpeg" in text and "aspect-ratio:1.5" in text and "There are no photographs here" not in text
    beside = tiny.dataset().parent / "pictures"
    beside.symlink_to(tmp_path)
    page(gallery.toy(page__queries=2), workdir)
    beside.unlink()
    assert "data:image/jpeg" in path.read_text("utf-8")  # photographs beside the data set need no flag
    for changes, message in (
        ({"page__pictures": str(tmp_path / "none")}, "none': no such folder"),
        ({"page__results": 0}, "config.page.results is 0"),
        ({"page__highlights": -1}, "config.page.highlights is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            page(gallery.toy(**changes), workdir)
