"""Ahead-of-time compilation of the training step and the encoders, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from shnet_jax.evaluation.encode import halves, image_tower, text_tower
from shnet_jax.evaluation.pipelined import make_pipelined_text_encoder, placed_shapes, stage_mesh
from shnet_jax.observe.compiled import Memory, OutOfMemory, compile_lowered, memory
from shnet_jax.observe.hardware import Chip
from shnet_jax.observe.work import Work, steady_and_warm_up
from shnet_jax.parallel.mapping import map_encode
from shnet_jax.parallel.rules import step_mesh, variable_specs
from shnet_jax.plan.planned_run import (
    PlannedRun,
    image_batch_shapes,
    resident_table_shapes,
    text_batch_shapes,
    train_batch_shapes,
    variable_shapes,
)
from shnet_jax.training.setup import TrainSetup, build_step
from shnet_jax.types import DATA


@dataclasses.dataclass(frozen=True)
class Program:
    """Figures of one compiled program on one device.

    rows: pairs, images or captions of one device's batch. fits: whether memory suffices; None if that is unknown.
    memory, work: None if the program did not compile. beside: bytes of other data on the device meanwhile.
    needed: bytes of the program and `beside`; if it did not compile, the compiler's figure, None without one.
    warm_up: work of a step in the loss's warm-up; None if it equals `work`, that of every later step.
    seconds: compile time. why: the compiler's message if it did not compile.
    """

    rows: int
    fits: bool | None
    memory: Memory | None
    work: Work | None
    needed: float | None
    seconds: float
    beside: float = 0.0
    why: str = ""
    warm_up: Work | None = None


def lower_train(run: PlannedRun, mesh: Mesh, pairs: int) -> jax.stages.Lowered:
    """Lowers the training step of `planned_setup`."""
    setup = planned_setup(run, mesh, pairs)
    mesh = setup.mesh
    batch = _placed(train_batch_shapes(run, pairs * mesh.shape[DATA]), mesh, PartitionSpec(DATA))
    return setup.step.lower(setup.like, batch, _table(run, mesh))


def stays_while_evaluating(run: PlannedRun, mesh: Mesh) -> float:
    """Bytes of training state and resident features on each device during an evaluation."""
    leaves = jax.tree.leaves((planned_setup(run, mesh, 1).like, _table(run, mesh)))
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def planned_setup(run: PlannedRun, mesh: Mesh, pairs: int) -> TrainSetup:
    """The setup of training with `pairs` pairs on each device, or group of config.parallel.model devices."""
    config = run.config.copy_and_resolve_references()
    config.train.batch_size = pairs * step_mesh(mesh, config.parallel).shape[DATA]
    per_epoch = max(1, run.captions // config.train.batch_size)
    total = config.train.steps or math.ceil(config.train.epochs * per_epoch)
    return build_step(FrozenConfigDict(config), run.model, mesh, variable_shapes(run), per_epoch, total)


def _table(run: PlannedRun, mesh: Mesh) -> Any:
    return _placed(resident_table_shapes(run) if run.config.data.resident else {}, mesh, PartitionSpec())


def lower_encode(run: PlannedRun, mesh: Mesh, rows: int, side: str) -> jax.stages.Lowered:
    """Lowers the encoder of "image" or "text" with `rows` on each device; text in config.eval.stages stages."""
    evaluation, given = run.config.eval, variable_shapes(run)
    mesh = halves(mesh)[side == "text"] if evaluation.overlap else mesh
    mesh = step_mesh(mesh, run.config.parallel)
    rows *= mesh.shape[DATA]
    if side == "text" and evaluation.stages > 1:
        staged = stage_mesh(mesh, evaluation.stages)
        encode = make_pipelined_text_encoder(run.model, staged, evaluation.microbatches)
        batch = _placed(text_batch_shapes(run, rows), staged, PartitionSpec(staged.axis_names))
        return encode.lower(placed_shapes(run.model, given, staged), batch)
    tower, make_batch = (image_tower, image_batch_shapes) if side == "image" else (text_tower, text_batch_shapes)
    batch = _placed(make_batch(run, rows), mesh, PartitionSpec(DATA))
    return map_encode(partial(tower, run.model), mesh).lower(
        split_shapes(given, run.config.parallel.rules, mesh), batch
    )


def split_shapes(variables: Any, rules: Sequence[str], mesh: Mesh) -> Any:
    """Shapes of variables as `evaluation.encode.Towers` places the arrays."""
    return jax.tree.map(lambda leaf, spec: _placed(leaf, mesh, spec), variables, variable_specs(variables, rules, mesh))


def _placed(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def compile_program(
    lower: Callable[[], jax.stages.Lowered],
    rows: int,
    limit: float | None,
    effort: float = 0.0,
    beside: float = 0.0,
) -> Program:
    """Compiles a program and takes its figures.

    limit: bytes of one device's memory, None if unknown. effort: as config.plan.effort. beside: as in Program.
    """
    start = time.perf_counter()
    try:
        compiled = compile_lowered(lower(), effort)
    except OutOfMemory as error:
        return Program(rows, False, None, None, error.needed, time.perf_counter() - start, beside, str(error))
    size = memory(compiled)
    needed = size.peak + beside
    fits = None if limit is None else needed <= limit
    steady, warm_up = steady_and_warm_up(compiled.as_text())
    seconds = time.perf_counter() - start
    return Program(rows, fits, size, steady, needed, seconds, beside, warm_up=None if warm_up == steady else warm_up)


def bounds(work: Work, peaks: Chip) -> tuple[float, float]:
    """Lower bounds of the time in seconds: (compute at the chip's peak, memory traffic at its bandwidth)."""
    low = work.flops - sum(work.float32.values())
    compute = low / peaks.flops + sum(flops / peaks.peak(precision) for precision, flops in work.float32.items())
    return compute, work.bytes / peaks.bandwidth


def interconnect_seconds(work: Work, peaks: Chip) -> float | None:
    """Lower bound in seconds of what the collectives send within a slice; None where the links are not known.

    All links of a chip share a gather or a sum, of which a chip sends every byte once (twice for an all-reduce). A
    permutation to the next device of a ring has one link. Latency, and hops over several links, are not counted.
    """
    if peaks.links is None or peaks.link is None:
        return None
    once = {kind: size * (2 if kind == "all-reduce" else 1) for kind, size in work.collectives.items()}
    shifted = once.pop("collective-permute", 0.0)
    return sum(once.values()) / (peaks.links * peaks.link) + shifted / peaks.link
