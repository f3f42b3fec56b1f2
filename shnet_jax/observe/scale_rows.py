"""A scaling study as rows, one for each point, and how their figures are written; the same as a table (CSV)."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PARTS = ("input", "encode", "loss", "collectives", "optimiser", "rest")
"""Of the seconds of a step, in the order in which they are drawn."""

ENOUGH = 0.8
"""Efficiency below which adding devices is called a waste."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One point of a study; None where a figure is not known.

    devices, pairs (of the batch on each), batch (over all), strategy and dtype name the point.
    series: the lines it lies on, ("weak", pairs) and ("strong", batch).
    status, message: "measured", or what went wrong. virtual: several CPU devices, compiled and not run.
    examples_per_second: pairs over all devices. ideal: of one device with these pairs, times devices.
    efficiency: of the ideal. strong_efficiency: the same against one device with the whole batch.
    memory: bytes of one device by the compiler, device_memory: by its allocator. flops: of matrix products, one step on
    one device. collectives: bytes by kind, one step on one device. seconds: of a "step" and of PARTS.
    """

    devices: int
    pairs: int
    batch: int
    strategy: str
    dtype: str
    series: tuple[tuple[str, int], ...]
    status: str
    message: str
    virtual: bool
    examples_per_second: float | None
    ideal: float | None
    efficiency: float | None
    strong_efficiency: float | None
    memory: float | None
    device_memory: float | None
    flops: float | None
    collectives: Mapping[str, float]
    seconds: Mapping[str, float]
    compile_seconds: float | None

    @property
    def sent(self) -> float | None:
        """Bytes of all collectives; None when the point was not compiled."""
        return None if self.memory is None else sum(self.collectives.values())

    @property
    def sent_beside(self) -> float | None:
        """The same but for all-reduce, which is nearly all the gradient, whatever the strategy."""
        return None if self.sent is None else self.sent - self.collectives.get("all-reduce", 0.0)

    def __str__(self) -> str:
        return f"{devices_text(self.devices)} with {pairs_text(self.pairs)} each, {self.strategy}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Study:
    """What was studied. data: where the batches come from. machine: as `observe.machine.describe` gives it."""

    name: str
    machine: Mapping[str, Any]
    command: str
    data: str
    steps: int
    warmup_steps: int
    date: str


def efficiency_of(row: Row, kind: str) -> float | None:
    """Of a point on a "weak" or on a "strong" line."""
    return row.efficiency if kind == "weak" else row.strong_efficiency


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line for each point, bytes and seconds as they are; empty where a figure is not known."""
    sent = kinds(rows)
    names = [f.name for f in dataclasses.fields(Row) if f.name not in ("series", "collectives", "seconds", "message")]
    timed = ("step", *PARTS)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        measured = [*(f"{kind}_bytes" for kind in sent), *(f"{part}_seconds" for part in timed)]
        writer.writerow([*names, "collective_bytes", *measured, "message"])
        for row in rows:
            writer.writerow(
                [getattr(row, name) for name in names]
                + [row.sent, *(row.collectives.get(kind, 0.0 if row.memory is not None else None) for kind in sent)]
                + [row.seconds.get(part) for part in timed]
                + [row.message]
            )


def kinds(rows: Iterable[Row]) -> list[str]:
    """Of the collectives in any row."""
    return sorted({kind for row in rows for kind in row.collectives})


def number_text(value: float | None, form: str, scale: float = 1.0, unit: str = "") -> str:
    """`-` where it is not known."""
    return "-" if value is None else f"{value * scale:{form}}{unit}"


def bytes_text(size: float | None) -> str:
    """In the largest unit of which there is one."""
    if size is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.3g} {unit}"


def milliseconds_text(row: Row, part: str) -> str:
    """Of the step or one of PARTS."""
    return f"{1e3 * row.seconds[part]:,.1f} ms"


def devices_text(count: int) -> str:
    """`1 device`, `2 devices`."""
    return f"{count} device{'s' if count > 1 else ''}"


def pairs_text(count: int) -> str:
    """`1 pair`, `2 pairs`."""
    return f"{count:,} pair{'s' if count > 1 else ''}"
