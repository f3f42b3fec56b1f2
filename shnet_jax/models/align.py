"""Heads on the frozen vectors of an image model and of a text model, as SAIL trains them (arXiv 2412.04616).

The image side reads `image_embedding`, or tokens (regions, grid) that are pooled before or after the head, with other
vectors of the image beside them. The text side is `text.tower = "vectors"` as published; any other tower works too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.contract import TwoTowers, check_choices
from shnet_jax.models.heads import EPSILON, Head, build_head
from shnet_jax.models.layers import Dense, LayerNorm, xavier_uniform
from shnet_jax.models.pooling import GPO
from shnet_jax.models.text import build_encoder
from shnet_jax.models.units import UNIT_MASKS, given_unit
from shnet_jax.ops.matmul import DTYPES, DType, einsum
from shnet_jax.ops.norms import l2norm, masked_softmax
from shnet_jax.types import Array, Batch

SOURCES = ("vector", "units")
POOLS = ("mean", "gpo", "attention")

VECTORS: Mapping[str, str] = {
    "image_embedding": "image_embedding",
    "coverage": "seg_semantic",
    "categories": "categories",
}
"""Vectors of an image beside its units, and the field that each is made of; see `vector_of`."""


def vector_of(batch: Batch, name: str) -> Array:
    """A vector of VECTORS, [n, width] float32; coverage is the share of the image that each category covers."""
    x = batch[VECTORS[name]].astype(jnp.float32)
    return jnp.mean(x, axis=(2, 3)) if name == "coverage" else x


class Pool(nn.Module):
    """Tokens to one vector: their mean, `GPO`, or attention by a learned query over a linear map of them.

    Attributes: kind: one of POOLS. dtype: of the operands of the map.
    """

    kind: str
    dtype: DType = "float32"

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """x [n, N, d], mask [n, N] bool -> [n, d]."""
        if self.kind == "gpo":
            return GPO(name="gpo")(x, mask)
        if self.kind == "attention":
            keys = Dense(x.shape[-1], self.dtype, xavier_uniform, name="key")(x)
            query = self.param("query", nn.initializers.normal(1.0), (x.shape[-1],))
            logits = einsum("nkd,d->nk", keys, query / math.sqrt(x.shape[-1]), "float32")
            weights = masked_softmax(logits, mask)
        else:
            weights = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        return einsum("nk,nkd->nd", jnp.where(mask, weights, 0.0), x, "float32")


class ImageHead(nn.Module):
    """The image side: `image_embedding`, or the pooled units, through a `Head`.

    With `pool_first`, each kind of units is pooled by itself. If these and `vectors` are several, each goes through a
    LayerNorm of its own, and the head reads them one after the other; their widths may differ.

    Attributes:
      head: the head.
      units: kinds of units that are the tokens; (): `image_embedding` is read alone.
      pool: of the tokens. pool_first: pool, then map; else map each token, then pool.
      vectors: kinds of vectors beside the pooled units, names of VECTORS.
      vectors_gain: first gain of their LayerNorms; that of units is 1.
      activation_dtype: of the head's input and of what lies between its layers.
    """

    head: Head
    units: tuple[str, ...] = ()
    pool: partial[Pool] | None = None
    pool_first: bool = True
    vectors: tuple[str, ...] = ()
    vectors_gain: float = 1.0
    activation_dtype: DType = "float32"

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool) -> Array:
        """Image fields of `batch` -> unit vectors [n, dim]. Raises ValueError for units of different widths."""
        if self.pool is None:
            vectors = batch["image_embedding"].astype(jnp.float32).astype(self.activation_dtype)
            mapped = self.head(vectors, train=train)
        elif self.pool_first:
            mapped = self.head(self._joined(batch, self.pool).astype(self.activation_dtype), train=train)
        else:
            tokens, mask = self._tokens(batch)
            mapped = self.head(tokens, mask, train=train).astype(self.activation_dtype)
            mapped = self.pool(name="pool")(mapped, mask)
        self.sow("intermediates", "mapped", mapped)
        return l2norm(mapped)

    def _joined(self, batch: Batch, pool: partial[Pool]) -> Array:
        """Pooled units and `vectors`, [n, sum of their widths]."""
        parts: dict[str, Array] = {}
        for unit in self.units:
            name = "pool" if len(self.units) == 1 else f"{unit}_pool"
            parts[unit] = pool(name=name)(*given_unit(batch, unit, self.activation_dtype))
        parts |= {name: vector_of(batch, name) for name in self.vectors}
        if len(parts) > 1:
            gains = {
                name: nn.initializers.constant(self.vectors_gain if name in self.vectors else 1.0) for name in parts
            }
            parts = {
                name: LayerNorm(epsilon=EPSILON, scale_init=gains[name], name=f"{name}_norm")(x)
                for name, x in parts.items()
            }
        return jnp.concatenate(list(parts.values()), axis=-1)

    def _tokens(self, batch: Batch) -> tuple[Array, Array]:
        given = [given_unit(batch, unit, self.activation_dtype) for unit in self.units]
        widths = {unit: x.shape[-1] for unit, (x, _) in zip(self.units, given, strict=True)}
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{unit} of {width}" for unit, width in widths.items())
            raise ValueError(
                f"one head maps tokens of one width, found {listed}: choose one kind in config.model.units, or "
                "config.model.align.pool_first=True"
            )
        tokens, masks = zip(*given, strict=True)
        return jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1)


class Align(TwoTowers):
    """Two heads; the score is the dot product of their unit vectors."""

    image: ImageHead

    @property
    def norm_depth(self) -> int:
        """See `RetrievalModel.norm_depth`."""
        return max(self.image.head.norm_depth, super().norm_depth)


def image_fields(config: ConfigDict) -> tuple[str, ...]:
    """Fields of the record that the model of this configuration reads."""
    m = config.model
    if m.align.source == "vector":
        return ("image_embedding",)
    return (*m.units, *(VECTORS[name] for name in m.align.vectors))


def build(config: ConfigDict) -> Align:
    """Builds the model of a configuration.

    Raises ValueError for a field that is none of its choices, for vectors beside what is no pooled unit, or for a
    feature_dropout.
    """
    m, align = config.model, config.model.align
    check_choices(config, {"align.source": SOURCES, "align.pool": POOLS, "dtype": DTYPES, "units": UNIT_MASKS})
    check_choices(config, {"align.vectors": VECTORS, "activation_dtype": DTYPES})
    if align.vectors and not (align.source == "units" and align.pool_first):
        raise ValueError(
            f"config.model.align.vectors is {tuple(align.vectors)}: vectors join units that are pooled first, which "
            f"needs source 'units' and pool_first True; found {align.source!r} and {align.pool_first}"
        )
    if m.feature_dropout:
        raise ValueError(
            f"config.model.feature_dropout is {m.feature_dropout}: align has none on its features; set it to 0 and use "
            "config.model.align.head.dropout"
        )
    head = build_head(align.head, "config.model.align.head", dim=m.dim, dtype=m.dtype, bn_sync=m.bn_sync)
    if align.source == "vector":
        image = ImageHead(head, activation_dtype=m.activation_dtype)
    else:
        pool = partial(Pool, align.pool, m.dtype)
        vectors = tuple(align.vectors), align.vectors_gain
        image = ImageHead(head, tuple(m.units), pool, align.pool_first, *vectors, m.activation_dtype)
    return Align(image=image, text=build_encoder(config))
