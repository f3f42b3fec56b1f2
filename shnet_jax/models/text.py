"""Text encoder: any tower over the tokens, a linear head and learned pooling; or a head on stored vectors.

A tower is a `flax.linen.Module` called as `tower(tokens, mask, train=train)`: tokens [t, L] int32 and mask
[t, L] bool (valid tokens first) -> features [t, L, width]. Features of valid tokens must not depend on L, what masked
features hold is free. Its file has `build(text: ConfigDict) -> nn.Module`, given `config.text`. An attribute
`activation_dtype`, the dtype of its features, is set to `config.model.activation_dtype`. A tower of equal layers that
has `layers`, `make_layer` and `run_layers`, as BERT has, can also be spread over devices layer by layer
(`evaluation/pipelined.py`).

`text.tower = "vectors"` is no tower: a frozen language model ran before, and `VectorEncoder` maps the vectors of a
caption that lie in the record, one (`caption_embeddings`) or one a token (`caption_tokens`).
"""

from __future__ import annotations

import importlib

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.heads import Head, build_head
from shnet_jax.models.layers import Dense
from shnet_jax.models.pooling import GPO
from shnet_jax.ops.matmul import DTYPES, DType
from shnet_jax.ops.norms import l2norm
from shnet_jax.types import Array, Batch, Embedding

TOWERS = ("bert", "bigru", "transformer", "clip", "siglip")
VECTORS = "vectors"
"""Name in `text.tower` of the text side without a tower."""
SOURCES = ("caption_embeddings", "caption_tokens")
"""Fields of a record that `text.source` may name: stored vectors of captions, or of their tokens."""
_FREEZABLE = ("shnet_jax.models.bert", "shnet_jax.models.clip", "shnet_jax.models.siglip")


def build_tower(config: ConfigDict) -> nn.Module:
    """The text tower of a configuration; `text.tower` may also be the dotted path of a module of yours.

    Raises ValueError for an unknown tower or dtype, when `config.text.vocab_size` is not known yet, for
    `config.text.frozen_layers` with another tower than BERT, CLIP or SigLIP, and for an activation dtype of a tower
    that has no such attribute.
    """
    text = config.text
    if text.tower == VECTORS:
        raise ValueError(
            "config.text.tower is 'vectors', a head on stored vectors of captions; this model reads the tower's own "
            "embedding of a caption, so choose " + " or ".join(TOWERS)
        )
    if text.tower not in TOWERS and "." not in text.tower:
        raise ValueError(f"config.text.tower is {text.tower!r}; choose from {', '.join((*TOWERS, VECTORS))}")
    if text.dtype not in DTYPES:
        raise ValueError(f"config.text.dtype is {text.dtype!r}; choose from {', '.join(DTYPES)}")
    if text.vocab_size < 1:
        raise ValueError(
            f"config.text.vocab_size is {text.vocab_size}: set it to the number of tokens of the vocabulary "
            "(a run takes it from its tokenizer)"
        )
    path = text.tower if "." in text.tower else f"shnet_jax.models.{text.tower}"
    if text.frozen_layers > 0 and path not in _FREEZABLE:
        raise ValueError(
            f"config.text.frozen_layers is {text.frozen_layers} and config.text.tower {text.tower!r}: "
            "only layers of bert, clip and siglip can be frozen, set it to 0"
        )
    tower: nn.Module = importlib.import_module(path).build(text)
    activations = config.model.activation_dtype
    if activations == "float32":
        return tower
    if not hasattr(tower, "activation_dtype"):
        raise ValueError(
            f"config.model.activation_dtype is {activations!r}, which the text tower {text.tower!r} does not have: set "
            "it to 'float32'"
        )
    return tower.clone(activation_dtype=activations)


def reads_tokens(config: ConfigDict) -> bool:
    """Whether the text side of a configuration has an element for each token of a caption."""
    return config.text.tower != VECTORS or config.text.source == "caption_tokens"


def text_fields(config: ConfigDict) -> tuple[str, ...]:
    """Fields of a record that the text side reads in place of captions; () for a tower, which reads tokens."""
    return (config.text.source,) if config.text.tower == VECTORS else ()


def text_inputs(batch: Batch) -> tuple[Array, Array]:
    """The t captions of a batch, for a text encoder: token ids [t, L] or vectors [t, L, E], and a mask."""
    if "tokens" in batch:
        return batch["tokens"], batch["token_mask"]
    if "caption_tokens" in batch:
        vectors, mask = batch["caption_tokens"], batch.get("caption_token_mask")
    else:
        vectors, mask = batch["caption_embeddings"][:, None], None
    return vectors, jnp.ones(vectors.shape[:2], bool) if mask is None else mask


def build_encoder(config: ConfigDict) -> TextEncoder | VectorEncoder:
    """The text side of a configuration: `TextEncoder` on its tower, or `VectorEncoder`.

    Raises ValueError as `build_tower`, and for vectors from an unknown source.
    """
    text = config.text
    if text.tower == VECTORS:
        if text.source not in SOURCES:
            raise ValueError(f"config.text.source is {text.source!r}; choose from {', '.join(SOURCES)}")
        if text.dtype not in DTYPES:
            raise ValueError(f"config.text.dtype is {text.dtype!r}; choose from {', '.join(DTYPES)}")
        head = build_head(
            text.head, "config.text.head", dim=config.model.dim, dtype=text.dtype, bn_sync=config.model.bn_sync
        )
        return VectorEncoder(head, config.model.activation_dtype)
    return TextEncoder(tower=build_tower(config), dim=config.model.dim, dtype=config.text.dtype)


class TextEncoder(nn.Module):
    """Tower -> linear -> GPO over all valid tokens, [CLS] and [SEP] included -> unit length (3SHNet).

    Attributes:
      tower: the text tower.
      dim: size of the joint embedding.
      dtype: of the operands of the head's product.
    """

    tower: nn.Module
    dim: int
    dtype: DType = "float32"

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, *, train: bool, with_elements: bool = False) -> Embedding:
        """tokens [t, L] int32, mask [t, L] bool -> unit vectors [t, dim].

        with_elements: also give the tokens' features behind the head, [t, L, dim] (not normalised), and the
        mask.
        """
        features = self.tower(tokens, mask, train=train)
        # A projection to a joint space is float32, for those that read it; a head goes on from less.
        features = features.astype(getattr(self.tower, "activation_dtype", "float32"))
        words = Dense(self.dim, self.dtype, name="head")(features)
        pooled = GPO(name="pool")(words, mask)
        for name, value in (("hidden", features), ("words", words), ("pooled", pooled)):
            self.sow("intermediates", name, value)
        vector = l2norm(pooled)
        return Embedding(vector, words, mask) if with_elements else Embedding(vector)


class VectorEncoder(nn.Module):
    """Stored vectors of a caption -> `Head` -> GPO where there are several -> unit length.

    Attributes:
      head: maps each vector to the joint space.
      activation_dtype: of what the head keeps for the backward pass.
    """

    head: Head
    activation_dtype: DType = "float32"

    @property
    def norm_depth(self) -> int:
        """BatchNorms of the head; see `contract.RetrievalModel.norm_depth`."""
        return self.head.norm_depth

    @nn.compact
    def __call__(self, vectors: Array, mask: Array, *, train: bool, with_elements: bool = False) -> Embedding:
        """vectors [t, L, E] float, mask [t, L] bool -> unit vectors [t, dim]; L = 1 for one vector a caption.

        with_elements: as in `TextEncoder`.
        """
        words = self.head(vectors.astype(jnp.float32).astype(self.activation_dtype), mask, train=train)
        if vectors.shape[1] == 1:
            pooled = words[:, 0]
        else:
            words = words.astype(self.activation_dtype)
            pooled = GPO(name="pool")(words, mask)
        for name, value in (("words", words), ("pooled", pooled)):
            self.sow("intermediates", name, value)
        vector = l2norm(pooled)
        return Embedding(vector, words, mask) if with_elements else Embedding(vector)
