"""Measures one point of a scaling study in its own process: `python -m shnet_jax.scaling.point OUT.json`.

Compiled programs, memory that the allocator keeps, and crashes end with the process: they do not reach the next point.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

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
from shnet_jax.plan.planned_run import describe, random_batch, variable_shapes
from shnet_jax.plan.programs import lower_train
from shnet_jax.train.optim import make_optimiser, schedule
from shnet_jax.train.setup import build_step, setup_training, training_data
from shnet_jax.train.state import TrainState, create_state
from shnet_jax.train.step import make_step
from shnet_jax.train.workdir import load_config
from shnet_jax.types import DATA, Array, Batch, Context, Embedding

RANDOM_BATCHES = 4
"""Number of different random batches, used in turn."""


class Run(NamedTuple):
    """A training run before its first step. batches: endless, on the host. table: resident features, {} without."""

    config: ConfigDict | FrozenConfigDict
    model: RetrievalModel
    mesh: Mesh
    step: Mapped
    state: TrainState
    batches: Iterator[dict[str, np.ndarray]]
    table: dict[str, Any]


class Part(NamedTuple):
    """A part of a step as a program and its arguments. in_place: it returns the next state in the memory of the old."""

    program: Mapped
    state: Any
    batch: Any
    table: Any = None
    in_place: bool = False


def compile_point(config: ConfigDict) -> dict[str, Any]:
    """The compiler's figures of a step that is not run; makes no array."""
    mesh = make_mesh(config.parallel.devices)
    return compiled_figures(lower_train(describe(config), mesh, config.train.batch_size // mesh.size))


def compiled_figures(lowered: jax.stages.Lowered) -> dict[str, Any]:
    """The compiler's figures for one device: bytes of memory, operations, bytes of each kind of collective."""
    start = time.perf_counter()
    compiled = compile_lowered(lowered)
    seconds = time.perf_counter() - start
    counted, size = work(compiled.as_text()), memory(compiled)
    return {
        "compile_seconds": seconds,
        "memory": dataclasses.asdict(size) | {"peak": size.peak},
        "flops": counted.flops,
        "traffic": counted.bytes,
        "collectives": counted.collectives,
        "loops_once": counted.loops_once,
        "hidden": counted.hidden,
    }


def measure_point(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """The compiler's figures of a step, its seconds, and the seconds that each part takes alone.

    Yields what is known after the step, and again after each part: a part may not fit in memory.
    """
    run = dataset_run(config) if config.data.dir else random_run(config)
    warmup, steps = config.scale.warmup_steps, config.scale.steps
    put = partial(put_batch, mesh=run.mesh, mapping=config.parallel.mapping)
    batch = put(next(run.batches))
    figures = compiled_figures(run.step.lower(run.state, batch, run.table))
    params, batch_stats = jax.device_get((run.state.params, run.state.batch_stats))  # the step reuses their memory

    state, resident = time_steps(run, run.state, itertools.repeat(batch), warmup, steps)
    state, reading = time_steps(run, state, map(put, run.batches), warmup, steps)
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in run.mesh.local_devices]
    del state  # the parts need its memory
    seconds = {"step": reading, "input": max(0.0, reading - resident)}
    figures |= {
        "device_peak": max((peak for peak in peaks if peak is not None), default=None),
        "seconds": seconds,
        "examples_per_second": config.train.batch_size / reading,
    }
    if run.mesh.size == 1:
        seconds["collectives"] = 0.0  # a device alone sends nothing
    yield figures
    if config.parallel.shard_params:
        return
    for name, make in PROGRAMS.items():
        if name not in seconds:
            seconds[name] = time_part(make(run, params, batch_stats, batch), warmup, steps)
            yield figures
    seconds["rest"] = reading - sum(value for name, value in seconds.items() if name != "step")
    yield figures


def dataset_run(config: ConfigDict) -> Run:
    """The run of config.data.dir, as training has it."""
    experiment = assemble(config)
    built = setup_training(experiment)
    iterator, table = training_data(experiment, built.mesh)
    state = built.first_state(init_variables(experiment, experiment.config.seed))
    return Run(experiment.config, experiment.model, built.mesh, built.step, state, iterator, table)


def random_run(config: ConfigDict) -> Run:
    """A run with random weights on random batches of the sizes in config.plan."""
    subject = describe(config)
    config, model, mesh = subject.config, subject.model, make_mesh(config.parallel.devices)
    per_epoch = max(1, subject.captions // config.train.batch_size)
    shapes = variable_shapes(subject)
    built = build_step(FrozenConfigDict(config), model, mesh, shapes, per_epoch, 1000 * per_epoch)
    batches = [random_batch(subject, config.train.batch_size, seed) for seed in range(RANDOM_BATCHES)]
    one: Any = random_batch(subject, config.data.captions_per_image, 0)
    init = jax.jit(lambda key: model.init(key, gather({}, one), train=False))
    variables = nn.meta.unbox(dict(init(jax.random.key(config.seed))))
    state = built.first_state({name: variables.get(name, {}) for name in ("params", "batch_stats")})
    return Run(config, model, mesh, built.step, state, itertools.cycle(batches), {})


def time_steps(
    run: Run, state: TrainState, batches: Iterable[Any], warmup: int, steps: int
) -> tuple[TrainState, float]:
    """Times steps: (last state, median seconds between the ends of steps); as in training, a step is always queued."""
    ends, pending = [], None
    for batch in itertools.islice(batches, warmup + steps + 2):
        state, metrics = run.step(state, batch, run.table)
        if pending is not None:
            jax.block_until_ready(pending)
            ends.append(time.perf_counter())
        pending = metrics["loss"]
    jax.block_until_ready(pending)
    return state, statistics.median([after - before for before, after in itertools.pairwise(ends)][-steps:])


def time_part(part: Part, warmup: int, steps: int) -> float:
    """Median seconds of a call and the wait for its result, after `warmup` calls and one that compiles."""
    state, seconds = part.state, []
    for _ in range(1 + warmup + steps):
        start = time.perf_counter()
        result = jax.block_until_ready(part.program(state, part.batch, part.table))
        seconds.append(time.perf_counter() - start)
        state = result if part.in_place else state
    return statistics.median(seconds[-steps:])


# ------------------------------------------------------------------------------------------------------ parts of a step


def encode_part(run: Run, params: Any, batch_stats: Any, batch: Any) -> Part:
    """The training step with the sum of the embeddings for a loss, and neither an update nor a sum of gradients."""
    train = run.config.train

    def sum_of_embeddings(images: Embedding, texts: Embedding, ids: Array, ctx: Context) -> dict[str, Array]:
        floats = [x for x in jax.tree.leaves((images, texts)) if jnp.issubdtype(x.dtype, jnp.floating)]
        return {"loss": sum((jnp.sum(x, dtype=jnp.float32) for x in floats), jnp.zeros(()))}

    step = make_step(
        run.model,
        sum_of_embeddings,
        optax.identity(),
        prepare_batch=gather,
        microbatch=train.microbatch,
        statistics=train.microbatch_statistics,
    )

    def per_device(state: TrainState, batch: Batch, table: Any) -> Array:
        # One number that depends on every gradient: the compiler leaves nothing out, and nothing large is sent.
        return axis.psum(optax.global_norm(step(state, batch, table)[0].params), DATA)

    variables = {"params": params["model"], "batch_stats": batch_stats}
    state = create_state(variables, {}, optax.identity(), ema=False, seed=run.config.seed)
    return Part(_map(run, per_device), replicate(state, run.mesh), batch, run.table)


def loss_part(run: Run, params: Any, batch_stats: Any, batch: Any) -> Part:
    """Value and gradient of the loss with respect to the embeddings, with the collectives of its strategy."""
    captions = run.config.data.captions_per_image
    _, total_loss = total.build(run.config.loss, 1)

    def encode(variables: Any, batch: Batch, table: Any) -> tuple[Embedding, Embedding]:
        return cast(tuple[Embedding, Embedding], run.model.apply(variables, gather(table, batch), train=False))

    def per_device(params: Any, inputs: Any, table: Any) -> Array:
        score = scorer(run.model, params["model"])
        ids = jnp.repeat(inputs["ids"], captions)

        def local_loss(embeddings: tuple[Embedding, Embedding], loss_params: Any) -> Array:
            # A step after the warm-up of every loss: during it some losses are another program.
            ctx = Context(step=jnp.int32(2**30), params=loss_params, score=score, axis=DATA)
            return total_loss(embeddings[0].repeat(captions), embeddings[1], ids, ctx)["loss"]

        value, gradient = jax.value_and_grad(local_loss, (0, 1))(inputs["embeddings"], params["loss"])
        return axis.psum(value + optax.global_norm(gradient), DATA)

    variables = replicate({"params": params["model"], "batch_stats": batch_stats}, run.mesh)
    embeddings = map_encode(encode, run.mesh, run.config.parallel.mapping)(variables, batch, run.table)
    inputs = {"embeddings": jax.block_until_ready(embeddings), "ids": batch.get("identity", batch["image_index"])}
    score_params = {name: params["model"][name] for name in run.model.score_params}
    return Part(_map(run, per_device), replicate({"model": score_params, "loss": params["loss"]}, run.mesh), inputs)


def collectives_part(run: Run, params: Any, batch_stats: Any, batch: Any) -> Part:
    """The sum over the devices of arrays like the gradients, and nothing else of what a step sends."""
    # As rows of a batch: the compiler must not know that they are equal, or it could multiply instead.
    rows = jax.tree.map(lambda x: np.broadcast_to(x, (run.mesh.size, *x.shape)), params)
    gradients = put_batch(rows, run.mesh, run.config.parallel.mapping)

    def per_device(state: Any, gradients: Any, table: Any) -> Any:
        return axis.psum(jax.tree.map(lambda x: x[0], gradients), DATA)

    return Part(_map(run, per_device), (), gradients)


def optimiser_part(run: Run, params: Any, batch_stats: Any, batch: Any) -> Part:
    """An update from gradients that are ready, with clipping, without the running average of the parameters."""
    tx = make_optimiser(run.config, schedule(run.config, 1000, 1000))

    def per_device(state: tuple[Any, Any], batch: Batch, gradient: Any) -> tuple[Any, Any]:
        updates, opt_state = tx.update(gradient, state[1], state[0])
        return optax.apply_updates(state[0], updates), opt_state

    state, rows = replicate((params, tx.init(params)), run.mesh), {"image_index": batch["image_index"]}
    program = map_step(per_device, run.mesh, run.config.parallel.mapping)
    return Part(program, state, rows, replicate(params, run.mesh), in_place=True)


def _map(run: Run, per_device: Any) -> Mapped:
    return map_step(per_device, run.mesh, run.config.parallel.mapping, donate_state=False)


PROGRAMS = {"encode": encode_part, "loss": loss_part, "collectives": collectives_part, "optimiser": optimiser_part}
"""The parts of a step that are compiled alone, each made from (run, params, batch_stats, batch on the devices)."""


def main(argv: list[str] | None = None) -> None:
    """Writes OUT: the figures of the point CONFIG or, without one, a description of this machine."""
    parser = argparse.ArgumentParser(description="One point of a scaling study; called by main.py --mode=scale.")
    parser.add_argument("--config", type=Path, help="configuration of the point; without it OUT describes the machine")
    parser.add_argument("--compile_only", action="store_true", help="the compiler's figures only, nothing is run")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args(argv)
    threading.Thread(target=_end_with_input, daemon=True).start()
    if arguments.config is None:
        results: Iterable[dict[str, Any]] = [describe_machine()]
    else:
        config = load_config(arguments.config)
        results = [compile_point(config)] if arguments.compile_only else measure_point(config)
    for figures in results:
        write_json(arguments.out, figures)


def _end_with_input() -> None:
    """Ends this process when its standard input closes: a killed study leaves no point at work beside the next one."""
    while os.read(0, 1024):  # not sys.stdin: this thread would hold its lock when the point is done
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
