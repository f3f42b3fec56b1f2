"""The gradient of a large batch, encoded in microbatches: what memory holds no longer grows with the batch.

A contrastive loss needs all embeddings at once, but not all activations (gradient caching, Gao et al. 2021, arXiv
2101.06983): encode every microbatch and keep the embeddings; differentiate the loss by the embeddings; encode every
microbatch once more, now differentiated, with the cached gradient of its embeddings. The sum is the gradient of the
whole batch. Each microbatch draws its dropout from a key of its own, the same in all passes.

BatchNorm ties the microbatches of a device together. Whose statistics normalise is a choice, `statistics`:

  exact    those of the device's whole batch, through which gradients flow as well. They are found in passes of their
           own, as many as BatchNorms lie one behind the other (`norm_depth`), and differentiated in as many.
  local    each microbatch's own, as if it lay on a device of its own. No further pass.
  running  the running averages; gradients do not flow through statistics. No further pass.

In all three the running averages take up the statistics of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.models.mlp import advance, merge, running_moments
from shnet_jax.types import Array, Embedding

STATISTICS = ("exact", "local", "running")

Embeddings = tuple[Embedding, Embedding]


Encode = Callable[[Any, Any, Array, Any], tuple[Embeddings, Any]]
"""(params, microbatch, key, given) -> embeddings and moments of the microbatch; `given`: moments to normalise with,
{}: its own."""

Share = Callable[[Any, Embeddings], tuple[Array, dict[str, Array]]]
"""(params, embeddings of the device's whole batch) -> its share of the loss, and metrics."""


def cached_gradients(
    encode: Encode,
    share: Share,
    params: Any,
    batch_stats: Any,
    batch: Any,
    key: Array,
    *,
    count: int,
    statistics: str,
    norm_depth: int,
) -> tuple[Any, dict[str, Array], Any]:
    """Gradient of `share(params, embeddings)[0]` by `params`, of this device's batch in `count` microbatches.

    batch: every leaf has `count` equal parts along its first axis.
    norm_depth: BatchNorms on the longest path through a tower; 0: there is none.
    Returns (gradient, metrics, running averages after this batch).
    """
    each = _cut(batch, key, count)

    def embed(params: Any, given: Any, part: Any) -> Embeddings:
        return _without_masks(encode(params, part[0], part[1], given)[0])

    def moments(params: Any, given: Any, part: Any) -> Any:
        return encode(params, part[0], part[1], given)[1]

    embeddings, batch_stats, given, passes = _forward(encode, params, batch_stats, each, statistics, norm_depth)
    whole = _joined(embeddings)

    # Backward: the loss, then the embeddings, then the statistics in the opposite order.
    def share_of(params: Any, bare: Embeddings) -> tuple[Array, dict[str, Array]]:
        images, texts = (dataclasses.replace(x, mask=y.mask) for x, y in zip(bare, whole, strict=True))
        return share(params, (images, texts))

    graded = jax.value_and_grad(share_of, argnums=(0, 1), has_aux=True)
    (_, metrics), (gradient, of_whole) = graded(params, _without_masks(whole))
    cotangents = jax.tree.map(lambda x, like: x.reshape(like.shape), of_whole, _without_masks(embeddings))
    of_params, of_given = _pull(embed, params, given, each, cotangents)
    gradient = jax.tree.map(jnp.add, gradient, of_params)
    for given, of_found in reversed(passes):
        of_params, of_given = _pull(moments, params, given, each, of_found(of_given)[0])
        gradient = jax.tree.map(jnp.add, gradient, of_params)
    return gradient, metrics, batch_stats


def _without_masks(embeddings: Embeddings) -> Embeddings:
    """What a gradient is taken of: masks are no numbers."""
    images, texts = (dataclasses.replace(x, mask=None) for x in embeddings)
    return images, texts


def embed_in_parts(
    encode: Encode,
    params: Any,
    batch_stats: Any,
    batch: Any,
    key: Array,
    *,
    count: int,
    statistics: str,
    norm_depth: int,
) -> tuple[Embeddings, Any]:
    """(embeddings of this device's whole batch, running averages after it); arguments as in `cached_gradients`."""
    found = _forward(encode, params, batch_stats, _cut(batch, key, count), statistics, norm_depth)
    return _joined(found[0]), found[1]


def _cut(batch: Any, key: Array, count: int) -> tuple[Any, Array]:
    """The microbatches, every leaf [count, ...], and the key of each."""
    parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
    return parts, jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def _joined(embeddings: Embeddings) -> Embeddings:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), embeddings)


def _forward(
    encode: Encode, params: Any, batch_stats: Any, each: Any, statistics: str, norm_depth: int
) -> tuple[Embeddings, Any, Any, list[tuple[Any, Callable[[Any], tuple[Any]]]]]:
    """The statistics, pass after pass, then the embeddings.

    Returns (embeddings of each microbatch, running averages, moments that normalised them, and of each pass the moments
    it was given and how a gradient by those it gave leads back to those of its microbatches).
    """

    def forward(given: Any, part: Any) -> tuple[Embeddings, Any]:
        return encode(params, part[0], part[1], given)

    def moments(given: Any, part: Any) -> Any:
        return forward(given, part)[1]  # what else the towers compute is dead code here

    given = lax.stop_gradient(running_moments(batch_stats)) if statistics == "running" else {}
    passes: list[tuple[Any, Callable[[Any], tuple[Any]]]] = []
    for _ in range(norm_depth if statistics == "exact" else 0):
        found = _map(partial(moments, given), each)
        merged, of_found = jax.vjp(merge, found)
        passes.append((given, of_found))
        given = merged
    embeddings, found = _map(partial(forward, given), each)
    if not jax.tree.leaves(found):
        return embeddings, batch_stats, given, passes
    if statistics == "local":  # as over devices: the average of what each would have
        batch_stats = jax.tree.map(lambda x: x.mean(0), jax.vmap(advance, (None, 0))(batch_stats, found))
    else:
        batch_stats = advance(batch_stats, merge(found) if statistics == "running" else given)
    return embeddings, batch_stats, given, passes


def _map(fn: Callable[[Any], Any], each: Any) -> Any:
    """`fn` of every microbatch, one after another; results stacked."""
    return lax.scan(lambda _, part: (None, fn(part)), None, each)[1]


def _pull(fn: Callable[..., Any], params: Any, given: Any, each: Any, cotangents: Any) -> tuple[Any, Any]:
    """Gradients of sum(fn(params, given, microbatch) * cotangent) by params and given."""

    def visit(sums: Any, part: tuple[Any, Any]) -> tuple[Any, None]:
        inputs, cotangent = part
        _, pull = jax.vjp(lambda params, given: fn(params, given, inputs), params, given)
        return jax.tree.map(jnp.add, sums, pull(cotangent)), None

    zeros = jax.tree.map(jnp.zeros_like, (params, given))
    return lax.scan(visit, zeros, (each, cotangents))[0]
