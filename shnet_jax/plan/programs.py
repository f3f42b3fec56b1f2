"""The programs that train and evaluate, compiled ahead of time from shapes alone."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

from shnet_jax.evaluate.encode import halves, image_tower, text_tower
from shnet_jax.evaluate.pipelined import make_pipelined_text_encoder, placed_shapes, stage_mesh
from shnet_jax.observe.compiled import Memory, OutOfMemory, compile_lowered, memory
from shnet_jax.observe.hardware import Chip
from shnet_jax.observe.work import Work, work
from shnet_jax.parallel.mapping import map_encode
from shnet_jax.plan.subject import Subject, image_batch, resident_table, text_batch, train_batch, variables
from shnet_jax.train.prepare import BuiltStep, build_step
from shnet_jax.types import DATA


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program on one device.

    rows: pairs, images or captions of one device's batch. fits: within the memory; None where that is not known.
    memory, work: None when the compiler gave up. beside: bytes that lie on the device meanwhile, not the program's own.
    warm_up: work of a step in the warm-up of the loss, `work` being that of all others; None where they are the same.
    needed: both together; where the compiler gave up what it says it would take, None if it does not.
    seconds: that compiling took. why: the compiler's message.
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


def lower_train(subject: Subject, mesh: Mesh, pairs: int) -> jax.stages.Lowered:
    """The training step with `pairs` pairs on each device."""
    built = _built(subject, mesh, pairs)
    batch = _placed(train_batch(subject, pairs * mesh.size), mesh, PartitionSpec(DATA))
    return built.step.lower(built.like, batch, _table(subject, mesh))


def stays_while_evaluating(subject: Subject, mesh: Mesh) -> float:
    """Bytes of training on each device during an evaluation: parameters, moments, average, resident features."""
    leaves = jax.tree.leaves((_built(subject, mesh, 1).like, _table(subject, mesh)))
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def _built(subject: Subject, mesh: Mesh, pairs: int) -> BuiltStep:
    config = subject.config.copy_and_resolve_references()
    config.train.batch_size = pairs * mesh.size
    per_epoch = max(1, subject.captions // config.train.batch_size)
    total = config.train.steps or math.ceil(config.train.epochs * per_epoch)
    return build_step(FrozenConfigDict(config), subject.model, mesh, variables(subject), per_epoch, total)


def _table(subject: Subject, mesh: Mesh) -> Any:
    return _placed(resident_table(subject) if subject.config.data.resident else {}, mesh, PartitionSpec())


def lower_encode(subject: Subject, mesh: Mesh, rows: int, side: str) -> jax.stages.Lowered:
    """The encoding of "image" or "text", `rows` on each device; the text tower in config.eval.stages stages."""
    evaluation, given = subject.config.eval, variables(subject)
    mesh = halves(mesh)[side == "text"] if evaluation.overlap else mesh
    rows *= mesh.size
    if side == "text" and evaluation.stages > 1:
        staged = stage_mesh(mesh, evaluation.stages)
        encode = make_pipelined_text_encoder(subject.model, staged, evaluation.microbatches)
        batch = _placed(text_batch(subject, rows), staged, PartitionSpec(staged.axis_names))
        return encode.lower(placed_shapes(subject.model, given, staged), batch)
    tower, make_batch = (image_tower, image_batch) if side == "image" else (text_tower, text_batch)
    batch = _placed(make_batch(subject, rows), mesh, PartitionSpec(DATA))
    return map_encode(partial(tower, subject.model), mesh).lower(_placed(given, mesh, PartitionSpec()), batch)


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
    """Compiles and measures. limit: bytes of one device's memory, None: not known. effort: as config.plan.effort."""
    start = time.perf_counter()
    try:
        compiled = compile_lowered(lower(), effort)
    except OutOfMemory as error:
        return Program(rows, False, None, None, error.needed, time.perf_counter() - start, beside, str(error))
    found = memory(compiled)
    needed = found.peak + beside
    fits = None if limit is None else needed <= limit
    steady, first = (work(compiled.as_text(), warm_up=warm_up) for warm_up in (False, True))
    seconds = time.perf_counter() - start
    return Program(rows, fits, found, steady, needed, seconds, beside, warm_up=None if first == steady else first)


def bounds(found: Work, peaks: Chip) -> tuple[float, float]:
    """Seconds that the matrix units and that the memory need at least; the step takes no less than the larger."""
    low = found.flops - sum(found.float32.values())
    compute = low / peaks.flops + sum(flops / peaks.peak(precision) for precision, flops in found.float32.items())
    return compute, found.bytes / peaks.bandwidth
