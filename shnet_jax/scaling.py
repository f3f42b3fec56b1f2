"""`--mode=scale`: the training step over devices, batch sizes, loss strategies and precisions, with a report.

Two questions: how much faster do more devices take the same batch (strong scaling, Amdahl), and do more devices take a
larger batch in the same time (weak scaling, Gustafson). Each point is a process of its own (`scale_point`).

Several CPU devices are virtual: they share the cores of one machine, and how fast they are says nothing of real ones.
Such points are compiled and not run.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from shnet_jax.data.batches import token_buckets
from shnet_jax.foreign import read_object
from shnet_jax.observe.files import sole_writer, write_json
from shnet_jax.observe.scale_report import write_report
from shnet_jax.observe.scale_rows import Row, Study
from shnet_jax.train.workdir import save_config
from shnet_jax.types import PAIR_STRATEGIES

DTYPES = ("float32", "bfloat16")
OUT_OF_MEMORY = "out of memory"
MEASURED, FAILED = "measured", "failed"

# Sections that change nothing of a training step.
_ASIDE = ("name", "eval", "study")

Record = dict[str, Any]
"""A point's JSON: status, message, settings and, when it was measured, the figures of `scale_point`."""


@dataclasses.dataclass(frozen=True, order=True)
class Point:
    """pairs: of the batch on each device. strategy: config.loss.pairs.strategy. dtype: of both towers' products."""

    strategy: str
    dtype: str
    pairs: int
    devices: int

    @property
    def batch(self) -> int:
        """Pairs of the global batch."""
        return self.pairs * self.devices

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.strategy}_{self.dtype}_{self.pairs}x{self.devices}"

    def __str__(self) -> str:
        devices = f"{self.devices} device{'s' if self.devices > 1 else ''}"
        return f"{devices}, {self.pairs} pairs each, {self.strategy}, {self.dtype}"


def scale(config: ConfigDict, workdir: str | Path) -> list[Row]:
    """Measures the points of config.scale below `workdir` and writes scaling.csv, plots/ and report.html.

    An interrupted study goes on with the same command: points that were measured, or did not fit in memory, with the
    same settings on the same kind of machine are not repeated (delete points/ to repeat them); failed ones are.
    Raises ValueError for settings that do not fit together or to the machine, FolderInUse when another study writes
    there; ends the process with status 1 when no point has a result.
    """
    if jax.distributed.is_initialized():
        raise ValueError("--mode=scale starts processes of its own on one machine: run it without --distributed")
    _check(config)
    with sole_writer(workdir):
        return _scale(config, Path(workdir))


def _scale(config: ConfigDict, workdir: Path) -> list[Row]:
    folder = workdir / "points"
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(folder)
    check_machine(config, machine)
    points = sweep(config.scale, references=machine["platform"] != "cpu")
    records = measure_all(config, machine, points, folder)
    rows = make_rows(config.scale, records, virtual=machine["platform"] == "cpu")
    command = shlex.join(["python", *sys.argv])
    data = config.data.dir or "random batches of the sizes in config.plan"
    steps, warmup = config.scale.steps, config.scale.warmup_steps
    study = Study(config.name, machine, command, data, steps, warmup, _date())
    page = write_report(workdir, study, rows)
    failed = sum(row.status != MEASURED for row in rows)
    print(f"{len(rows)} points{f', {failed} of them without a result' if failed else ''}: {page}")
    if failed == len(rows):
        raise SystemExit(f"error: none of {failed} points has a result; the first: {rows[0].status}: {rows[0].message}")
    return rows


def _date() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def _check(config: ConfigDict) -> None:
    s = config.scale
    for field, known in (("strategies", PAIR_STRATEGIES), ("dtypes", DTYPES)):
        if not s[field] or set(s[field]) - set(known):
            raise ValueError(
                f"config.scale.{field} is {tuple(s[field])}; choose one or more of {', '.join(known)}, as "
                f'--config.scale.{field}="{known}"'
            )
    for field in ("devices", "pairs_per_device", "batch_sizes"):
        if any(value < 1 for value in s[field]):
            raise ValueError(f"config.scale.{field} is {tuple(s[field])}; its numbers must be at least 1")
    if not s.devices or not (s.pairs_per_device or s.batch_sizes):
        raise ValueError("config.scale needs devices, and pairs_per_device or batch_sizes")
    if s.steps < 1 or s.warmup_steps < 0 or s.timeout <= 0:
        raise ValueError(
            f"config.scale.steps is {s.steps}, warmup_steps {s.warmup_steps}, timeout {s.timeout}; expected at least "
            "1, at least 0 and above 0"
        )
    unit = config.data.captions_per_image
    for pairs in s.pairs_per_device:
        if pairs % unit:
            raise ValueError(
                f"config.scale.pairs_per_device has {pairs}, no multiple of config.data.captions_per_image = {unit}"
            )
    for batch in s.batch_sizes:
        for devices in s.devices:
            if batch % (devices * unit):
                raise ValueError(
                    f"config.scale.batch_sizes has {batch}; it must divide into {devices} devices with whole images of "
                    f"config.data.captions_per_image = {unit}"
                )
    if config.data.resident and not config.data.dir:
        raise ValueError("config.data.resident is True and config.data.dir empty: random batches are not resident")


def check_machine(config: ConfigDict, machine: Mapping[str, Any]) -> None:
    """Raises ValueError when the study needs devices that are not there or cannot be compiled for."""
    most = max(config.scale.devices)
    if machine["platform"] != "cpu" and most > machine["devices"]:
        raise ValueError(
            f"config.scale.devices asks for {most}, this machine has {machine['devices']} x {machine['device_kind']}; "
            "JAX_PLATFORMS=cpu compiles for virtual devices instead"
        )
    if machine["platform"] == "cpu" and most > 1 and config.parallel.mapping == "pmap":
        raise ValueError("config.parallel.mapping is pmap, which cannot be compiled without being run: use shard_map")


def sweep(scale: ConfigDict, *, references: bool) -> list[Point]:
    """The points of config.scale, each once.

    references: also one device with each batch size per device that strong scaling comes to, for the ideal line.
    """
    pairs = [(n, p) for p in scale.pairs_per_device for n in scale.devices]
    strong = [(n, batch // n) for batch in scale.batch_sizes for n in scale.devices]
    pairs += strong + [(1, p) for _, p in strong if references]
    pairs += [(1, p) for p in scale.pairs_per_device if references]
    return [
        Point(strategy, dtype, p, n)
        for dtype in scale.dtypes
        for strategy in scale.strategies
        for n, p in dict.fromkeys(pairs)
    ]


def point_config(config: ConfigDict, point: Point) -> ConfigDict:
    """The configuration of one point. Captions are padded to the longest bucket, so that every step is the same."""
    own = ConfigDict(config.to_dict())
    own.parallel.devices = point.devices
    own.train.batch_size = point.batch
    own.loss.pairs.strategy = point.strategy
    for options in own.loss.values():
        if isinstance(options, ConfigDict) and "warmup_epochs" in options:
            options.warmup_epochs = 0.0  # what nearly all steps of a training are
    own.model.dtype = own.text.dtype = point.dtype
    own.data.token_buckets = token_buckets(config.data)[-1:]
    return own


def settings(config: ConfigDict, point: Point, machine: Mapping[str, Any]) -> str:
    """A digest of all that a point's figures depend on, but for the code and the contents of the data set."""
    own = {name: value for name, value in point_config(config, point).to_dict().items() if name not in _ASIDE}
    own["scale"] = {name: own["scale"][name] for name in ("steps", "warmup_steps")}
    # How many devices JAX sees here says nothing of the point, which asks for its own.
    there = {name: value for name, value in machine.items() if name != "devices"}
    text = json.dumps([own, there], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------- processes


def describe_machine(folder: Path) -> dict[str, Any]:
    """`observe.machine.describe`, found by another process: this one must not take the devices from the points."""
    out, log = folder / "machine.json", folder / "machine.log"
    status = _python([str(out)], os.environ, 600.0, log)
    if status != 0:
        raise ValueError(f"JAX finds no devices: {fault(status, log, 600.0)[1]}")
    log.unlink()
    return json.loads(out.read_text(encoding="utf-8"))


def measure_all(
    config: ConfigDict,
    machine: Mapping[str, Any],
    points: Sequence[Point],
    folder: Path,
    run: Callable[[ConfigDict, Point, bool, Path], Record] | None = None,
) -> dict[Point, Record]:
    """The record of each point, found in `folder` or measured by `run` (`run_point`) and put there."""
    run = run or run_point
    found: dict[Point, Record] = {}
    taken: list[float] = []
    for number, point in enumerate(points):
        path = folder / f"{point.name}.json"
        digest = settings(config, point, machine)
        record = read_record(path, digest)
        if record is None:
            left = len(points) - number
            eta = f"  ETA {datetime.timedelta(seconds=round(left * sum(taken) / len(taken)))}" if taken else ""
            print(f"point {number + 1}/{len(points)}  {point}{eta}", file=sys.stderr, flush=True)
            start = time.monotonic()
            compile_only = machine["platform"] == "cpu" and point.devices > 1
            record = run(point_config(config, point), point, compile_only, folder)
            taken.append(time.monotonic() - start)
            record |= {"point": dataclasses.asdict(point), "compile_only": compile_only, "settings": digest}
            write_json(path, record)
            if record["message"]:
                print(f"  {record['status']}: {record['message']}", file=sys.stderr, flush=True)
        found[point] = record
    return found


def read_record(path: Path, digest: str) -> Record | None:
    """A record that needs no repetition; None when there is none, it failed, or its settings were others."""
    if not path.is_file():
        return None
    record: Record = read_object(path)
    return record if record.get("settings") == digest and record.get("status") != FAILED else None


def run_point(config: ConfigDict, point: Point, compile_only: bool, folder: Path) -> Record:
    """Measures in a process of its own; what goes wrong there is the record. Its output is kept as `<point>.log`.

    What it had measured before it failed counts: a part of the step that does not fit alone costs not the step.
    """
    files = {end: folder / f"{point.name}.{end}" for end in ("config.json", "out.json", "log")}
    save_config(config, files["config.json"])
    files["out.json"].unlink(missing_ok=True)
    files["log"].unlink(missing_ok=True)
    environment = dict(os.environ)
    if compile_only:
        environment["XLA_FLAGS"] = virtual_devices(environment.get("XLA_FLAGS", ""), point.devices)
    flags = ["--config", str(files["config.json"]), *(["--compile_only"] if compile_only else [])]
    ended = _python([*flags, str(files["out.json"])], environment, config.scale.timeout, files["log"])
    found = files["out.json"]
    figures = json.loads(found.read_text(encoding="utf-8")) if found.exists() else {}
    if ended != 0:
        status, message = fault(ended, files["log"], config.scale.timeout)
        if not figures:
            return {"status": status, "message": message}
        found.unlink()
        return {"status": MEASURED, "message": f"not all parts were measured: {status}: {message}"} | figures
    for end in files:
        files[end].unlink()
    return {"status": MEASURED, "message": ""} | figures


def virtual_devices(flags: str, count: int) -> str:
    """XLA_FLAGS with that many virtual CPU devices, whatever they said before."""
    others = [flag for flag in flags.split() if not flag.startswith("--xla_force_host_platform_device_count")]
    return " ".join([*others, f"--xla_force_host_platform_device_count={count}"])


def _python(arguments: list[str], environment: Mapping[str, str], limit: float, log: Path) -> int | None:
    """Runs `scale_point`, whose output goes to `log`; its status, None when it takes longer than `limit` seconds."""
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    # Filtered tracebacks end in a note instead of the error.
    environment = {**environment, "PYTHONPATH": paths, "JAX_TRACEBACK_FILTERING": "off"}
    command = [sys.executable, "-m", "shnet_jax.scale_point", "--attached", *arguments]
    with (
        log.open("wb") as out,
        # Its end of the pipe tells the point when this process is gone, however it ended.
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()


_ERROR = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Exit|Memory|Interrupt)\b.*$", re.MULTILINE)


def fault(ended: int | None, log: Path, limit: float) -> tuple[str, str]:
    """(status, message) of a process that did not end well, by its status and output; None: it took too long."""
    said = log.read_text(encoding="utf-8", errors="replace")
    where = f" (output: {log})"
    if ended is None:
        return FAILED, f"took longer than config.scale.timeout = {limit:g} seconds{where}"
    errors, lines = list(_ERROR.finditer(said)), said.strip().splitlines()
    message = said[errors[-1].start() :] if errors else (lines[-1] if lines else "no message")
    message = " ".join(message.split())[:500] + where
    if "RESOURCE_EXHAUSTED" in said:
        return OUT_OF_MEMORY, message
    if ended < 0:
        name = signal.Signals(-ended).name
        system = " (by the system, for want of memory?)" if name == "SIGKILL" else ""
        return FAILED, f"ended by {name}{system}: {message}"
    return FAILED, message


# ----------------------------------------------------------------------------------------------------- arithmetic


def make_rows(scale: ConfigDict, records: Mapping[Point, Record], *, virtual: bool) -> list[Row]:
    """One row for each point, with what it is compared to."""
    speeds = {point: record.get("examples_per_second") for point, record in records.items()}
    return [_row(scale, point, record, speeds, virtual) for point, record in records.items()]


def _row(scale: ConfigDict, point: Point, record: Record, speeds: Mapping[Point, float | None], virtual: bool) -> Row:
    alone = speeds.get(dataclasses.replace(point, devices=1))
    same_batch = speeds.get(dataclasses.replace(point, devices=1, pairs=point.batch))
    own = speeds[point]
    return Row(
        devices=point.devices,
        pairs=point.pairs,
        batch=point.batch,
        strategy=point.strategy,
        dtype=point.dtype,
        series=tuple(_series(scale, point)),
        status=record["status"],
        message=record["message"],
        virtual=virtual and point.devices > 1,
        examples_per_second=own,
        ideal=point.devices * alone if alone else None,
        efficiency=efficiency(own, alone, point.devices),
        strong_efficiency=efficiency(own, same_batch, point.devices),
        memory=record.get("memory", {}).get("peak"),
        device_memory=record.get("device_peak"),
        flops=record.get("flops"),
        # On one device they are in the program and send nothing.
        collectives=record.get("collectives", {}) if point.devices > 1 else {},
        seconds=record.get("seconds", {}),
        compile_seconds=record.get("compile_seconds"),
    )


def efficiency(rate: float | None, alone: float | None, devices: int) -> float | None:
    """Share of the ideal: rate / (devices * rate of one device alone); None where either is not known."""
    return rate / (devices * alone) if rate and alone else None


def _series(scale: ConfigDict, point: Point) -> Iterator[tuple[str, int]]:
    """The lines that a point lies on: ("weak", pairs of each device), ("strong", pairs of the batch)."""
    if point.devices in scale.devices:
        if point.pairs in scale.pairs_per_device:
            yield "weak", point.pairs
        if point.batch in scale.batch_sizes:
            yield "strong", point.batch
