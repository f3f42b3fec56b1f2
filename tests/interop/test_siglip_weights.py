"""SigLIP's text tower, weights and vocabularies against the equations in NumPy float64; no PyTorch."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from shnet_jax import bundled
from shnet_jax.data import siglip_tokens
from shnet_jax.data.gallery import text_batches
from shnet_jax.data.tokenise import NO_MASK, Tokenizer, siglip, tokenise_captions
from shnet_jax.experiment import fit_weights
from shnet_jax.interop.siglip_weights import load_siglip, sizes
from shnet_jax.models import dual
from shnet_jax.models.siglip import Text
from tests import siglip_example as example

KINDS = ("siglip", "siglip2")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder and arrays of each kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {kind: (folder, example.write_folder(folder, kind)) for kind, folder in folders.items()}


def tokens_of(tokenizer: Tokenizer, texts) -> np.ndarray:
    captions = tokenise_captions([texts], tokenizer)
    return np.stack([tokenizer.enclose(captions.caption(t)[0], example.LENGTH) for t in range(len(texts))])


def norm(x, weights, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def oracle(arrays, tokens):
    """The equations of SigLIP's text tower, [t, L] -> [t, L, projection]."""
    w = {name.removeprefix("text_model."): array.astype(np.float64) for name, array in arrays.items()}
    x = w["embeddings.token_embedding.weight"][tokens] + w["embeddings.position_embedding.weight"]
    for number in range(2):
        layer = f"encoder.layers.{number}"
        inner = norm(x, w, f"{layer}.layer_norm1")
        q, k, v = (
            linear(inner, w, f"{layer}.self_attn.{name}_proj").reshape(*tokens.shape, 4, 6).swapaxes(1, 2)
            for name in ("q", "k", "v")
        )
        weights = np.exp(q @ k.swapaxes(2, 3) / math.sqrt(6))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + linear(mixed.swapaxes(1, 2).reshape(x.shape), w, f"{layer}.self_attn.out_proj")
        inner = linear(norm(x, w, f"{layer}.layer_norm2"), w, f"{layer}.mlp.fc1")
        inner = 0.5 * inner * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + linear(inner, w, f"{layer}.mlp.fc2")
    return linear(norm(x, w, "final_layer_norm"), w, "head")


@pytest.mark.parametrize("kind", KINDS)
def test_captions(made, kind):
    folder, arrays = made[kind]
    tokens = tokens_of(siglip(siglip_tokens.find_vocabulary(folder)), example.TEXTS)
    apply = jax.jit(partial(Text(**sizes(folder)).apply, train=False))
    states = apply({"params": load_siglip(folder)}, jnp.asarray(tokens), jnp.ones(tokens.shape, bool))
    np.testing.assert_allclose(states, oracle(arrays, tokens), atol=2e-5)


def test_the_vector_of_a_caption_is_that_of_the_last_place(made):
    """The dual encoder, from the configuration: captions are filled up, and what fills them is attended to."""
    folder, arrays = made["siglip"]
    c = config(folder)
    fit_weights(c)
    model = dual.build(c)
    tokenizer = siglip(Path(c.tokenizer.path))
    (batch,) = text_batches(tokenise_captions([example.TEXTS], tokenizer), tokenizer, c.data, len(example.TEXTS))
    batch, numbers = batch.batch, batch.numbers
    assert batch["token_mask"].all()
    variables = {"params": {"text": {"tower": load_siglip(folder)}}}
    encode = jax.jit(lambda batch: model.apply(variables, batch, train=False, method="encode_text"))
    expected = oracle(arrays, tokens_of(tokenizer, example.TEXTS))[:, -1]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encode(batch).vector, expected[numbers], atol=2e-5)


def config(folder, length=example.LENGTH) -> ConfigDict:
    c = bundled.get_config("dual")
    c.text.weights, c.text.tower, c.tokenizer.kind = str(folder), "siglip", "siglip"
    c.data.max_tokens, c.data.token_buckets = length, (4, length)
    return c


def test_shorter_captions_than_the_model_was_trained_on_are_refused(made):
    with pytest.raises(
        ValueError, match="max_tokens is 8: a SigLIP reads captions filled up to all 12 of its positions"
    ):
        fit_weights(config(made["siglip"][0], 8))


def test_canonical_text():
    """Words and punctuation as big_vision prepares them for SigLIP."""
    assert siglip_tokens.canonical("  A Dog!  runs\t(fast) - on_the \n beach.") == "a dog runs fast onthe beach"
    assert siglip_tokens.canonical("CAF\u00c9, \u201cquoted\u201d\u3000text") == "caf\u00e9 \u201cquoted\u201d text"
    assert siglip_tokens.canonical("?!") == ""


@pytest.mark.parametrize("kind", KINDS)
def test_tokens(made, kind):
    tokenizer = siglip(siglip_tokens.find_vocabulary(made[kind][0]))
    tokens = tokens_of(tokenizer, example.TEXTS)
    end, fill = (1, 1) if kind == "siglip" else (1, 0)
    assert (tokenizer.end_id, tokenizer.fill_id, tokenizer.mask_id) == (end, fill, NO_MASK)
    words = tokens_of(tokenizer, ["a red star above the sea", "A RED star above the sea"])
    assert (words[0] == words[1]).all() and (words[0, -1], words[0, 0] == end) == (fill, False)
    assert tokens.shape[1] == example.LENGTH and tokens[-1, -1] == end  # "star" 20 times: cut, and still ended
    empty = tokenizer.vocabulary.pieces(["", "?!"])
    assert empty[0] == empty[1] if kind == "siglip" else empty[0] != empty[1]  # SigLIP 2 keeps punctuation
    captions = tokenise_captions([example.CAPTIONS], tokenizer)
    assert [len(captions.caption(t)[1]) for t in range(5)] == [6, 7, 9, 10, 7]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokenizer_class": "T5Tokenizer"}, "tokenizer_class is 'T5Tokenizer'"),
        ({"do_lower_case": False}, "do_lower_case is false; SigLIP was trained on lower case"),
        ({"pad_token": "<pad>"}, "pad_token is '<pad>' in the settings; expected </s>"),
        ({"padding_side": "left"}, "padding_side is 'left'; expected"),
    ],
)
def test_other_settings_are_refused(tmp_path, change, message):
    example.write_pieces(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"} | change))
    with pytest.raises(ValueError, match=message):
        siglip(tmp_path / "spiece.model")


def test_damaged_vocabularies_are_told(made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither spiece.model nor tokenizer.json"):
        siglip_tokens.find_vocabulary(tmp_path)
    (tmp_path / "spiece.model").write_bytes((made["siglip"][0] / "spiece.model").read_bytes()[:50])
    with pytest.raises(ValueError, match="expected a SentencePiece model"):
        siglip(tmp_path / "spiece.model")
    clip = Path(__file__).parents[1] / "golden" / "clip" / "tokenizer.json"
    with pytest.raises(ValueError, match="expected a BPE whose words begin with \u2581"):
        siglip(clip)
    described = json.loads((made["siglip2"][0] / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(described | {"normalizer": None}))
    with pytest.raises(ValueError, match="expected a normalizer that puts \u2581 for a space"):
        siglip(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("text_model.head.bias"), r"missing \['text_model.head.bias'\]"),
        (lambda w: w.update({"text_model.extra": np.zeros(3, np.float32)}), r"unknown \['text_model.extra'\]"),
        (
            lambda w: w.update({"text_model.head.weight": np.zeros((20, 25), np.float32)}),
            r"head.weight is \(20, 25\), expected \(20, 24\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(made, tmp_path, change, message):
    folder, arrays = made["siglip"]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    changed = dict(arrays)
    change(changed)
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_siglip(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "siglip2"}, "'siglip2'; expected 'siglip'"),
        ({"text_config": {"hidden_act": "relu"}}, "text_config.hidden_act is 'relu'"),
        ({"text_config": {"layer_norm_eps": 1e-5}}, "text_config.layer_norm_eps is 1e-05"),
        ({"text_config": {"num_hidden_layers": 0}}, "num_hidden_layers is 0, expected a positive"),
        ({"text_config": [1]}, "text_config is .*, expected an object"),
    ],
)
def test_other_models_are_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"} | change))
    with pytest.raises(ValueError, match=message):
        sizes(tmp_path)
