"""The training step of one device on the named axis `data`. parallel/mapping.py maps it over the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from shnet_jax.models.contract import RetrievalModel, scorer
from shnet_jax.parallel import axis, sharding
from shnet_jax.train import momentum
from shnet_jax.train.microbatch import Encode, cached_gradients, embed_in_parts
from shnet_jax.train.state import TrainState
from shnet_jax.types import Array, Batch, Context, Embedding, Keys

Step = Callable[..., tuple[TrainState, dict[str, Array]]]


def make_step(
    model: RetrievalModel,
    total_loss: Callable[..., dict[str, Array]],
    tx: optax.GradientTransformation,
    *,
    finish: Callable[[Any, Batch], Batch],
    ema: float = 0.0,
    stop_on_nonfinite: bool = True,
    microbatch: int = 0,
    statistics: str = "exact",
    axis_name: str | None = None,
    split: Any = None,
    key_options: momentum.Momentum | None = None,
) -> Step:
    """One optimiser step as a pure function `(state, batch, table) -> (state, metrics)` of one device.

    finish: (table, raw batch) -> model input (looks resident features up, applies masks).
    total_loss: (images, texts, ids, ctx) -> {"loss": this device's share, ...}; see losses/pairs.py for the convention.
    microbatch, statistics: pairs that a device encodes at once, 0: all of its own; see train/microbatch.py.
    split: axes along which the parameters are split over the devices (`parallel.sharding.split_axes`); None: none is.
    key_options: of the momentum encoders, whose state is `state.momentum` (train/momentum.py); None: there are none.
    A batch whose loss or gradient is not finite changes nothing but the counters; with `stop_on_nonfinite` nor does any
    batch after it, so that the state the loop saves is the one before the fault.
    """

    def step(state: TrainState, batch: Batch, table: Any = None) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        key = jax.random.fold_in(key, axis.axis_index(axis_name))
        captions = batch["tokens"].shape[0] // batch["image_index"].shape[0]
        ids = batch.get("identity", batch["image_index"])  # two images of one person are no negatives
        axes = jax.tree.map(lambda _: sharding.WHOLE, state.params) if split is None else split
        pairs = batch["tokens"].shape[0]
        count = pairs // microbatch if 0 < microbatch < pairs else 1  # of microbatches
        parts: dict[str, Any] = {"count": count, "statistics": statistics, "norm_depth": model.norm_depth}

        def encode(mutable: str, params: Any, batch: Batch, key: Array, given: Any) -> tuple[Any, Any]:
            weights = sharding.gather(params["model"], axes["model"], axis_name)
            variables = {"params": weights, "batch_stats": state.batch_stats, "given_moments": given}
            rngs = {"dropout": key}
            found, updated = model.apply(variables, finish(table, batch), train=True, rngs=rngs, mutable=[mutable])
            return found, updated.get(mutable, {})

        def encoder(mutable: str) -> Encode:
            return sharding.regathering(partial(encode, mutable), axes)

        def by_keys(options: momentum.Momentum) -> tuple[momentum.MomentumState, Keys]:
            """The momentum encoders after this batch, and what the loss is given of them."""
            assert state.momentum is not None
            moved = momentum.follow(options, state.momentum, state.params["model"], state.batch_stats, state.step)

            def encode_keys(mutable: str, params: Any, batch: Batch, key: Array, given: Any) -> tuple[Any, Any]:
                weights = sharding.gather(params, axes["model"], axis_name)
                variables = {"params": weights, "batch_stats": moved.batch_stats, "given_moments": given}
                return momentum.encode(options, model, variables, finish(table, batch), key, mutable)

            own = jax.random.fold_in(key, momentum.SEED)
            if count > 1:
                encode_part = partial(encode_keys, "moments")
                found, stats = embed_in_parts(encode_part, moved.params, moved.batch_stats, batch, own, **parts)
            else:
                found, stats = encode_keys("batch_stats", moved.params, batch, own, {})
            met = momentum.meet(options, moved, found, captions, state.step)  # before this batch enters the queues
            moved = dataclasses.replace(moved, batch_stats=axis.pmean(stats, axis_name))
            return momentum.enqueue(moved, found, ids, captions, axis_name), met

        moved, met = (None, None) if key_options is None else by_keys(key_options)

        def share(params: Any, embeddings: tuple[Embedding, Embedding]) -> tuple[Array, dict[str, Array]]:
            images, texts = embeddings
            loss_params = sharding.gather(params["loss"], axes["loss"], axis_name)
            own, own_axes = ({n: tree["model"][n] for n in model.score_params} for tree in (params, axes))
            score = scorer(model, sharding.gather(own, own_axes, axis_name))
            ctx = Context(step=state.step, params=loss_params, score=score, axis=axis_name, keys=met)
            terms = total_loss(images.repeat(captions), texts, jnp.repeat(ids, captions), ctx)
            return terms["loss"], terms

        def whole(params: Any) -> tuple[Array, tuple[dict[str, Array], Any]]:
            embeddings, batch_stats = encoder("batch_stats")(params, batch, key, {})
            loss, terms = share(params, embeddings)
            return loss, (terms, batch_stats)

        # Shares add up over the devices, and so do their gradients (losses/pairs.py).
        if count > 1:
            grads, terms, batch_stats = cached_gradients(
                encoder("moments"), share, state.params, state.batch_stats, batch, key, **parts
            )
        else:
            (_, (terms, batch_stats)), grads = jax.value_and_grad(whole, has_aux=True)(state.params)
        grads, metrics = sharding.reduce(grads, axes, axis_name), axis.psum(terms, axis_name)
        batch_stats = axis.pmean(batch_stats, axis_name)
        metrics["grad_norm"] = sharding.global_norm(grads, axes, axis_name)

        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        apply = finite & (state.nonfinite == 0) if stop_on_nonfinite else finite

        def update() -> tuple[Any, Any, Any, Any, Any]:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            if state.ema is None:
                return params, batch_stats, opt_state, None, moved
            # Averages over few steps forget the initial parameters faster.
            decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
            latest = {"params": params["model"], "batch_stats": batch_stats}
            return params, batch_stats, opt_state, optax.incremental_update(latest, state.ema, 1.0 - decay), moved

        def leave() -> tuple[Any, Any, Any, Any, Any]:
            return state.params, state.batch_stats, state.opt_state, state.ema, state.momentum

        # A branch, not a choice between two results: the arrays of the old state can be updated where they are.
        params, batch_stats, opt_state, average, moved = lax.cond(apply, update, leave)

        # A batch that is not finite counts only as such in the means of a log line.
        metrics = {name: jnp.where(finite, value, 0.0) for name, value in metrics.items()}
        metrics |= {"finite": finite.astype(jnp.float32), "nonfinite": (~finite).astype(jnp.float32)}
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=average,
            momentum=moved,
            nonfinite=state.nonfinite + ~finite,
        )
        return state, metrics

    return step
