"""Results of benchmarks: rows, each a ratio of two speeds measured in the same run; as JSON and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from benchmarks.timing import Timing
from shnet_jax.observe.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    benchmark: file of this package. what, reference: what was measured and what it is compared with.
    seconds, reference_seconds: median time of one call; best_seconds, reference_best_seconds: of the fastest round.
    rounds: how often each was measured, in turn.
    work, reference_work: what one call does, in `unit`.
    ratio: (work / seconds) / (reference_work / reference_seconds), the speed in units of the reference's.
    aim: the least ratio that is hoped for on this kind of machine, None: no aim. Nothing fails below it.
    memory_bytes, reference_memory_bytes: as `memory` says, None: not measured.
    memory: which memory that is.
    note: what else a reader should know; for a row without numbers, why it has none.
    """

    benchmark: str
    what: str
    reference: str
    seconds: float | None = None
    best_seconds: float | None = None
    reference_seconds: float | None = None
    reference_best_seconds: float | None = None
    rounds: int = 0
    work: float = 1.0
    reference_work: float = 1.0
    unit: str = "calls"
    ratio: float | None = None
    aim: float | None = None
    memory_bytes: int | None = None
    reference_memory_bytes: int | None = None
    memory: str = ""
    note: str = ""


def compare(
    benchmark: str,
    what: str,
    timing: Timing,
    reference: str,
    reference_timing: Timing,
    *,
    work: float = 1.0,
    reference_work: float | None = None,
    **fields: Any,
) -> Row:
    """The row of two timings; `reference_work` is `work` unless told. fields: the rest of `Row`."""
    reference_work = work if reference_work is None else reference_work
    speed, reference_speed = work / timing.median, reference_work / reference_timing.median
    return Row(
        benchmark,
        what,
        reference,
        seconds=timing.median,
        best_seconds=timing.best,
        reference_seconds=reference_timing.median,
        reference_best_seconds=reference_timing.best,
        rounds=min(len(timing.rounds), len(reference_timing.rounds)),
        work=work,
        reference_work=reference_work,
        ratio=speed / reference_speed,
        **fields,
    )


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    heading = ("", "what", "time", "reference", "time", "ratio", "aim", "memory", "of the reference", "")
    cells = [
        (
            row.benchmark,
            row.what,
            _time(row.seconds),
            row.reference,
            _time(row.reference_seconds),
            "" if row.ratio is None else f"{row.ratio:.3g}",
            "" if row.aim is None else f"≥ {row.aim:g}",
            _memory(row.memory_bytes),
            _memory(row.reference_memory_bytes),
            "; ".join(filter(None, (row.memory and f"memory: {row.memory}", row.note))),
        )
        for row in rows
    ]
    return str(Table("Benchmarks", heading, cells, words=True))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds:.1e} s"


def _memory(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f} MiB"
