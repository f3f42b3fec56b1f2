"""Runs benchmarks one after another; writes JSON after each and prints the table."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from subprocess import SubprocessError

from benchmarks import machine
from benchmarks.rows import Row, table
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
)
"""Files of this package: each has `run(sizes) -> list[Row]` and the sizes FULL and QUICK."""

FAULTS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, OSError, SubprocessError)
"""Exceptions that a failed benchmark may raise: JAX's errors are RuntimeErrors; a child process may fail."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    make_output_safe()
    parser = argparse.ArgumentParser("benchmarks", description="Ratios measured in one run; see benchmarks/README.md.")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help=f"some of {','.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast it is")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/results.json"), help="file for all numbers")
    args = parser.parse_args(argv)
    chosen = [name for name in args.only.split(",") if name]
    unknown = [name for name in chosen if name not in BENCHMARKS]
    if unknown or not chosen:
        parser.error(f"argument --only: expected some of {','.join(BENCHMARKS)}, found {args.only!r}")

    document = {"machine": machine.describe(), "quick": args.quick, "seconds": {}, "rows": []}
    rows: list[Row] = []
    failed: list[str] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        print(f"{name} ...", flush=True)
        module, start = importlib.import_module(f"benchmarks.{name}"), time.perf_counter()
        try:
            rows += module.run(module.QUICK if args.quick else module.FULL)
        except FAULTS as error:  # the others are measured all the same, and the table is printed
            traceback.print_exc()
            failed.append(name)
            message = " ".join(str(error).split())[:200]
            rows.append(Row(name, "did not run to its end", "", note=f"{type(error).__name__}: {message}"))
        document["seconds"][name] = time.perf_counter() - start
        document["rows"] = [dataclasses.asdict(row) for row in rows]
        args.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"\n{_headline(document['machine'])}\n\n{table(rows)}\nAll numbers: {args.out}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _headline(found: dict) -> str:
    accelerator = "" if found["platform"] == "cpu" else f", {found['devices']} x {found['device_kind']}"
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['memory_bytes'] / 2**30:.0f} GiB{accelerator}; "
        f"Python {found['python']}, {versions}; load {found['load_average']:.1f} at the start"
    )
