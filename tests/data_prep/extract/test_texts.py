"""Vectors of texts by models of transformers: every pooling against the model applied to one text without padding."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from shnet_jax.interop.sentence_vectors import SentenceEncoder, describe
from tests.interop.test_sentence_vectors import TEXTS, bert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from data_prep.extract import weights  # noqa: E402
from data_prep.extract.texts import TextModel, modules  # noqa: E402
from data_prep.schema import DataError  # noqa: E402

pytestmark = pytest.mark.slow

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20}
TEXT |= {"max_position_embeddings": 20, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}


def save_tokenizer(folder, around=True):
    """Words p5 to p19, between [CLS] and [SEP] if asked."""
    ids = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {f"p{i}": i for i in range(5, 20)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if around:
        special = [("[CLS]", 2), ("[SEP]", 3)]
        made.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=special)
    options = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]", "model_max_length": 20}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **options).save_pretrained(folder)


def saved(folder, kind):
    """A tiny model with random weights and its tokenizer."""
    torch.manual_seed(0)
    if kind == "clip":
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        config = transformers.CLIPConfig(
            text_config=TEXT, vision_config=vision | {"image_size": 8, "patch_size": 4}, projection_dim=6
        )
        model = transformers.CLIPModel(config)
    elif kind == "decoder":
        config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, architectures=["LlamaForCausalLM"])
        model = transformers.LlamaForCausalLM(config)
    else:
        model = transformers.RobertaModel(transformers.RobertaConfig(**TEXT | {"max_position_embeddings": 40}))
    model.save_pretrained(folder)
    save_tokenizer(folder, around=kind != "decoder")
    return str(folder)


@torch.inference_mode()
def alone(folder, kind, pooling, text):
    """The vector of one text without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([text], return_tensors="pt", truncation=True, max_length=20)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    if pooling == "model":
        features = model.get_text_features(**inputs)
        return (features if isinstance(features, torch.Tensor) else features.pooler_output)[0].numpy()
    hidden = model(**inputs).last_hidden_state[0]
    return {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling].numpy()


@pytest.mark.parametrize(
    ("kind", "asked", "pooling"),
    [("clip", "", "model"), ("decoder", "", "last"), ("roberta", "", "mean"), ("roberta", "cls", "cls")],
)
def test_a_model_is_pooled_as_its_kind_asks(tmp_path, kind, asked, pooling):
    folder = saved(tmp_path / kind, kind)
    model = TextModel(folder, asked, 0, "cpu", batch_size=3)
    assert model.description.pooling == pooling and model.description.max_tokens == 20
    for text, vector in zip(TEXTS, model.encode(TEXTS), strict=True):
        np.testing.assert_allclose(vector, alone(folder, kind, pooling, text), atol=2e-5)


def test_a_bert_gives_the_vectors_that_it_gives_in_jax(tmp_path):
    folder = bert(tmp_path / "bert", "mean_tokens", normalise=True, longest=10)
    ours = SentenceEncoder(describe(str(folder))).encode(TEXTS)
    theirs = TextModel(str(folder), "", 10, "cpu", batch_size=2)
    assert theirs.description.normalised and theirs.description.sha256 == describe(str(folder)).sha256
    np.testing.assert_allclose(theirs.encode(TEXTS), ours, atol=1e-5)


def test_a_model_of_the_hub_is_pooled_as_its_modules_say(tmp_path, monkeypatch):
    cache = tmp_path / "models--org--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    folder = bert(cache / "snapshots" / ("0" * 40), "cls_token", normalise=True)
    monkeypatch.setattr(weights, "cached_file", partial(weights.cached_file, cache_dir=tmp_path, local_files_only=True))
    assert modules("org/name", "") == ("cls", True) == modules(str(folder), "")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    assert modules("org/name", "last") == ("last", True)
    with pytest.raises(ValueError, match=r"found \['pooling_mode_max_tokens'\]; choose with --pooling"):
        modules("org/name", "")


def test_a_pooling_that_a_model_does_not_have_is_refused(tmp_path):
    with pytest.raises(DataError, match="a clip has no pooling 'mean'"):
        TextModel(saved(tmp_path / "clip", "clip"), "mean", 0, "cpu", 2)
