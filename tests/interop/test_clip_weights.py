"""CLIP's towers, weights and tokenizer against a recording of transformers (tests/golden/clip/make.py)."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shnet_jax.data import clip_bpe
from shnet_jax.data.tokenise import NO_MASK, clip, tokenise_captions
from shnet_jax.interop.clip_weights import load_clip, sizes
from shnet_jax.models.clip import Text, Vision

GOLDEN = Path(__file__).parents[1] / "golden" / "clip"


@pytest.fixture(scope="module")
def recorded():
    with np.load(GOLDEN / "outputs.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def loaded():
    return sizes(GOLDEN), load_clip(GOLDEN)


def test_captions(recorded, loaded):
    (shape, _), (params, _) = loaded
    tokens, mask = jnp.asarray(recorded["tokens"], jnp.int32), jnp.asarray(recorded["token_mask"])
    words = jax.jit(partial(Text(**shape).apply, train=False))({"params": params}, tokens, mask)
    np.testing.assert_allclose(words[mask], recorded["words"][recorded["token_mask"]], atol=2e-5)
    last = recorded["token_mask"].sum(1) - 1
    np.testing.assert_allclose(words[np.arange(len(last)), last], recorded["caption_vectors"], atol=2e-5)


@pytest.mark.parametrize(
    "pictures, states", [("pixels", "image_states"), pytest.param("tall", "tall_states", marks=pytest.mark.slow)]
)
def test_pictures(recorded, loaded, pictures, states):
    """tall: 48 x 16 pixels, with the positions of 32 x 32 interpolated."""
    (_, shape), (_, params) = loaded
    tokens = jax.jit(partial(Vision(**shape).apply, train=False))({"params": params}, recorded[pictures])
    np.testing.assert_allclose(tokens, recorded[states], atol=2e-5)
    if pictures == "pixels":
        np.testing.assert_allclose(tokens[:, 0], recorded["image_vectors"], atol=2e-5)


@pytest.mark.parametrize("file", ["tokenizer.json", "merges.txt"])
def test_tokens(file):
    golden = json.loads((GOLDEN / "captions.json").read_text(encoding="utf-8"))
    tokenizer = clip(GOLDEN / file)
    captions = tokenise_captions([golden["captions"]], tokenizer)
    found = [tokenizer.enclose(captions.caption(t)[0], 1000).tolist() for t in range(len(captions))]
    assert found == golden["ids"]
    assert tokenizer.enclose(captions.caption(0)[0], 4).tolist() == [*golden["ids"][0][:3], golden["ids"][0][-1]]
    assert len(captions.caption(0)[1]) == 7  # the man in a red jacket .
    assert tokenizer.mask_id == NO_MASK


def copy(tmp_path, **changes):
    for name in ("config.json", "model.safetensors", "merges.txt", "vocab.json", "tokenizer.json"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    if "config" in changes:
        config = json.loads((GOLDEN / "config.json").read_text())
        changes["config"](config)
        (tmp_path / "config.json").write_text(json.dumps(config))
    if "weights" in changes:
        weights = load_file(GOLDEN / "model.safetensors")
        changes["weights"](weights)
        save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("text_projection.weight"), r"missing \['text_projection.weight'\]"),
        (lambda w: w.update(extra=np.zeros(3, np.float32)), r"unknown \['extra'\]"),
        (
            lambda w: w.update({"visual_projection.weight": np.zeros((20, 25), np.float32)}),
            r"visual_projection.weight is \(20, 25\), expected \(20, 24\)",
        ),
        (
            lambda w: w.update({"vision_model.embeddings.patch_embedding.weight": np.zeros((24, 3, 8, 4), np.float32)}),
            r"patch_embedding.weight is \(24, 3, 8, 4\), expected \(24, 3, 8, 8\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_clip(copy(tmp_path, weights=change))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(model_type="siglip"), "'siglip'; expected 'clip'"),
        (lambda c: c["text_config"].update(hidden_act="relu"), "text_config.hidden_act is 'relu'"),
        (lambda c: c["vision_config"].update(layer_norm_eps=1e-6), "vision_config.layer_norm_eps is 1e-06"),
        (lambda c: c["vision_config"].update(num_hidden_layers=0), "num_hidden_layers is 0, expected a positive"),
    ],
)
def test_other_models_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        sizes(copy(tmp_path, config=change))


def test_damaged_vocabularies_are_told(tmp_path):
    folder = copy(tmp_path)
    (folder / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(ValueError, match=r"vocab.json is not the vocabulary that merges.txt makes"):
        clip_bpe.read(folder / "merges.txt")
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nthe\n")
    with pytest.raises(ValueError, match="merge 1: expected two pieces, found 'the'"):
        clip_bpe.read(folder / "merges.txt")
    (folder / "tokenizer.json").write_text((GOLDEN / "tokenizer.json").read_text()[:100])
    with pytest.raises(ValueError, match="expected JSON"):
        clip_bpe.read(folder / "tokenizer.json")
    (folder / "tokenizer.json").unlink()
    assert clip_bpe.find_vocabulary(folder).name == "merges.txt"
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor merges.txt"):
        clip_bpe.find_vocabulary(folder)
