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
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from shnet_jax.data.batches import gather
from shnet_jax.experiment import assemble, init_variables
from shnet_jax.observe.compiled import compile_lowered, memory
from shnet_jax.observe.files import write_json
from shnet_jax.observe.machine import describe as describe_machine
from shnet_jax.observe.work import work
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.parallel.rules import step_mesh
from shnet_jax.plan.planned_run import describe, random_batch
from shnet_jax.plan.programs import lower_train, planned_setup
from shnet_jax.scaling.parts import PROGRAMS, Part, Run
from shnet_jax.training.setup import setup_training, training_data
from shnet_jax.training.state import TrainState
from shnet_jax.training.workdir import load_config
from shnet_jax.types import DATA

RANDOM_BATCHES = 4
"""Number of different random batches, used in turn."""


def compile_point(config: ConfigDict) -> dict[str, Any]:
    """The compiler's figures of a step that is not run; makes no array."""
    mesh = make_mesh(config.parallel.devices)
    parts = step_mesh(mesh, config.parallel).shape[DATA]
    return compiled_figures(lower_train(describe(config), mesh, config.train.batch_size // parts))


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
    mesh, warmup, steps = run.setup.mesh, config.scale.warmup_steps, config.scale.steps
    batch, state = run.put(next(run.batches)), run.steady_state()
    figures = compiled_figures(run.setup.step.lower(state, batch, run.table))
    state, resident = time_steps(run, state, itertools.repeat(batch), warmup, steps)
    state, reading = time_steps(run, state, map(run.put, run.batches), warmup, steps)
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in mesh.local_devices]
    del state  # the parts need its memory
    seconds = {"step": reading, "input": max(0.0, reading - resident)}
    figures |= {
        "device_peak": max((peak for peak in peaks if peak is not None), default=None),
        "seconds": seconds,
        "examples_per_second": config.train.batch_size / reading,
    }
    if mesh.size == 1:
        seconds["collectives"] = 0.0  # a device alone sends nothing
    yield figures
    if config.parallel.shard_params or config.parallel.model > 1:
        return
    for name, make in PROGRAMS.items():
        if name not in seconds:
            seconds[name] = time_part(make(run, batch), warmup, steps)
            yield figures
    seconds["rest"] = reading - sum(value for name, value in seconds.items() if name != "step")
    yield figures


def dataset_run(config: ConfigDict) -> Run:
    """The run of config.data.dir, as training has it."""
    experiment = assemble(config)
    setup = setup_training(experiment)
    batches, table = training_data(experiment, setup.mesh)
    variables = jax.device_get(init_variables(experiment, experiment.config.seed))
    return Run(experiment.config, setup, variables, batches, table)


def random_run(config: ConfigDict) -> Run:
    """A run with random weights on random batches of the sizes in config.plan."""
    planned, mesh = describe(config), make_mesh(config.parallel.devices)
    parts = step_mesh(mesh, config.parallel).shape[DATA]
    setup = planned_setup(planned, mesh, config.train.batch_size // parts)
    batches = [random_batch(planned, config.train.batch_size, seed) for seed in range(RANDOM_BATCHES)]
    one: Any = random_batch(planned, config.data.captions_per_image, 0)
    init = jax.jit(lambda key: planned.model.init(key, gather({}, one), train=False))
    variables = nn.meta.unbox(dict(jax.device_get(init(jax.random.key(config.seed)))))
    variables = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    return Run(planned.config, setup, variables, itertools.cycle(batches), {})


def time_steps(
    run: Run, state: TrainState, batches: Iterable[Any], warmup: int, steps: int
) -> tuple[TrainState, float]:
    """Times steps: (last state, median seconds between the ends of steps); as in training, a step is always queued."""
    ends, pending = [], None
    for batch in itertools.islice(batches, warmup + steps + 2):
        state, metrics = run.setup.step(state, batch, run.table)
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


def main(argv: list[str] | None = None) -> None:
    """Writes OUT: the figures of the point CONFIG or, without one, a description of this machine."""
    parser = argparse.ArgumentParser(description="One point of a scaling study; called by `shnet scale`.")
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
