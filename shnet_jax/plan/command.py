"""`--mode=plan`: what training and evaluation will cost on devices that are not there.

The programs are those that train and evaluate, compiled ahead of time for the target from shapes alone: no weights are
read, and of a data set only its sizes.
"""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.evaluate.encode import check
from shnet_jax.evaluate.pipelined import schedule_text
from shnet_jax.experiment import settle_dtypes
from shnet_jax.models.contract import RetrievalModel, has_static_score
from shnet_jax.observe.files import write_json
from shnet_jax.observe.hardware import GIB, Chip, chip, memory_limit, target_devices
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.parallel.pipeline import bubble_share
from shnet_jax.plan.block_plan import PairCost, measure_pairs, plan_blocks, plan_two_stage
from shnet_jax.plan.programs import Program, bounds, compile_program, lower_encode, lower_train, stays_while_evaluating
from shnet_jax.plan.rank_plan import RankPlan, measure_round, plan_ranking
from shnet_jax.plan.search import advice, fitting_microbatch, largest_batch
from shnet_jax.plan.subject import Subject, describe, embeddings, gallery, variables
from shnet_jax.plan.table import table
from shnet_jax.train.prepare import pairs_per_device

log = logging.getLogger(__name__)


def plan(config: ConfigDict, workdir: str | Path, target: str) -> None:
    """Compiles for `target` (see `hardware.target_devices`), prints a table, writes workdir/plan_<target>.json.

    Raises ValueError for an unknown target, and for settings that do not fit together or to it.
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
    report = make_plan(describe(config), mesh) | {"target": target}
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / f"plan_{target.replace(':', '_')}.json"
    write_json(path, report)
    print(f"{table(report)}\n{path}")


def make_plan(subject: Subject, mesh: Mesh) -> dict[str, Any]:
    """Compiles the programs of `subject` for the devices of `mesh`; what `plan` writes, but for the target."""
    config, device = subject.config, mesh.devices.flat[0]
    kind, peaks = device.device_kind, chip(device.device_kind)
    limit, of_limit = memory_limit(device, peaks)
    pairs, effort = pairs_per_device(config, mesh.size), config.plan.effort
    if not -1 <= effort <= 0:
        raise ValueError(f"config.plan.effort is {effort}; it must be between -1 and 0")
    check(subject.model, config, mesh)
    stays = stays_while_evaluating(subject, mesh)

    def train(pairs: int, subject: Subject = subject) -> Program:
        log.info("compiling the training step with %d pairs on each of %d devices", pairs, mesh.size)
        return compile_program(lambda: lower_train(subject, mesh, pairs), pairs, limit, effort)

    def encode(side: str) -> Program:
        log.info("compiling the %s tower", side)
        lower = partial(lower_encode, subject, mesh, config.eval.batch_size, side)
        return compile_program(lower, config.eval.batch_size, limit, effort, stays)

    programs = {"train": train(pairs), "encode images": encode("image"), "encode captions": encode("text")}
    rankings = _rankings(subject, mesh)
    first, largest, changes = programs["train"], None, []
    if first.fits is False:
        changes = advice(config, mesh.size)
    if config.plan.search and first.fits is not None:
        unit = config.train.microbatch or config.data.captions_per_image
        most = min(subject.captions, config.momentum.queue or subject.captions)  # a queue holds a whole batch
        largest = largest_batch(train, first, unit=unit, most=most // mesh.size)
        if not first.fits and (found := fitting_microbatch(train, subject, pairs)):
            changes.insert(0, f"it fits with --config.train.microbatch={found[0]}: {found[1] / GIB:.2f} GiB")
    return {
        "name": config.name,
        "device_kind": kind,
        "devices": mesh.size,
        "chip": peaks._asdict() if peaks else None,
        "memory_limit": limit,
        "memory_limit_is": of_limit,
        "global_batch": pairs * mesh.size,
        "settings": {
            "train.microbatch": config.train.microbatch,
            "loss.pairs.strategy": config.loss.pairs.strategy,
            "model.dtype": config.model.dtype,
            "text.dtype": config.text.dtype,
            "text.vocab_size": config.text.vocab_size,
            "data.resident": config.data.resident,
            "eval.stages": config.eval.stages,
            "plan.effort": effort,
        },
        "pipeline": _pipeline(config.eval),
        "programs": {name: _as_dict(program, peaks) for name, program in programs.items()},
        "rankings": {name: _ranking_as_dict(way, stays, limit, peaks) for name, way in rankings.items()},
        "largest_pairs_per_device": largest,
        "changes": changes,
    }


def _rankings(subject: Subject, mesh: Mesh) -> dict[str, RankPlan]:
    """The ways in which --mode=eval ranks the gallery; their seconds where the devices are those of this machine."""
    evaluation, model, items = subject.config.eval, subject.model, embeddings(subject)
    n, t = gallery(subject)
    tile, here = evaluation.tile, mesh.devices.flat[0].platform != "tpu"
    log.info("compiling the ranking")
    found = {}
    if evaluation.two_stage or not has_static_score(model):
        cost = PairCost(model, variables(subject)["params"], items)
        cost = dataclasses.replace(cost, pair_seconds=measure_pairs(cost, mesh) if here else None)
    if evaluation.two_stage:
        seconds = measure_round(items, mesh, tile, RetrievalModel.score) if here else None
        found["global vectors"] = plan_ranking(n, t, items, mesh, tile, RetrievalModel.score, seconds)
        staged = plan_two_stage(n, t, evaluation.two_stage, cost, mesh, tile)
        if staged.seconds is not None and found["global vectors"].seconds is not None:
            staged = dataclasses.replace(staged, seconds=staged.seconds + found["global vectors"].seconds)
        found[f"two-stage {evaluation.two_stage}"] = staged
    if not evaluation.exact:
        return found
    if has_static_score(model):
        seconds = measure_round(items, mesh, tile, model.score) if here else None
        return found | {"exact": plan_ranking(n, t, items, mesh, tile, model.score, seconds)}
    return found | {"exact": plan_blocks(n, t, cost, mesh, tile)}


def _pipeline(evaluation: ConfigDict) -> dict[str, Any] | None:
    """The share of the ticks in which a stage of the text tower has nothing to do; None where it has no stages."""
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
    if program.warm_up and peaks:
        out["warm_up_seconds"] = max(bounds(program.warm_up, peaks))
    return out


def _ranking_as_dict(found: RankPlan, stays: float, limit: float | None, peaks: Chip | None) -> dict[str, Any]:
    needed = found.bytes_per_device + stays
    out = dataclasses.asdict(found) | {"tiles": found.tiles, "beside": stays, "needed": needed}
    out |= {"fits": None if limit is None else needed <= limit, "text": str(found)}
    if peaks:
        out["compute_seconds"], out["memory_seconds"] = bounds(found.work, peaks)
    return out
