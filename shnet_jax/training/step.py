"""The training step. Gradients are summed over the devices in one place, `reduce_over_devices`.

`train_step` is a function of one device on the named axis `data`, and parallel/mapping.py maps it over the devices:

  key_pass              EMA update, keys and queues of momentum encoders, where there are any (training/momentum.py)
  gradients             the gradient of this device's share of the loss, at once or in microbatches
  reduce_over_devices   the `psum` of gradients and metrics; shares of the loss add up (losses/pairs.py)
  apply_update          the optimiser, unless loss or gradient is not finite
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from shnet_jax.models.contract import RetrievalModel, scorer
from shnet_jax.parallel import axis, sharding
from shnet_jax.training import momentum
from shnet_jax.training.microbatch import Embeddings, Splitting, cached_gradients, embed_in_parts
from shnet_jax.training.momentum import MomentumState
from shnet_jax.training.state import TrainState
from shnet_jax.types import Array, Batch, Context, Keys, count_texts

Metrics = dict[str, Array]
Step = Callable[..., tuple[TrainState, Metrics]]
Apply = Callable[[RetrievalModel, dict[str, Any], Batch, Array, str], tuple[Embeddings, Any]]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """The constants of a step.

    total_loss: (images, texts, ids, ctx) -> {"loss": this device's share, ...}; see losses/pairs.py.
    prepare_batch: (table, raw batch) -> model input (looks resident features up, applies masks).
    ema: decay of the running average that is evaluated; 0: there is none.
    microbatch, statistics: pairs that a device encodes at once, 0: all of its own; see training/microbatch.py.
    split: axes along which the parameters are split over the devices (`parallel.sharding.split_axes`); None: none is.
    project: the losses' parameters -> within their bounds, after each update (`losses.total.projection`).
    score_dtype: of the operands of training scores, `config.loss.pairs.dtype`.
    key_options: of the momentum encoders, whose state is `state.momentum` (training/momentum.py); None: there are none.
    """

    model: RetrievalModel
    total_loss: Callable[..., Metrics]
    tx: optax.GradientTransformation
    prepare_batch: Callable[[Any, Batch], Batch]
    ema: float = 0.0
    stop_on_nonfinite: bool = True
    microbatch: int = 0
    statistics: str = "exact"
    axis_name: str | None = None
    split: Any = None
    project: Callable[[Any], Any] | None = None
    score_dtype: str = "float32"
    key_options: momentum.Momentum | None = None


class StepInput(NamedTuple):
    """One device's batch as a step reads it.

    table: resident features, {} or None in streaming mode. key: this device's random key of this step.
    ids: [n] int32, equal for images that are no negatives of each other. captions: texts of each image.
    """

    batch: Batch
    table: Any
    key: Array
    ids: Array
    captions: int

    @property
    def pairs(self) -> int:
        """Image-text pairs of this device."""
        return count_texts(self.batch)


class Gradients(NamedTuple):
    """The gradient by the parameters, metrics, and the running statistics after the batch."""

    params: Any
    metrics: Metrics
    batch_stats: Any


def make_step(
    model: RetrievalModel, total_loss: Callable[..., Metrics], tx: optax.GradientTransformation, **options: Any
) -> Step:
    """The step `(state, batch, table) -> (state, metrics)` of one device, a pure function; options of StepOptions."""
    return partial(train_step, StepOptions(model, total_loss, tx, **options))


def train_step(options: StepOptions, state: TrainState, batch: Batch, table: Any = None) -> tuple[TrainState, Metrics]:
    """One step of the optimiser.

    A batch whose loss or gradient is not finite changes nothing but the counters `step` and `nonfinite`. With
    `stop_on_nonfinite` no later batch changes anything: the state stays the one right after the first such batch.
    """
    if options.split is None:
        options = dataclasses.replace(options, split=jax.tree.map(lambda _: sharding.WHOLE, state.params))
    inputs = step_input(options, state, batch, table)
    next_momentum, keys = key_pass(options, state, inputs) if options.key_options is not None else (None, None)
    reduced = reduce_over_devices(options, gradients(options, state, inputs, keys))
    return apply_update(options, state, reduced, next_momentum)


def reduce_over_devices(options: StepOptions, local: Gradients) -> Gradients:
    """Sums gradients and metrics over the devices, and averages the running statistics.

    Split parameters are the exception: the gradient of their gathering is a reduce-scatter, so theirs arrive summed
    (parallel/sharding.py). Adds the metric grad_norm.
    """
    params = sharding.reduce(local.params, options.split, options.axis_name)
    metrics = axis.psum(local.metrics, options.axis_name)
    metrics["grad_norm"] = sharding.global_norm(params, options.split, options.axis_name)
    return Gradients(params, metrics, axis.pmean(local.batch_stats, options.axis_name))


def step_input(options: StepOptions, state: TrainState, batch: Batch, table: Any) -> StepInput:
    """The batch with its random key, a function of (seed, step, device), and the ids that the losses compare."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    key = jax.random.fold_in(key, axis.axis_index(options.axis_name))
    ids = batch.get("identity", batch["image_index"])  # two images of one person are no negatives
    return StepInput(batch, table, key, ids, count_texts(batch) // batch["image_index"].shape[0])


def encode(
    options: StepOptions,
    apply: Apply,
    inputs: StepInput,
    batch_stats: Any,
    collection: str,
    params: Any,
    batch: Batch,
    key: Array,
    moments: Any,
) -> tuple[Embeddings, Any]:
    """Embeddings of a batch or microbatch in training, and the model's `collection` ("batch_stats" or "moments").

    apply: `_apply_model` or, for the key encoders, `momentum.encode`. params: {"model": this device's parts}.
    moments: those that BatchNorms normalise with; {}: those of the batch.
    """
    weights = sharding.gather(params["model"], options.split["model"], options.axis_name)
    variables = {"params": weights, "batch_stats": batch_stats, "given_moments": moments}
    return apply(options.model, variables, options.prepare_batch(inputs.table, batch), key, collection)


def _apply_model(
    model: RetrievalModel, variables: dict[str, Any], batch: Batch, key: Array, collection: str
) -> tuple[Embeddings, Any]:
    embeddings, updated = model.apply(variables, batch, train=True, rngs={"dropout": key}, mutable=[collection])
    return embeddings, updated.get(collection, {})


def key_pass(options: StepOptions, state: TrainState, inputs: StepInput) -> tuple[MomentumState, Keys]:
    """The momentum state after this batch, and the keys and queues that the loss compares with.

    The loss gets the queues as they are before the keys of this batch enter them.
    """
    key_options, last = options.key_options, state.momentum
    assert key_options is not None and last is not None
    updated = momentum.ema_update(key_options, last, state.params["model"], state.batch_stats, state.step)
    key = jax.random.fold_in(inputs.key, momentum.SEED)
    encoder = partial(encode, options, partial(momentum.encode, key_options), inputs, updated.batch_stats)
    params, splitting = {"model": updated.params}, _splitting(options, inputs)
    if splitting.count > 1:
        arrays = params, updated.batch_stats, inputs.batch, key
        (images, texts), batch_stats = embed_in_parts(partial(encoder, "moments"), *arrays, splitting)
    else:
        (images, texts), batch_stats = encoder("batch_stats", params, inputs.batch, key, {})
    active = state.step >= key_options.from_step
    keys = Keys(images.repeat(inputs.captions), texts, updated.images, updated.texts, active)
    updated = dataclasses.replace(updated, batch_stats=axis.pmean(batch_stats, options.axis_name))
    return momentum.enqueue(updated, (images, texts), inputs.ids, inputs.captions, options.axis_name), keys


def local_loss(
    options: StepOptions, step: Array, inputs: StepInput, keys: Keys | None, params: Any, embeddings: Embeddings
) -> tuple[Array, Metrics]:
    """This device's share of the loss of the global batch, and its metrics."""
    images, texts = embeddings
    name, split = options.axis_name, options.split
    loss_params = sharding.gather(params["loss"], split["loss"], name)
    trained, axes = ({n: tree["model"][n] for n in options.model.score_params} for tree in (params, split))
    score = scorer(options.model, sharding.gather(trained, axes, name), options.score_dtype)
    ctx = Context(step=step, params=loss_params, score=score, axis=name, keys=keys, captions=inputs.captions)
    ids = jnp.repeat(inputs.ids, inputs.captions)
    metrics = options.total_loss(images.repeat(inputs.captions), texts, ids, ctx)
    return metrics["loss"], metrics


def gradients(options: StepOptions, state: TrainState, inputs: StepInput, keys: Keys | None) -> Gradients:
    """The gradient of this device's share of the loss."""
    encoder = partial(encode, options, _apply_model, inputs, state.batch_stats)
    loss_of = partial(local_loss, options, state.step, inputs, keys)
    splitting = _splitting(options, inputs)
    if splitting.count > 1:
        encode_part = sharding.remat_gather(partial(encoder, "moments"), options.split)
        arrays = state.params, state.batch_stats, inputs.batch, inputs.key
        return Gradients(*cached_gradients(encode_part, loss_of, *arrays, splitting))
    encode_all = sharding.remat_gather(partial(encoder, "batch_stats"), options.split)

    def forward(params: Any) -> tuple[Array, tuple[Metrics, Any]]:
        embeddings, batch_stats = encode_all(params, inputs.batch, inputs.key, {})
        loss, metrics = loss_of(params, embeddings)
        return loss, (metrics, batch_stats)

    (_, (metrics, batch_stats)), grads = jax.value_and_grad(forward, has_aux=True)(state.params)
    return Gradients(grads, metrics, batch_stats)


def _splitting(options: StepOptions, inputs: StepInput) -> Splitting:
    count = inputs.pairs // options.microbatch if 0 < options.microbatch < inputs.pairs else 1
    return Splitting(count, options.statistics, options.model.norm_depth)


def apply_update(
    options: StepOptions, state: TrainState, reduced: Gradients, next_momentum: MomentumState | None
) -> tuple[TrainState, Metrics]:
    """The state after the step, and its metrics, which are 0 where the batch changed nothing.

    finite, nonfinite: 1 for a batch that was applied, and for one whose loss or gradient is not finite. Both are 0 once
    training has stopped.
    """
    finite = jnp.isfinite(reduced.metrics["loss"]) & jnp.isfinite(reduced.metrics["grad_norm"])
    stopped = state.nonfinite > 0 if options.stop_on_nonfinite else jnp.zeros((), bool)
    applied, faulty = finite & ~stopped, ~finite & ~stopped
    # A branch, not a choice between two results: the arrays of the old state can be updated where they are.
    updated = lax.cond(applied, partial(_updated, options), lambda state, *_: state, state, reduced, next_momentum)
    state = dataclasses.replace(updated, step=state.step + ~stopped, nonfinite=state.nonfinite + faulty)
    metrics = {name: jnp.where(applied, value, 0.0) for name, value in reduced.metrics.items()}
    return state, metrics | {"finite": applied.astype(jnp.float32), "nonfinite": faulty.astype(jnp.float32)}


def _updated(
    options: StepOptions, state: TrainState, reduced: Gradients, next_momentum: MomentumState | None
) -> TrainState:
    """The state with the optimiser's update and its averages; the counters are as they were."""
    tx, norm = optax.with_extra_args_support(options.tx), reduced.metrics["grad_norm"]
    updates, opt_state = tx.update(reduced.params, state.opt_state, state.params, grad_norm=norm)
    params = optax.apply_updates(state.params, updates)
    if options.project is not None:
        params = params | {"loss": options.project(params["loss"])}
    average = state.ema
    if average is not None:
        # Averages over few steps forget the initial parameters faster.
        decay = jnp.minimum(options.ema, (1.0 + state.step) / (10.0 + state.step))
        latest = {"params": params["model"], "batch_stats": reduced.batch_stats}
        average = optax.incremental_update(latest, average, 1.0 - decay)
    return dataclasses.replace(
        state, params=params, batch_stats=reduced.batch_stats, opt_state=opt_state, ema=average, momentum=next_momentum
    )
