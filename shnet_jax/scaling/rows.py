"""The table of a scaling study: the lines of scaling.csv, from which charts, sentences and page are made."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from shnet_jax.scaling.sweep import Point, Record, count

PARTS = ("input", "encode", "loss", "collectives", "optimiser", "rest")
"""The parts of the time of a step, in the order in which they are drawn."""

Row = dict[str, Any]
"""One point by the columns of scaling.csv, in bytes and seconds; None where a figure is not known."""


class Line(NamedTuple):
    """Points along which devices are added. efficiency: the column that holds it. ideal: its reference, in words."""

    name: str
    title: str
    efficiency: str
    ideal: str
    rows: list[Row]


def make_rows(scale: ConfigDict, records: Mapping[Point, Record], *, virtual: bool) -> list[Row]:
    """A row for each point, with its efficiency. virtual: the devices are those of a CPU."""
    kinds = sorted({kind for p, record in records.items() if p.devices > 1 for kind in record.get("collectives", {})})
    speeds = {point: record.get("examples_per_second") for point, record in records.items()}
    rows = []
    for point, record in records.items():
        one_device = dataclasses.replace(point, devices=1)
        alone, whole_batch = speeds.get(one_device), speeds.get(dataclasses.replace(one_device, pairs=point.batch))
        memory, rate = record.get("memory", {}).get("peak"), speeds[point]
        collectives = record.get("collectives", {}) if point.devices > 1 else {}  # a device alone sends nothing
        sent = None if memory is None else sum(collectives.values())
        row: Row = {
            "devices": point.devices,
            "pairs": point.pairs,
            "batch": point.batch,
            "strategy": point.strategy,
            "dtype": point.dtype,
            "status": record["status"],
            "virtual": virtual and point.devices > 1,
            "examples_per_second": rate,
            "ideal": point.devices * alone if alone else None,
            "efficiency": rate / (point.devices * alone) if rate and alone else None,
            "strong_efficiency": rate / (point.devices * whole_batch) if rate and whole_batch else None,
            "memory": memory,
            "device_memory": record.get("device_peak"),
            "flops": record.get("flops"),
            "compile_seconds": record.get("compile_seconds"),
            "goodput": goodput(record.get("seconds", {})),
            "collective_bytes": sent,
            "exchange_bytes": None if sent is None else sent - collectives.get("all-reduce", 0.0),
        }
        row |= {f"{kind}_bytes": collectives.get(kind, None if memory is None else 0.0) for kind in kinds}
        row |= {f"{part}_seconds": record.get("seconds", {}).get(part) for part in ("step", *PARTS)}
        rows.append(row | {"message": record["message"]})
    return rows


def goodput(seconds: Mapping[str, float]) -> float | None:
    """Share of a step, 0..1, in which the devices do not wait for its batch; None where it was not timed."""
    return 1 - seconds["input"] / seconds["step"] if seconds.get("step") else None


def scaling_lines(scale: ConfigDict, rows: Sequence[Row]) -> Iterator[Line]:
    """The lines of weak and of strong scaling in config.scale, on which some of the rows lie."""
    rows = [row for row in rows if row["devices"] in scale.devices]
    for size in scale.pairs_per_device:
        if on_line := [row for row in rows if row["pairs"] == size]:
            title = f"{count(size, 'pair')} on each device"
            yield Line(f"weak_{size}", title, "efficiency", "one device with as many pairs", on_line)
    for size in scale.batch_sizes:
        if on_line := [row for row in rows if row["batch"] == size]:
            title = f"{count(size, 'pair')} over all devices"
            yield Line(f"strong_{size}", title, "strong_efficiency", "one device with the whole batch", on_line)


def point_text(row: Row) -> str:
    """The point of a row in words."""
    return str(Point(row["strategy"], row["dtype"], row["pairs"], row["devices"]))


def collective_kinds(row: Row) -> list[str]:
    """The kinds of collectives that the table has a column for."""
    columns = [name for name in row if name.endswith("_bytes") and name not in ("collective_bytes", "exchange_bytes")]
    return [name.removesuffix("_bytes") for name in columns]


def has_all_parts(row: Row) -> bool:
    """Whether every part of the step was timed."""
    return all(row[f"{part}_seconds"] is not None for part in PARTS)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes a line for each point; a field is empty where a figure is not known."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
