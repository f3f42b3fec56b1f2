"""The exact gradient of a large batch, encoded in microbatches so that memory does not grow with the batch.

Gradient caching (Gao et al. 2021, arXiv 2101.06983): encode every microbatch and keep its embeddings, differentiate the
loss by all embeddings, then encode every microbatch once more and pull its part of that gradient back. Each microbatch
draws its dropout from its own key, the same in all passes.

BatchNorm ties the microbatches of a device together. `statistics` chooses which moments normalise:

  exact    those of the device's whole batch, with their gradient: `norm_depth` further passes, forward and backward
  local    each microbatch's, as if it were on a device of its own
  running  the running averages, as constants

In all three the running averages take up the moments of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.models.mlp import advance, merge, running_moments
from shnet_jax.types import Array, Batch, Embedding

STATISTICS = ("exact", "local", "running")

Embeddings = tuple[Embedding, Embedding]


Encode = Callable[[Any, Batch, Array, Any], tuple[Embeddings, Any]]
"""Function (params, microbatch, key, moments) -> embeddings and batch moments of the microbatch. It normalises with
`moments`, or with its own where they are {}."""

LocalLoss = Callable[[Any, Embeddings], tuple[Array, dict[str, Array]]]
"""Function (params, embeddings of the device's whole batch) -> this device's share of the loss, and metrics."""


@dataclasses.dataclass(frozen=True)
class Splitting:
    """Splitting of a device's batch into `count` microbatches, with one of STATISTICS.

    norm_depth: BatchNorms on the longest path through a tower; 0: there is none.
    """

    count: int
    statistics: str
    norm_depth: int


class Microbatch(NamedTuple):
    """A part of the batch and its random key; stacked, every leaf is [count, ...]."""

    batch: Batch
    key: Array


class MomentsPass(NamedTuple):
    """One pass that computed moments of the whole batch.

    given: the moments that normalised it. pull: from a gradient by the merged moments to one by those of each
    microbatch.
    """

    given: Any
    pull: Callable[[Any], tuple[Any]]


class Forward(NamedTuple):
    """The forward passes: embeddings of each microbatch [count, ...], and the running averages after the batch.

    moments: those that normalised the embeddings. passes: the passes that computed them, in order.
    """

    embeddings: Embeddings
    batch_stats: Any
    moments: Any
    passes: list[MomentsPass]


def cached_gradients(
    encode: Encode, local_loss: LocalLoss, params: Any, batch_stats: Any, batch: Batch, key: Array, splitting: Splitting
) -> tuple[Any, dict[str, Array], Any]:
    """Gradient of `local_loss(params, embeddings)[0]` by `params`, of this device's batch in microbatches.

    batch: every leaf divides into `splitting.count` equal parts along its first axis.
    Returns (gradient, metrics, running averages after this batch).
    """
    microbatches = _cut(batch, key, splitting.count)
    forward = _forward(encode, params, batch_stats, microbatches, splitting)
    embeddings = _joined(forward.embeddings)

    # Masks are no numbers to differentiate by, so they are put back inside.
    def loss_of(params: Any, unmasked: Embeddings) -> tuple[Array, dict[str, Array]]:
        images, texts = (dataclasses.replace(x, mask=y.mask) for x, y in zip(unmasked, embeddings, strict=True))
        return local_loss(params, (images, texts))

    # Backward: the loss, then the embeddings, then the moments in the opposite order of their passes.
    value_and_grad = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
    (_, metrics), (gradient, by_embeddings) = value_and_grad(params, _without_masks(embeddings))
    cotangents = jax.tree.map(lambda x, like: x.reshape(like.shape), by_embeddings, _without_masks(forward.embeddings))
    by_params, by_moments = _pull(partial(_embed, encode), params, forward.moments, microbatches, cotangents)
    gradient = jax.tree.map(jnp.add, gradient, by_params)
    for given, pull in reversed(forward.passes):
        cotangents = pull(by_moments)[0]
        by_params, by_moments = _pull(partial(_measure, encode), params, given, microbatches, cotangents)
        gradient = jax.tree.map(jnp.add, gradient, by_params)
    return gradient, metrics, forward.batch_stats


def embed_in_parts(
    encode: Encode, params: Any, batch_stats: Any, batch: Batch, key: Array, splitting: Splitting
) -> tuple[Embeddings, Any]:
    """Embeddings of this device's whole batch and the running averages after it; arguments as in `cached_gradients`."""
    forward = _forward(encode, params, batch_stats, _cut(batch, key, splitting.count), splitting)
    return _joined(forward.embeddings), forward.batch_stats


def _embed(encode: Encode, params: Any, moments: Any, part: Microbatch) -> Embeddings:
    """Embeddings of a microbatch, without masks."""
    return _without_masks(encode(params, part.batch, part.key, moments)[0])


def _measure(encode: Encode, params: Any, moments: Any, part: Microbatch) -> Any:
    """Batch moments of a microbatch; what else the towers compute is dead code."""
    return encode(params, part.batch, part.key, moments)[1]


def _without_masks(embeddings: Embeddings) -> Embeddings:
    images, texts = (dataclasses.replace(x, mask=None) for x in embeddings)
    return images, texts


def _cut(batch: Batch, key: Array, count: int) -> Microbatch:
    """The microbatches, stacked, and the key of each."""
    parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
    return Microbatch(parts, jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count)))


def _joined(embeddings: Embeddings) -> Embeddings:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), embeddings)


def _forward(encode: Encode, params: Any, batch_stats: Any, microbatches: Microbatch, splitting: Splitting) -> Forward:
    """The moments, pass after pass, then the embeddings."""
    statistics = splitting.statistics
    moments = lax.stop_gradient(running_moments(batch_stats)) if statistics == "running" else {}
    passes = []
    for _ in range(splitting.norm_depth if statistics == "exact" else 0):
        each = _map(partial(_measure, encode, params, moments), microbatches)
        merged, pull = jax.vjp(merge, each)
        passes.append(MomentsPass(moments, pull))
        moments = merged
    embeddings, each = _map(lambda part: encode(params, part.batch, part.key, moments), microbatches)
    if not jax.tree.leaves(each):  # no BatchNorm
        return Forward(embeddings, batch_stats, moments, passes)
    if statistics == "local":  # as over devices: the average of what each would have
        advanced = jax.vmap(advance, (None, 0))(batch_stats, each)
        batch_stats = jax.tree.map(lambda x: x.mean(0), advanced)
    else:
        batch_stats = advance(batch_stats, merge(each) if statistics == "running" else moments)
    return Forward(embeddings, batch_stats, moments, passes)


def _map(fn: Callable[[Microbatch], Any], microbatches: Microbatch) -> Any:
    """`fn` of every microbatch, one after another; results stacked."""
    return lax.scan(lambda _, part: (None, fn(part)), None, microbatches)[1]


def _pull(
    fn: Callable[..., Any], params: Any, moments: Any, microbatches: Microbatch, cotangents: Any
) -> tuple[Any, Any]:
    """Gradients of sum(fn(params, moments, microbatch) * cotangent) by params and moments."""

    def visit(sums: Any, part: tuple[Microbatch, Any]) -> tuple[Any, None]:
        microbatch, cotangent = part
        _, pull = jax.vjp(lambda params, moments: fn(params, moments, microbatch), params, moments)
        return jax.tree.map(jnp.add, sums, pull(cotangent)), None

    zeros = jax.tree.map(jnp.zeros_like, (params, moments))
    return lax.scan(visit, zeros, (microbatches, cotangents))[0]
