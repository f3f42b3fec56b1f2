"""The page: its structure and escaping, its pictures, and what a real browser makes of it."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from shnet_jax.data.batches import stack_images, stored_fields
from shnet_jax.evaluation.evaluator import provenance
from shnet_jax.experiment import Experiment, abstract_variables, assemble
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.retrieve import pictures
from shnet_jax.retrieve.embed import embed
from shnet_jax.retrieve.embeddings import Embeddings
from shnet_jax.retrieve.examples import collect, spaced, worst
from shnet_jax.retrieve.highlight import highlights, look
from shnet_jax.retrieve.highlight_view import LABEL, place_labels
from shnet_jax.retrieve.page import render_page
from shnet_jax.retrieve.scene import Album
from tests.browser import HOSTILE, look_at, needs_browser
from tests.train import tiny

TEXTS = " ".join(HOSTILE).replace("\0", "")
"""What a caption of a data set can be: with a NUL it is refused."""
EVIL = "<script>document.title='owned';console.error('owned')</script>"
slow = pytest.mark.slow  # needs the page, which takes a model's compilation


def evil(record):
    """Captions and ids that would be a program if they were not escaped."""
    captions = [f'{EVIL} "{caption}" & \' {TEXTS}' for caption in record["captions"]]
    return record | {"captions": captions, "image_id": f'{record["image_id"]}"><img src=x onerror=alert(1)>'}


# As names of classes: none begins with a word that the page shows in another way.
CLASSES = [f"{number}{HOSTILE[number % len(HOSTILE)]}" for number in range(20)]


@dataclasses.dataclass(frozen=True)
class Made:
    path: Path
    experiment: Experiment
    variables: dict
    embeddings: Embeddings
    album: Album


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page of a 3SHNet with random parameters."""
    c = tiny.config(data__dir=str(tiny.write("evil", evil)))
    c.name = f"name {EVIL}"
    c.page.update({"queries": 2, "failures": 2, "highlights": 2, "results": 3})
    folder, experiment, mesh = tmp_path_factory.mktemp("page"), assemble(c), make_mesh(1)
    rng, shapes = np.random.default_rng(0), abstract_variables(experiment)  # to initialise takes a compilation
    variables = {
        "params": jax.tree.map(lambda s: np.asarray(0.1 * rng.standard_normal(s.shape), s.dtype), shapes["params"]),
        "batch_stats": jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes["batch_stats"]),
    }
    embeddings = embed(experiment, variables, "test", mesh, folder / "embeddings", {})
    about = provenance(experiment, "test", 1, "none", 1)
    contents = collect(experiment, variables, embeddings, c, about, mesh)
    again = collect(experiment, variables, embeddings, c, about, mesh)
    assert (again.captions, again.images, again.image_failures) == (
        contents.captions,
        contents.images,
        contents.image_failures,
    )
    history = [{"kind": "eval", "step": s, "i2t_r1": 5.0 * s} for s in (1, 2)]
    photographs = folder / "photographs"
    photographs.mkdir()
    for image_id in experiment.dataset.image_ids("test")[::2]:
        Image.new("RGB", (4, 4)).save(photographs / f"{image_id}.png")
    album = Album(experiment.dataset, "test", photographs, CLASSES)
    path = folder / "page.html"
    path.write_text(render_page(dataclasses.replace(contents, history=history, run=f"run {EVIL}"), album), "utf-8")
    return Made(path, experiment, variables, embeddings, album)


class Tags(HTMLParser):
    """Checks that tags are closed in turn, and collects them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(name, value) for name, value in attrs]
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@slow
def test_everything_is_there_and_nothing_comes_from_elsewhere(made):
    text = made.path.read_text("utf-8")
    page = Tags(text)
    words = "".join(page.words)
    for wanted in (
        "How well it retrieves", "rSum", "chance", "How it learned", "Text to image", "Image to text", f"run {EVIL}",
        "Failures worth seeing", "Semantic gate of the regions", "Spatial attention, mean", "How the set is pooled",
    ):  # fmt: skip
        assert wanted in words, wanted
    assert not {"script", "link", "iframe", "object"} & {*page.seen}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [value for name, value in page.attributes if name in ("src", "srcset", "href")]
    assert links and all(re.match(r"#|data:image/(png|jpeg);base64,", value) for value in links)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    bare = text.replace("url(http://192.0.2.1/x)", "")  # of HOSTILE
    assert set(re.findall(r"url\((?!#)(.{10})", bare + style)) == {"data:image"} and "http" not in bare + style
    assert EVIL in words and f"“{EVIL}" in words  # as text
    assert text.count("✓ right") >= 2 and "card good" in text


@slow
@needs_browser
def test_a_browser_shows_it_without_a_word_of_complaint(made):
    seen = look_at(made.path, tiny.folder() / "browser")
    assert not seen.console  # no script ran, nothing was looked for elsewhere
    assert seen.title.startswith(f"name {EVIL}") and not {"script", "a:b", "textarea"} & {*seen.tags}
    assert made.album.photographs and {"svg", "img", "figure"} <= {*seen.tags}  # those of the page
    for text in HOSTILE:
        assert " ".join(text.replace("\0", "\ufffd").split()) in " ".join(seen.text.split()), text
    shown = [name for name in CLASSES if pictures.class_name(0, [name]).replace("\0", "\ufffd") in seen.text]
    assert len(shown) > 3
    assert seen.tags.count("bdi") > 10  # where a text's marks of direction end


@slow
def test_looking_changes_no_number(made):
    experiment, rows = made.experiment, [2, 0]
    records = experiment.dataset.open_split("test", stored_fields(experiment.dataset, experiment.fields))
    batch = {"image_index": np.array(rows, np.int32), **stack_images(records, rows)}
    embedding, sown, _ = look(experiment.model, made.variables, batch)
    np.testing.assert_allclose(embedding.vector, made.embeddings.images.vector[rows], atol=1e-5)
    for place, (shown, row) in enumerate(zip(highlights(experiment, made.variables, "test", rows), rows, strict=True)):
        np.testing.assert_allclose(shown.gate, sown["semantic", "gate"][place], atol=1e-5)
        np.testing.assert_allclose(shown.attention.sum(1), 1, atol=1e-4)
        np.testing.assert_array_equal(shown.valid, records[row]["region_mask"])
        assert shown.units == {"regions": 8} and len(shown.weights) == 2 * shown.valid.sum() + 50
        assert (shown.gate[shown.valid] > 0).all() and not shown.gate[~shown.valid].any()
        np.testing.assert_allclose(shown.weights.sum(), 1, atol=1e-5)


def test_a_file_that_is_no_photograph(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.png: expected a picture, found no BMP"):
        pictures.photograph(tmp_path, "a")
    assert pictures.photograph(tmp_path, "b") is None


def test_an_id_brings_no_file_from_elsewhere(tmp_path):
    (tmp_path / "photographs").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "private.png")
    for image_id in ("../private", "../private.png", str(tmp_path / "private.png")):
        assert pictures.photograph(tmp_path / "photographs", image_id) is None
    assert pictures.photograph(tmp_path, "private") is not None


def decoded(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGBA")).astype(int)


def test_pictures_show_what_is_in_the_arrays():
    seg_map = np.array([[0, 0, 3], [1, 2, 2]], np.uint8)
    names = ("sky-other-merged", "dog", "cup")  # 3 is void
    shown = decoded(pictures.label_map(seg_map, names))
    hexes = [[f"#{r:02x}{g:02x}{b:02x}" for r, g, b, _ in row] for row in shown]
    assert hexes == [[pictures.colour(int(c), names) for c in row] for row in seg_map]
    assert len({pictures.colour(c, names) for c in range(4)}) == 4
    assert [(name, share) for name, _, share in pictures.shares(seg_map, names, 2)] == [("sky", 1 / 3), ("cup", 1 / 3)]
    assert pictures.class_name(3, names) == "unlabelled" and pictures.class_name(3, ()) == "class 3"
    np.testing.assert_array_equal(pictures.inside(seg_map, np.array([0.4, 0.5, 1.0, 1.0])), [[2, 2]])
    assert pictures.inside(seg_map, np.array([1.0, 1.0, 1.0, 1.0])).tolist() == [[2]]
    np.testing.assert_array_equal(
        decoded(pictures.heat(np.array([[0.0, 0.25], [1.0, 0.0]])))[..., 3], [[0, 112], [225, 0]]
    )
    point = np.zeros((32, 32))
    point[5, 9] = 1
    assert np.argwhere(decoded(pictures.heat(point))[..., 3]).tolist() == [
        [y, x] for y in (4, 5, 6) for x in (8, 9, 10)
    ]
    assert not decoded(pictures.heat(np.zeros((2, 2))))[..., 3].any()


def test_the_choice_of_examples():
    assert spaced(10, 2).tolist() == [2, 7] and spaced(3, 8).tolist() == [0, 1, 2] and not len(spaced(0, 4))
    assert worst(np.array([0, 5, 0, 9, 5]), 3).tolist() == [3, 1, 4] and not len(worst(np.zeros(3, int), 2))


def test_labels_do_not_lie_on_each_other():
    boxes = np.array([[0.1, 0.1, 0.9, 0.9]] * 4 + [[0.95, 0.95, 1.0, 1.0], [0.0, 0.0, 0.02, 0.02]] * 2)
    places = np.array(place_labels(boxes))
    assert (places >= 0).all() and (places + LABEL <= 1).all()
    apart = np.abs(places[:, None] - places) >= np.array(LABEL) - 1e-9
    assert (apart.any(-1) | np.eye(len(places), dtype=bool)).all()
    assert places[0].tolist() == [0.1, 0.1]
