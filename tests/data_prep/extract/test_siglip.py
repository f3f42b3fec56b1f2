"""SigLIP and SigLIP 2 in `shnet photos` against transformers: tokens, vectors of words and of photographs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from shnet_jax import bundled, load
from shnet_jax.data import siglip_tokens
from shnet_jax.data.tokenise import siglip, tokenise_captions
from shnet_jax.modes.photos import photos
from tests import siglip_example as example

torch = pytest.importorskip("torch", reason="needs the extra `extract`: make test-extract")
transformers = pytest.importorskip("transformers")
from data_prep.extract.texts import TextModel  # noqa: E402


def save_model(folder: Path, kind: str):
    """A tiny random model and its tokenizer as transformers saves them; returns the tokenizer."""
    torch.manual_seed(0)
    size = example.write_pieces(folder) if kind == "siglip" else example.write_gemma(folder)
    vision = {
        "hidden_size": 20,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    c = transformers.SiglipConfig(text_config=example.text_config(size), vision_config=vision)
    model = transformers.SiglipModel(c)
    with torch.no_grad():  # fresh towers hardly react to their input
        for parameter in model.text_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    if kind == "siglip":
        tokenizer = transformers.SiglipTokenizer(str(folder / "spiece.model"), model_max_length=example.LENGTH)
    else:
        tokenizer = transformers.Siglip2Tokenizer(
            tokenizer_file=str(folder / "tokenizer.json"),
            add_bos_token=False,
            add_eos_token=True,
            padding_side="right",
            model_max_length=example.LENGTH,
        )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_words_and_photographs_as_transformers_sees_them(made, tmp_path, capsys, kind):
    folder, names, _ = made
    model, mine = tmp_path / "model", tmp_path / "mine"
    model.mkdir()
    mine.mkdir()
    for name in names:
        shutil.copy(folder / name, mine)
    tokenizer = save_model(model, kind)
    texts = [text for text in example.TEXTS if text != "?!"]
    length = {"padding": "max_length", "truncation": True, "max_length": example.LENGTH, "return_tensors": "pt"}
    ids = tokenizer(texts, **length)["input_ids"]
    ours = siglip(siglip_tokens.find_vocabulary(model))
    captions = tokenise_captions([texts], ours)
    found = [ours.enclose(captions.caption(t)[0], example.LENGTH).tolist() for t in range(len(texts))]
    assert found == ids.tolist()

    c = bundled.get_config("dual")
    c.parallel.devices = 1
    photo = str(mine / names[2])
    photos(c, tmp_path / "run", folder=str(mine), model=str(model), query=texts[0], photo=photo, top_k=4)
    theirs = transformers.SiglipModel.from_pretrained(model).eval()
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(theirs.get_text_features(input_ids=ids).pooler_output, dim=1).numpy()
    stored = TextModel(str(model), "", 0, "cpu", 3).encode(texts)
    np.testing.assert_allclose(stored / np.linalg.norm(stored, axis=1, keepdims=True), expected, atol=1e-5)
    retriever = load(tmp_path / "run")
    np.testing.assert_allclose(retriever.encode_texts(texts).vector, expected, atol=1e-5)
    words, like = json.loads((tmp_path / "run" / "search.json").read_text())["results"]
    assert {hit["image_id"] for hit in words["hits"]} == {*names}
    assert like["hits"][0]["image_id"] == names[2] and like["hits"][0]["score"] == pytest.approx(1, abs=1e-4)
    with torch.inference_mode():
        logits = theirs.logit_scale.exp() * torch.tensor([hit["score"] for hit in words["hits"]]) + theirs.logit_bias
    assert (logits.diff() <= 0).all()  # the scale and bias of the sigmoid keep the order
