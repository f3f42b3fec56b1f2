"""The parts of the training step that a scaling study times alone: functions of training/step.py, each a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.data.batches import gather
from shnet_jax.parallel import axis, sharding
from shnet_jax.parallel.mapping import Mapped, map_encode, map_step, put_batch, replicate
from shnet_jax.training.setup import TrainSetup
from shnet_jax.training.state import TrainState
from shnet_jax.training.step import Gradients, apply_update, gradients, key_pass, local_loss, step_input
from shnet_jax.types import DATA, Array, Batch, Context, Embedding, Keys

STEADY_STEP = 2**30
"""Number of the steps that are measured: after the warm-up of every loss, as nearly all steps of a training are."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run. variables: initial, on the host. batches: endless, on the host. table: resident features or {}.

    A program may reuse the memory of the state it gets, so each takes a state of its own.
    """

    config: ConfigDict | FrozenConfigDict
    setup: TrainSetup
    variables: dict[str, Any]
    batches: Iterator[dict[str, np.ndarray]]
    table: dict[str, Any]

    def steady_state(self) -> TrainState:
        """A state on the devices whose step is STEADY_STEP."""
        state = self.setup.first_state(self.variables)
        return dataclasses.replace(state, step=state.step + STEADY_STEP)

    def put(self, batch: Any) -> Any:
        """The batch, rows of this process, on the devices."""
        return put_batch(batch, self.setup.mesh, self.config.parallel.mapping)

    def map(self, per_device: Callable[..., Any], **options: Any) -> Mapped:
        """The function (state, batch, table) of one device, over the devices."""
        return map_step(per_device, self.setup.mesh, self.config.parallel.mapping, **options)


class Part(NamedTuple):
    """A part of a step as a program and its arguments. in_place: it returns the next state in the memory of the old."""

    program: Mapped
    state: Any
    batch: Any
    table: Any = None
    in_place: bool = False


def encode_part(run: Run, batch: Any) -> Part:
    """The gradient of the step with the sum of the embeddings for a loss; with key encoders, their pass as well."""
    options = dataclasses.replace(run.setup.options, total_loss=_sum_of_embeddings)

    def per_device(state: TrainState, batch: Batch, table: Any) -> Array:
        inputs = step_input(options, state, batch, table)
        keys = key_pass(options, state, inputs)[1] if options.key_options else None
        key_embeddings = () if keys is None else (keys.images, keys.texts)
        return _number((gradients(options, state, inputs, keys).params, key_embeddings))

    state = dataclasses.replace(run.steady_state(), opt_state=(), ema=None)
    return Part(run.map(per_device, donate_state=False), state, batch, run.table)


def loss_part(run: Run, batch: Any) -> Part:
    """Value and gradient of the loss with respect to the embeddings, with the collectives of its strategy."""
    options, state = run.setup.options, run.steady_state()

    def encode(state: TrainState, batch: Batch, table: Any) -> Any:
        variables = {"params": state.params["model"], "batch_stats": state.batch_stats}
        return options.model.apply(variables, gather(table, batch), train=False)

    def per_device(state: TrainState, inputs: Any, table: Any) -> Array:
        step, (images, texts) = step_input(options, state, inputs["batch"], table), inputs["embeddings"]
        queues, keys = state.momentum, None
        if queues is not None:
            keys = Keys(images.repeat(step.captions), texts, queues.images, queues.texts)
        loss_of = partial(local_loss, options, state.step, step, keys)
        # allow_int: the masks of the embeddings are no numbers to differentiate by.
        value_and_grad = jax.value_and_grad(loss_of, (0, 1), has_aux=True, allow_int=True)
        (loss, _), gradient = value_and_grad(state.params, (images, texts))
        return axis.psum(loss, DATA) + _number(gradient)

    embeddings = map_encode(encode, run.setup.mesh, run.config.parallel.mapping)(state, batch, run.table)
    score_params = {name: state.params["model"][name] for name in options.model.score_params}
    params = {"model": score_params, "loss": state.params["loss"]}
    inputs = {"embeddings": jax.block_until_ready(embeddings), "batch": batch}
    return Part(
        run.map(per_device, donate_state=False),
        dataclasses.replace(state, params=params, opt_state=(), ema=None),
        inputs,
    )


def collectives_part(run: Run, batch: Any) -> Part:
    """The sum over the devices of arrays like the gradients, and nothing else of what a step sends."""
    params, mesh = jax.device_get(run.steady_state().params), run.setup.mesh
    # As rows of a batch: the compiler must not know that they are equal, or it could multiply instead.
    rows = jax.tree.map(lambda x: np.broadcast_to(x, (mesh.size, *x.shape)), params)

    def per_device(state: Any, rows: Any, table: Any) -> Any:
        return sharding.reduce(jax.tree.map(lambda x: x[0], rows), run.setup.options.split, DATA)

    return Part(run.map(per_device, donate_state=False), (), run.put(rows))


def optimiser_part(run: Run, batch: Any) -> Part:
    """The update by gradients that are ready: optimiser, clipping, running averages and the check for NaN."""
    state, metrics = run.steady_state(), {"loss": jnp.zeros(()), "grad_norm": jnp.ones(())}
    reduced = replicate(Gradients(state.params, metrics, state.batch_stats), run.setup.mesh)

    def per_device(state: TrainState, batch: Batch, reduced: Gradients) -> TrainState:
        return apply_update(run.setup.options, state, reduced, state.momentum)[0]

    return Part(run.map(per_device), state, {"image_index": batch["image_index"]}, reduced, in_place=True)


PROGRAMS: dict[str, Callable[[Run, Any], Part]] = {
    "encode": encode_part,
    "loss": loss_part,
    "collectives": collectives_part,
    "optimiser": optimiser_part,
}
"""The parts of a step, each made from the run and a batch on the devices."""


def _sum_of_embeddings(images: Embedding, texts: Embedding, ids: Array, ctx: Context) -> dict[str, Array]:
    return {"loss": sum((jnp.sum(x, dtype=jnp.float32) for x in _floats((images, texts))), jnp.zeros(()))}


def _number(tree: Any) -> Array:
    """A number that depends on all arrays: the compiler leaves nothing out, and nothing large is sent."""
    return axis.psum(optax.global_norm(_floats(tree)), DATA)


def _floats(tree: Any) -> list[Array]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
