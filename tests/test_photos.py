"""`shnet photos` from pictures to answers, with the recorded tiny CLIP; a stand-in for its vision tower, no PyTorch."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import socket
import urllib.error
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import shnet_jax
from data_prep.extract import encoders, hub, own_photos, run
from data_prep.schema import DataError
from shnet_jax import bundled, cli
from shnet_jax.data.records import open_dataset
from shnet_jax.interop import clip_weights
from shnet_jax.models import dual
from shnet_jax.modes import photos as modes_photos
from shnet_jax.modes import serve
from shnet_jax.modes.page import page
from shnet_jax.modes.photo_query import check_encoder, noted_encoder, open_sight
from shnet_jax.modes.photos import photos
from shnet_jax.modes.search import open_search, search
from shnet_jax.retrieve.server import Engine
from shnet_jax.stored_config import get_config
from shnet_jax.training.load import load
from shnet_jax.training.workdir import load_config, save_config
from tests import siglip_example
from tests.load import get
from tests.patience import PATIENCE
from tests.retrieve.serving import serving
from tests.train import tiny

GOLDEN = Path(__file__).parent / "golden" / "clip"
WIDTH = 20  # of the joint space of the recorded CLIP


def colours(pictures, names):
    """In place of the vision tower: the mean colour of each picture, mixed into the joint space."""
    mix = np.random.default_rng(0).standard_normal((3, WIDTH))
    return [{"image_embedding": (np.asarray(p).mean((0, 1)) @ mix).astype(np.float32)} for p in pictures]


colours.models = {}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(run, "load_extractor", lambda settings, device: colours)
    with tiny.quick():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(GOLDEN / name, folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def draw(folder, count):
    """Pictures of `count` colours, every other one in a folder below, and a file that is no picture."""
    (folder / "below").mkdir(parents=True)
    for number, colour in enumerate(np.random.default_rng(1).integers(0, 256, (count, 3)).tolist()):
        Image.new("RGB", (8, 8), tuple(colour)).save(folder / ("below" if number % 2 else ".") / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("photos") / "mine", 6)


def config():
    c = bundled.get_config("dual")
    c.parallel.devices, c.eval.batch_size = 1, 8
    return c


@pytest.fixture(scope="module")
def made(tmp_path_factory, folder, model):
    """The run of the photographs."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_extractor", lambda settings, device: colours)
        photos(config(), workdir, folder=str(folder), model=str(model), query="a red star", top_k=3)
    return workdir


def stored(workdir) -> ConfigDict:
    return get_config(str(workdir))


def results(workdir):
    return json.loads((workdir / "search.json").read_text())["results"]


def test_words_find_photographs_by_the_clips_own_cosine(made, folder, model, capsys):
    dataset = open_dataset(made / "data_sets")
    assert dataset.splits == {"photos": 6} and dataset.metadata["skipped"] == ["broken.jpg"]
    assert "below/1.png" in dataset.image_ids("photos")
    search(stored(made), made, query="a red star", top_k=6)
    images = np.stack([r["image_embedding"] for r in dataset.open_split("photos", ["image_embedding"])])
    retriever = shnet_jax.load(made)
    query = retriever.encode_texts("a red star").vector[0]
    expected = images / np.linalg.norm(images, axis=1, keepdims=True) @ query
    found = results(made)[0]["hits"]
    np.testing.assert_allclose([hit["score"] for hit in found], np.sort(expected)[::-1], atol=1e-5)
    assert [hit["image_id"] for hit in found] == dataset.image_ids("photos")[np.argsort(-expected)].tolist()


@pytest.mark.slow  # makes a run
@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_words_find_photographs_by_siglips_own_cosine(kind, folder, tmp_path, capsys):
    siglip_example.write_folder(tmp_path / "model", kind)
    photos(config(), tmp_path / "run", folder=str(folder), model=str(tmp_path / "model"), query="A red star!", top_k=6)
    run_there = stored(tmp_path / "run")
    assert (run_there.text.tower, run_there.tokenizer.kind) == ("siglip", "siglip")
    assert run_there.data.max_tokens == run_there.text.max_positions == siglip_example.LENGTH
    dataset = open_dataset(tmp_path / "run" / "data_sets")
    images = np.stack([r["image_embedding"] for r in dataset.open_split("photos", ["image_embedding"])])
    query = shnet_jax.load(tmp_path / "run").encode_texts("a RED star!").vector[0]
    expected = images / np.linalg.norm(images, axis=1, keepdims=True) @ query
    found = results(tmp_path / "run")[0]["hits"]
    np.testing.assert_allclose([hit["score"] for hit in found], np.sort(expected)[::-1], atol=1e-5)
    assert np.ptp(expected) > 0.01  # else any order would do


def test_a_new_photograph_finds_those_like_it(made, tmp_path, capsys):
    shutil.copy(made.parent / "run" / "config.json", tmp_path)
    original = Path(stored(made).page.pictures) / "below" / "1.png"
    shutil.copy(original, tmp_path / "new.png")
    photos(stored(made), made, photo=str(tmp_path / "new.png"), top_k=2)
    (answer,) = results(made)
    assert answer["kind"] == "image" and answer["target"] == "images"
    assert answer["hits"][0]["image_id"] == "below/1.png" and answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png"):
        photos(stored(made), made, photo=str(tmp_path / "text.png"))


@pytest.fixture(scope="module")
def copied(made, tmp_path_factory):
    """A photograph that is one of the run, under another name."""
    return shutil.copy(Path(stored(made).page.pictures) / "below" / "1.png", tmp_path_factory.mktemp("new") / "new.png")


def test_search_takes_a_new_photograph(made, copied, model, tmp_path, monkeypatch, capsys):
    search(stored(made), made, photo=str(copied), top_k=2)
    (answer,) = results(made)
    assert answer["hits"][0]["image_id"] == "below/1.png" and answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(FileNotFoundError, match=r"--photo=absent\.png: no such file"):
        search(stored(made), made, photo="absent.png")
    c = stored(made)
    c.text.weights = str(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="gone: the encoder of this run is not there"):
        search(c, made, photo=str(copied))
    shutil.copytree(model, tmp_path / "clip")
    with (tmp_path / "clip" / "model.safetensors").open("ab") as file:
        file.write(b" ")
    c.text.weights = str(tmp_path / "clip")
    with pytest.raises(
        ValueError, match=r"clip/model\.safetensors: sha256: expected \w{64}, with which .* was made, found \w{64};"
    ):
        search(c, made, photo=str(copied))
    c.model.name = "shnet"
    with pytest.raises(ValueError, match=r"--photo is for runs of shnet photos; .* has the model 'shnet'"):
        search(c, made, photo=str(copied))
    monkeypatch.undo()
    if importlib.util.find_spec("torch") is None:
        with pytest.raises(ValueError, match=r"needs PyTorch and transformers .*: pip install -e '\.\[extract\]'"):
            search(stored(made), made, photo=str(copied))


def test_a_server_without_the_encoder_says_so_and_searches_words(made, tmp_path, caplog):
    loaded = load(made, stored(made))
    assert serve._sight(loaded, stored(made), made, "") is not None
    c = stored(made)
    c.text.weights = str(tmp_path / "gone")
    assert serve._sight(loaded, c, made, "") is None and not caplog.text.count("\n") > 1
    assert "no search by a new photograph: " in caplog.text and "gone: the encoder of this run is not" in caplog.text
    c.model.name = "shnet"
    caplog.clear()
    assert serve._sight(loaded, c, made, "") is None and not caplog.text


def test_the_encoder_is_checked_by_the_files_that_are_loaded(made, model, tmp_path, caplog):
    c, clip = stored(made), shutil.copytree(model, tmp_path / "clip")
    c.text.weights = str(clip)
    (clip / "pytorch_model.bin").write_bytes(b"model.safetensors is loaded instead")
    (clip / "optimizer.bin").write_bytes(b"of its training")
    assert check_encoder(c, made) == clip and not caplog.text
    (clip / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    with pytest.raises(
        ValueError, match=r"clip/preprocessor_config\.json: sha256: expected \w{64}, with which .* found"
    ):
        check_encoder(c, made)
    (clip / "preprocessor_config.json").unlink()
    (clip / "processor_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"clip/preprocessor_config\.json: sha256: expected .* found no such file;"):
        check_encoder(c, made)


def test_weights_in_parts_and_of_pytorch_are_hashed(tmp_path):
    """The form that transformers loads is hashed where there are several."""
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"")
    assert [*encoders.files_sha256(tmp_path)] == ["config.json", "pytorch_model.bin"]
    for name in parts:
        (tmp_path / name).write_bytes(b"")
    assert [*encoders.files_sha256(tmp_path)] == ["config.json", *parts]


def test_a_run_has_its_encoder_noted_even_when_it_is_killed(made, folder, model, tmp_path, monkeypatch, caplog):
    """Without the note any weights would be taken."""
    run_there = shutil.copytree(made, tmp_path / "run")
    (run_there / "encoder.json").unlink()
    assert check_encoder(stored(made), run_there) == model.resolve()
    assert "run has no encoder.json with sha256: files of" in caplog.text
    photos(stored(made), run_there, folder=str(folder), model=str(model))  # completes the run that is there
    note = (run_there / "encoder.json").read_bytes()
    assert note == (made / "encoder.json").read_bytes()
    (run_there / "encoder.json").unlink()
    shutil.rmtree(run_there / "checkpoints")
    monkeypatch.setattr(modes_photos, "write_run", lambda *args: fails("killed"))
    monkeypatch.setattr(modes_photos, "init_variables", lambda *args: {})
    with pytest.raises(ValueError, match="killed"):
        photos(stored(made), run_there, folder=str(folder), model=str(model))
    assert (run_there / "encoder.json").read_bytes() == note


def test_other_files_of_the_encoder_are_refused(folder, model, tmp_path):
    """Vectors of one encoder beside the text tower, or the photographs, of another would be compared in vain."""
    run_there, clip = tmp_path / "run", shutil.copytree(model, tmp_path / "clip")
    for _ in range(2):
        photos(config(), run_there, folder=str(folder), model=str(clip))
    (clip / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    before = files(run_there)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: sha256: expected .* again with --overwrite$"):
        photos(stored(run_there), run_there, folder=str(folder))
    assert files(run_there) == before
    photos(stored(run_there), run_there, query="a red star")  # by the text tower that is part of the run
    photos(stored(run_there), run_there, folder=str(folder), overwrite=True)
    assert check_encoder(stored(run_there), run_there) == clip


def test_the_encoder_of_a_stopped_extraction_is_noted(folder, model, tmp_path, monkeypatch):
    clip = shutil.copytree(model, tmp_path / "clip")
    flags = {"folder": str(folder), "model": str(clip)}
    with monkeypatch.context() as patch:
        patch.setattr(own_photos, "files_below", lambda folder: fails("no photographs"))
        with pytest.raises(ValueError, match="no photographs"):
            photos(config(), tmp_path / "run", **flags)
    (clip / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')  # nothing was begun yet
    with monkeypatch.context() as patch:
        patch.setattr(run, "load_extractor", lambda settings, device: fails("stopped"))
        with pytest.raises(ValueError, match="stopped"):
            photos(config(), tmp_path / "run", **flags)
    (clip / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: sha256: expected .* again with --overwrite$"):
        photos(config(), tmp_path / "run", **flags)


def test_a_head_has_its_encoder_noted_before_it_is_trained(model, tmp_path, monkeypatch):
    monkeypatch.setattr(modes_photos, "load_config", lambda path: config())
    monkeypatch.setattr(modes_photos, "_fit_encoder", lambda c: None)
    counts = ConfigDict({"caption_counts": lambda split: np.ones(64, int)})
    monkeypatch.setattr(modes_photos, "open_dataset", lambda path: counts)
    monkeypatch.setattr(modes_photos, "train_and_evaluate", lambda *args: fails("killed"))
    c = config()
    c.text.weights = str(model)
    with pytest.raises(ValueError, match="killed"):
        modes_photos._train_head(c, tmp_path, tmp_path)
    assert "model.safetensors" in noted_encoder(tmp_path / "head")


@pytest.fixture(scope="module")
def address(made):
    """Address of a server of the run, with the stand-in for the vision tower."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_extractor", lambda settings, device: colours)
        loaded, tower, searcher = open_search(stored(made), made)
        sight = open_sight(loaded, stored(made), check_encoder(stored(made), made))
        pictures = Path(stored(made).page.pictures)
        with serving(Engine(loaded.experiment, loaded.variables, tower, searcher, pictures, sight)) as running:
            yield running


def form(data, field="photo"):
    """Content type and body of a browser's form with a file."""
    head = f'--edge\r\nContent-Disposition: form-data; name="{field}"; filename="new.png"\r\n'
    return (
        "multipart/form-data; boundary=edge",
        f"{head}Content-Type: image/png\r\n\r\n".encode() + data + b"\r\n--edge--\r\n",
    )


def send(url, data, kind="image/png"):
    """Status and answer of a POST request."""
    request = urllib.request.Request(url, data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_photograph_is_sent_to_the_server(address, copied):
    data = Path(copied).read_bytes()
    status, text = send(f"{address}/photo?k=2", data)
    hits = json.loads(text)["hits"]
    assert status == 200 and len(hits) == 2
    assert hits[0]["image_id"] == "below/1.png" and hits[0]["score"] == pytest.approx(1, abs=1e-5)
    kind, body = form(data)
    status, page = send(f"{address}/photo", body, kind)
    assert status == 200 and page.index("Images like <bdi>new.png</bdi>") < page.index("/image/below%2F1.png")
    assert page.count("data:image/jpeg") == 7  # the photographs, and the one that was sent
    status, page = get(f"{address}/")
    assert 'enctype="multipart/form-data"' in page


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (lambda data: (data[:40], "image/png"), 400, "photo:"),
        (lambda data: (b"", "image/png"), 400, "photo:"),
        (lambda data: (b"GIF89a no picture", "image/gif"), 400, "photo:"),
        (lambda data: (b"0" * (2**24 + 1), "image/png"), 413, "expected at most 16777216 bytes"),
        (lambda data: (huge(), "image/png"), 400, "8300 x 8200 pixels, more than"),
        (lambda data: form(data, "file")[::-1], 400, 'a file in the field "photo", found none'),
        (lambda data: (data, "multipart/form-data"), 400, 'a file in the field "photo", found none'),
        (lambda data: form(b"no picture")[::-1], 400, "new.png"),
        (lambda data: form(data, '"; name*0*=%')[::-1], 400, 'a file in the field "photo", found none'),
    ],
)
def test_what_is_no_photograph_gets_one_line(address, copied, change, status, message):
    found, text = send(f"{address}/photo", *change(Path(copied).read_bytes()))
    line = json.loads(text)["error"]
    assert found == status and re.search(message, line) and "\n" not in line
    assert send(f"{address}/photo?k=0", Path(copied).read_bytes())[0] == 400
    assert get(f"{address}/health")[0] == 200


def huge():
    """A small file of 68 million pixels."""
    out = io.BytesIO()
    Image.new("1", (8300, 8200)).save(out, "PNG")
    return out.getvalue()


def test_the_page_shows_the_photographs(made, capsys):
    page(stored(made), made)
    text = (made / "page_photos_photos.html").read_text()
    assert text.count("data:image/jpeg") == 6


def test_the_same_command_makes_nothing_again(made, folder, model, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_extractor", lambda settings, device: pytest.fail("extracted again"))
    before = files(made)
    photos(stored(made), made, folder=str(folder), model=str(model))
    assert files(made) == before
    streams = capsys.readouterr()
    assert "made of these photographs before" in streams.err
    assert f"6 photographs can be searched in {made}" in streams.out
    photos(stored(made), made)
    assert capsys.readouterr().out == streams.out  # what can be asked now


def test_other_photographs_or_another_model_are_an_error(made, folder, model, tmp_path):
    with pytest.raises(FileExistsError, match=r"was made otherwise: .*; --overwrite makes it again"):
        photos(stored(made), made, folder=str(draw(tmp_path / "other", 2)), model=str(model))
    other = shutil.copytree(model, tmp_path / "clip")
    with pytest.raises(ValueError, match=r"was made with the model .*; --overwrite makes it again"):
        photos(stored(made), made, folder=str(folder), model=str(other))


@pytest.mark.slow  # makes a run twice
def test_more_photographs_with_overwrite(folder, model, tmp_path, capsys):
    mine = shutil.copytree(folder, tmp_path / "mine")
    photos(config(), tmp_path / "run", folder=str(mine), model=str(model), query="a dog", top_k=20)
    Image.new("RGB", (8, 8), "red").save(mine / "red.png")
    (tmp_path / "run" / "head").mkdir()
    photos(config(), tmp_path / "run", folder=str(mine), model=str(model), query="a dog", top_k=20, overwrite=True)
    assert {"red.png"} <= {hit["image_id"] for hit in results(tmp_path / "run")[0]["hits"]}
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {
        *("checkpoints", "data_sets", "embeddings")
    }
    assert stored(tmp_path / "run").data.dir == str(tmp_path / "run/data_sets/photos/1.0.0")


def files(workdir):
    """All files of a run, with their contents."""
    return {path.relative_to(workdir): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"name": "shnet"}, "a run of the model 'shnet'"),
        ({"dual": {"head": "residual"}}, "a head that was trained"),
        (None, "checkpoints, head but no config.json"),
    ],
)
def test_another_run_is_refused_and_stays(folder, model, tmp_path, overwrite, change, what):
    c = config()
    c.text.weights = str(model.resolve())
    for name in ("checkpoints/7", "head"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "trained").write_text("for weeks")
    if change is not None:
        c.model.update(change)
        save_config(c, tmp_path / "run" / "config.json")
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match=f"run holds {what}.*; choose another --out$"):
        photos(config(), tmp_path / "run", folder=str(folder), model=str(model), overwrite=overwrite)
    assert files(tmp_path / "run") == before


def test_a_mistake_with_overwrite_leaves_the_run(made, folder, model, tmp_path, monkeypatch):
    """A head cost hours: captions that are not there, a model that fails and broken weights cost nothing of it."""
    run_there = shutil.copytree(made, tmp_path / "run")
    (run_there / "head").mkdir()
    (run_there / "head" / "trained").write_text("for hours")
    before = files(run_there)

    def again(**flags):
        with pytest.raises((ValueError, OSError)) as error:
            photos(config(), run_there, folder=str(folder), model=str(model), overwrite=True, **flags)
        after = files(run_there)
        assert {name: after.get(name) for name in before} == before
        return str(error.value)

    assert "captoins.csv" in again(captions=str(tmp_path / "captoins.csv"))
    with monkeypatch.context() as patch:
        patch.setattr(run, "load_extractor", lambda settings, device: fails("no memory"))
        assert "no memory" in again()
    monkeypatch.setattr(modes_photos, "init_variables", lambda *args: fails("broken weights"))
    assert "broken weights" in again()


def fails(text):
    raise ValueError(text)


@pytest.mark.slow  # trains
def test_captions_give_a_table_and_a_head(model, tmp_path, capsys):
    mine = draw(tmp_path / "mine", 60)
    names = [path.relative_to(mine).as_posix() for path in sorted(mine.rglob("*.png"))]
    rows = ["image,caption", *(f"{name},a picture number {name[-5]}" for name in names[5:]), "gone.jpg,a dog"]
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    flags = {"folder": str(mine), "model": str(model), "captions": str(tmp_path / "captions.csv")}
    photos(config(), tmp_path / "run", **flags)
    out = capsys.readouterr()
    assert "1 captioned images are not in" in out.err and "--captions=" in out.out and "--head" in out.out
    assert open_dataset(tmp_path / "run/data_sets/photos").splits == {"photos": 60}
    captioned = open_dataset(tmp_path / "run/data_sets/captioned")
    assert captioned.splits == {"train": 45, "val": 5, "test": 5}
    first = sorted(names[5:], key=lambda name: hashlib.sha256(name.encode()).digest())[:5]
    assert sorted(first) == sorted(captioned.image_ids("test").tolist())
    photos(config(), tmp_path / "run", head=True, **flags)
    document = json.loads((tmp_path / "run/results_captioned.json").read_text())
    assert set(document["arms"]) == {"zero-shot", "head"}
    assert document["arms"]["head"]["card"]["images"] == 5
    text = (tmp_path / "run/results_captioned.md").read_text()
    assert "| head - zero-shot |" in text and "the first tenth is test" in text
    head = load_config(tmp_path / "run/head/config.json")
    assert head.text.frozen_layers == 2 and head.train.batch_size == 32


@pytest.fixture
def ten(model, tmp_path, monkeypatch):
    """Ten photographs with captions in the folder from which commands are given, as docs/search.md names them."""
    monkeypatch.setattr(own_photos, "LEAST", 10)
    monkeypatch.chdir(tmp_path)
    mine = draw(tmp_path / "MY_PHOTOS", 10)
    shutil.copy(mine / "0.png", "ANOTHER.jpg")
    shutil.copytree(model, "clip")
    caption("a picture")
    return tmp_path


def caption(text):
    names = [path.relative_to("MY_PHOTOS").as_posix() for path in sorted(Path("MY_PHOTOS").rglob("*.png"))]
    Path("captions.csv").write_text("\n".join(["image,caption", *(f"{name},{text} {name[-5]}" for name in names)]))


def test_captions_that_come_later_or_change_extract_nothing_again(ten, monkeypatch):
    def extract(captions, **flags):
        return own_photos.extract(Path("MY_PHOTOS"), ten / "clip", ten / "sets", captions, **flags)

    everything, none = extract("")
    assert none is None
    before = files(everything)
    monkeypatch.setattr(run, "load_extractor", lambda settings, device: pytest.fail("extracted again"))
    _, captioned = extract("captions.csv")
    first = files(captioned)
    assert extract("captions.csv") == (everything, captioned) and files(captioned) == first
    caption("another picture")
    with pytest.raises(FileExistsError, match=r"^head was trained on other captions than captions.csv; remove"):
        extract("captions.csv", trained=Path("head"))
    assert files(captioned) == first
    assert extract("", trained=Path("head")) == (everything, None)
    extract("captions.csv")
    dataset, photographs = open_dataset(captioned), open_dataset(everything)
    assert dataset.splits == {"train": 8, "val": 1, "test": 1}
    (record,) = dataset.open_split("test", ["image_id", "captions", "image_embedding"])
    assert record["captions"] == [f"another picture {record['image_id'][-5]}"]
    row = photographs.image_ids("photos").tolist().index(record["image_id"])
    vector = photographs.open_split("photos", ["image_embedding"])[row]["image_embedding"]
    np.testing.assert_array_equal(record["image_embedding"], vector)
    caption("a picture")
    extract("captions.csv")
    assert files(captioned) == first and files(everything) == before


def documented():
    """The commands of docs/search.md on photographs, each as a list of words."""
    section = (Path(__file__).parents[1] / "docs" / "search.md").read_text().split("## Your own photographs")[1]
    block = section.split("```bash")[1].split("```")[0]
    return [
        words[1:] for words in (shlex.split(line, comments=True) for line in block.splitlines()) if "shnet" in words
    ]


def give(words):
    """Runs a command of `documented`; for one that serves, the search that it would begin with."""
    argv = cli._of_photos([f"--mode={words[0]}", *words[1:]])
    c = bundled.get_config(cli._with_config(["shnet", *argv])[1].removeprefix("--config="))
    c.parallel.devices, c.eval.batch_size = 1, 8
    flags = {name: value or True for name, _, value in (word[2:].partition("=") for word in argv[1:])}
    workdir = flags.pop("workdir")
    if words[0] == "photos":
        photos(c, workdir, **flags)
    else:
        search(c, workdir, query="a cat", top_k=10)
        assert len(results(Path(workdir))[0]["hits"]) == 10


@pytest.mark.slow  # trains
def test_the_commands_of_the_documentation_in_their_order(ten, monkeypatch, capsys):
    commands = documented()
    assert [words[0] for words in commands] == ["photos", "photos", "serve", "photos"] and "--head" in commands[-1]
    give([*commands[0], "--model=clip"])
    monkeypatch.setattr(own_photos.run, "extract_here", lambda *args: pytest.fail("extracted again"))
    for words in commands[1:]:
        give(words)
    assert set(json.loads(Path("runs/photos/results_captioned.json").read_text())["arms"]) == {"zero-shot", "head"}
    give(commands[2])  # the search is as before
    give(commands[-1])  # and the head is not trained again
    caption("another picture")
    with pytest.raises(FileExistsError, match="photos/head was trained on other captions"):
        give(commands[-1])


def test_the_head_begins_as_the_clip(model):
    """At first the head is the identity, whatever the vectors."""
    c = bundled.get_config("dual:head")
    text, _ = clip_weights.sizes(model)
    c.text.update(text | {"frozen_layers": 2})
    with_head, without = dual.build(c), dual.build(bundled_like(c))
    batch = {
        "image_embedding": jnp.asarray(np.random.default_rng(0).standard_normal((2, WIDTH)), jnp.float32),
        "tokens": jnp.ones((2, 5), jnp.int32),
        "token_mask": jnp.ones((2, 5), bool),
    }
    variables = with_head.init(jax.random.key(0), batch, train=False)
    assert set(variables["params"]) == {"text", "image_head", "text_head"}
    alone = {"params": {"text": variables["params"]["text"]}}
    for found, expected in zip(
        with_head.apply(variables, batch, train=False), without.apply(alone, batch, train=False), strict=True
    ):
        np.testing.assert_allclose(found.vector, expected.vector, atol=1e-6)
        np.testing.assert_allclose(jnp.linalg.norm(found.vector, axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="image_embedding is 7 wide, the joint space of the text tower 20"):
        without.apply(alone, batch | {"image_embedding": jnp.ones((2, 7))}, train=False)


def bundled_like(c):
    plain = ConfigDict(c.to_dict())
    plain.model.dual.head = "none"
    return plain


def test_overwrite_with_another_model_takes_its_words_and_lengths(made, folder, model, tmp_path, capsys):
    """Nothing of the old model stays: neither its vocabulary nor lengths that were cut to its positions."""
    run_there, other = shutil.copytree(made, tmp_path / "run"), shutil.copytree(model, tmp_path / "other")
    old = load_config(run_there / "config.json")
    old.data.max_tokens, old.data.token_buckets = 7, (7,)  # as if the old CLIP had 7 positions
    save_config(old, run_there / "config.json")
    words = json.dumps(json.loads((model / "tokenizer.json").read_text()), indent=7)
    (other / "tokenizer.json").write_text(words)
    argv = ["shnet", *cli._of_photos(["--mode=photos", str(folder), f"--out={run_there}", f"--model={other}"])]
    path = cli._with_config([*argv, "--overwrite"])[1].removeprefix("--config=")
    c = bundled.get_config(path)
    c.parallel.devices, c.eval.batch_size = 1, 8
    photos(c, run_there, folder=str(folder), model=str(other), overwrite=True)
    new = stored(run_there)
    assert Path(new.tokenizer.path).read_text() == words != (made / "vocabulary.json").read_text()
    assert new.data.max_tokens == load_config(made / "config.json").data.max_tokens > 7
    assert new.data.token_buckets == load_config(made / "config.json").data.token_buckets
    assert new.text.weights == str(other.resolve())


def test_overwrite_without_a_model_keeps_that_of_the_run(made, folder, model, monkeypatch):
    monkeypatch.setattr(encoders, "folder_of", lambda asked: fails(f"asked for {asked}"))
    with pytest.raises(ValueError, match=f"asked for {model.resolve()}$"):
        photos(config(), made, folder=str(folder), overwrite=True)


def test_overwrite_needs_the_photographs(made):
    with pytest.raises(ValueError, match="--overwrite needs the photographs: shnet photos FOLDER --out="):
        photos(config(), made, query="a dog", overwrite=True)


@pytest.mark.parametrize(
    "flags, bundled_one",
    [
        (["--overwrite"], True),
        (["--overwrite=true"], True),
        ([], False),
        (["--nooverwrite"], False),
        (["--overwrite", "--overwrite=false"], False),
    ],
)
def test_overwrite_begins_with_the_bundled_configuration(made, flags, bundled_one):
    path = cli._with_config(["shnet", "--mode=photos", f"--workdir={made}", *flags])[1]
    assert path.endswith("configs/dual.py" if bundled_one else f":{made}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "holds no run yet: shnet photos FOLDER --out="),
        ({"captions": "c.csv"}, "holds no run yet"),
        ({"overwrite": True}, "holds no run yet"),
        ({"folder": "absent"}, "absent: no such folder of photographs"),
        ({"folder": ".", "head": True}, "--head needs --captions=FILE"),
        ({"folder": ".", "photo": "absent.jpg"}, "--photo=absent.jpg: no such file"),
    ],
)
def test_mistakes_in_flags(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        photos(config(), tmp_path / "run", **arguments)


def test_too_few_captions_and_splits_that_are_not_whole(folder, model, tmp_path):
    (tmp_path / "c.csv").write_text("image,caption\n0.png,a dog\n")
    with pytest.raises(
        DataError, match=r"expected captions of at least 50 photographs of .*, found 1; .* such as 'below/"
    ):
        own_photos.extract(folder, model, tmp_path, str(tmp_path / "c.csv"))
    many = draw(tmp_path / "many", 50)
    names = [path.relative_to(many).as_posix() for path in sorted(many.rglob("*.png"))]
    (tmp_path / "c.csv").write_text("\n".join(["image,caption,split", *(f"{n},a dog,train" for n in names)]) + "\n")
    with pytest.raises(DataError, match="expected the splits train, val, test or none at all, found no val, test"):
        own_photos.extract(many, model, tmp_path, str(tmp_path / "c.csv"))


@pytest.fixture
def silent():
    """Address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_model_that_is_not_here_is_one_line(tmp_path, model, monkeypatch, silent):
    def fails(*args, **kwargs):
        assert kwargs["local_files_only"]  # as the hub does not answer
        raise OSError("no\nnetwork")

    monkeypatch.setattr(hub.constants, "ENDPOINT", silent)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    monkeypatch.setattr(hub, "snapshot_download", fails)
    with pytest.raises(DataError) as error:
        encoders.folder_of(encoders.DEFAULT)
    assert "\n" not in str(error.value) and "model.safetensors or pytorch_model.bin" in str(error.value)
    assert f"hf download {encoders.DEFAULT} --local-dir=FOLDER" in str(error.value)
    part = shutil.copytree(model, tmp_path / "part")
    (part / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer\.json or spiece\.model or merges\.txt and"):
        encoders.folder_of(str(part))
    with pytest.raises(DataError, match="no such folder"):
        encoders.folder_of(str(tmp_path / "absent"))
    (part / "tokenizer.json").write_text("{}")
    (part / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(DataError, match=r"expected model_type 'clip' or 'siglip', found 'siglip2'.*of a fixed size"):
        encoders.folder_of(str(part))


def test_a_name_on_the_hub_is_fetched_with_the_weights_it_has(tmp_path, model, monkeypatch):
    asked = []

    def fetch(name, allow_patterns=(), local_files_only=False):
        if not allow_patterns:  # asked for what is in the cache
            raise OSError("nothing")
        asked.append(allow_patterns[-1])
        if "pytorch_model.bin" in allow_patterns:
            shutil.copy(model / "model.safetensors", tmp_path / "clip" / "pytorch_model.bin")
        return str(tmp_path / "clip")

    shutil.copytree(model, tmp_path / "clip", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    monkeypatch.setattr(hub, "_answers", lambda: True)
    assert encoders.folder_of("somebody/clip") == tmp_path / "clip"
    assert asked == ["model.safetensors", "pytorch_model.bin"]


def test_the_command_line(tmp_path):
    assert cli._of_photos(["--mode=photos", "mine", "--out=r", "--query", "a dog"]) == [
        *("--mode=photos", "--folder=mine", "--workdir=r", "--query", "a dog")
    ]
    assert cli._of_photos(["--mode=photos", "--out", "r"]) == ["--mode=photos", "--workdir", "r"]
    argv = cli._with_config(["shnet", "--mode=photos", f"--workdir={tmp_path}", "--folder=mine"])
    assert argv[1] == f"--config={bundled.CONFIGS / 'dual.py'}"
    assert "  --out  " in cli.mode_help("photos") and "--workdir  " not in cli.mode_help("photos")
    assert "openai/clip-vit-base-patch32" in cli.mode_help("photos") and encoders.DEFAULT in cli.mode_help("photos")
