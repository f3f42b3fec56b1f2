"""Losses averaged over prefixes of the embeddings (Matryoshka: Kusupati et al., NeurIPS 2022, arXiv 2205.13147).

A run trained so can be searched by the first numbers of its vectors (`config.search.dims`), in less memory and time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.types import Array, Context, Embedding, Keys, Queue

Terms = dict[str, Array]
Compute = Callable[[Embedding, Embedding, Array, Context], Terms]
Q = TypeVar("Q", bound=Queue)

TINY = 1e-24
"""Squared length up to which a prefix counts as zero: it is returned as zeros, with a gradient of 0."""


def check(dims: Sequence[int]) -> tuple[int, ...]:
    """The sizes of `config.loss.matryoshka`. Raises ValueError unless they are whole numbers that rise from 1 on."""
    sizes = tuple(dims)
    all_integers = all(type(size) is int for size in sizes)
    if not all_integers or any(a >= b for a, b in zip((0, *sizes), sizes, strict=False)):
        raise ValueError(f"config.loss.matryoshka is {sizes}; expected rising sizes, as (64, 128, 256, 512), or ()")
    return sizes


def check_last(sizes: Sequence[int], width: int) -> None:
    """Raises ValueError unless the last size is that of the whole vector, which evaluation and search use."""
    if sizes and sizes[-1] != width:
        raise ValueError(
            f"config.loss.matryoshka is {tuple(sizes)}, and the model's vectors have {width} numbers: its last size "
            f"must be {width}, as evaluation and search use the whole vector unless told otherwise"
        )


def over_prefixes(compute: Compute, sizes: Sequence[int]) -> Compute:
    """The mean of `compute` over prefixes of these sizes, each brought to unit length; every prefix weighs the same.

    Its terms are means too, and matryoshka_SIZE is the "loss" of each prefix. Queues and keys of momentum encoders are
    cut alike. The parameters of a loss, as its temperature, are shared by all prefixes. Valid where the score is the
    dot product of the vectors.
    """

    def averaged(images: Embedding, texts: Embedding, ids: Array, ctx: Context) -> Terms:
        check_last(sizes, images.vector.shape[1])
        by_size = {}
        for size in sizes:
            keys = None if ctx.keys is None else _keys(ctx.keys, size)
            with jax.named_scope(f"matryoshka_{size}"):
                cut = prefix(images, size), prefix(texts, size)
                by_size[size] = compute(*cut, ids, dataclasses.replace(ctx, keys=keys))
        means = jax.tree.map(lambda *terms: sum(terms) / len(sizes), *by_size.values())
        return means | {f"matryoshka_{size}": terms["loss"] for size, terms in by_size.items()}

    return averaged


def prefix(items: Embedding, size: int) -> Embedding:
    """The first `size` numbers of each vector, brought to unit length; without elements."""
    return Embedding(_unit(items.vector[:, :size]))


def _unit(vectors: Array) -> Array:
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jnp.where(squares > TINY, lax.rsqrt(jnp.maximum(squares, TINY)), 0.0)


def _keys(keys: Keys, size: int) -> Keys:
    def cut(queue: Q) -> Q:
        return dataclasses.replace(queue, vectors=_unit(queue.vectors[:, :size]))

    return dataclasses.replace(
        keys,
        images=prefix(keys.images, size),
        texts=prefix(keys.texts, size),
        image_queue=cut(keys.image_queue),
        text_queue=cut(keys.text_queue),
    )
