"""Fixed-dimensional encodings: one vector per set, so that dot products approximate Chamfer similarities of sets.

Source: Dhulipala et al., "MUVERA: Multi-Vector Retrieval via Fixed Dimensional Encodings" (arXiv 2405.19504). SimHash
cuts space into 2^k_sim cells. A query's encoding has the sum of its elements in each cell, a document's their mean. The
product of both sums, over the query's elements, the product of each with the mean of the document's elements near it.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp

from shnet_jax.ops.matmul import einsum
from shnet_jax.types import Array

STREAM = 0x4D55  # folded into the seed, so that these draws differ from others of the run


@dataclasses.dataclass(frozen=True)
class EncodingOptions:
    """Sizes of an encoding.

    k_sim: hyperplanes of a partition, of 2^k_sim cells. r_reps: independent partitions, whose products are averaged.
    d_proj: dimension that the elements are projected to in each partition; 0: not projected.
    d_final: dimension of the count sketch of all of it; 0: none.
    """

    k_sim: int
    r_reps: int
    d_proj: int
    d_final: int

    def __post_init__(self) -> None:
        """Raises ValueError for a size below its smallest, and for more than 2^16 cells."""
        if not 0 <= self.k_sim <= 16 or self.r_reps < 1 or min(self.d_proj, self.d_final) < 0:
            raise ValueError(
                f"an encoding has 0 to 16 hyperplanes, at least 1 partition and no negative dimension; found {self}"
            )

    def width(self, dim: int) -> int:
        """Numbers in the encoding of a set of vectors of `dim` numbers."""
        return self.d_final or self.r_reps * 2**self.k_sim * (self.d_proj or dim)


class Projections(NamedTuple):
    """Random numbers of an encoding, the same for queries and documents.

    planes: [r_reps, k_sim, d] normals of the hyperplanes. inner: [r_reps, d, d_proj] of -1 and 1 by sqrt(d_proj); None:
    elements are not projected. place, sign: [width] int32 and -1 or 1, of the count sketch; None: none.
    """

    planes: Array
    inner: Array | None
    place: Array | None
    sign: Array | None


@lru_cache(maxsize=8)
def draw_projections(options: EncodingOptions, dim: int, seed: int) -> Projections:
    """The random numbers of encodings of sets of vectors of `dim` numbers; the same for the same seed."""
    planes, inner, place, sign = jax.random.split(jax.random.fold_in(jax.random.key(seed), STREAM), 4)
    reps, width = options.r_reps, dataclasses.replace(options, d_final=0).width(dim)
    signs = lambda key, shape: jax.random.rademacher(key, shape, jnp.float32)  # noqa: E731
    final = options.d_final
    return Projections(
        jax.random.normal(planes, (reps, options.k_sim, dim), jnp.float32),
        signs(inner, (reps, dim, options.d_proj)) / math.sqrt(options.d_proj) if options.d_proj else None,
        jax.random.randint(place, (width,), 0, final, jnp.int32) if final else None,
        signs(sign, (width,)) if final else None,
    )


def encode_queries(elements: Array, mask: Array | None, projections: Projections, d_final: int = 0) -> Array:
    """Encodings [n, width] float32 of sets as queries: the mean over a set's elements, each in its cell.

    The product with a document's encoding approximates 1/M_q sum_a max_b <q_a, p_b>, where MUVERA has the sum; of an
    empty set it is 0.

    Args:
      elements: [n, m, d]. mask: [n, m] bool, valid elements; None: all.
      projections: of `draw_projections`. d_final: `EncodingOptions.d_final`.
    """
    cells, projected, valid = _cells(elements, mask, projections)
    members = _members(cells, valid, projections)
    sums = jnp.einsum("nmrb,nmrp->nrbp", members, projected, precision="highest")
    count = jnp.maximum(jnp.sum(valid, axis=1, dtype=jnp.float32), 1.0)
    return _flatten(sums / count[:, None, None, None], projections, d_final)


def encode_documents(elements: Array, mask: Array | None, projections: Projections, d_final: int = 0) -> Array:
    """Encodings [n, width] float32 of sets as documents: the mean of a set's elements in each cell.

    An empty cell gets the element whose own cell is nearest in Hamming distance, of several the first. The arguments
    are those of `encode_queries`.
    """
    cells, projected, valid = _cells(elements, mask, projections)
    members = _members(cells, valid, projections)
    sums = jnp.einsum("nmrb,nmrp->nrbp", members, projected, precision="highest")
    count = jnp.sum(members, axis=1)  # [n, r, b]
    far = projections.planes.shape[1] + 1
    distance = jnp.bitwise_count(cells[..., None] ^ jnp.arange(members.shape[-1])).astype(jnp.int32)
    nearest = jnp.argmin(jnp.where(valid[:, :, None, None], distance, far), axis=1)  # [n, r, b]
    filled = jnp.take_along_axis(projected.swapaxes(1, 2), nearest[..., None], axis=2)
    means = jnp.where(count[..., None] > 0, sums / jnp.maximum(count, 1.0)[..., None], filled)
    return _flatten(jnp.where(valid.any(axis=1)[:, None, None, None], means, 0.0), projections, d_final)


def _cells(elements: Array, mask: Array | None, projections: Projections) -> tuple[Array, Array, Array]:
    """Cell [n, m, r] and projection [n, m, r, p] of each element, and the mask [n, m] of valid ones."""
    planes, inner = projections.planes, projections.inner
    bits = planes.shape[1]
    valid = jnp.ones(elements.shape[:2], bool) if mask is None else mask
    elements = jnp.where(valid[..., None], elements, 0.0)  # masked places may hold any value
    above = einsum("nmd,rkd->nmrk", elements, planes, "float32") > 0
    cells = jnp.sum(above * (1 << jnp.arange(bits)), axis=-1, dtype=jnp.int32)
    if inner is None:
        return cells, jnp.broadcast_to(elements[:, :, None], (*cells.shape, elements.shape[-1])), valid
    return cells, einsum("nmd,rdp->nmrp", elements, inner, "float32"), valid


def _members(cells: Array, valid: Array, projections: Projections) -> Array:
    """Whether a valid element lies in each cell, as numbers [n, m, r, 2^k_sim]."""
    return jax.nn.one_hot(cells, 2 ** projections.planes.shape[1]) * valid[..., None, None]


def _flatten(blocks: Array, projections: Projections, d_final: int) -> Array:
    """Blocks [n, r, b, p] as one vector, whose products are means over the partitions; sketched where asked for."""
    flat = blocks.reshape(blocks.shape[0], -1) / math.sqrt(blocks.shape[1])
    if projections.place is None or projections.sign is None:
        return flat
    signed = (flat * projections.sign).T
    return jax.ops.segment_sum(signed, projections.place, num_segments=d_final).T
