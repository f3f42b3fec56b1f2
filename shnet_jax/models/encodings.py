"""Encodings of a model's set score: one vector an item, so that dot products approximate the whole score.

An item's vector is its global vector and, behind it, the fixed-dimensional encodings (`ops.fixed_encoding`) of its set
in the roles that the set similarity asks for: as query, as document, or both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from shnet_jax.models.esa import SetScore
from shnet_jax.ops.fixed_encoding import (
    EncodingOptions,
    Projections,
    draw_projections,
    encode_documents,
    encode_queries,
)
from shnet_jax.ops.set_similarity import HALVES
from shnet_jax.types import Array, Embedding, Score

LIKE_CHAMFER = HALVES | {"smooth_chamfer": HALVES["chamfer"]}  # the limit of smooth Chamfer for large sharpness


@dataclasses.dataclass(frozen=True)
class ScoreEncoding:
    """How a score is encoded. score: its similarity is one of LIKE_CHAMFER. seed: of the random numbers."""

    score: SetScore
    options: EncodingOptions
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values that the vectors depend on, beside the embeddings."""
        return {"seed": self.seed} | dataclasses.asdict(self.options) | dataclasses.asdict(self.score)

    @property
    def description(self) -> str:
        """For the protocol card."""
        sizes = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self.options).items())
        return f"fixed-dimensional encodings ({sizes}, seed {self.seed})"

    def width(self, items: Embedding) -> int:
        """Length of a vector. items: embeddings, or their shapes."""
        roles = sum(factor > 0 for factor in LIKE_CHAMFER[self.score.similarity])
        return items.vector.shape[1] + roles * self.options.width(_elements(items).shape[-1])

    def draw(self, items: Embedding) -> Projections:
        """The random numbers for the elements of embeddings, the same for images and captions."""
        return draw_projections(self.options, _elements(items).shape[-1], self.seed)

    def encode(self, items: Embedding, projections: Projections, side: str) -> Array:
        """Vectors [n, width] float32 of a side ("images", "texts").

        The half of Chamfer over the image elements has images as queries and captions as documents; the other half has
        them the other way round. Each factor is split between both sides, so that their vectors have numbers of one
        size. Raises ValueError for embeddings without elements.
        """
        parts, elements = [items.vector], _elements(items)
        for factor, queries in zip(LIKE_CHAMFER[self.score.similarity], ("images", "texts"), strict=True):
            if factor:
                weight = self.score.eta * factor / 2
                encode = encode_queries if side == queries else encode_documents
                signed = math.copysign(1.0, weight) if side == "images" else 1.0
                encoded = encode(elements, items.mask, projections, self.options.d_final)
                parts.append(signed * math.sqrt(abs(weight)) * encoded)
        return jnp.concatenate(parts, axis=1)


def score_encoding(score: Score, sizes: Mapping[str, int], seed: int) -> ScoreEncoding:
    """The encoding of a model's score. sizes: fields of `EncodingOptions`.

    Raises ValueError for a score that is no set similarity of LIKE_CHAMFER, and for sizes that do not exist.
    """
    if not isinstance(score, SetScore) or score.similarity not in LIKE_CHAMFER:
        score_name = score.similarity if isinstance(score, SetScore) else getattr(score, "__qualname__", repr(score))
        raise ValueError(
            f"config.eval.stage_one is 'fde', which approximates the set similarities {', '.join(LIKE_CHAMFER)}; this "
            f"model scores by {score_name}: set it to 'vectors'"
        )
    return ScoreEncoding(score, EncodingOptions(**sizes), seed)


def _elements(items: Embedding) -> Array:
    if items.elements is None:
        raise ValueError("config.eval.stage_one is 'fde', which encodes sets; these embeddings have no elements")
    return items.elements
