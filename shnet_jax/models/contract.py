"""Interface of a model (contract 1). Loss, evaluation, embedding and search use only this.

A model is a `flax.linen.Module` with the three methods below; its file also has
`build(config) -> RetrievalModel` and `image_fields(config) -> tuple[str, ...]` (the record fields it reads). It may
have `optional_fields(config) -> dict[str, str]`: fields of which it reads the first that a data set has, each with what
happens where there is none.
The parameters of a text tower lie at params/text/tower: pretrained weights are put there, and the optimiser gives
what lies there its own learning rate and keeps the frozen layers as they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, cast

import flax.linen as nn
from ml_collections import ConfigDict

from shnet_jax.models.text import text_inputs
from shnet_jax.ops.matmul import DTYPES, einsum
from shnet_jax.types import Array, Batch, Embedding, Score


class RetrievalModel(nn.Module):
    """Base of the models: the default score and the call that initialises both towers.

    score_params: names in "params" that a score which is a method reads.
    """

    score_params: ClassVar[tuple[str, ...]] = ()

    @property
    def norm_depth(self) -> int:
        """Number of BatchNorms on the longest path through a tower; 0: there is none (see training/microbatch.py)."""
        return getattr(getattr(self, "text", None), "norm_depth", 0)

    @property
    def activation_dtype(self) -> str:
        """Dtype of what lies between the layers of the image tower, an attribute of it; "float32" without one."""
        return str(getattr(getattr(self, "image", None), "activation_dtype", "float32"))

    @property
    def set_sizes(self) -> tuple[int, int]:
        """Set sizes of images and of texts, where all sets of a side have the same, all valid; (0, 0): no such sets."""
        return 0, 0

    def encode_image(self, batch: Batch, *, train: bool) -> Embedding:
        """Encodes the image fields of `batch` [n, ...] as n embeddings."""
        raise TypeError(f"{type(self).__name__} does not define encode_image")

    def encode_text(self, batch: Batch, *, train: bool) -> Embedding:
        """Encodes the t captions of `batch`, as tokens or as stored vectors, as t embeddings."""
        raise TypeError(f"{type(self).__name__} does not define encode_text")

    @staticmethod
    def score(images: Embedding, texts: Embedding) -> Array:
        """Scores [n, t] of every image with every text: the dot product of their unit vectors.

        A model with a score of its own overrides it by a static method, by a property that gives a function, or by a
        method, which may have parameters and is reached through `scorer`; it leaves `vector` a unit vector, by which
        candidates are found.
        """
        return einsum("nd,td->nt", images.vector, texts.vector, "float32")

    def __call__(self, batch: Batch, *, train: bool) -> tuple[Embedding, Embedding]:
        """Both towers on one batch; used to initialise the parameters, those of the score too."""
        images, texts = self.encode_image(batch, train=train), self.encode_text(batch, train=train)
        if self.is_initializing() and not has_static_score(self):
            self.score(images, texts)
        return images, texts


class TwoTowers(RetrievalModel):
    """Model of two independent towers, whose score is the dot product of their unit vectors.

    Attributes:
      image: called as image(batch, train=train) -> unit vectors [n, dim].
      text: as `models.text.TextEncoder`, or on stored vectors `models.text.VectorEncoder`.
    """

    image: nn.Module
    text: nn.Module

    def encode_image(self, batch: Batch, *, train: bool) -> Embedding:
        """See `RetrievalModel.encode_image`."""
        return Embedding(self.image(batch, train=train))

    def encode_text(self, batch: Batch, *, train: bool) -> Embedding:
        """See `RetrievalModel.encode_text`."""
        return self.text(*text_inputs(batch), train=train)


def check_choices(config: ConfigDict, choices: Mapping[str, Collection[str]]) -> None:
    """Raises ValueError for a field of `config.model` that is none of its choices, or a list that is not of them.

    choices: of each field, by its path below `config.model`. `units` may not be empty.
    """
    for path, known in choices.items():
        value = functools.reduce(lambda section, name: section[name], path.split("."), config.model)
        values = (value,) if isinstance(value, str) else tuple(value)
        if [one for one in values if one not in known] or (path == "units" and not values):
            shown = value if isinstance(value, str) else values
            raise ValueError(f"config.model.{path} is {shown!r}; choose from {', '.join(known)}")


def check_activations(model: RetrievalModel, config: ConfigDict) -> None:
    """Raises ValueError for a `config.model.activation_dtype` that the built model does not have."""
    if model.activation_dtype != config.model.activation_dtype:
        raise ValueError(
            f"config.model.activation_dtype is {config.model.activation_dtype!r}, and the model {config.model.name!r} "
            f"has {model.activation_dtype} activations only: set it to {model.activation_dtype!r}"
        )


def scorer(model: RetrievalModel, params: Mapping[str, Any], dtype: str = "float32") -> Score:
    """Score function of a model, given its "params", `score_params` at least.

    A static score is that function itself. dtype: of the operands of the product, see `check_pairs_dtype`.
    """
    if dtype != "float32":
        return rounded_score
    if has_static_score(model):
        return model.score
    score_params = {name: params[name] for name in model.score_params}

    def score(images: Embedding, texts: Embedding) -> Array:
        return cast(Array, model.apply({"params": score_params}, images, texts, method="score"))

    score.__qualname__ = f"{type(model).__name__}.score"  # messages name it
    return score


def has_static_score(model: RetrievalModel) -> bool:
    """Whether the score needs no parameters: a static method, or a property that gives a function."""
    return not inspect.isfunction(inspect.getattr_static(model, "score"))


def rounded_score(images: Embedding, texts: Embedding) -> Array:
    """`RetrievalModel.score` from bfloat16 operands, with float32 sums, in both passes."""
    return einsum("nd,td->nt", images.vector, texts.vector, "bfloat16")


def check_pairs_dtype(model: RetrievalModel, dtype: str) -> None:
    """Raises ValueError for a `config.loss.pairs.dtype` that is unknown or that the score of the model does not have.

    A score that looks inside the items has operands of its own, `config.model.dtype`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"config.loss.pairs.dtype is {dtype!r}; choose from {', '.join(DTYPES)}")
    if dtype != "float32" and model.score is not RetrievalModel.score:
        raise ValueError(
            f"config.loss.pairs.dtype is {dtype!r}, and the score of {type(model).__name__} is not the dot product of "
            "two vectors, whose operands it rounds: set it to 'float32'"
        )


def check_prefixes(model: RetrievalModel, field: str) -> None:
    """Raises ValueError, naming the field that asks for it, where vectors cannot be cut to their first numbers.

    A score that looks inside the items, or has parameters of its own, was learned for whole vectors.
    """
    if model.score is not RetrievalModel.score:
        raise ValueError(
            f"config.{field} cuts vectors to their first numbers, and the score of {type(model).__name__} is not the "
            f"dot product of two vectors: leave config.{field} off"
        )
