"""`--mode=scale`: measures the training step over devices, batch sizes, loss strategies and precisions.

Strong scaling (Amdahl) asks how much faster more devices take the same batch, weak scaling (Gustafson) whether they
take a larger batch in the same time. Several CPU devices are virtual: they share the cores of one machine, and their
speed says nothing about real devices. Such points are compiled and not run.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from shnet_jax.observe.files import sole_writer, write_json
from shnet_jax.scaling.processes import FAILED, MEASURED, describe_machine, run_point
from shnet_jax.scaling.report import write_report
from shnet_jax.scaling.rows import Row, make_rows
from shnet_jax.scaling.sweep import Point, Record, check_config, check_machine, point_config, settings_digest, sweep
from shnet_jax.untrusted import read_object


def scale(config: ConfigDict, workdir: str | Path) -> list[Row]:
    """Measures the points of config.scale and writes scaling.csv, plots/ and report.html into `workdir`.

    The same command continues an interrupted study. A point is not repeated when it was measured, or did not fit in
    memory, with the same settings on the same kind of machine; delete points/ to repeat it. Failed points are repeated.
    Raises ValueError for settings that do not fit together or do not fit the machine, FolderInUse when another study
    writes to `workdir`. Ends the process with status 1 when no point has a result.
    """
    if jax.distributed.is_initialized():
        raise ValueError("--mode=scale starts processes of its own on one machine: run it without --distributed")
    check_config(config)
    with sole_writer(workdir):
        folder = Path(workdir) / "points"
        folder.mkdir(parents=True, exist_ok=True)
        machine = describe_machine(folder)
        check_machine(config, machine)
        virtual = machine["platform"] == "cpu"
        records = measure_all(config, machine, sweep(config.scale, references=not virtual), folder)
        rows = make_rows(config.scale, records, virtual=virtual)
        page = write_report(Path(workdir), config, machine, rows)
    failed = sum(row["status"] != MEASURED for row in rows)
    print(f"{len(rows)} points{f', {failed} of them without a result' if failed else ''}: {page}")
    if failed == len(rows):
        first = f"{rows[0]['status']}: {rows[0]['message']}"
        raise SystemExit(f"error: none of {failed} points has a result; the first: {first}")
    return rows


def measure_all(
    config: ConfigDict, machine: Mapping[str, Any], points: Sequence[Point], folder: Path
) -> dict[Point, Record]:
    """The record of each point: read from `folder`, or measured and written there."""
    records: dict[Point, Record] = {}
    durations: list[float] = []
    for number, point in enumerate(points):
        path = folder / f"{point.name}.json"
        digest = settings_digest(config, point, machine)
        record = read_record(path, digest)
        if record is None:
            average = sum(durations) / max(1, len(durations))
            eta = f"  ETA {datetime.timedelta(seconds=round((len(points) - number) * average))}" if durations else ""
            print(f"point {number + 1}/{len(points)}  {point}{eta}", file=sys.stderr, flush=True)
            start = time.monotonic()
            compile_only = machine["platform"] == "cpu" and point.devices > 1
            record = run_point(point_config(config, point), point, compile_only, folder)
            durations.append(time.monotonic() - start)
            record |= {"point": dataclasses.asdict(point), "compile_only": compile_only, "settings": digest}
            write_json(path, record)
            if record["message"]:
                print(f"  {record['status']}: {record['message']}", file=sys.stderr, flush=True)
        records[point] = record
    return records


def read_record(path: Path, digest: str) -> Record | None:
    """A point's record; None when there is none, the point failed, or its settings were others."""
    if not path.is_file():
        return None
    record: Record = read_object(path)
    return record if record.get("settings") == digest and record.get("status") != FAILED else None
