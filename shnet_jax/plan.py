"""`--mode=plan`: what training and evaluation will cost on devices that are not there.

The programs are those that train and evaluate, compiled ahead of time for the target from shapes alone: no array is
made, no data set and no weights are read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax import registry
from shnet_jax.data.batches import gather, stored_fields, token_buckets
from shnet_jax.data.records import DataSet, Feature, open_dataset
from shnet_jax.evaluate.split import image_tower, text_tower
from shnet_jax.interop import bert_weights
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.observe.compiled import Memory, OutOfMemory, compile_lowered, memory
from shnet_jax.observe.hardware import GIB, Chip, chip, target_devices
from shnet_jax.observe.work import COLLECTIVES, Work, work
from shnet_jax.parallel.mapping import data_mesh, map_encode
from shnet_jax.train.prepare import build_step
from shnet_jax.types import DATA

BERT_VOCABULARY = 30522  # of bert-base-uncased, where config.text.vocab_size is 0
LABEL_MAP = (64, 64)  # of seg_map, and below the cells of seg_semantic: what the importers make
CELLS = (7, 7)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is planned: a complete configuration, its model and the data set, real or described by config.plan."""

    config: ConfigDict
    model: RetrievalModel
    dataset: DataSet
    fields: tuple[str, ...]
    captions: int  # of the training split


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program on one device.

    rows: pairs, images or captions of one device's batch. fits: within the memory; None where that is not known.
    memory, work: None when the compiler gave up; needed then is what it says it would take, None if it does not.
    seconds: that compiling took. why: the compiler's message.
    """

    rows: int
    fits: bool | None
    memory: Memory | None
    work: Work | None
    needed: float | None
    seconds: float
    why: str = ""


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
    report = make_plan(describe(config), mesh) | {"target": target}
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / f"plan_{target.replace(':', '_')}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{table(report)}\n{path}")


def describe(config: ConfigDict) -> Subject:
    """The subject of a configuration. Sizes come from config.data.dir if it is set, else from config.plan.

    Raises ValueError or FileNotFoundError for a data set that is not there, or lacks what the model reads.
    """
    config = ConfigDict(config.to_dict())
    if config.text.weights:
        config.text.update(bert_weights.sizes(bert_weights.find_folder(config.text.weights)))
    config.text.vocab_size = config.text.vocab_size or BERT_VOCABULARY
    dataset = open_dataset(config.data.dir) if config.data.dir else _described(config)
    module = registry.model(config.model.name)
    fields = module.image_fields(config)
    if missing := [field for field in fields if field not in dataset.features]:
        raise ValueError(
            f"{dataset.path}: the model reads {', '.join(missing)}; there is {', '.join(dataset.features)}"
        )
    if config.data.dir:
        captions = int(dataset.caption_counts(config.data.train_split).sum())
    else:
        captions = config.plan.images * config.plan.captions
    return Subject(config, module.build(config), dataset, fields, captions)


def _described(config: ConfigDict) -> DataSet:
    """A data set of the sizes in config.plan, with all fields of images, as the importers store them."""
    p, classes = config.plan, config.model.num_classes
    features = {
        "regions": ((p.regions, p.region_dim), "float16"),
        "region_mask": ((p.regions,), "bool"),
        "boxes": ((p.regions, 4), "float32"),
        "box_classes": ((p.regions,), "int32"),
        "box_scores": ((p.regions,), "float32"),
        "grid": ((p.grid, p.grid_dim), "float16"),
        "grid_mask": ((p.grid,), "bool"),
        "seg_semantic": ((classes, *CELLS), "float16"),
        "seg_map": (LABEL_MAP, "uint8"),
        "categories": ((classes,), "bool"),
        "image_embedding": ((p.image_embedding,), "float32"),
    }
    named = {name: Feature(shape, np.dtype(dtype)) for name, (shape, dtype) in features.items()}
    return DataSet(Path("config.plan"), {config.data.train_split: p.images}, named, classes, {})


def train_batch(subject: Subject, pairs: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of `data.batches.train_batches`, of the longest captions."""
    data = subject.config.data
    images = pairs // data.captions_per_image
    fields = image_batch(subject, images)
    keeps = {
        keep: jax.ShapeDtypeStruct((images, subject.dataset.features[unit].shape[0]), bool)
        for unit, keep in (("regions", "region_keep"), ("grid", "grid_keep"))
        if unit in fields
    }
    kept = {"image_index": fields["image_index"]} if data.resident else fields
    return {**kept, **keeps, **text_batch(subject, pairs)}


def image_batch(subject: Subject, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the images of a batch, or of a gallery's batch of images."""
    features = {field: subject.dataset.features[field] for field in stored_fields(subject.dataset, subject.fields)}
    index = {"image_index": jax.ShapeDtypeStruct((rows,), np.int32)}
    return index | {field: jax.ShapeDtypeStruct((rows, *f.shape), f.dtype) for field, f in features.items()}


def resident_table(subject: Subject) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of `data.batches.resident_table` of the training split."""
    images = image_batch(subject, subject.dataset.splits[subject.config.data.train_split])
    return {field: shape for field, shape in images.items() if field != "image_index"}


def text_batch(subject: Subject, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the captions of a batch, padded to the longest that there may be."""
    shape = rows, token_buckets(subject.config.data)[-1]
    return {"tokens": jax.ShapeDtypeStruct(shape, np.int32), "token_mask": jax.ShapeDtypeStruct(shape, bool)}


def variables(subject: Subject) -> dict[str, Any]:
    """Shapes of the model's {"params", "batch_stats"}."""
    batch = image_batch(subject, 1) | text_batch(subject, 1)
    init = lambda batch: subject.model.init(jax.random.key(0), gather({}, batch), train=False)  # noqa: E731
    shapes = dict(jax.eval_shape(init, batch))
    return {name: shapes.get(name, {}) for name in ("params", "batch_stats")}


def lower_train(subject: Subject, mesh: Mesh, pairs: int) -> jax.stages.Lowered:
    """The training step with `pairs` pairs on each device."""
    config = subject.config.copy_and_resolve_references()
    config.train.batch_size = pairs * mesh.size
    per_epoch = max(1, subject.captions // config.train.batch_size)
    total = config.train.steps or math.ceil(config.train.epochs * per_epoch)
    built = build_step(FrozenConfigDict(config), subject.model, mesh, variables(subject), per_epoch, total)
    table = resident_table(subject) if config.data.resident else {}
    batch = _placed(train_batch(subject, config.train.batch_size), mesh, PartitionSpec(DATA))
    return built.step.lower(built.like, batch, _placed(table, mesh, PartitionSpec()))


def lower_encode(subject: Subject, mesh: Mesh, rows: int, side: str) -> jax.stages.Lowered:
    """The encoding of "image" or "text", `rows` on each device, every device having the whole tower."""
    tower, make_batch = (image_tower, image_batch) if side == "image" else (text_tower, text_batch)
    batch = make_batch(subject, rows * mesh.size)
    given = _placed(variables(subject), mesh, PartitionSpec()), _placed(batch, mesh, PartitionSpec(DATA))
    return map_encode(partial(tower, subject.model), mesh).lower(*given)


def _placed(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def compile_program(
    lower: Callable[[], jax.stages.Lowered], rows: int, limit: float | None, effort: float = 0.0
) -> Program:
    """Compiles and measures. limit: bytes of one device's memory, None: not known. effort: as config.plan.effort."""
    start = time.perf_counter()
    try:
        compiled = compile_lowered(lower(), effort)
    except OutOfMemory as error:
        return Program(rows, False, None, None, error.needed, time.perf_counter() - start, str(error))
    found = memory(compiled)
    fits = None if limit is None else found.peak <= limit
    return Program(rows, fits, found, work(compiled.as_text()), found.peak, time.perf_counter() - start)


def make_plan(subject: Subject, mesh: Mesh) -> dict[str, Any]:
    """Compiles the programs of `subject` for the devices of `mesh`; what `plan` writes, but for the target."""
    config, kind = subject.config, mesh.devices.flat[0].device_kind
    peaks = chip(kind)
    limit = peaks.memory if peaks else None
    pairs, effort = _pairs_per_device(config, mesh.size), config.plan.effort
    if not -1 <= effort <= 0:
        raise ValueError(f"config.plan.effort is {effort}; it must be between -1 and 0")

    def train(pairs: int, subject: Subject = subject) -> Program:
        log.info("compiling the training step with %d pairs on each of %d devices", pairs, mesh.size)
        return compile_program(lambda: lower_train(subject, mesh, pairs), pairs, limit, effort)

    def encode(side: str) -> Program:
        rows = config.eval.batch_size
        log.info("compiling the %s tower", side)
        return compile_program(lambda: lower_encode(subject, mesh, rows, side), rows, limit, effort)

    programs = {"train": train(pairs), "encode images": encode("image"), "encode captions": encode("text")}
    first, largest, changes = programs["train"], None, []
    if first.fits is False:
        changes = advice(config, mesh.size)
    if config.plan.search and first.fits is not None:
        largest = largest_batch(train, first, unit=_unit(config), most=subject.captions // mesh.size)
        if not first.fits and (found := fitting_microbatch(train, subject, pairs)):
            changes.insert(0, f"it fits with --config.train.microbatch={found[0]}: {found[1] / GIB:.2f} GiB")
    return {
        "name": config.name,
        "device_kind": kind,
        "devices": mesh.size,
        "chip": peaks._asdict() if peaks else None,
        "global_batch": pairs * mesh.size,
        "settings": {
            "train.microbatch": config.train.microbatch,
            "loss.pairs.strategy": config.loss.pairs.strategy,
            "model.dtype": config.model.dtype,
            "text.dtype": config.text.dtype,
            "data.resident": config.data.resident,
            "plan.effort": effort,
        },
        "programs": {name: _as_dict(program, peaks, kind) for name, program in programs.items()},
        "largest_pairs_per_device": largest,
        "changes": changes,
    }


def _pairs_per_device(config: ConfigDict, devices: int) -> int:
    """Pairs of a batch on each device; raises ValueError when they do not divide."""
    batch, unit = config.train.batch_size, _unit(config)
    if batch < 1 or batch % (unit * devices):
        what = "config.train.microbatch" if config.train.microbatch else "config.data.captions_per_image"
        raise ValueError(
            f"config.train.batch_size is {batch}; it must divide into {devices} devices with a multiple of {what} = "
            f"{unit} on each"
        )
    if unit % config.data.captions_per_image:
        raise ValueError(
            f"config.train.microbatch is {unit}, no multiple of config.data.captions_per_image = "
            f"{config.data.captions_per_image}"
        )
    return batch // devices


def _unit(config: ConfigDict) -> int:
    """Pairs that a device's batch is a multiple of."""
    return config.train.microbatch or config.data.captions_per_image


def largest_batch(compiled: Callable[[int], Program], first: Program, unit: int, most: int) -> int:
    """The most pairs on each device that fit, within an eighth, from 0 to `most`; multiples of `unit`.

    Doubles or halves from `first` to both sides of the limit, then bisects.
    """

    def fits(units: int) -> bool:
        return bool(compiled(units * unit).fits)

    start, last = first.rows // unit, max(most // unit, first.rows // unit)
    low, high = (start, last + 1) if first.fits else (0, start)
    while first.fits and low < last:
        tried = min(2 * low, last)
        if not fits(tried):
            high = tried
            break
        low = tried
    while not first.fits and high > 1 and not low:
        if fits(high // 2):
            low = high // 2
        else:
            high //= 2
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def fitting_microbatch(
    compiled: Callable[[int, Subject], Program], subject: Subject, pairs: int
) -> tuple[int, float] | None:
    """(microbatch, bytes needed) of the first of pairs / 2, / 4, ... that fits; None: none of them does."""
    for microbatch in _divisors(
        pairs, subject.config.data.captions_per_image, subject.config.train.microbatch or pairs
    ):
        config = subject.config.copy_and_resolve_references()
        config.train.microbatch = microbatch
        found = compiled(pairs, dataclasses.replace(subject, config=config))
        if found.fits and found.needed is not None:
            return microbatch, found.needed
    return None


def _divisors(pairs: int, unit: int, below: int) -> Iterator[int]:
    """pairs / 2, / 4, / 8, ... as long as they are multiples of `unit`, those smaller than `below`."""
    while pairs % (2 * unit) == 0:
        pairs //= 2
        if pairs < below:
            yield pairs


def advice(config: ConfigDict, devices: int) -> list[str]:
    """What makes a step that does not fit smaller, the cheapest first."""
    found = []
    if config.data.resident:
        found.append(
            "--config.data.resident=False: the features come with the batches instead of staying on every device"
        )
    if "float32" in (config.model.dtype, config.text.dtype):
        found.append("--config.model.dtype=bfloat16 --config.text.dtype=bfloat16: half of what the backward pass keeps")
    microbatch = config.train.microbatch
    found.append(
        "--config.train.microbatch: activations then grow with it and no longer with the batch"
        if not microbatch
        else f"a smaller --config.train.microbatch than {microbatch}"
    )
    if config.loss.pairs.strategy == "gathered":
        found.append(
            "--config.loss.pairs.strategy=streamed or ring: no device holds its scores with the whole global batch"
        )
    if "remat" in config.text and not config.text.remat:
        found.append("--config.text.remat=True: layers of the text tower are computed again in the backward pass")
    if "shard_params" in config.parallel and not config.parallel.shard_params and devices > 1:
        found.append("--config.parallel.shard_params=True: parameters and optimiser state are split over the devices")
    found.append(f"more than {devices} devices for the same --config.train.batch_size, or a smaller batch")
    return found


def bounds(found: Work, peaks: Chip, kind: str) -> tuple[float, float]:
    """Seconds that the matrix units and that the memory need at least; the step takes no less than the larger."""
    operations = found.passes if kind.startswith("TPU") else found.flops
    return operations / peaks.flops, found.bytes / peaks.bandwidth


def _as_dict(program: Program, peaks: Chip | None, kind: str) -> dict[str, Any]:
    out = dataclasses.asdict(program)
    if program.memory:
        out["memory"]["peak"] = program.memory.peak
    if program.work and peaks:
        out["compute_seconds"], out["memory_seconds"] = bounds(program.work, peaks, kind)
    return out


def table(report: Mapping[str, Any]) -> str:
    """What `make_plan` found, as text; figures of one device."""
    programs, peaks, devices = list(report["programs"].values()), report["chip"], report["devices"]
    rows = [["on each device", *report["programs"]], ["rows of a batch", *(f"{p['rows']:,}" for p in programs)]]

    def row(label: str, value: Callable[[dict[str, Any]], float | None], units: Mapping[str, float]) -> None:
        values = [value(p) for p in programs]
        if any(v is not None for v in values):
            rows.append([label, *("-" if v is None else _amount(v, units) for v in values)])

    for label, key in _MEMORY.items():
        row(label, lambda p, key=key: p["memory"] and p["memory"][key], _BYTES)  # type: ignore[misc]
    row("peak", lambda p: p["needed"], _BYTES)
    rows.append(["fits", *(_FITS[p["fits"]] for p in programs)])
    row("matrix operations", lambda p: p["work"] and p["work"]["flops"], _OPERATIONS)
    row("memory traffic", lambda p: p["work"] and p["work"]["bytes"], _BYTES)
    for kind in COLLECTIVES:
        row(kind, lambda p, kind=kind: p["work"] and p["work"]["collectives"].get(kind), _BYTES)  # type: ignore[misc]
    row("compute-bound", lambda p: p.get("compute_seconds"), _SECONDS)
    row("bandwidth-bound", lambda p: p.get("memory_seconds"), _SECONDS)
    row("compiled in", lambda p: p["seconds"], _SECONDS)

    lines = [
        f"{report['name']}: {devices} x {report['device_kind']}, global batch {report['global_batch']:,}",
        ", ".join(f"{name}={value}" for name, value in report["settings"].items()),
        f"memory of a device: {peaks['memory'] / GIB:.1f} GiB"
        if peaks
        else "memory and peaks of this device: not known",
        "",
        *_aligned(rows),
        "",
    ]
    if once := sum(p["work"]["loops_once"] for p in programs if p["work"]):
        lines.append(f"{once} loops do not say how often they run: what is in them is counted once.")
    if hidden := sum(p["work"]["hidden"] for p in programs if p["work"]):
        lines.append(f"{hidden} calls of libraries do not say what they do: their operations are not counted.")
    most = report["largest_pairs_per_device"]
    if most is not None:
        lines.append(f"largest batch that fits: {most:,} pairs a device, {most * devices:,} in all")
    if report["changes"]:
        lines += ["The training step does not fit. What helps:", *(f"  - {change}" for change in report["changes"])]
        lines.append(report["programs"]["train"]["why"])
    return "\n".join(lines).rstrip()


_MEMORY = {
    "arguments": "arguments",
    "temporaries": "temporaries",
    "outputs": "outputs",
    "  of these donated": "aliased",
    "program": "code",
}
_BYTES = {"GiB": GIB, "MiB": 2**20, "KiB": 2**10, "B": 1}
_OPERATIONS = {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}
_SECONDS = {"s": 1, "ms": 1e-3, "us": 1e-6}
_FITS = {True: "yes", False: "NO", None: "?"}


def _amount(value: float, units: Mapping[str, float]) -> str:
    """In the largest unit of which there is one, else in the smallest."""
    unit = next((unit for unit, size in units.items() if value >= size), list(units)[-1])
    return f"{value / units[unit]:,.2f} {unit}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
