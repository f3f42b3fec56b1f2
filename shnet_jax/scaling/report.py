"""The report of a scaling study: sentences, charts and tables on one HTML page that needs no other file."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from ml_collections import ConfigDict

from shnet_jax.observe.charts import svg, theme
from shnet_jax.observe.files import write_text
from shnet_jax.observe.html import Markup, document, table, tag
from shnet_jax.observe.table import BYTES, amount
from shnet_jax.scaling.charts import charts
from shnet_jax.scaling.rows import PARTS, Row, has_all_parts, point_text, scaling_lines, write_csv
from shnet_jax.scaling.sweep import count

LOW_EFFICIENCY = 0.8
"""Efficiency below which the report names the number of devices."""


def write_report(workdir: Path, config: ConfigDict, machine: Mapping[str, Any], rows: Sequence[Row]) -> Path:
    """Writes scaling.csv, plots/*.png and report.html into `workdir`; returns the page's path."""
    write_csv(workdir / "scaling.csv", rows)
    folder = workdir / "plots"
    folder.mkdir(exist_ok=True)
    for outdated in folder.glob("*.png"):
        outdated.unlink()
    figures = []
    with matplotlib.rc_context(theme()):
        for name, caption, draw in charts(config.scale, rows):
            figure = draw()
            figure.savefig(folder / f"{name}.png", dpi=150)
            figures.append(tag("figure", svg(figure), tag("figcaption", caption)))
    path = workdir / "report.html"
    write_text(path, page(config, machine, rows, figures))
    return path


def page(config: ConfigDict, machine: Mapping[str, Any], rows: Sequence[Row], figures: Sequence[Markup]) -> str:
    """The HTML of the report. machine: from `observe.machine.describe`."""
    # Messages are too long for a column: each stands once, with the first point that it is about.
    failures = {row["message"]: (point_text(row), f"{row['status']}; {row['message']}") for row in reversed(rows)}
    failures.pop("", None)
    return document(
        f"Scaling study: {config.name}",
        tag("h1", f"Scaling study: {config.name}"),
        [tag("p", sentence.replace(" %", "\u00a0%")) for sentence in sentences(config.scale, rows)],
        tag("h2", "Charts"),
        tag("div", figures, class_="pair"),
        tag("h2", "All points"),
        _points(rows),
        (tag("h2", "Failures"), _definitions(reversed(failures.values()))) if failures else None,
        tag("h2", "How it was measured"),
        _definitions(_facts(config, machine, rows)),
        tag("h2", "How to read it"),
        _definitions(_GLOSSARY.items()),
        tag("h2", "The command"),
        tag("pre", shlex.join(["python", *sys.argv]), class_="scroll"),
    )


# ---------------------------------------------------------------------------------------------------------- sentences


def sentences(scale: ConfigDict, rows: Sequence[Row]) -> Iterator[str]:
    """The results in sentences."""
    if any(row["virtual"] for row in rows):
        yield (
            f"The devices are virtual: up to {max(row['devices'] for row in rows)} of them share the processor of one "
            "machine. Their speed together says nothing about real devices, so only one device was timed. Memory, "
            "communication and operations of the others are the compiler's; they hold for CPU programs and are a guide "
            "for other devices."
        )
    timed = [row for row in rows if row["examples_per_second"]]
    if timed:
        yield from _speed_sentences(timed)
    several = [row for row in rows if row["devices"] > 1]
    for line in scaling_lines(scale, several):
        yield from _by_strategy(line.rows, line.efficiency, f"Efficiency, {line.title}", percent)
        low: dict[str, int] = {}  # strategy and precision: the fewest devices with which efficiency is low
        for row in sorted(line.rows, key=lambda row: row["devices"]):
            if row[line.efficiency] is not None and row[line.efficiency] < LOW_EFFICIENCY:
                low.setdefault(f"{row['strategy']}, {row['dtype']}", row["devices"])
        if low:
            first = "; ".join(f"{name} with {count(devices, 'device')}" for name, devices in low.items())
            yield f"It falls below {percent(LOW_EFFICIENCY)}: {first}."
    yield from _by_strategy(rows, "memory", "Memory of a device", bytes_text)
    yield from _by_strategy(several, "exchange_bytes", "Sent by a device in a step, except all-reduce", bytes_text)
    lost = [f"{point_text(row)}: {row['status']}" for row in rows if row["memory"] is None]
    if lost:
        listed = "; ".join(lost[:3]) + (" and more" if len(lost) > 3 else "")
        yield f"{len(lost)} of {len(rows)} points have no result: {listed}. Their messages are below the table."


def _speed_sentences(timed: Sequence[Row]) -> Iterator[str]:
    """The fastest point, its slowest part, the largest share of the sum of the gradients, and a caveat."""
    best = max(timed, key=lambda row: row["examples_per_second"])
    yield f"Fastest: {best['examples_per_second']:,.0f} pairs/s, with {point_text(best)}."
    if has_all_parts(best):
        part = max(PARTS, key=lambda name: best[f"{name}_seconds"])
        alone, step = (f"{1e3 * best[f'{name}_seconds']:,.1f} ms" for name in (part, "step"))
        yield f"Its slowest part is {part}: {alone} alone, of a step of {step}."
    sending = [row for row in timed if row["devices"] > 1 and row["collectives_seconds"] is not None]
    if sending:
        row = max(sending, key=lambda row: row["collectives_seconds"] / row["step_seconds"])
        seconds = row["collectives_seconds"]
        yield (
            f"The sum of the gradients over the devices takes at most {100 * seconds / row['step_seconds']:.1f} % of a "
            f"step, alone: {1e3 * seconds:,.1f} ms with {point_text(row)}. What the loss sends is part of the loss."
        )
    above = sum((row["rest_seconds"] or 0.0) < -0.1 * row["step_seconds"] for row in timed)
    if above:
        yield (
            f"In {above} of {len(timed)} timed points the parts took longer alone than the whole step: in the step "
            "they overlap, or the machine had other work meanwhile. Read the shares with care."
        )


def _by_strategy(rows: Sequence[Row], column: str, title: str, text: Callable[[float], str]) -> Iterator[str]:
    """A figure of every strategy, where the devices and then the pairs are most; a sentence for each precision."""
    known = [row for row in rows if row[column] is not None]
    devices, pairs = max(((row["devices"], row["pairs"]) for row in known), default=(0, 0))
    largest = [row for row in known if (row["devices"], row["pairs"]) == (devices, pairs)]
    for dtype in dict.fromkeys(row["dtype"] for row in largest):
        values = [f"{row['strategy']} {text(row[column])}" for row in largest if row["dtype"] == dtype]
        yield f"{title}, {count(devices, 'device')} with {count(pairs, 'pair')} each, {dtype}: {', '.join(values)}."


# ------------------------------------------------------------------------------------------------------------- tables


def percent(fraction: float) -> str:
    """The fraction in percent."""
    return f"{100 * fraction:.0f} %"


def bytes_text(size: float) -> str:
    """The size in the largest unit of which there is one."""
    return amount(size, BYTES)


# Heading of a column, its name in scaling.csv, its text.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("devices", "devices", str),
    ("pairs each", "pairs", "{:,}".format),
    ("batch", "batch", "{:,}".format),
    ("result", "status", str),
    ("pairs/s", "examples_per_second", "{:,.0f}".format),
    ("step, ms", "step_seconds", lambda seconds: f"{1e3 * seconds:,.1f}"),
    ("goodput", "goodput", percent),
    ("compiled in, s", "compile_seconds", "{:,.1f}".format),
    ("efficiency", "efficiency", percent),
    ("strong", "strong_efficiency", percent),
    ("memory", "memory", bytes_text),
    ("allocator", "device_memory", bytes_text),
    ("GFLOP", "flops", lambda flops: f"{flops / 1e9:,.2f}"),
    ("sent", "collective_bytes", bytes_text),
    ("exchanged", "exchange_bytes", bytes_text),
)


def _points(rows: Sequence[Row]) -> Markup:
    """The table of all points, without the columns in which nothing is known."""
    heading, columns = ["strategy, precision"], [[f"{row['strategy']}, {row['dtype']}" for row in rows]]
    for title, name, text in _COLUMNS:
        values = [None if "efficiency" in name and row["devices"] == 1 else row[name] for row in rows]
        if name == "status":
            values = ["compiled" if row["virtual"] and row["memory"] is not None else row[name] for row in rows]
        if any(value is not None for value in values):
            heading.append(title)
            columns.append(["-" if value is None else text(value) for value in values])
    return table(heading, list(zip(*columns, strict=True)))


def _definitions(pairs: Iterable[tuple[str, str]]) -> Markup:
    return tag("dl", ((tag("dt", name), tag("dd", text)) for name, text in pairs))


def _facts(config: ConfigDict, machine: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    virtual, most = any(row["virtual"] for row in rows), max(row["devices"] for row in rows)
    versions = {"Python": machine["python"], **machine["versions"]}
    yield "Step", "one training step as --mode=train runs it: towers forward and backward, loss, optimiser"
    yield "Devices", f"{most} virtual CPU devices" if virtual else f"{machine['devices']} x {machine['device_kind']}"
    yield "Machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"
    yield "Software", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "Batches", config.data.dir or "random batches of the sizes in config.plan"
    timing = f"median of {config.scale.steps} steps after {config.scale.warmup_steps} others"
    yield "Timing", f"{timing}; all of them after the warm-up of the loss"
    yield "Date", datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


_GLOSSARY = {
    "Weak scaling": "Every device keeps the same number of pairs, so the batch grows with the devices.",
    "Strong scaling": "The batch stays the same, so each device gets fewer pairs.",
    "Efficiency": "Pairs/s divided by the devices times the pairs/s of one device with the same strategy, precision "
    "and pairs on it. The column for strong scaling divides by one device with the whole batch instead.",
    "Goodput": "Share of a step that is not spent waiting for its batch. Compilation comes once, before the first "
    "step; evaluations, checkpoints and restarts are no part of this study: the log of a training run has them.",
    "Strategy": "How the loss sees the pairs of other devices. gathered: all at once. streamed: gathered, scored in "
    "tiles. ring: embeddings travel from device to device. local: not at all, which is another loss.",
    "Memory": "By the compiler: arguments, results and temporaries of the step on one device. Allocator: the most that "
    "the device held while stepping, where it tells.",
    "Sent": "Bytes of collectives that one device hands in or receives in a step: whole arrays, as the program names "
    "them, not the bytes on each wire. Exchanged: the same except all-reduce, which is mostly the gradient.",
    "Parts of a step": "Each part is compiled and timed alone. The parts do not add up exactly: inside the step the "
    "compiler fuses and overlaps them.",
    "input": "How much longer a step takes when its batch has to be fetched and sent than when it is there.",
    "encode": "Both towers forward and backward under a trivial loss, and the pass of key encoders.",
    "loss": "Value and gradient with respect to the embeddings, with the collectives of the strategy.",
    "collectives": "The sum of the gradients over the devices, of arrays that are ready. The step can overlap it with "
    "the backward pass.",
    "optimiser": "The update alone, with the running average of the parameters.",
    "rest": "The step less these parts; below zero where the parts take longer alone than together.",
}
