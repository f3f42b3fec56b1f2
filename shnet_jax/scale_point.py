"""One point of a scaling study, in a process of its own: `python -m shnet_jax.scale_point CONFIG.json OUT.json`.

The process ends with the point: what one point leaves behind (compiled programs, memory that the allocator keeps, a
crash for want of memory) does not reach the next. Called by `scaling`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.data.batches import gather
from shnet_jax.experiment import assemble, init_variables
from shnet_jax.losses import total
from shnet_jax.models.contract import RetrievalModel, scorer
from shnet_jax.observe.compiled import compile_lowered, memory
from shnet_jax.observe.files import write_json
from shnet_jax.observe.machine import describe as describe_machine
from shnet_jax.observe.work import work
from shnet_jax.parallel import axis
from shnet_jax.parallel.mapping import Mapped, make_mesh, map_encode, map_step, put_batch, replicate
from shnet_jax.plan.programs import lower_train
from shnet_jax.plan.subject import describe, random_batch
from shnet_jax.plan.subject import variables as variables_of
from shnet_jax.train.optim import make_optimiser, schedule
from shnet_jax.train.setup import build_step, setup_training, training_data
from shnet_jax.train.state import TrainState, create_state
from shnet_jax.train.step import make_step
from shnet_jax.train.workdir import load_config
from shnet_jax.types import DATA, Array, Batch, Context, Embedding

RANDOM_BATCHES = 4
"""Different random batches, taken in turn."""

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that a training step needs. host_batches: endless. table: resident features, {} without."""

    config: ConfigDict | FrozenConfigDict
    model: RetrievalModel
    mesh: Mesh
    step: Mapped
    state: TrainState
    host_batches: Iterator[HostBatch]
    table: dict[str, Any]


def compiled_figures(lowered: jax.stages.Lowered) -> dict[str, Any]:
    """What the compiler knows of a program, for one device: bytes of memory, operations, bytes of each collective."""
    start = time.perf_counter()
    compiled = compile_lowered(lowered)
    seconds = time.perf_counter() - start
    found, size = work(compiled.as_text()), memory(compiled)
    return {
        "compile_seconds": seconds,
        "memory": dataclasses.asdict(size) | {"peak": size.peak},
        "flops": found.flops,
        "traffic": found.bytes,
        "collectives": found.collectives,
        "loops_once": found.loops_once,
        "hidden": found.hidden,
    }


def compile_point(config: ConfigDict) -> dict[str, Any]:
    """The figures of the step for devices whose speed says nothing; no array is made."""
    mesh = make_mesh(config.parallel.devices)
    return compiled_figures(lower_train(describe(config), mesh, config.train.batch_size // mesh.size))


def measure_point(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """The figures of the step, and its seconds: `step`, and how much of them each part takes alone (see `parts`).

    Yields all that is known as soon as the step, and then each part, has been measured: a part may not fit in memory.
    """
    setup = from_dataset(config) if config.data.dir else from_random(config)
    warmup, steps = config.scale.warmup_steps, config.scale.steps

    def put(batch: HostBatch) -> Any:
        return put_batch(batch, setup.mesh, config.parallel.mapping)

    resident = put(next(setup.host_batches))
    figures = compiled_figures(setup.step.lower(setup.state, resident, setup.table))
    initial = jax.device_get((setup.state.params, setup.state.batch_stats))  # the step takes the state's memory

    state, alone = steps_in_turn(setup.step, setup.state, lambda: resident, setup.table, warmup, steps)
    state, reading = steps_in_turn(setup.step, state, lambda: put(next(setup.host_batches)), setup.table, warmup, steps)
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in setup.mesh.local_devices]
    del state
    seconds = {"step": reading, "input": max(0.0, reading - alone)}
    if setup.mesh.size == 1:
        seconds["collectives"] = 0.0  # there is nobody to send to
    figures |= {
        "device_peak": max((peak for peak in peaks if peak is not None), default=None),
        "seconds": seconds,
        "examples_per_second": config.train.batch_size / reading,
    }
    yield figures
    if config.parallel.shard_params:
        return
    for name, call in parts(setup, initial, resident):
        seconds[name] = median_seconds(call, warmup, steps)
        yield figures
    seconds["rest"] = reading - sum(value for name, value in seconds.items() if name != "step")
    yield figures


def from_dataset(config: ConfigDict) -> Setup:
    """The run of config.data.dir, as training has it."""
    experiment = assemble(config)
    built = setup_training(experiment)
    iterator, table = training_data(experiment, built.mesh)
    state = built.first_state(init_variables(experiment, experiment.config.seed))
    return Setup(experiment.config, experiment.model, built.mesh, built.step, state, iterator, table)


def from_random(config: ConfigDict) -> Setup:
    """Random weights and random batches of the sizes in config.plan."""
    subject = describe(config)
    config, mesh = subject.config, make_mesh(config.parallel.devices)
    per_epoch = max(1, subject.captions // config.train.batch_size)
    shapes = variables_of(subject)
    built = build_step(FrozenConfigDict(config), subject.model, mesh, shapes, per_epoch, 1000 * per_epoch)
    batches = [random_batch(subject, config.train.batch_size, seed) for seed in range(RANDOM_BATCHES)]
    one: Any = random_batch(subject, config.data.captions_per_image, 0)
    init = jax.jit(lambda key: subject.model.init(key, gather({}, one), train=False))
    variables = nn.meta.unbox(dict(init(jax.random.key(config.seed))))
    state = built.first_state({name: variables.get(name, {}) for name in ("params", "batch_stats")})
    return Setup(config, subject.model, mesh, built.step, state, itertools.cycle(batches), {})


def steps_in_turn(
    step: Mapped, state: TrainState, batch: Callable[[], Any], table: Any, warmup: int, steps: int
) -> tuple[TrainState, float]:
    """(the state afterwards, median seconds of a step). As in training, one step is always on its way."""
    ends, pending = [], None
    for _ in range(warmup + steps + 2):
        state, metrics = step(state, batch(), table)
        if pending is not None:
            jax.block_until_ready(pending)
            ends.append(time.perf_counter())
        pending = metrics["loss"]
    jax.block_until_ready(pending)
    between = [after - before for before, after in itertools.pairwise(ends)]
    return state, statistics.median(between[-steps:])


def median_seconds(call: Callable[[], Any], warmup: int, steps: int) -> float:
    """Of a call and the wait for its result, after `warmup` calls and one that compiles."""
    seconds = []
    for _ in range(1 + warmup + steps):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[-steps:])


def parts(setup: Setup, initial: tuple[Any, Any], batch: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of the parts of a step, each a program of its own.

    initial: (params, batch_stats) on the host. One after another, so that the memory of one is free for the next.
    """
    params, batch_stats = initial
    yield "encode", _encode(setup, params, batch_stats, batch)
    yield "loss", _loss(setup, params, batch_stats, batch)
    if setup.mesh.size > 1:
        yield "collectives", _collectives(setup, params, batch)
    yield "optimiser", _optimiser(setup, params, batch)


def _encode(setup: Setup, params: Any, batch_stats: Any, batch: Any) -> Callable[[], Any]:
    """Both towers forward and backward under a trivial loss, microbatches included; gradients stay where they are."""
    train = setup.config.train

    def trivial(images: Embedding, texts: Embedding, ids: Array, ctx: Context) -> dict[str, Array]:
        floats = [x for x in jax.tree.leaves((images, texts)) if jnp.issubdtype(x.dtype, jnp.floating)]
        return {"loss": sum((jnp.sum(x, dtype=jnp.float32) for x in floats), jnp.zeros(()))}

    own = make_step(
        setup.model,
        trivial,
        optax.identity(),
        prepare_batch=gather,
        microbatch=train.microbatch,
        statistics=train.microbatch_statistics,
    )

    def per_device(state: TrainState, batch: Batch, table: Any) -> Array:
        # One number that depends on every gradient: nothing can be left out, and nothing large is sent.
        return axis.psum(optax.global_norm(own(state, batch, table)[0].params), DATA)

    variables = {"params": params["model"], "batch_stats": batch_stats}
    state = replicate(create_state(variables, {}, optax.identity(), ema=False, seed=setup.config.seed), setup.mesh)
    mapped = map_step(per_device, setup.mesh, setup.config.parallel.mapping, donate_state=False)
    return lambda: mapped(state, batch, setup.table)


def _loss(setup: Setup, params: Any, batch_stats: Any, batch: Any) -> Callable[[], Any]:
    """Value and gradient by the embeddings, with the collectives of the loss."""
    config, mesh = setup.config, setup.mesh
    captions = config.data.captions_per_image
    _, total_loss = total.build(config.loss, 1)

    def encode(variables: Any, batch: Batch, table: Any) -> tuple[Embedding, Embedding]:
        return cast(tuple[Embedding, Embedding], setup.model.apply(variables, gather(table, batch), train=False))

    score = scorer(setup.model, params["model"])

    def per_device(loss_params: Any, found: Any) -> Array:
        def share(given: Any) -> Array:
            (images, texts), own = given
            # After the warm-up of a loss, which is another program in some of them.
            ctx = Context(step=jnp.int32(2**30), params=own, score=score, axis=DATA)
            return total_loss(images.repeat(captions), texts, jnp.repeat(found["ids"], captions), ctx)["loss"]

        value, gradient = jax.value_and_grad(share)((found["embeddings"], loss_params))
        return axis.psum(value + optax.global_norm(gradient), DATA)

    variables = replicate({"params": params["model"], "batch_stats": batch_stats}, mesh)
    embeddings = map_encode(encode, mesh, config.parallel.mapping)(variables, batch, setup.table)
    found = {"embeddings": jax.block_until_ready(embeddings), "ids": batch["image_index"]}
    loss_params = replicate(params["loss"], mesh)
    mapped = map_step(per_device, mesh, config.parallel.mapping, donate_state=False)
    return lambda: mapped(loss_params, found)


def _collectives(setup: Setup, params: Any, batch: Any) -> Callable[[], Any]:
    """The sum of the gradients over the devices, and nothing else of what a step sends."""
    mapped, gradients = gradient_sum(setup, params, batch)
    return lambda: mapped((), gradients)


def gradient_sum(setup: Setup, params: Any, batch: Any) -> tuple[Mapped, Any]:
    """(program, its gradients): the all-reduce of a step, of arrays like the gradients, which are ready and differ.

    Were they the same on all devices, and the compiler knew it, it could multiply instead.
    """

    def own(params: Any, batch: Batch) -> Any:
        del batch  # a mapped function has one
        return jax.tree.map(lambda x: (x * axis.axis_index(DATA))[None], params)

    def per_device(state: Any, gradients: Any) -> Any:
        del state  # likewise
        return axis.psum(jax.tree.map(lambda x: x[0], gradients), DATA)

    mesh, mapping = setup.mesh, setup.config.parallel.mapping
    gradients = map_encode(own, mesh, mapping)(replicate(params, mesh), {"image_index": batch["image_index"]})
    return map_step(per_device, mesh, mapping, donate_state=False), jax.block_until_ready(gradients)


def _optimiser(setup: Setup, params: Any, batch: Any) -> Callable[[], Any]:
    """An update from gradients that are there; clipping included, the running average of parameters not."""
    tx = make_optimiser(setup.config, schedule(setup.config, 1000, 1000))

    def per_device(state: tuple[Any, Any], batch: Batch, gradient: Any) -> tuple[Any, Any]:
        del batch  # a mapped function has one
        updates, opt_state = tx.update(gradient, state[1], state[0])
        return optax.apply_updates(state[0], updates), opt_state

    state = replicate((params, tx.init(params)), setup.mesh)
    gradient = replicate(params, setup.mesh)
    mapped = map_step(per_device, setup.mesh, setup.config.parallel.mapping)
    rows = {"image_index": batch["image_index"]}

    def call() -> Any:
        nonlocal state
        state = mapped(state, rows, gradient)  # takes the memory of the state before
        return state

    return call


def main(argv: list[str] | None = None) -> None:
    """Writes OUT: the point of CONFIG or, without one, what this machine is."""
    parser = argparse.ArgumentParser(description="One point of a scaling study; called by main.py --mode=scale.")
    parser.add_argument("--config", type=Path, help="configuration of the point; without it OUT describes the machine")
    parser.add_argument("--compile_only", action="store_true", help="the compiler's figures only, nothing is run")
    parser.add_argument("--attached", action="store_true", help="end when standard input ends")
    parser.add_argument("out", type=Path)
    given = parser.parse_args(argv)
    if given.attached:
        threading.Thread(target=_end_with_input, daemon=True).start()
    if given.config is None:
        results: Iterable[dict[str, Any]] = [describe_machine()]
    else:
        config = load_config(given.config)
        results = [compile_point(config)] if given.compile_only else measure_point(config)
    for found in results:
        write_json(given.out, found)


def _end_with_input() -> None:
    """A study that was killed and started again does not find the point that it left, still at work beside its own."""
    while os.read(0, 1024):  # not sys.stdin, whose lock this thread would hold when the point is done
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
