"""Vectors of texts by a model of transformers, in PyTorch: BERT-like, sentence-transformers, CLIP, SigLIP, decoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from data_prep.extract import weights
from data_prep.schema import DataError
from shnet_jax.interop.sentence_vectors import Description, read_modules
from shnet_jax.untrusted import read_json

_DUAL = ("clip", "siglip", "siglip2", "chinese_clip", "altclip")
_LONGEST = 512  # where neither tokenizer nor model says


def modules(name: str, pooling: str) -> tuple[str, bool]:
    """Pooling and normalisation that a sentence-transformers folder or model of the hub says; ("", False) of others.

    pooling: in place of what it says.
    """
    path = weights.found(name, "modules.json")
    if path is None:
        return "", False
    listed = read_json(path)
    for module in listed if isinstance(listed, list) else ():
        if isinstance(module, dict) and str(module.get("type", "")).endswith("Pooling"):
            weights.found(name, f"{module.get('path', '1_Pooling')}/config.json")  # brought beside modules.json
    return read_modules(path.parent, pooling)


class TextModel:
    """A text model with its tokenizer.

    pooling: "mean" and "cls" of the last hidden states; "last" valid token, of a decoder; "model", the text features of
    a CLIP or SigLIP; "": by the kind of the model, or as a sentence-transformers folder says.
    """

    def __init__(self, name: str, pooling: str, max_tokens: int, device: str, batch_size: int):
        """Loads the model. Raises DataError for a pooling that it does not have."""
        folder = Path(name).expanduser()
        name = str(folder) if folder.is_dir() else name
        config = AutoConfig.from_pretrained(name)
        dual = config.model_type in _DUAL
        said, normalised = modules(name, pooling)
        decoder = any(str(kind).endswith("ForCausalLM") for kind in config.architectures or ())
        pooling = pooling or said or ("model" if dual else "last" if decoder else "mean")
        if (pooling == "model") != dual:
            raise DataError(f"{name}: a {config.model_type} has no pooling {pooling!r}; it is pooled otherwise")
        self._tokenizer = AutoTokenizer.from_pretrained(name)
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model: Any = AutoModel.from_pretrained(name).eval().to(self._device)
        self._batch_size, self._fixed = batch_size, config.model_type.startswith("siglip")
        text = getattr(config, "text_config", config)
        most = min(self._tokenizer.model_max_length, getattr(text, "max_position_embeddings", _LONGEST))
        digest = weights.digest(name)
        self.description = Description(name, digest, pooling, normalised, min(max_tokens or most, most))

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts, [t, E] float32; short texts first, so that little is padding."""
        order = sorted(range(len(texts)), key=lambda t: len(texts[t]))
        parts: dict[int, np.ndarray] = {}
        for start in range(0, len(order), self._batch_size):
            numbers = order[start : start + self._batch_size]
            vectors = self._pooled([texts[t] for t in numbers])
            if self.description.normalised:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
            parts |= dict(zip(numbers, vectors.float().cpu().numpy(), strict=True))
        return np.stack([parts[t] for t in range(len(texts))])

    def _pooled(self, texts: list[str]) -> torch.Tensor:
        padding = "max_length" if self._fixed else True  # SigLIP was trained on texts of one length
        length = self.description.max_tokens
        inputs = self._tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        inputs = inputs.to(self._device)
        if self._fixed:  # what fills a text up is attended to; some of its tokenizers give a mask all the same
            inputs.pop("attention_mask", None)
        if self.description.pooling == "model":
            features = self._model.get_text_features(**inputs)
            return features if isinstance(features, torch.Tensor) else features.pooler_output
        hidden, mask = self._model(**inputs).last_hidden_state, inputs["attention_mask"]
        if self.description.pooling == "cls":
            return hidden[:, 0]
        if self.description.pooling == "last":
            return hidden[torch.arange(len(texts)), mask.sum(dim=1) - 1]
        weights_of = mask[..., None].to(hidden.dtype)
        return (hidden * weights_of).sum(dim=1) / weights_of.sum(dim=1)
