"""Runs benchmarks one after another; writes JSON after each and prints the table."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

from benchmarks import machine
from benchmarks.rows import Row, table
from shnet_jax.observe.files import write_json
from shnet_jax.observe.terminal import make_output_safe

BENCHMARKS = (
    "step",
    "momentum",
    "pool",
    "ranking",
    "losses",
    "input",
    "text",
    "sets",
    "interaction",
    "stage_one",
    "align",
    "memory",
    "soak",
    "embed",
    "published",
)
"""Files of this package: each has `run(sizes) -> list[Row]` and the sizes FULL and QUICK, some also GPU."""

ON_GPU = ("step", "text", "pool", "losses", "ranking", "embed", "published", "align")
"""Benchmarks of --gpu, the most wanted first."""

GPU_SECONDS = 480.0
"""No further benchmark of --gpu begins after so many seconds."""

FAULTS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, OSError, SubprocessError)
"""Exceptions that a failed benchmark may raise: JAX's errors are RuntimeErrors; a child process may fail."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    make_output_safe()
    parser = argparse.ArgumentParser("benchmarks", description="Ratios measured in one run; see benchmarks/README.md.")
    parser.add_argument("--only", help=f"some of {','.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast it is")
    parser.add_argument(
        "--gpu", action="store_true", help=f"{','.join(ON_GPU)} at a GPU's sizes; nothing begins after 8 minutes"
    )
    parser.add_argument("--out", type=Path, help="file for all numbers, runs/bench/results.json or gpu.json")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/bench") / ("gpu.json" if args.gpu else "results.json")
    default = ",".join(ON_GPU if args.gpu else BENCHMARKS)
    chosen = [name for name in (default if args.only is None else args.only).split(",") if name]
    unknown = [name for name in chosen if name not in BENCHMARKS]
    if unknown or not chosen:
        parser.error(f"argument --only: expected some of {','.join(BENCHMARKS)}, found {args.only!r}")

    document: dict[str, Any] = {"machine": machine.describe(), "quick": args.quick, "seconds": {}, "rows": []}
    rows: list[Row] = []
    failed: list[str] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for name in chosen:
        start = time.perf_counter()
        if args.gpu and start - began > GPU_SECONDS:
            rows.append(Row(name, "not begun", "", note=f"{GPU_SECONDS:.0f} s were spent; run it alone: --only={name}"))
        else:
            print(f"{name} ...", flush=True)
            measured, message = _measure(name, quick=args.quick, gpu=args.gpu)
            rows += measured
            failed += [name] if message else []
        document["seconds"][name] = time.perf_counter() - start
        document["rows"] = [dataclasses.asdict(row) for row in rows]
        write_json(args.out, document)
        page = args.out.with_suffix(".md")
        page.write_text(f"{_headline(document['machine'])}\n\n{table(rows)}", encoding="utf-8")
    print(f"\n{page.read_text(encoding='utf-8')}\nAll numbers: {args.out}; this table: {page}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _measure(name: str, *, quick: bool, gpu: bool) -> tuple[list[Row], str]:
    """Rows of a benchmark, and why it failed; "" if it did not."""
    module = importlib.import_module(f"benchmarks.{name}")
    sizes = module.QUICK if quick else getattr(module, "GPU", module.FULL) if gpu else module.FULL
    rows: list[Row] = []
    try:
        for each in sizes if isinstance(sizes, tuple) else (sizes,):
            rows += module.run(each)
    except FAULTS as error:  # the others are measured all the same, and the table is printed
        traceback.print_exc()
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return [*rows, Row(name, "did not run to its end", "", note=message)], message
    return rows, ""


def _headline(facts: dict) -> str:
    accelerator = "" if facts["platform"] == "cpu" else f", {facts['devices']} x {facts['device_kind']}"
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB{accelerator}; "
        f"Python {facts['python']}, {versions}; load {facts['load_average']:.1f} at the start"
    )
