"""Sentence vectors of a BERT folder, in JAX: mean or [CLS] pooling of the last hidden states, as its folder says.

Reads Hugging Face folders of a BERT and, of sentence-transformers' folders, those of Transformer, Pooling and
Normalize; "minilm" names what `make minilm` installs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from shnet_jax.data import wordpiece
from shnet_jax.data.tokenise import Tokenizer
from shnet_jax.data.tokenise import wordpiece as read_tokenizer
from shnet_jax.interop import bert_weights
from shnet_jax.models.bert import BERT
from shnet_jax.types import Array
from shnet_jax.untrusted import read_json, read_object

POOLINGS = ("mean", "cls")
_BUCKET = 16  # captions are padded to a multiple of this, so that few lengths are compiled
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


@dataclasses.dataclass(frozen=True)
class Description:
    """Everything that the vectors of a text depend on, as a data set keeps it: metadata `text_encoder`.

    encoder: folder or name. sha256: of its weights. pooling: one of POOLINGS for the models here. normalised: vectors
    have unit length. max_tokens: longer texts are cut.
    """

    encoder: str
    sha256: str
    pooling: str
    normalised: bool
    max_tokens: int

    @classmethod
    def parse(cls, value: Any, where: object) -> Description:
        """Reads what `dataclasses.asdict` gave. Raises ValueError for anything else."""
        names = {field.name: field.type for field in dataclasses.fields(cls)}
        kinds = {"str": str, "bool": bool, "int": int}
        if not isinstance(value, dict) or any(
            type(value.get(name)) is not kinds[str(kind)] for name, kind in names.items()
        ):
            raise ValueError(f"{where}: text_encoder: expected {', '.join(names)}, found {value!r:.200}")
        return cls(**{name: value[name] for name in names})


def describe(encoder: str, pooling: str = "", max_tokens: int = 0) -> Description:
    """The description of a BERT's folder. pooling, max_tokens: in place of what the folder says; "", 0: as it says.

    Raises FileNotFoundError where there is no such folder, ValueError for a model that is not followed.
    """
    folder = bert_weights.find_folder(encoder)
    sizes = bert_weights.sizes(folder)
    pooling, normalised = read_modules(folder, pooling)
    if pooling not in POOLINGS:
        raise ValueError(f"{folder}: pooling {pooling!r}; a BERT's hidden states are pooled by {' or '.join(POOLINGS)}")
    most = read_object(path).get("max_seq_length") if (path := folder / "sentence_bert_config.json").is_file() else None
    longest = most if type(most) is int and most > 2 else sizes["max_positions"]
    longest = min(max_tokens or longest, sizes["max_positions"])
    return Description(encoder, weights_sha256(folder), pooling, normalised, longest)


def read_modules(folder: Path, asked: str = "") -> tuple[str, bool]:
    """Pooling, and whether vectors are normalised, of a sentence-transformers folder; ("mean", False) of any other.

    asked: pooling in place of the folder's, which may then be any. Raises ValueError for modules that are not followed.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return asked or "mean", False
    modules = read_json(path)
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules] if isinstance(modules, list) else []
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(f"{path}: expected the modules Transformer, Pooling and perhaps Normalize, found {kinds}")
    if asked:
        return asked, kinds[-1] == "Normalize"
    pooling = read_object(folder / str(modules[1].get("path", "1_Pooling")) / "config.json")
    modes = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise ValueError(f"{folder}: expected a pooling by {' or '.join(_MODES)}, found {modes}; choose with --pooling")
    return _MODES[modes[0]], kinds[-1] == "Normalize"


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the weights in a folder: of the file, or, of several, of the lines of `sha256sum`."""
    files = next((matches for pattern in _WEIGHTS if (matches := sorted(folder.glob(pattern)))), [])
    if not files:
        raise FileNotFoundError(f"{folder}: no {' or '.join(_WEIGHTS)}")
    sums = {}
    for file in files:
        with file.open("rb") as stream:
            sums[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    if len(sums) == 1:
        return next(iter(sums.values()))
    return hashlib.sha256("".join(f"{sha}  {name}\n" for name, sha in sums.items()).encode()).hexdigest()


class SentenceEncoder:
    """Texts to vectors; compiled once for each length, in multiples of 16 tokens."""

    def __init__(self, description: Description, batch_size: int = 32):
        """Loads the weights. Raises ValueError where they are others than those described, and for another pooling."""
        if description.pooling not in POOLINGS:
            raise ValueError(f"pooling {description.pooling!r}; expected {' or '.join(POOLINGS)}")
        folder = bert_weights.find_folder(description.encoder)
        if (sha := weights_sha256(folder)) != description.sha256:
            raise ValueError(f"{folder}: sha256 of its weights: expected {description.sha256}, found {sha}")
        self.description, self._batch_size = description, batch_size
        sizes = bert_weights.sizes(folder)
        self._params = bert_weights.load_bert(folder)
        self._tokenizer: Tokenizer = read_tokenizer(wordpiece.find_vocabulary(folder))
        self.width = int(sizes["width"])
        tower = BERT(**sizes, dropout=0.0)
        self._pooled: Callable[[Any, Array, Array], Array] = jax.jit(partial(_pooled, tower, description))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts, [t, E] float32; short texts first, so that little is padding."""
        out = np.empty((len(texts), self.width), np.float32)
        for numbers, tokens, mask in self._batches(texts):
            out[numbers] = np.asarray(self._pooled(self._params, jnp.asarray(tokens), jnp.asarray(mask)))[
                : len(numbers)
            ]
        return out

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        pieces = self._tokenizer.vocabulary.pieces(list(texts))
        ids = [self._tokenizer.enclose(piece, self.description.max_tokens) for piece in pieces]
        order = np.argsort([len(one) for one in ids], kind="stable")
        for start in range(0, len(order), self._batch_size):
            numbers = order[start : start + self._batch_size]
            padded = np.resize(numbers, self._batch_size)
            longest = max(len(ids[t]) for t in numbers)
            width = min(-(-longest // _BUCKET) * _BUCKET, self.description.max_tokens)
            tokens = np.zeros((self._batch_size, width), np.int32)
            for row, t in enumerate(padded):
                tokens[row, : len(ids[t])] = ids[t]
            yield numbers, tokens, np.arange(width) < np.array([len(ids[t]) for t in padded])[:, None]


def _pooled(tower: BERT, description: Description, params: Mapping[str, Any], tokens: Array, mask: Array) -> Array:
    hidden = cast(Array, tower.apply({"params": params}, tokens, mask, train=False))
    if description.pooling == "cls":
        vectors = hidden[:, 0]
    else:
        weights = mask / jnp.sum(mask, axis=1, keepdims=True)
        vectors = jnp.sum(jnp.where(mask[..., None], hidden, 0.0) * weights[..., None], axis=1)
    if description.normalised:
        vectors = vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors
