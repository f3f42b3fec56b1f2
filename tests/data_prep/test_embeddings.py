import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from data_prep import from_embeddings, from_scan
from shnet_jax.data.records import open_dataset
from shnet_jax.modes.embed import embed
from shnet_jax.retrieve.embeddings import open_embeddings
from tests.data_prep.example import stored_records
from tests.retrieve import gallery
from tests.train import tiny

RNG = np.random.default_rng(0)


def _folder(path, images, numbers=True):
    """A folder as --mode=embed writes it, of {image: captions}; returns image -> vector, caption -> vector."""
    path.mkdir()
    captions = [caption for of_image in images.values() for caption in of_image]
    rows = [row for row, of_image in enumerate(images.values()) for _ in of_image]
    names = [f"{name}#{k}" for name, of_image in images.items() for k in range(len(of_image))]
    vectors = {
        side: RNG.normal(size=(count, 4)).astype(np.float32)
        for side, count in (("images", len(images)), ("texts", len(captions)))
    }
    for side, array in vectors.items():
        save_file({"vector": array}, path / f"{side}.safetensors")
    ids = [str(100 + n) for n in range(len(captions))] if numbers else names
    content = {"image_ids": list(images), "caption_ids": ids, "captions": captions, "caption_image": rows}
    (path / "ids.json").write_text(json.dumps(content))
    (path / "embeddings.json").write_text(json.dumps({"format": 1, "checkpoint": path.name}))
    open_embeddings(path)  # the project's own reader takes it
    return dict(zip(images, vectors["images"], strict=True)), dict(zip(captions, vectors["texts"], strict=True))


def _captions(path, images, ids=None, splits=None):
    """Karpathy's JSON."""
    entries = []
    for name, captions in images.items():
        sentences = [{"raw": text} | ({"sentid": ids[text]} if ids else {}) for text in captions]
        entries.append({"filename": name, "split": (splits or {}).get(name, "train"), "sentences": sentences})
    path.write_text(json.dumps({"images": entries}))
    return f"--captions={path}"


def _check(record, made):
    images, texts = made
    np.testing.assert_array_equal(record["image_embedding"], images[record["image_id"]])
    np.testing.assert_array_equal(record["caption_embeddings"], [texts[c] for c in record["captions"]])


IMAGES = {"1.jpg": ["a dog", "a  cat"], "2.jpg": ["a cow"], "3.jpg": ["an owl", "a bee"]}


def test_splits_in_folders_of_their_own(tmp_path):
    (tmp_path / "a,b").mkdir()
    test = _folder(tmp_path / "a,b" / "test", {"9.jpg": ["x", "y"]}, numbers=False)
    train = _folder(tmp_path / "train", IMAGES, numbers=False)
    flags = ["--name=toy", f"--out={tmp_path / 'out'}"]
    one = _captions(tmp_path / "c.json", {"9.jpg": ["x", "y"]}, splits={"9.jpg": "test"})
    assert from_embeddings.main([*flags, one, f"--embeddings={tmp_path / 'a,b' / 'test'}"]) == 0  # a path with a comma
    (tmp_path / "a,b" / "test").rename(tmp_path / "test")
    captions = _captions(tmp_path / "c.json", {"9.jpg": ["x", "y"], **IMAGES}, splits={"9.jpg": "test"})
    joined = f"--embeddings={tmp_path / 'test'},{tmp_path / 'train'}"
    assert from_embeddings.main([*flags, captions, joined, "--overwrite"]) == 0
    for record in stored_records(tmp_path / "out", "train"):
        _check(record | {"captions": IMAGES[record["image_id"]]}, train)
    _check(stored_records(tmp_path / "out", "test")[0], test)
    made = [model["checkpoint"] for model in open_dataset(tmp_path / "out").metadata["embeddings"]]
    assert made == ["test", "train"]


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
def test_what_mode_embed_writes(known, tmp_path):
    """From a run to a set of its vectors: by the numbers of captions in another order, else by their order."""
    with tiny.quick():
        run = gallery.toy_run()
        embed(gallery.toy(search__embeddings=str(tmp_path / "e")), run)
    made = open_embeddings(tmp_path / "e")
    images, ids = {}, {}
    source = open_dataset(tiny.dataset())
    for record in source.open_split("test", list(source.features)):
        texts = list(record["captions"])[:: -1 if known else 1]
        images[record["image_id"]] = [f" {text} " for text in texts]
        ids[record["image_id"]] = record["caption_ids"].tolist()[:: -1 if known else 1]
    sentences = {
        name: [
            {"raw": text} | ({"sentid": n} if known else {}) for text, n in zip(images[name], ids[name], strict=True)
        ]
        for name in images
    }
    entries = [{"filename": name, "split": "test", "sentences": raw} for name, raw in sentences.items()]
    (tmp_path / "c.json").write_text(json.dumps({"images": entries[::-1]}))
    flags = [f"--captions={tmp_path / 'c.json'}", f"--embeddings={tmp_path / 'e'}", "--name=toy"]
    assert from_embeddings.main([*flags, f"--out={tmp_path / 'out'}"]) == 0
    actual = {record["image_id"]: record for record in stored_records(tmp_path / "out", "test")}
    assert len(actual) == tiny.SPLITS["test"]
    for row, name in enumerate(made.ids.image_ids):
        first, last = made.ids.first[row], made.ids.first[row + 1]
        np.testing.assert_array_equal(actual[name]["image_embedding"], made.images.vector[row])
        expected = made.texts.vector[first:last][:: -1 if known else 1]
        np.testing.assert_array_equal(actual[name]["caption_embeddings"], expected)
    for entry in entries:  # captions of another file of this name
        entry["sentences"][0]["raw"] += " once more"
    (tmp_path / "c.json").write_text(json.dumps({"images": entries}))
    assert from_embeddings.main([*flags, f"--out={tmp_path / 'other'}"]) == 1


def test_captions_are_found_by_their_numbers(tmp_path):
    """In another order, and not all of them."""
    made = _folder(tmp_path / "e", {"1.jpg": ["a dog", "a cat", "a cow"], "2.jpg": ["an owl"]})
    ids = {"a dog": 100, "a cat": 101, "a cow": 102, "an owl": 103}
    flag = _captions(tmp_path / "c.json", {"2": ["an owl"], "1": ["a cow", "a dog"]}, ids)
    flags = [flag, f"--embeddings={tmp_path / 'e'}", "--name=toy", f"--out={tmp_path / 'out'}"]
    assert from_embeddings.main(flags) == 0
    second, first = stored_records(tmp_path / "out", "train")
    assert first["captions"] == ["a cow", "a dog"]
    _check(first | {"image_id": "1.jpg"}, made)
    _check(second | {"image_id": "2.jpg"}, made)


def test_beside_regions(tmp_path):
    made = _folder(tmp_path / "e", {"1": ["a dog", "a cat"]}, numbers=False)
    np.save(tmp_path / "dev_ims.npy", RNG.normal(size=(1, 3, 5)).astype(np.float32))
    (tmp_path / "dev_caps.txt").write_text("a dog\na cat\n")
    (tmp_path / "dev_ids.txt").write_text("1\n")
    flags = [f"--src={tmp_path}", f"--embeddings={tmp_path / 'e'}", "--name=toy", f"--out={tmp_path / 'out'}"]
    assert from_scan.main(flags) == 0
    (record,) = stored_records(tmp_path / "out", "dev")
    assert record["regions"].shape == (3, 5)
    _check(record, made)


@pytest.mark.parametrize(
    ("images", "ids", "expected"),
    [
        (
            {"1.jpg": ["a dog", "a fox"]},
            None,
            "image '1.jpg': caption 1: expected 'a fox' as in the captions given, found 'a  cat'",
        ),
        ({"1.jpg": ["a  cat", "a dog"]}, None, "caption 0: expected 'a cat' as in the captions given, found 'a dog'"),
        ({"1.jpg": ["a dog"]}, None, "image '1.jpg': expected vectors of 1 captions, found 2"),
        (
            {"1.jpg": ["a dog"]},
            {"a dog": 104},
            "image '1.jpg': expected a vector of caption 104, found those of 100, 101",
        ),
        (
            {"1.jpg": ["a fox"]},
            {"a fox": 101},
            "caption 101: expected 'a fox' as in the captions given, found 'a  cat'",
        ),
        ({"4.jpg": ["a fox"]}, None, "image '4.jpg': expected its vectors, found none; --absent=skip"),
    ],
)
def test_captions_that_do_not_fit(tmp_path, capsys, images, ids, expected):
    _folder(tmp_path / "e", IMAGES)
    flags = [_captions(tmp_path / "c.json", images, ids), f"--embeddings={tmp_path / 'e'}", "--name=toy"]
    assert from_embeddings.main([*flags, f"--out={tmp_path / 'out'}"]) == 1
    assert expected in capsys.readouterr().err.splitlines()[-1]


def test_folders_that_do_not_fit(tmp_path, capsys):
    flags = ["--name=toy", f"--out={tmp_path / 'out'}", _captions(tmp_path / "c.json", IMAGES)]
    for name in ("e", "f"):
        _folder(tmp_path / name, IMAGES)
    assert from_embeddings.main([*flags, f"--embeddings={tmp_path / 'e'},{tmp_path / 'f'}"]) == 1
    assert "f: image '1.jpg': expected it once, found it in a second place" in capsys.readouterr().err
    assert from_embeddings.main([*flags, f"--embeddings={tmp_path / 'none'}"]) == 1
    assert "none: no embeddings.json; make the embeddings with --mode=embed" in capsys.readouterr().err
    (tmp_path / "e" / "texts.safetensors").write_bytes(b"\xff" * 20)
    assert from_embeddings.main([*flags, f"--embeddings={tmp_path / 'e'}"]) == 1
    assert "texts.safetensors: no safetensors file" in capsys.readouterr().err
