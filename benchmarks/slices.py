"""Training on slices of 256 TPU chips, on paper: the step of each model compiled ahead of time, and data stores.

    python -m benchmarks.slices --write    # compiles what runs/slices lacks, one after another: an hour on 2 cores

Writes benchmarks/slices.json and the tables of docs/scaling.md, which says what they mean. The programs are those of
`shnet plan`. Nothing runs on a TPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from benchmarks.losses import LOSSES, lower_loss
from configs import align, base, user
from shnet_jax.data.batches import stored_fields
from shnet_jax.models.text import text_fields
from shnet_jax.observe.files import write_json, write_text
from shnet_jax.observe.hardware import CHIPS, GIB, Chip, chip, target_devices
from shnet_jax.observe.table import Table
from shnet_jax.observe.terminal import make_output_safe
from shnet_jax.observe.work import Work
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.plan.planned_run import PlannedRun, describe, train_batch_shapes
from shnet_jax.plan.programs import Program, bounds, compile_program, interconnect_seconds, lower_train
from shnet_jax.types import DATA

ROOT = Path(__file__).parents[1]
FIGURES, PAGE = ROOT / "benchmarks" / "slices.json", ROOT / "docs" / "scaling.md"
TARGET, LOSS_TARGET = "tpu:v5e:16x16", "tpu:v5e:8x8"
CHIPS_SHOWN = {"v5e": CHIPS["TPU v5e"], "v6e": CHIPS["TPU v6e"]}
"""Chips by name; both have slices of 16 x 16, and one program of a chip has the same work on both."""

BATCHES = (32_768, 131_072, 524_288)
MICROBATCH = 128
"""Pairs that a chip encodes at once: all of its pairs in the smallest batch."""

STORES = {"CC3M": 3.3e6, "CC12M": 12e6, "LAION-400M": 400e6}
"""Image-caption pairs of data sets of that size, one caption an image."""

NIC = {"v5e": 100e9 / 8, "v6e": 400e9 / 8}
"""Bytes per second that the network brings to a machine of 4 chips, half of a host's (cloud.google.com/tpu/docs)."""

CHIPS_OF_MACHINE = 4
GIGABYTE = 1e9


def _base(batch: int) -> ConfigDict:
    return base.get_config()


def _user(batch: int) -> ConfigDict:
    c = user.get_config("coco")
    c.momentum.queue = max(65_536, batch)  # a queue holds a whole batch
    return c


def _align(batch: int) -> ConfigDict:
    return align.get_config("sail")


MODELS: dict[str, tuple[str, Callable[[int], ConfigDict]]] = {
    "base": ("base.py", _base),
    "user": ("USER, queues", _user),
    "align": ("align, stored vectors", _align),
}


def configuration(model: str, batch: int) -> ConfigDict:
    """The configuration that is compiled: bfloat16, streamed scores, microbatches with statistics of their own."""
    c = MODELS[model][1](batch)
    c.model.dtype = c.text.dtype = c.loss.pairs.dtype = "bfloat16"
    c.loss.pairs.strategy = "streamed"
    c.loss.pairs.tile = 4096
    c.train.batch_size = batch
    c.train.microbatch, c.train.microbatch_statistics = 0 if model == "align" else MICROBATCH, "local"
    c.plan.effort = 0.0 if model == "align" else -1.0  # with BERT the usual effort takes longer than ten minutes
    c.plan.images = int(STORES["LAION-400M"])
    c.plan.captions = 1
    c.plan.image_embedding = c.plan.caption_embedding = 1024
    return c


def record_bytes(run: PlannedRun) -> int:
    """Bytes of the fields of an image and one caption as they are stored, without compression."""
    shapes, vectors = train_batch_shapes(run, 1), text_fields(run.config)
    stored = [*stored_fields(run.dataset, run.fields), *(vectors or ("tokens",))]
    # Vectors in float16, as a store of this size is made (docs/frozen-features.md).
    sizes = {name: 2 if vectors else np.dtype(shapes[name].dtype).itemsize for name in stored}
    return sum(math.prod(shapes[name].shape) * sizes[name] for name in stored)


def compiled(target: str, model: str, batch: int) -> dict[str, Any]:
    """Compiles the step for `target`; its figures for one chip, as JSON takes them."""
    devices = target_devices(target)
    peaks = chip(devices[0].device_kind)
    assert peaks is not None
    run, mesh = describe(configuration(model, batch)), data_mesh(devices)
    pairs = batch // mesh.size
    program = compile_program(lambda: lower_train(run, mesh, pairs), pairs, peaks.memory, run.config.plan.effort)
    figures = {"target": target, "model": model, "batch": batch, "chips": mesh.size, "record_bytes": record_bytes(run)}
    figures |= {"needed": program.needed, "fits": program.fits, "effort": run.config.plan.effort}
    return figures | _figures(program)


def _figures(program: Program) -> dict[str, Any]:
    if program.work is None or program.memory is None:
        return {}
    return {
        "arguments": program.memory.arguments,
        "temporaries": program.memory.temporaries,
        "flops": program.work.flops,
        "float32": program.work.float32,
        "traffic": program.work.bytes,
        "collectives": program.work.collectives,
        "loops_once": program.work.loops_once,
    }


def compiled_loss(target: str, loss: str, strategy: str, pairs: int, dim: int) -> dict[str, Any]:
    """Compiles a loss and its gradients alone for `target`; its figures for one chip."""
    devices = target_devices(target)
    peaks, mesh = chip(devices[0].device_kind), data_mesh(devices)
    assert peaks is not None
    split, replicated = NamedSharding(mesh, P(DATA)), NamedSharding(mesh, P())
    vectors = jax.ShapeDtypeStruct((pairs, dim), jnp.float32, sharding=split)
    batch = {"images": vectors, "texts": vectors, "ids": jax.ShapeDtypeStruct((pairs,), jnp.int32, sharding=split)}
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    program = compile_program(lambda: lower_loss(loss, strategy, mesh, step, batch), pairs // mesh.size, peaks.memory)
    return {"target": target, "loss": loss, "strategy": strategy, "batch": pairs, "dim": dim} | _figures(program)


def compile_all(folder: Path, jobs: dict[str, Callable[[], dict[str, Any]]]) -> None:
    """Writes the figures of each job to FOLDER/NAME.json, one after another; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, compile_one) in enumerate(jobs.items(), 1):
        if not (folder / f"{name}.json").exists():
            print(f"{number} of {len(jobs)}: {name} ...", flush=True)
            write_json(folder / f"{name}.json", compile_one())


def jobs_of(models: Iterable[str], batches: Iterable[int]) -> dict[str, Callable[[], dict[str, Any]]]:
    """All programs of the page by name."""
    jobs: dict[str, Callable[[], dict[str, Any]]] = {}
    batches = list(batches)
    for model in models:
        for batch in batches:
            jobs[f"step_{model}_{batch}"] = partial(compiled, TARGET, model, batch)
    for loss in LOSSES:
        for strategy in ("gathered", "streamed", "ring"):
            jobs[f"loss_{loss}_{strategy}"] = partial(compiled_loss, LOSS_TARGET, loss, strategy, BATCHES[0], 1024)
    return jobs


def collected(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All figures in a folder of `compile_all`, of steps by model and batch."""
    by_name = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    order = list(jobs_of(MODELS, BATCHES))
    names = sorted(by_name, key=order.index)
    return {kind: [by_name[name] for name in names if name.startswith(kind)] for kind in ("step", "loss")}


def work_of(figures: dict[str, Any]) -> Work:
    """The work that figures tell."""
    return Work(figures["flops"], figures["float32"], figures["traffic"], figures["collectives"])


def seconds_of(figures: dict[str, Any], peaks: Chip) -> dict[str, float]:
    """Least seconds of a step on a chip, by what limits it."""
    compute, memory = bounds(work_of(figures), peaks)
    sent = interconnect_seconds(work_of(figures), peaks)
    assert sent is not None
    return {"compute": compute, "HBM": memory, "ICI": sent}


def step_seconds(figures: dict[str, Any], peaks: Chip) -> float:
    """The bound of a step: products and interconnect; HBM too where the compiler made its usual effort."""
    times = seconds_of(figures, peaks)
    return max(seconds for name, seconds in times.items() if name != "HBM" or figures["effort"] == 0)


def steps_table(steps: list[dict[str, Any]]) -> Table:
    """Memory, work and bounds of a step on one chip."""
    heading = ["model", "global batch", "pairs a chip", "memory", "TFLOP", "HBM", "ICI"]
    heading += [f"{chip} {name}" for chip in CHIPS_SHOWN for name in ("compute", "HBM", "ICI")]
    rows = []
    for each in steps:
        row = [MODELS[each["model"]][0], f"{each['batch']:,}", f"{each['batch'] // each['chips']:,}"]
        row += [f"{each['needed'] / GIB:.1f} GiB", f"{each['flops'] / 1e12:.2f}", f"{each['traffic'] / 1e9:,.0f} GB"]
        row += [f"{sum(each['collectives'].values()) / 1e9:.2f} GB"]
        for peaks in CHIPS_SHOWN.values():
            times = seconds_of(each, peaks)
            bound = step_seconds(each, peaks)
            row += [f"**{t * 1e3:.1f}**" if t == bound else f"{t * 1e3:.1f}" for t in times.values()]
        rows.append(row)
    return Table("Steps", heading, rows)


def largest(steps: list[dict[str, Any]], memory: float, chips: int) -> int:
    """Largest global batch, a multiple of MICROBATCH a chip, if memory grows linearly from the last two batches."""
    one, other = sorted(steps, key=lambda each: each["batch"])[-2:]
    slope = (other["needed"] - one["needed"]) / (other["batch"] - one["batch"])
    pairs = other["batch"] + (memory - other["needed"]) / slope
    return int(pairs // (MICROBATCH * chips)) * MICROBATCH * chips


def by_model(steps: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The figures of each model that has some, under its label."""
    grouped = [(label, [each for each in steps if each["model"] == model]) for model, (label, _) in MODELS.items()]
    return [(label, model_steps) for label, model_steps in grouped if model_steps]


def largest_table(steps: list[dict[str, Any]]) -> Table:
    """The largest batch by memory, and the pairs a second of the best bound."""
    rows = []
    for label, model_steps in by_model(steps):
        row = [label]
        row += [f"{largest(model_steps, peaks.memory, model_steps[0]['chips']):,}" for peaks in CHIPS_SHOWN.values()]
        row += [f"{best_rate(model_steps, peaks) / 1e6:.2f} million" for peaks in CHIPS_SHOWN.values()]
        rows.append(row)
    heading = ["model", *(f"{c}: largest batch" for c in CHIPS_SHOWN), *(f"{c}: pairs/s at most" for c in CHIPS_SHOWN)]
    return Table("Largest batches", heading, rows)


def best_rate(steps: list[dict[str, Any]], peaks: Chip, *, traffic: bool = False) -> float:
    """Most pairs per second of a slice over all batches, by the bound of a step; traffic: HBM counts as it is told."""
    seconds = [max(seconds_of(e, peaks).values()) if traffic else step_seconds(e, peaks) for e in steps]
    return max(each["batch"] / time for each, time in zip(steps, seconds, strict=True))


def stores_table(steps: list[dict[str, Any]]) -> Table:
    """Disk, the read rate that keeps a slice busy, and the time of an epoch."""
    rows = []
    for label, model_steps in by_model(steps):
        each_pair, machines = model_steps[0]["record_bytes"], model_steps[0]["chips"] // CHIPS_OF_MACHINE
        for store, pairs in STORES.items():
            size = pairs * each_pair
            row = [label, store, _bytes(size), _bytes(size / machines), _time(size / machines / GIGABYTE)]
            for name, peaks in CHIPS_SHOWN.items():
                rate, network = best_rate(model_steps, peaks), NIC[name] * machines / each_pair
                row += [f"{rate * each_pair / machines / GIGABYTE:.2f} GB/s", _time(pairs / min(rate, network))]
                row += [_time(pairs / best_rate(model_steps, peaks, traffic=True))]
            rows.append(row)
    heading = ["model", "pairs", "disk", "of a machine", "epoch at 1 GB/s a machine"]
    heading += [f"{c}: {x}" for c in CHIPS_SHOWN for x in ("read a machine", "epoch, bound", "epoch, with HBM")]
    return Table("Stores", heading, rows)


def losses_table(losses: list[dict[str, Any]]) -> Table:
    """Work and bounds of a loss and its gradient alone, by strategy."""
    rows = []
    for each in losses:
        times = seconds_of(each, CHIPS[f"TPU {each['target'].split(':')[1]}"])
        row = [each["loss"], each["strategy"], f"{each['flops'] / 1e9:,.0f}", f"{each['temporaries'] / 2**20:,.0f} MiB"]
        rows.append([*row, f"{each['traffic'] / 1e9:.1f} GB", *(f"{t * 1e3:.2f}" for t in times.values())])
    return Table("Losses", ["loss", "strategy", "GFLOP", "temporaries", "HBM", "compute", "HBM", "ICI"], rows)


def _bytes(count: float) -> str:
    return f"{count / 1e12:.1f} TB" if count >= 1e12 else f"{count / 1e9:.0f} GB"


def _time(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


TABLES = {"steps": steps_table, "largest": largest_table, "stores": stores_table}


def page(text: str, figures: dict[str, list[dict[str, Any]]]) -> str:
    """The page with each table between its two comments made anew."""
    made = {name: str(make(figures["step"])) for name, make in TABLES.items()}
    made["losses"] = str(losses_table(figures["loss"]))
    for name, table in made.items():
        if f"<!-- {name} -->" not in text:
            continue
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        text = f"{before}{start}{table}{end}{rest.split(end, 1)[1]}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser("benchmarks.slices", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {','.join(MODELS)}")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="global batches")
    parser.add_argument("--folder", type=Path, default=Path("runs/slices"), help="folder of a file for each program")
    parser.add_argument("--write", action="store_true", help=f"also {FIGURES.name}, and the tables of {PAGE.name}")
    make_output_safe()
    args = parser.parse_args(argv)
    compile_all(args.folder, jobs_of(args.models.split(","), map(int, args.batches.split(","))))
    if args.write:
        figures = collected(args.folder)
        write_json(FIGURES, figures)
        write_text(PAGE, page(PAGE.read_text(encoding="utf-8"), figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
