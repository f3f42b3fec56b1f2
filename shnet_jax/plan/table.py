"""Text table of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from shnet_jax.observe.hardware import GIB
from shnet_jax.observe.table import BYTES, Table, amount
from shnet_jax.observe.work import COLLECTIVES


def table(report: Mapping[str, Any]) -> str:
    """The report of `make_plan` as text, with the figures of one device."""
    programs, limit, devices = list(report["programs"].values()), report["memory_limit"], report["devices"]
    rows = [["on each device", *report["programs"]], ["rows of a batch", *(f"{p['rows']:,}" for p in programs)]]

    def row(label: str, value: Callable[[dict[str, Any]], float | None], units: Mapping[str, float]) -> None:
        values = [value(p) for p in programs]
        if any(v is not None for v in values):
            rows.append([label, *("-" if v is None else amount(v, units) for v in values)])

    for label, key in _MEMORY.items():
        row(label, lambda p, key=key: p["memory"] and p["memory"][key], BYTES)  # type: ignore[misc]
    row("peak", lambda p: p["memory"] and p["memory"]["peak"], BYTES)
    row("beside it, from training", lambda p: p["beside"] or None, BYTES)
    row("needed", lambda p: p["needed"], BYTES)
    rows.append(["fits", *(_FITS[p["fits"]] for p in programs)])
    row("matrix operations", lambda p: p["work"] and p["work"]["flops"], _OPERATIONS)
    row("  in the loss's warm-up", lambda p: p["warm_up"] and p["warm_up"]["flops"], _OPERATIONS)
    row("memory traffic", lambda p: p["work"] and p["work"]["bytes"], BYTES)
    for kind in COLLECTIVES:
        row(kind, lambda p, kind=kind: p["work"] and p["work"]["collectives"].get(kind), BYTES)  # type: ignore[misc]
    row("compute-bound", lambda p: p.get("compute_seconds"), _SECONDS)
    row("bandwidth-bound", lambda p: p.get("memory_seconds"), _SECONDS)
    row("interconnect-bound", lambda p: p.get("interconnect_seconds"), _SECONDS)
    row("  the larger, in the warm-up", lambda p: p.get("warm_up_seconds"), _SECONDS)
    row("compiled in", lambda p: p["seconds"], _SECONDS)

    lines = [
        f"{report['name']}: {devices} x {report['device_kind']}, global batch {report['global_batch']:,}",
        ", ".join(f"{name}={value}" for name, value in report["settings"].items()),
        f"memory of a device: {limit / GIB:.1f} GiB ({report['memory_limit_is']})"
        if limit
        else "memory of a device: not known, so nobody knows what fits",
        *([] if report["chip"] else [f"peaks of {report['device_kind']}: not known, so there are no bounds of time"]),
        "",
        Table("Plan", rows[0], rows[1:]).plain(),
        "",
    ]
    if once := sum(p["work"]["loops_once"] for p in programs if p["work"]):
        lines.append(f"{once} loops do not say how often they run: what is in them is counted once.")
    if hidden := sum(p["work"]["hidden"] for p in programs if p["work"]):
        lines.append(f"{hidden} calls of libraries do not say what they do: their operations are not counted.")
    if report["pipeline"]:
        lines.append(report["pipeline"]["text"])
    for name, ranking in report["rankings"].items():
        lines.append(f"ranking, {name}: {ranking['text']}")
        held = f"  with what stays from training {amount(ranking['needed'], BYTES)} on each device"
        if "compute_seconds" in ranking:
            held += f"; at least {amount(max(ranking['compute_seconds'], ranking['memory_seconds']), _SECONDS)}"
        lines.append(f"{held}; fits: {_FITS[ranking['fits']]}")
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
_OPERATIONS = {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}
_SECONDS = {"s": 1, "ms": 1e-3, "us": 1e-6}
_FITS = {True: "yes", False: "NO", None: "?"}
