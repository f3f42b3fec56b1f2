"""ESA-style: an item is its global vector and a small set of embeddings merged from its tokens.

A reconstruction, docs/models.md, of Zhao et al., "Fine-grained semantic oriented embedding set alignment for
text-based person search" (Image and Vision Computing 152, 2024), of which the abstract alone was available. The towers
are independent, so every item is encoded once; the set head (`models/sets.py`) works on the tokens of any backbone.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.clip import Vision, build_vision
from shnet_jax.models.contract import RetrievalModel, check_choices
from shnet_jax.models.layers import from_config
from shnet_jax.models.pooling import GPO
from shnet_jax.models.sets import MODES, SetHead
from shnet_jax.models.text import build_encoder, build_tower, reads_tokens, text_inputs
from shnet_jax.models.units import UNIT_MASKS, UnitEncoder, build_mlp, given_unit
from shnet_jax.ops.matmul import DTYPES
from shnet_jax.ops.norms import l2norm
from shnet_jax.ops.set_similarity import SIMILARITIES, set_similarity
from shnet_jax.types import Array, Batch, Embedding, Score

HEADS = ("learned", "none")
SOURCES = ("units", "picture")


@dataclasses.dataclass(frozen=True)
class SetScore:
    """Score cos(global, global) + eta * set similarity. It has no parameters; equal ones share compiled programs.

    similarity, sharpness: see `ops.set_similarity`. eta: weight of the set term; 0: the dot product alone.
    """

    similarity: str
    sharpness: float
    eta: float

    def __call__(self, images: Embedding, texts: Embedding) -> Array:
        """Scores [n, t]. Raises ValueError for embeddings without elements."""
        if images.elements is None or texts.elements is None:
            raise ValueError("a set similarity was asked of embeddings without elements")
        within = set_similarity(
            images.elements, images.mask, texts.elements, texts.mask, self.similarity, self.sharpness
        )
        return RetrievalModel.score(images, texts) + self.eta * within


class UnitTokens(UnitEncoder, kw_only=True):
    """VSE-infinity's tower: linear and MLP on each kind of unit, GPO over all; the units are the tokens."""

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool) -> Embedding:
        """Image fields of `batch` -> global unit vectors [n, dim], tokens [n, N, dim] and their mask."""
        units = self.project(batch, train=train)
        return Embedding(l2norm(GPO(name="pool")(units.projected, units.mask)), units.projected, units.mask)


class GivenTokens(nn.Module):
    """Image features of a frozen backbone, read from the record: global vector `image_embedding`, the units as tokens.

    All of them have the width `dim` of the embedding: nothing here projects.
    """

    dim: int
    units: tuple[str, ...]
    activation_dtype: str = "float32"

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool) -> Embedding:
        """Image fields of `batch` -> global unit vectors [n, dim], tokens [n, N, dim] and their mask.

        Raises ValueError for a field of another width.
        """
        for field in ("image_embedding", *self.units):
            width = batch[field].shape[-1]
            if width != self.dim:
                raise ValueError(
                    f"the data set's {field} is {width} wide, expected {self.dim}, the width of the text tower's joint "
                    "space (config.model.dim, config.text.projection): with config.model.esa.head = 'none' nothing "
                    "projects it. Extract image_embedding with the CLIP of config.text.weights and the tokens with "
                    "--tokens=projected (docs/models.md), or set config.model.esa.head to 'learned'"
                )
        given = [given_unit(batch, unit, self.activation_dtype) for unit in self.units]
        tokens, mask = (jnp.concatenate(parts, axis=1) for parts in zip(*given, strict=True))
        return Embedding(l2norm(batch["image_embedding"].astype(jnp.float32)), tokens, mask)


class PictureEncoder(nn.Module):
    """CLIP's vision tower on the picture: its class token is the global vector, its patches are the tokens."""

    vision_tower: Vision

    @property
    def activation_dtype(self) -> str:
        """See `RetrievalModel.activation_dtype`."""
        return str(self.vision_tower.activation_dtype)

    def __call__(self, batch: Batch, *, train: bool) -> Embedding:
        """`image` [n, H, W, 3] of `batch` -> global unit vectors [n, d], tokens [n, patches, d] and their mask."""
        states = self.vision_tower(batch["image"], train=train)
        vector, patches = l2norm(states[:, 0]), states[:, 1:].astype(self.activation_dtype)
        return Embedding(vector, patches, jnp.ones(patches.shape[:2], bool))


class EndToken(nn.Module):
    """CLIP's text side: the tower's last valid token is the global vector, nothing is learned behind the tower."""

    tower: nn.Module

    def __call__(self, tokens: Array, mask: Array, *, train: bool, with_elements: bool = False) -> Embedding:
        """See `models.text.TextEncoder`."""
        words = self.tower(tokens, mask, train=train)
        last = jnp.sum(mask, axis=1) - 1
        vector = l2norm(jnp.take_along_axis(words, last[:, None, None], axis=1)[:, 0])
        if not with_elements:
            return Embedding(vector)
        return Embedding(vector, words.astype(getattr(self.tower, "activation_dtype", "float32")), mask)


class ESA(RetrievalModel):
    """Two towers that give global vectors and tokens, and a set head on each; without set heads the plain model.

    Attributes:
      image, text: towers as above. image_set, text_set: their set heads, both None for global vectors alone.
      set_score: of pairs of sets.
    """

    image: nn.Module
    text: nn.Module
    image_set: SetHead | None
    text_set: SetHead | None
    set_score: SetScore

    @property
    def norm_depth(self) -> int:
        """See `RetrievalModel.norm_depth`: the MLPs of the units have one BatchNorm."""
        return max(1 if isinstance(self.image, UnitTokens) else 0, super().norm_depth)

    @property
    def set_sizes(self) -> tuple[int, int]:
        """See `RetrievalModel.set_sizes`."""
        return (0, 0) if self.image_set is None or self.text_set is None else (self.image_set.size, self.text_set.size)

    @property
    def score(self) -> Score:  # type: ignore[override]  # chosen by the configuration; the base has a function
        """See `RetrievalModel.score`; with set heads, a `SetScore`."""
        return RetrievalModel.score if self.image_set is None else self.set_score

    def encode_image(self, batch: Batch, *, train: bool) -> Embedding:
        """See `RetrievalModel.encode_image`; elements are unit vectors [n, M, dim]."""
        return _with_set(self.image_set, self.image(batch, train=train))

    def encode_text(self, batch: Batch, *, train: bool) -> Embedding:
        """See `RetrievalModel.encode_text`; elements are unit vectors [t, M, dim]."""
        tokens = self.text(*text_inputs(batch), train=train, with_elements=True)
        if "tokens" not in batch:  # stored vectors: all that are valid say something
            return _with_set(self.text_set, tokens)
        # Neither the token that begins a caption nor the one that ends it says anything of a part of it.
        mask = tokens.mask & (jnp.arange(tokens.mask.shape[1]) > 0)
        mask &= jnp.arange(tokens.mask.shape[1]) < jnp.sum(tokens.mask, axis=1, keepdims=True) - 1
        return _with_set(self.text_set, tokens.replace(mask=mask))


def _with_set(head: SetHead | None, tokens: Embedding) -> Embedding:
    if head is None:
        return Embedding(tokens.vector)
    assert tokens.elements is not None and tokens.mask is not None  # the towers here give both
    return Embedding(tokens.vector, head(tokens.vector, tokens.elements, tokens.mask))


def image_fields(config: ConfigDict) -> tuple[str, ...]:
    """Fields of the record that the model of this configuration reads."""
    if config.model.esa.source == "picture":
        return ("image",)
    return (*config.model.units, *(("image_embedding",) if config.model.esa.head == "none" else ()))


def build(config: ConfigDict) -> ESA:
    """Builds the model of a configuration whose `text.vocab_size` is known.

    Raises ValueError for a field of `config.model` or `config.text` that is none of its choices.
    """
    m, esa = config.model, config.model.esa
    _check(config)
    image: nn.Module
    if esa.source == "picture":
        image = PictureEncoder(build_vision(m.clip, m.dtype, m.activation_dtype))
    elif esa.head == "none":
        image = GivenTokens(m.dim, tuple(m.units), m.activation_dtype)
    else:
        image = from_config(UnitTokens, m, units=tuple(m.units), mlp=build_mlp(m))
    text = build_encoder(config) if esa.head == "learned" else EndToken(build_tower(config))
    head = partial(SetHead, mode=esa.mode, depth=esa.depth, heads=esa.heads, dtype=m.dtype)
    return ESA(
        image=image,
        text=text,
        image_set=head(esa.size) if esa.size else None,
        text_set=head(esa.text_size) if esa.text_size else None,
        set_score=SetScore(esa.similarity, esa.sharpness, esa.eta),
    )


def _check(config: ConfigDict) -> None:
    m, esa = config.model, config.model.esa
    choices = {"source": SOURCES, "head": HEADS, "mode": MODES, "similarity": SIMILARITIES}
    choices = {f"esa.{field}": known for field, known in choices.items()}
    check_choices(config, choices | {"dtype": DTYPES, "activation_dtype": DTYPES, "units": UNIT_MASKS})
    if esa.text_size and not reads_tokens(config):
        raise ValueError(
            f"config.text.source is 'caption_embeddings', one vector a caption, and config.model.esa.text_size is "
            f"{esa.text_size}: a set is made of tokens; store caption_tokens and set text.source to it, or set size "
            "and text_size to 0"
        )
    if bool(esa.size) != bool(esa.text_size) or min(esa.size, esa.text_size) < 0:
        raise ValueError(
            f"config.model.esa.size is {esa.size} and text_size {esa.text_size}: both sides have sets, or neither (0)"
        )
    if esa.source == "picture" and esa.head != "none":
        raise ValueError(f"config.model.esa.source is 'picture', which needs head 'none'; it is {esa.head!r}")
    if esa.head == "none" and config.text.projection != m.dim:
        raise ValueError(
            f"config.model.esa.head is 'none', so the tower's width is the embedding's: config.text.projection is "
            f"{config.text.projection}, config.model.dim {m.dim}"
        )
