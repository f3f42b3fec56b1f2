"""Folders of a tiny random SigLIP and SigLIP 2 as Hugging Face saves them: sizes, vocabularies, weights."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, normalizers, pre_tokenizers, trainers

LENGTH = 12  # positions of the text towers
CAPTIONS = (
    "a red star above the sea",
    "two small hearts beside a blue square",
    "a dog runs on the beach, near the sea",
    "the man in a red jacket looks at a dog",
    "don't look: five stars above a house",
)
TEXTS = (*CAPTIONS, "A Dog!  runs\t(fast) - on_the beach", "CAF\u00c9 \u2581 at the \u5d16", "?!", "star " * 20)
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def write_pieces(folder: Path) -> int:
    """A spiece.model with the special pieces of SigLIP's; returns its size."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 4),
        model_writer=model,
        vocab_size=90,
        hard_vocab_limit=False,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


def write_gemma(folder: Path) -> int:
    """A tokenizer.json of Gemma's kind, with bytes for what has no piece; returns its size."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # no piece goes over the end of a word
    of_bytes = [f"<0x{number:02X}>" for number in range(256)]
    made.train_from_iterator(
        CAPTIONS, trainers.BpeTrainer(vocab_size=360, special_tokens=[*SPECIAL, *of_bytes], show_progress=False)
    )
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.save(str(folder / "tokenizer.json"))
    return made.get_vocab_size()


def text_config(vocab_size: int) -> dict[str, int]:
    """Sizes of the text tower by their names in config.json; the joint space is 20 wide."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": 24,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "projection_size": 20,
    }


def write_folder(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """A folder of kind "siglip" or "siglip2" with random weights of the text side; returns its arrays."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = text_config(write_pieces(folder) if kind == "siglip" else write_gemma(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "text_config": sizes}))
    (folder / "preprocessor_config.json").write_text("{}")
    width, hidden, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    shapes = {
        "embeddings.token_embedding.weight": (vocabulary, width),
        "embeddings.position_embedding.weight": (LENGTH, width),
        "final_layer_norm": (width,),
        "head": (20, width),
    }
    for number in range(sizes["num_hidden_layers"]):
        layer = f"encoder.layers.{number}."
        shapes |= {f"{layer}self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        shapes |= {f"{layer}layer_norm{norm}": (width,) for norm in (1, 2)}
        shapes |= {f"{layer}mlp.fc1": (hidden, width), f"{layer}mlp.fc2": (width, hidden)}
    rng = np.random.default_rng(0)
    arrays = {"logit_scale": np.ones(1), "logit_bias": np.ones(1), "vision_model.post_layernorm.weight": np.ones(24)}
    for name, shape in shapes.items():
        if name.startswith("embeddings"):
            arrays[f"text_model.{name}"] = rng.standard_normal(shape)
            continue
        arrays[f"text_model.{name}.weight"] = rng.standard_normal(shape) * 0.5 + (len(shape) == 1)
        arrays[f"text_model.{name}.bias"] = rng.standard_normal(shape[0]) * 0.1
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    save_file(arrays, folder / "model.safetensors")
    return arrays
