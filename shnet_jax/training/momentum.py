"""Momentum encoders and queues of past keys (MoCo, He et al. 2020; USER, Zhang et al. 2024).

The key encoders are running averages of the model's parameters. `key_pass` in training/step.py follows USER's released
code:

  1. the EMA update, before the optimiser changes the parameters
  2. the key encoder pass over the batch, without a gradient
  3. the loss, with these keys and the queues of the batches before (losses/pairs.py)
  4. the keys of the global batch overwrite the oldest entries of the queues
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.durations import TrainingLength, given
from shnet_jax.models.contract import RetrievalModel, has_static_score
from shnet_jax.parallel import axis
from shnet_jax.types import NO_IMAGE, Array, Batch, Embedding, Queue, SetQueue

STARTS: Mapping[str, Callable[..., Array]] = {"uniform": jax.random.uniform, "gaussian": jax.random.normal}

SEED = 2**31 - 1
"""Number folded into a random key; steps and microbatches, which fold in their own number, stay below it."""


@dataclasses.dataclass(frozen=True)
class Momentum:
    """Options of `config.momentum` (configs/base.py), checked.

    dim: size of an embedding. sets: elements of each image and of each text in the queues, 0 where there are none.
    from_step: the first step in which the queues take part in the losses.
    """

    queue: int
    dim: int
    decay: float
    warm: bool
    start: str
    image_train: bool
    text_train: bool
    sets: tuple[int, int] = (0, 0)
    from_step: int = 0

    def in_training(self, tower: str) -> bool:
        """Whether the key encoder below params/`tower` runs as in training; the text tower's is "text"."""
        return self.text_train if tower == "text" else self.image_train


@struct.dataclass
class MomentumState:
    """Variables of the key encoders, as the model has them, and both queues."""

    params: Any
    batch_stats: Any
    images: Queue
    texts: Queue


def options(
    config: ConfigDict | FrozenConfigDict, model: RetrievalModel, steps_per_epoch: float, total_steps: int = 0
) -> Momentum | None:
    """The momentum encoders of a configuration; None where `config.momentum.queue` is 0.

    steps_per_epoch, total_steps: batches of an epoch and of the training (0: unknown).

    Raises ValueError for settings that do not fit together, and for a model whose score asks for more than queues hold.
    """
    m, pairs = config.momentum, config.train.batch_size
    if m.queue == 0:
        return None
    if m.queue < pairs:
        raise ValueError(
            f"config.momentum.queue is {m.queue}; it must hold a whole batch, config.train.batch_size = {pairs} pairs, "
            "or be 0"
        )
    if not 0 <= m.decay < 1:
        raise ValueError(f"config.momentum.decay is {m.decay}; it must be at least 0 and below 1")
    if m.start not in STARTS:
        raise ValueError(f"config.momentum.start is {m.start!r}; choose from {', '.join(STARTS)}")
    from_step = _from_step(config, steps_per_epoch, total_steps)
    sets = model.set_sizes
    if model.score is not RetrievalModel.score and not (any(sets) and has_static_score(model)):
        raise ValueError(
            f"config.momentum.queue is {m.queue}, and the score of the model {config.model.name!r} is neither the dot "
            "product of one vector of an image and one of a text nor one of sets of a fixed size, without parameters, "
            "which is what queues hold: set it to 0"
        )
    fields = {name: m[name] for name in ("queue", "decay", "warm", "start", "image_train", "text_train")}
    return Momentum(dim=config.model.dim, sets=sets, from_step=from_step, **fields)


def check_start(config: ConfigDict | FrozenConfigDict, steps_per_epoch: float, total_steps: int) -> None:
    """Raises ValueError where the queues of a run of `total_steps` would never take part."""
    start = given(config.momentum, "from", "config.momentum")
    if start is None or not config.momentum.queue:
        return
    first = _from_step(config, steps_per_epoch, total_steps)
    if total_steps <= first:
        raise ValueError(
            f"{start.field} is {start.value}, step {first}, and the run has {total_steps} steps: its queues would "
            "never take part"
        )


def _from_step(config: ConfigDict | FrozenConfigDict, steps_per_epoch: float, total_steps: int) -> int:
    return TrainingLength(steps_per_epoch, total_steps).steps(config.momentum, "from", "config.momentum")


def first_state(momentum: Momentum, variables: Mapping[str, Any], seed: int) -> MomentumState:
    """Key encoders equal to the model, and queues of random unit vectors, which count as negatives of everything."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), SEED))

    def unit(key: Array, *shape: int) -> Array:
        vectors = STARTS[momentum.start](key, (*shape, momentum.dim), jnp.float32)
        return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)

    def queue(key: Array, size: int) -> Queue:
        ids = jnp.full((momentum.queue,), NO_IMAGE, jnp.int32)
        plain = unit(key, momentum.queue), ids, jnp.zeros((), jnp.int32)
        return SetQueue(*plain, unit(jax.random.fold_in(key, SEED), momentum.queue, size)) if size else Queue(*plain)

    # A copy: the step donates its input, and one buffer cannot be given away twice.
    copies = jax.tree.map(jnp.copy, {name: variables.get(name, {}) for name in ("params", "batch_stats")})
    return MomentumState(copies["params"], copies["batch_stats"], *map(queue, keys, momentum.sets))


def ema_update(momentum: Momentum, state: MomentumState, params: Any, batch_stats: Any, step: Array) -> MomentumState:
    """The key encoders after their EMA update towards the model, [decay] of the old and the rest of the new.

    An encoder that runs as in training normalises by the statistics of its batch, and its running ones are its own, as
    published. An encoder that runs as in evaluation gets the average of the model's.
    """
    decay = jnp.float32(momentum.decay)
    if momentum.warm:
        decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))  # as the running average that is evaluated

    def average(latest: Any, old: Any) -> Any:
        return optax.incremental_update(latest, old, 1.0 - decay)

    stats = {
        tower: of_keys if momentum.in_training(tower) else average(batch_stats[tower], of_keys)
        for tower, of_keys in state.batch_stats.items()
    }
    return dataclasses.replace(state, params=average(params, state.params), batch_stats=stats)


def encode(
    momentum: Momentum, model: RetrievalModel, variables: dict[str, Any], batch: Batch, key: Array, collection: str
) -> tuple[tuple[Embedding, Embedding], Any]:
    """Embeddings of a batch by the key encoders, and the model's `collection` after it."""
    embeddings = []
    for method, tower in (("encode_image", "image"), ("encode_text", "text")):
        embedding, updated = model.apply(
            variables,
            batch,
            train=momentum.in_training(tower),
            method=method,
            rngs={"dropout": key},
            mutable=[collection],
        )
        embeddings.append(embedding)
        variables = {**variables, **updated}
    return (embeddings[0], embeddings[1]), variables.get(collection, {})


def enqueue(
    state: MomentumState, keys: tuple[Embedding, Embedding], ids: Array, captions: int, axis_name: str | None
) -> MomentumState:
    """The queues with the keys of the global batch, in its order; ids [n]: of this device's images."""
    given = (keys[0], ids), (keys[1], jnp.repeat(ids, captions))
    images, texts = axis.all_gather(given, axis_name)
    return dataclasses.replace(state, images=put(state.images, *images), texts=put(state.texts, *texts))


def put(queue: Queue, items: Embedding, ids: Array) -> Queue:
    """Queue after b embeddings and their ids [b] replaced the oldest ones; b is at most its size."""
    size, count = queue.ids.shape[0], ids.shape[0]
    slots = (queue.pointer + jnp.arange(count, dtype=jnp.int32)) % size
    given: dict[str, Array | None] = {"vectors": items.vector, "ids": ids}
    if isinstance(queue, SetQueue):
        given["elements"] = items.elements
    held = {name: getattr(queue, name).at[slots].set(new, unique_indices=True) for name, new in given.items()}
    return dataclasses.replace(queue, pointer=(queue.pointer + count) % size, **held)
