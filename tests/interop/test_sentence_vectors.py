"""Sentence vectors of a BERT folder: pooled hidden states of the valid tokens, as the folder says."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.data import wordpiece
from shnet_jax.data.tokenise import wordpiece as read_tokenizer
from shnet_jax.interop import bert_weights
from shnet_jax.interop.sentence_vectors import Description, SentenceEncoder, describe
from shnet_jax.models.bert import BERT
from tests.interop.test_bert_weights import CONFIG, arrays, write

TEXTS = ["p5", "p6 p7 p8 p9 p6 p7 p8", "p7 p5", "p5 p5 p6 p9 p8 p7 p6 p5 p9 p8 p7 p6 p5 p9 p9 p9 p9"]


def bert(folder, pooling=None, normalise=False, longest=None):
    """A tiny BERT, as a sentence-transformers folder where a pooling is given."""
    folder.mkdir(exist_ok=True)
    write(folder, {name: np.asarray(a) for name, a in arrays().items()}, CONFIG)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *(f"p{i}" for i in range(5, 20))]) + "\n")
    if pooling:
        kinds = ["Transformer", "Pooling", *(["Normalize"] if normalise else [])]
        modules = [
            {"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}"} for i, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    if longest:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
    return folder


def hidden(folder, text, longest=16):
    """Last hidden states of one text alone, without padding."""
    tokenizer = read_tokenizer(wordpiece.find_vocabulary(folder))
    ids = tokenizer.enclose(tokenizer.vocabulary.pieces([text])[0], longest)
    tower = BERT(**bert_weights.sizes(folder), dropout=0.0)
    params = {"params": bert_weights.load_bert(folder)}
    out = tower.apply(params, jnp.asarray(ids[None]), jnp.ones((1, len(ids)), bool), train=False)
    return np.asarray(out[0], np.float64)


def test_vectors_are_means_of_the_valid_tokens_of_each_text(tmp_path):
    folder = bert(tmp_path / "plain")
    described = describe(str(folder))
    assert (described.pooling, described.normalised, described.max_tokens) == ("mean", False, 16)
    vectors = SentenceEncoder(described, batch_size=3).encode(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(vector, hidden(folder, text).mean(0), atol=2e-6)


def test_a_sentence_transformers_folder_says_pooling_length_and_norm(tmp_path):
    folder = bert(tmp_path / "st", "cls_token", normalise=True, longest=6)
    described = describe(str(folder))
    assert (described.pooling, described.normalised, described.max_tokens) == ("cls", True, 6)
    for text, vector in zip(TEXTS, SentenceEncoder(described).encode(TEXTS), strict=True):
        first = hidden(folder, text, longest=6)[0]
        np.testing.assert_allclose(vector, first / np.linalg.norm(first), atol=2e-6)


def test_modules_that_are_not_followed_are_refused(tmp_path):
    folder = bert(tmp_path / "st", "max_tokens")
    with pytest.raises(ValueError, match=r"expected a pooling by .*, found \['pooling_mode_max_tokens'\]"):
        describe(str(folder))
    assert describe(str(folder), "cls").pooling == "cls"  # asked for, in place of what is not followed
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ValueError, match=r"modules\.json: expected the modules .* found \['Transformer', .*'Dense'\]"):
        describe(str(folder))


def test_other_weights_than_those_described_are_refused(tmp_path):
    described = describe(str(bert(tmp_path / "plain")))
    with pytest.raises(ValueError, match="sha256 of its weights: expected 00, found"):
        SentenceEncoder(dataclasses.replace(described, sha256="00"))


def test_another_pooling_than_mean_and_cls_is_refused(tmp_path):
    described = dataclasses.replace(describe(str(bert(tmp_path / "plain"))), pooling="last")
    with pytest.raises(ValueError, match="pooling 'last'; expected mean or cls"):
        SentenceEncoder(described)


def test_a_description_goes_through_json(tmp_path):
    described = Description("minilm", "ab", "mean", True, 256)
    assert Description.parse(json.loads(json.dumps(dataclasses.asdict(described))), "x") == described
    with pytest.raises(ValueError, match="x: text_encoder: expected encoder, sha256, pooling, normalised, max_tokens"):
        Description.parse({"encoder": "minilm"}, "x")
