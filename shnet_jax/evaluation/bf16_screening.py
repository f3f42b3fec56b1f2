"""Screening in bfloat16 with an error bound: it settles the order of most pairs, and lists the rest.

The float32 ranks are wanted, exactly. Of a pair, s16 is the score from operands in bfloat16 and s32 that of the float32
program. With |s16 - s32| <= E, and p the float32 score of a match, s16 - p > E says s32 > p, and s16 - p < -E says
s32 < p, whatever the roundings were. Otherwise the pair is in doubt, and its caption is set aside for this tile of
images, to be scored in float32 by the very program that float32 ranking uses. Gathering the pairs in doubt and
multiplying them one by one would score fewer, but sums in another order, and the order of near-ties could come out
differently. That a pair scores the same in every column of that program is what exact ties between equal items, in
float32 ranking too, rest on.

The bound. Let a, b be a pair of vectors of dimension d, a' = bf16(a), b' = bf16(b), and |.| the Euclidean norm. Then
  a.b - a'.b' = (a - a').b + a'.(b - b'), so by Cauchy-Schwarz |a.b - a'.b'| <= |a - a'| |b| + |a'| |b - b'|.
The roundings a - a' are numbers that float32 holds exactly, so their norms are measured instead of bounded: at most
2^-8 |a|, and about 2^-9.3 |a| for typical vectors. Products of two bfloat16 numbers are exact in float32, and a float32
sum of d products in any order is off by at most g times the sum of their absolute values, itself at most |a| |b|:
  |s16 - a'.b'| <= g |a'| |b'|,  |s32 - a.b| <= g |a| |b|,  g = (d + 8) u / (1 - (d + 8) u).
u = 2^-22 instead of the 2^-24 of round-to-nearest allows for matrix units that truncate, and for float32 products made
of bfloat16 parts. With |a'| <= (1 + 2^-8) |a| all this is below
  E = (1 + 2^-6 + 4 g) (|a - a'| |b| + |a| |b - b'| + 2 g |a| |b|) + 2^-100,
whose slack also covers the float32 roundings in computing E and s16 - p. d * 2^-126 under the roots and the 2^-100
cover numbers flushed to zero. Of unit vectors E is at most about 2^-7, and typically 0.004.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from shnet_jax.evaluation.tiles import ItemScore, Queries
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel import axis
from shnet_jax.parallel.mapping import Mapped, map_specs
from shnet_jax.types import DATA, Array, Embedding

SCORE_DTYPES = ("float32", "bfloat16")


def check_score_dtype(score: ItemScore, score_dtype: str) -> None:
    """Raises ValueError for an unknown dtype, or bfloat16 with another score than the default dot product."""
    if score_dtype not in SCORE_DTYPES:
        raise ValueError(f"config.eval.score_dtype is {score_dtype!r}; choose from {', '.join(SCORE_DTYPES)}")
    if score_dtype == "bfloat16" and score is not RetrievalModel.score:
        name = getattr(score, "__qualname__", repr(score))
        raise ValueError(
            f"config.eval.score_dtype is bfloat16, which knows how far rounding moves a dot product; this model has a "
            f"score of its own ({name}): set it to float32"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sizes:
    """Norms [m] of m vectors of dimension `dim`, and norms [m] of their losses by rounding to bfloat16."""

    norm: Array
    lost: Array
    dim: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Screen:
    """The compiled functions of a round; images and their queries are split over the devices, captions are whole.

    scores: (images, captions) -> `rounded_scores`, images split, captions whole.
    settle: (those three, Queries of the images, Queries of the captions) ->
      [devices * rows] and [columns]: how many items come before each match, captions in doubt left out;
      [columns] bool: captions of which a pair is in doubt on any device;
      [] how many pairs are in doubt.
    """

    scores: Mapped
    settle: Mapped


@lru_cache(maxsize=4)
def screen_programs(mesh: Mesh) -> Screen:
    """The programs of a mesh; JAX compiles each for the shapes it meets."""
    split, copied = P(DATA), P()
    return Screen(
        map_specs(rounded_scores, mesh, (split, copied), (split, split, copied)),
        map_specs(_settle, mesh, (split, split, copied, split, copied), (split, copied, copied, copied)),
    )


def rounded_scores(images: Embedding, texts: Embedding) -> tuple[Array, Sizes, Sizes]:
    """Scores [n, t] float32 of vectors rounded to bfloat16, and the sizes of both."""
    (a, image_sizes), (b, text_sizes) = _round(images.vector), _round(texts.vector)
    # The last thing in its program: jaxlib 0.10.2 refuses it on CPU in other layouts (see ops/matmul.py).
    return jnp.einsum("nd,td->nt", a, b, preferred_element_type=jnp.float32), image_sizes, text_sizes


def error_bound(images: Sizes, texts: Sizes) -> Array:
    """E [n, t] of the pairs of n images and t texts; see the head of this file."""
    terms = (images.dim + 8) * 2.0**-22
    g = terms / (1 - terms)
    a, lost_a, b, lost_b = images.norm[:, None], images.lost[:, None], texts.norm[None, :], texts.lost[None, :]
    return (1 + 2.0**-6 + 4 * g) * (lost_a * b + a * lost_b + 2 * g * a * b) + 2.0**-100


def _round(vectors: Array) -> tuple[Array, Sizes]:
    vectors = vectors.astype(jnp.float32)
    # reduce_precision and not astype: XLA may drop a conversion to bfloat16 and back, and with it what is lost.
    rounded = lax.reduce_precision(vectors, exponent_bits=8, mantissa_bits=7)
    dim = vectors.shape[1]

    def norm(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(x * x, axis=1) + dim * 2.0**-126)

    return rounded.astype(jnp.bfloat16), Sizes(norm(vectors), norm(vectors - rounded), dim)


def _settle(
    scores: Array, images: Sizes, texts: Sizes, rows: Queries, columns: Queries
) -> tuple[Array, Array, Array, Array]:
    bound = error_bound(images, texts)
    real = rows.real[:, None] & columns.real[None, :]
    from_row = scores - rows.score.astype(jnp.float32)[:, None]
    from_column = scores - columns.score.astype(jnp.float32)[None, :]
    certain = (jnp.abs(from_row) > bound) & (jnp.abs(from_column) > bound)  # never where anything is NaN
    # A caption and its own image: no other of its captions comes before the best one, and an item never before itself.
    matched = (rows.index[:, None] == columns.match[None, :]) & jnp.isfinite(bound)
    doubtful = real & ~certain & ~matched
    aside = axis.psum(jnp.any(doubtful, axis=0).astype(jnp.int32), DATA) > 0
    settled = real & ~matched & ~aside[None, :]
    return (
        jnp.sum((from_row > bound) & settled, axis=1, dtype=jnp.int32),
        axis.psum(jnp.sum((from_column > bound) & settled, axis=0, dtype=jnp.int32), DATA),
        aside,
        axis.psum(jnp.sum(doubtful, dtype=jnp.int32), DATA),
    )
