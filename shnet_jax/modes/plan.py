"""`--mode=plan`: plan training and evaluation for a TPU slice or GPUs that you do not have yet.

The programs that train and evaluate are compiled ahead of time for the target, from shapes alone. No weights are read,
and only the sizes of a data set.
"""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.evaluation.encode import check
from shnet_jax.evaluation.pipelined import schedule_text
from shnet_jax.evaluation.stage_one import make_stage_one
from shnet_jax.evaluation.tiles import tile_size
from shnet_jax.experiment import settle_dtypes
from shnet_jax.models.contract import RetrievalModel, has_static_score
from shnet_jax.observe.files import write_json
from shnet_jax.observe.hardware import GIB, Chip, chip, memory_limit, target_devices
from shnet_jax.ops.interaction import default_block
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.parallel.pipeline import bubble_share
from shnet_jax.parallel.rules import step_mesh
from shnet_jax.plan.block_plan import PairCost, measure_pairs, plan_blocks, plan_two_stage
from shnet_jax.plan.planned_run import PlannedRun, describe, embedding_shapes, gallery_size, variable_shapes
from shnet_jax.plan.programs import (
    Program,
    bounds,
    compile_program,
    interconnect_seconds,
    lower_encode,
    lower_train,
    stays_while_evaluating,
)
from shnet_jax.plan.rank_plan import RankPlan, measure_round, plan_ranking
from shnet_jax.plan.search import advice, fitting_microbatch, largest_batch
from shnet_jax.plan.table import table
from shnet_jax.training.setup import pairs_per_device
from shnet_jax.types import DATA, Embedding, Score

log = logging.getLogger(__name__)

SETTINGS = (
    *("train.microbatch", "loss.pairs.strategy", "model.dtype", "text.dtype", "text.vocab_size", "data.resident"),
    *("eval.stages", "plan.effort"),
)
"""Settings that head the table."""


def plan(config: ConfigDict, workdir: str | Path, target: str) -> None:
    """Compiles for `target`, prints a table and writes workdir/plan_<target>.json.

    target: see `hardware.target_devices`. Raises ValueError for an unknown one, and for settings that contradict each
    other or the target.
    """
    if config.parallel.mapping == "pmap":
        raise ValueError(
            "config.parallel.mapping is pmap, which compiles only for devices that are there; plan with "
            "--config.parallel.mapping=shard_map (its step does the same)"
        )
    devices = target_devices(target)
    if not 0 <= config.parallel.devices <= len(devices):
        raise ValueError(f"config.parallel.devices is {config.parallel.devices}, --target={target} has {len(devices)}")
    mesh = data_mesh(devices[: config.parallel.devices or None])
    config = ConfigDict(config.to_dict())
    settle_dtypes(config, devices[0])
    # A model takes it from the devices of this machine.
    config.model.cmsei.block = config.model.cmsei.block or default_block(devices[0].platform)
    report = make_plan(describe(config), mesh) | {"target": target}
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / f"plan_{target.replace(':', '_')}.json"
    write_json(path, report)
    print(f"{table(report)}\n{path}")


def make_plan(run: PlannedRun, mesh: Mesh) -> dict[str, Any]:
    """Compiles the programs of `run` for the devices of `mesh`; the report that `plan` writes, without the target."""
    config, device = run.config, mesh.devices.flat[0]
    kind, peaks = device.device_kind, chip(device.device_kind)
    limit, limit_source = memory_limit(device, peaks)
    parts = step_mesh(mesh, config.parallel).shape[DATA]  # of a batch
    pairs, effort = pairs_per_device(config, parts), config.plan.effort
    if not -1 <= effort <= 0:
        raise ValueError(f"config.plan.effort is {effort}; it must be between -1 and 0")
    check(run.model, config, mesh)
    beside = stays_while_evaluating(run, mesh)

    def train(pairs: int, run: PlannedRun = run) -> Program:
        log.info("compiling the training step with %d pairs on each of %d devices", pairs, parts)
        return compile_program(lambda: lower_train(run, mesh, pairs), pairs, limit, effort)

    def encode(side: str) -> Program:
        log.info("compiling the %s tower", side)
        lower = partial(lower_encode, run, mesh, config.eval.batch_size, side)
        return compile_program(lower, config.eval.batch_size, limit, effort, beside)

    programs = {"train": train(pairs), "encode images": encode("image"), "encode captions": encode("text")}
    rankings = _rankings(run, mesh)
    first, largest, changes = programs["train"], None, []
    if first.fits is False:
        changes = advice(config, mesh.size)
    if config.plan.search and first.fits is not None:
        unit = config.train.microbatch or config.data.captions_per_image
        most = min(run.captions, config.momentum.queue or run.captions)  # a queue holds a whole batch
        largest = largest_batch(train, first, unit=unit, most=most // parts)
        if not first.fits and (fitting := fitting_microbatch(train, run, pairs)):
            changes.insert(0, f"it fits with --config.train.microbatch={fitting[0]}: {fitting[1] / GIB:.2f} GiB")
    flat = flatten_dict(config.to_dict(), sep=".")
    return {
        "name": config.name,
        "device_kind": kind,
        "devices": mesh.size,
        "chip": peaks._asdict() if peaks else None,
        "memory_limit": limit,
        "memory_limit_is": limit_source,
        "global_batch": pairs * parts,
        "settings": {name: flat[name] for name in SETTINGS},
        "pipeline": _pipeline(config.eval),
        "programs": {name: _as_dict(program, peaks) for name, program in programs.items()},
        "rankings": {name: _ranking_as_dict(plan, beside, limit, peaks) for name, plan in rankings.items()},
        "largest_pairs_per_device": largest,
        "changes": changes,
    }


def _rankings(run: PlannedRun, mesh: Mesh) -> dict[str, RankPlan]:
    """Plans of the ranking methods of --mode=eval, by name; with seconds if the devices are local."""
    evaluation, model, items = run.config.eval, run.model, embedding_shapes(run)
    n, t = gallery_size(run)
    tile, local = tile_size(evaluation, mesh), mesh.devices.flat[0].platform != "tpu"
    log.info("compiling the ranking")

    def in_tiles(score: Score, items: tuple[Embedding, Embedding] = items) -> RankPlan:
        seconds = measure_round(items, mesh, tile, score) if local else None
        return plan_ranking(n, t, items, mesh, tile, score, seconds)

    plans = {}
    if evaluation.two_stage or not has_static_score(model):
        cost = PairCost(model, variable_shapes(run)["params"], items)
        cost = dataclasses.replace(cost, pair_seconds=measure_pairs(cost, mesh) if local else None)
    if evaluation.two_stage:
        stage_one = make_stage_one(evaluation, model.score, run.config.seed, mesh)
        image, text = (jax.ShapeDtypeStruct((1, stage_one.width(item)), jnp.float32) for item in items)
        first = in_tiles(RetrievalModel.score, (Embedding(image), Embedding(text)))  # type: ignore[arg-type]  # shapes
        staged = plan_two_stage(first, evaluation.two_stage, cost, mesh, tile)
        plans = {stage_one.name: first, f"two-stage {evaluation.two_stage}": staged}
    if evaluation.exact:
        static = has_static_score(model)
        plans["exact"] = in_tiles(model.score) if static else plan_blocks(n, t, cost, mesh, tile)
    return plans


def _pipeline(evaluation: ConfigDict) -> dict[str, Any] | None:
    """Fraction of the ticks in which a stage of the text tower is idle; None without stages."""
    stages, microbatches = evaluation.stages, evaluation.microbatches
    if stages == 1:
        return None
    return {"bubble_share": bubble_share(microbatches, stages), "text": schedule_text(stages, microbatches)}


def _as_dict(program: Program, peaks: Chip | None) -> dict[str, Any]:
    out = dataclasses.asdict(program)
    if program.memory:
        out["memory"]["peak"] = program.memory.peak
    if program.work and peaks:
        out["compute_seconds"], out["memory_seconds"] = bounds(program.work, peaks)
        out["interconnect_seconds"] = interconnect_seconds(program.work, peaks)
    if program.warm_up and peaks:
        out["warm_up_seconds"] = max(bounds(program.warm_up, peaks))
    return out


def _ranking_as_dict(plan: RankPlan, beside: float, limit: float | None, peaks: Chip | None) -> dict[str, Any]:
    needed = plan.bytes_per_device + beside
    out = dataclasses.asdict(plan) | {"tiles": plan.tiles, "beside": beside, "needed": needed}
    out |= {"fits": None if limit is None else needed <= limit, "text": str(plan)}
    if peaks:
        out["compute_seconds"], out["memory_seconds"] = bounds(plan.work, peaks)
    return out
