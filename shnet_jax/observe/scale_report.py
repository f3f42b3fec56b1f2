"""A scaling study as a table (CSV), as plots (PNG) and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import csv
import dataclasses
import html
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullLocator

TABLE = "scaling.csv"
PAGE = "report.html"
PLOTS = "plots"

PARTS = ("input", "encode", "loss", "optimiser", "rest")
"""Of the seconds of a step, in the order in which they are drawn."""

ENOUGH = 0.8
"""Efficiency below which adding devices is called a waste."""

MIB = 2**20


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
        return f"{_devices(self.devices)} with {_pairs(self.pairs)} each, {self.strategy}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Study:
    """What was studied. data: where the batches come from. machine: as `scale_point.machine` describes it."""

    name: str
    machine: Mapping[str, Any]
    command: str
    data: str
    steps: int
    warmup_steps: int
    date: str


def write_report(workdir: Path, study: Study, rows: Sequence[Row]) -> Path:
    """Writes scaling.csv, plots/*.png and report.html into `workdir`; returns the page's path."""
    write_csv(workdir / TABLE, rows)
    figures = []
    (workdir / PLOTS).mkdir(exist_ok=True)
    for name, caption, draw in plots(rows):
        light, dark = (render(draw, dark) for dark in (False, True))
        (workdir / PLOTS / f"{name}.png").write_bytes(light)
        figures.append(picture(caption, light, dark))
    path = workdir / PAGE
    path.write_text(page(study, rows, figures), encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------------------- the table


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line for each point, bytes and seconds as they are; empty where a figure is not known."""
    kinds = _kinds(rows)
    names = [f.name for f in dataclasses.fields(Row) if f.name not in ("series", "collectives", "seconds", "message")]
    timed = ("step", *PARTS)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        measured = [*(f"{kind}_bytes" for kind in kinds), *(f"{part}_seconds" for part in timed)]
        writer.writerow([*names, "collective_bytes", *measured, "message"])
        for row in rows:
            writer.writerow(
                [getattr(row, name) for name in names]
                + [row.sent, *(row.collectives.get(kind, 0.0 if row.memory is not None else None) for kind in kinds)]
                + [row.seconds.get(part) for part in timed]
                + [row.message]
            )


def _kinds(rows: Iterable[Row]) -> list[str]:
    return sorted({kind for row in rows for kind in row.collectives})


# ----------------------------------------------------------------------------------------------------------- the plots

Draw = Callable[[], Figure]

_LIGHT = {"figure.facecolor": "#ffffff", "ink": "#1f2328", "grid": "#d0d7de", "track": "#8c959f"}
_DARK = {"figure.facecolor": "#161b22", "ink": "#e6edf3", "grid": "#30363d", "track": "#7d8590"}
# Okabe and Ito's colours, told apart without full colour vision; markers say the same once more.
_STRATEGIES = {
    "local": ("#CC79A7", "v"),
    "gathered": ("#0072B2", "o"),
    "streamed": ("#E69F00", "s"),
    "ring": ("#009E73", "^"),
}
_PARTS = dict(zip(PARTS, ("#CC79A7", "#0072B2", "#E69F00", "#009E73", "#8c959f"), strict=True))
_KINDS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_WIDTH = 7.2


def render(draw: Draw, dark: bool) -> bytes:
    """The picture as PNG, for a light or a dark page."""
    colours = _DARK if dark else _LIGHT
    ink = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), colours["ink"]
    )
    style: dict[Any, Any] = {
        **ink,
        "figure.facecolor": colours["figure.facecolor"],
        "axes.facecolor": colours["figure.facecolor"],
        "axes.edgecolor": colours["track"],
        "grid.color": colours["grid"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "font.size": 11,
        "lines.color": colours["track"],
    }
    with matplotlib.rc_context(style):
        figure = draw()
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def plots(rows: Sequence[Row]) -> Iterator[tuple[str, str, Draw]]:
    """(name, caption, drawing) of what there is to see in these rows."""
    done = [row for row in rows if row.memory is not None]
    for kind, size in dict.fromkeys(series for row in rows for series in row.series):
        on = [row for row in done if (kind, size) in row.series]
        title = f"{_pairs(size)} on each device" if kind == "weak" else f"{_pairs(size)} over all devices"
        name = f"{kind}_{size}"
        counts = {row.devices for row in on}
        if len(counts) < 2:
            continue
        if any(row.examples_per_second and row.devices > 1 for row in on):
            yield f"speed_{name}", _SPEED[kind], _bound(_speed, on, kind, f"Speed, {title}")
            yield f"efficiency_{name}", _EFFICIENCY[kind], _bound(_efficiency, on, kind, f"Efficiency, {title}")
        yield f"memory_{name}", _MEMORY, _bound(_bars, on, lambda r: r.memory, "MiB", f"Memory of a device, {title}")
        several = [row for row in on if row.devices > 1]  # a device alone sends nothing
        yield (
            f"sent_{name}",
            _SENT,
            _bound(_bars, several, lambda r: r.sent_beside, "MiB", f"Sent beside the gradient, {title}"),
        )
    most = max((row.devices for row in done), default=0)
    if most > 1:
        on = [row for row in done if row.devices == most]
        yield "collectives", _COLLECTIVES, _bound(_stacked_kinds, on, f"Sent in a step with {_devices(most)}, by kind")
    timed = [row for row in done if "encode" in row.seconds]
    if timed:
        most = max(row.devices for row in timed)
        for devices in dict.fromkeys((1, most)):
            on = [row for row in timed if row.devices == devices]
            on.sort(key=lambda row: (row.pairs, row.dtype, row.strategy))
            if on:
                title = f"Where the time of a step goes, {_devices(devices)}"
                yield f"shares_{devices}", _SHARES, _bound(_shares, on, title)


_SPEED = {
    "weak": "Pairs a second over all devices. Dotted: the ideal, one device with as many pairs, times the devices.",
    "strong": "Pairs a second over all devices. Dotted: the ideal, one device with the whole batch, times the devices.",
}
_EFFICIENCY = {
    "weak": "Speed as a share of the ideal, one device with as many pairs on it. Dotted: 80 %.",
    "strong": "Speed as a share of the ideal, one device with the whole batch. Dotted: 80 %.",
}
_MEMORY = "By the compiler: arguments, results and temporaries of the training step on one device."
_SENT = (
    "By the compiler: what one device hands in to collectives, or receives from them, in one step, but for all-reduce: "
    "how embeddings and their gradients meet."
)
_COLLECTIVES = "All-reduce is mostly the gradient, the same for all strategies; the rest is how embeddings meet."
_SHARES = "Each part measured as a program of its own, divided by the step; rest: what the parts do not explain."


def _bound(draw: Callable[..., Figure], *arguments: Any) -> Draw:
    return lambda: draw(*arguments)


def _figure(title: str, height: float = 4.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    axes = figure.subplots()
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")
    return figure, axes


def _lines(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """(strategy, dtype, its rows by number of devices)."""
    pairs = dict.fromkeys((row.strategy, row.dtype) for row in rows)
    return [
        (s, d, sorted((r for r in rows if (r.strategy, r.dtype) == (s, d)), key=lambda r: r.devices)) for s, d in pairs
    ]


def _line(axes: Axes, strategy: str, dtype: str, x: list[int], y: list[float]) -> None:
    colour, marker = _STRATEGIES[strategy]
    narrow = dtype == "bfloat16"
    axes.plot(
        x, y, color=colour, marker=marker, linestyle="--" if narrow else "-", label=f"{strategy}, {dtype}",
        markerfacecolor="none" if narrow else colour, markersize=7, linewidth=1.8,
    )  # fmt: skip


def _device_axis(axes: Axes, counts: Iterable[int]) -> None:
    counts = sorted(set(counts))
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("devices")


def _legend(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    """A column for each precision; of one precision, a line."""
    handles, labels = axes.get_legend_handles_labels()
    dtypes = len({row.dtype for row in rows})
    figure.legend(
        handles, labels, loc="outside lower left", ncols=dtypes if dtypes > 1 else len(labels), fontsize="small"
    )


def _speed(rows: Sequence[Row], kind: str, title: str) -> Figure:
    figure, axes = _figure(title)
    for strategy, dtype, on in _lines(rows):
        measured = [row for row in on if row.examples_per_second]
        shares = [(row, efficiency_of(row, kind)) for row in measured]
        ideal = [(row.devices, (row.examples_per_second or 0.0) / share) for row, share in shares if share]
        if ideal:
            axes.plot(*zip(*ideal, strict=True), color=_STRATEGIES[strategy][0], linestyle=":", linewidth=1.2)
        _line(axes, strategy, dtype, [r.devices for r in measured], [r.examples_per_second or 0.0 for r in measured])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("pairs / s")
    _device_axis(axes, (row.devices for row in rows))
    _legend(figure, axes, rows)
    return figure


def _efficiency(rows: Sequence[Row], kind: str, title: str) -> Figure:
    figure, axes = _figure(title)
    for strategy, dtype, on in _lines(rows):
        known = [(row.devices, value) for row in on if (value := efficiency_of(row, kind)) is not None]
        _line(axes, strategy, dtype, [d for d, _ in known], [100 * value for _, value in known])
    axes.axhline(100 * ENOUGH, linestyle=":", linewidth=1.2, color=matplotlib.rcParams["lines.color"])
    axes.set_ylim(0, max(105.0, axes.get_ylim()[1]))
    axes.set_ylabel("% of the ideal")
    _device_axis(axes, (row.devices for row in rows))
    _legend(figure, axes, rows)
    return figure


def efficiency_of(row: Row, kind: str) -> float | None:
    """Of a point on a "weak" or on a "strong" line."""
    return row.efficiency if kind == "weak" else row.strong_efficiency


def _bars(rows: Sequence[Row], value: Callable[[Row], float | None], unit: str, title: str) -> Figure:
    figure, axes = _figure(title)
    lines, counts = _lines(rows), sorted({row.devices for row in rows})
    width = 0.84 / len(lines)
    for number, (strategy, dtype, on) in enumerate(lines):
        colour, narrow = _STRATEGIES[strategy][0], dtype == "bfloat16"
        x = [counts.index(row.devices) + (number - (len(lines) - 1) / 2) * width for row in on]
        axes.bar(
            x, [(value(row) or 0.0) / MIB for row in on], 0.9 * width, label=f"{strategy}, {dtype}",
            color="none" if narrow else colour, edgecolor=colour, hatch="////" if narrow else None, linewidth=1.0,
        )  # fmt: skip
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("devices")
    axes.set_ylabel(unit)
    _legend(figure, axes, rows)
    return figure


def _stacked(
    title: str, labels: Sequence[str], layers: Mapping[str, Sequence[float]], colours: Sequence[str]
) -> tuple[Figure, Axes]:
    """Horizontal bars, one under the other, each made of layers."""
    figure, axes = _figure(title, 1.7 + 0.34 * len(labels))
    left = np.zeros(len(labels))
    for (name, values), colour in zip(layers.items(), colours, strict=False):
        axes.barh(range(len(labels)), values, 0.7, left=left, label=name, color=colour)
        left += np.asarray(values)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.03 * max(left) or 1.0)
    axes.grid(visible=False, axis="y")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=5, fontsize="small", handlelength=1.0)
    return figure, axes


def _stacked_kinds(rows: Sequence[Row], title: str) -> Figure:
    labels = [f"{row.strategy}, {row.dtype}, {row.pairs} each" for row in rows]
    layers = {kind: [row.collectives.get(kind, 0.0) / MIB for row in rows] for kind in _kinds(rows)}
    figure, axes = _stacked(title, labels, layers, _KINDS)
    axes.set_xlabel("MiB")
    return figure


def _shares(rows: Sequence[Row], title: str) -> Figure:
    labels = [f"{row.strategy}, {row.dtype}, {row.pairs} each" for row in rows]
    layers = {part: [100 * max(0.0, row.seconds[part]) / row.seconds["step"] for row in rows] for part in PARTS}
    figure, axes = _stacked(title, labels, layers, list(_PARTS.values()))
    axes.axvline(100, linestyle=":", linewidth=1.2, color=matplotlib.rcParams["lines.color"])
    axes.set_xlabel("% of the step")
    return figure


# ------------------------------------------------------------------------------------------------------------ the page


def picture(caption: str, light: bytes, dark: bytes) -> str:
    """An HTML figure with the images in it."""
    code = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (light, dark)]
    text = html.escape(caption)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{code[1]}">'
        f'<img src="{code[0]}" alt="{text}"></picture><figcaption>{text}</figcaption></figure>'
    )


def page(study: Study, rows: Sequence[Row], figures: Sequence[str]) -> str:
    """The whole page. figures: of `picture`."""
    e = html.escape
    sentences = "".join(f"<li>{e(sentence)}</li>" for sentence in summary(rows))
    what = "".join(f"<dt>{e(name)}</dt><dd>{e(text)}</dd>" for name, text in _facts(study, rows))
    reading = "".join(f"<dt>{e(name)}</dt><dd>{e(text)}</dd>" for name, text in _reading(study, rows))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Scaling study: {e(study.name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{_STYLE}</style></head><body>\n"
        f"<h1>Scaling study: {e(study.name)}</h1>\n"
        f"<h2>In short</h2><ul>{sentences}</ul>\n"
        f"<h2>What was measured</h2><dl>{what}</dl>\n"
        f'<h2>Plots</h2><div class="plots">{"".join(figures)}</div>\n'
        f"<h2>All points</h2>{_html_table(rows)}\n"
        f"<h2>How to read it</h2><dl>{reading}</dl>\n"
        f"<h2>The command</h2><pre>{e(study.command)}</pre>\n"
        f"</body></html>\n"
    )


def summary(rows: Sequence[Row]) -> list[str]:
    """What the figures say, in sentences."""
    said = []
    timed = [row for row in rows if row.examples_per_second]
    if any(row.virtual for row in rows):
        most = max(row.devices for row in rows)
        said.append(
            f"The devices are virtual: up to {most} of them share the processor of one machine. How fast they are "
            "together says nothing of real devices, so only one device was timed; for more there are the compiler's "
            "figures of memory, communication and operations, which hold for CPU programs and are a guide for others."
        )
    if timed:
        best = max(timed, key=lambda row: row.examples_per_second or 0.0)
        said.append(f"Fastest: {best.examples_per_second:,.0f} pairs/s, with {best}.")
        if "encode" in best.seconds:
            part = max(PARTS, key=lambda name: best.seconds[name])
            alone = _milliseconds(best, part)
            said.append(
                f"There {_PART_NAMES[part]} took most: {alone} alone, of a step of {_milliseconds(best, 'step')}."
            )
        above = sum(row.seconds.get("rest", 0.0) < -0.1 * row.seconds["step"] for row in timed)
        if above:
            said.append(
                f"In {above} of {len(timed)} timed points the parts took longer alone than the step as a whole: in "
                "the step they overlap, or the machine had other work meanwhile. Read the shares with care."
            )
    said += _efficiency_sentences(rows)
    said += _memory_sentences(rows)
    said += _sent_sentences(rows)
    lost = [row for row in rows if row.memory is None]
    if lost:
        said.append(
            f"{len(lost)} of {len(rows)} points have no result: "
            + "; ".join(f"{row}: {row.status}" for row in lost[:3])
            + (" and more" if len(lost) > 3 else "")
            + ". The table has the messages."
        )
    return said


_PART_NAMES = {
    "input": "waiting for data",
    "encode": "the towers",
    "loss": "the loss",
    "optimiser": "the optimiser",
    "rest": "what the parts do not explain",
}


def _efficiency_sentences(rows: Sequence[Row]) -> Iterator[str]:
    """For each size of weak and of strong scaling, where efficiency falls below ENOUGH."""
    for kind, size in dict.fromkeys(series for row in rows for series in row.series):
        on = [row for row in rows if (kind, size) in row.series and row.devices > 1]
        known = [(row, value) for row in on if (value := efficiency_of(row, kind)) is not None]
        if not known:
            continue
        most = max(row.devices for row, _ in known)
        there = [value for row, value in known if row.devices == most]
        low, high = (f"{100 * value:.0f}" for value in (min(there), max(there)))
        first: dict[str, int] = {}
        for row, value in sorted(known, key=lambda found: found[0].devices):
            if value < ENOUGH:
                first.setdefault(f"{row.strategy}, {row.dtype}", row.devices)
        below = "; ".join(f"{name} at {_devices(devices)}" for name, devices in first.items())
        where = "Weak scaling" if kind == "weak" else "Strong scaling"
        spread = low if low == high else f"{low} to {high}"
        yield (
            f"{where}, {_pairs(size)} {'on each device' if kind == 'weak' else 'over all devices'}: at "
            f"{_devices(most)} efficiency is {spread} %. It falls below {100 * ENOUGH:.0f} % "
            + (f"with {below}." if below else "nowhere.")
        )


def _memory_sentences(rows: Sequence[Row]) -> Iterator[str]:
    yield from _by_strategy(rows, lambda row: row.memory, "Memory of a device, ")


def _sent_sentences(rows: Sequence[Row]) -> Iterator[str]:
    rows = [row for row in rows if row.devices > 1]
    yield from _by_strategy(rows, lambda row: row.sent_beside, "Sent by a device in a step beside the all-reduce, ")


def _by_strategy(rows: Sequence[Row], value: Callable[[Row], float | None], what: str) -> Iterator[str]:
    """A figure by strategy, where the devices and then the pairs are most."""
    known = [row for row in rows if value(row) is not None]
    if not known:
        return
    top = max(known, key=lambda row: (row.devices, row.pairs))
    for dtype in dict.fromkeys(row.dtype for row in known):
        on = [row for row in known if (row.devices, row.pairs, row.dtype) == (top.devices, top.pairs, dtype)]
        if on:
            found = ", ".join(f"{row.strategy} {_bytes(value(row))}" for row in on)
            yield f"{what}{_devices(top.devices)} with {_pairs(top.pairs)} each, {dtype}: {found}."


def _facts(study: Study, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    machine = study.machine
    devices = max((row.devices for row in rows), default=0)
    virtual = any(row.virtual for row in rows)
    kind = f"{devices} virtual CPU devices" if virtual else f"{machine['devices']} x {machine['device_kind']}"
    yield "Step", "one training step, towers forward and backward, loss, optimiser, as --mode=train runs it"
    yield "Devices", kind
    yield "Machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"
    yield "Software", ", ".join([f"Python {machine['python']}", *(f"{n} {v}" for n, v in machine["versions"].items())])
    yield "Batches", study.data
    yield "Timing", f"median of {study.steps} steps after {study.warmup_steps} steps of warm-up"
    yield "Date", study.date


def _reading(study: Study, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    yield "Weak scaling", "every device keeps the same number of pairs, so the batch grows with the devices."
    yield "Strong scaling", "the batch stays the same, so each device gets fewer pairs."
    yield (
        "Efficiency",
        "pairs/s divided by the devices times the pairs/s of one device with the same strategy, precision and pairs on "
        "it; the column for strong scaling divides by one device with the whole batch instead.",
    )
    yield (
        "Strategy",
        "how the pairs of other devices meet in the loss. gathered: all at once; streamed: gathered, scored in tiles; "
        "ring: embeddings travel from device to device; local: not at all, which is another loss.",
    )
    yield (
        "Memory",
        "by the compiler: arguments, results and temporaries of the step on one device. By the allocator: the most "
        "that the device held while stepping, where it tells.",
    )
    yield (
        "Sent",
        "bytes of collectives that one device hands in or receives in a step: whole arrays, as the program names them, "
        "not what crosses each wire.",
    )
    yield (
        "Parts of the time",
        "each is a program of its own, compiled and timed alone, so they do not add up exactly: inside the step the "
        "compiler fuses and overlaps what alone runs one after another. input: how much longer a step takes when its "
        "batch has to be fetched and sent than when it is there. encode: both towers forward and backward under a "
        "trivial loss. loss: value and gradient by the embeddings, its collectives included. optimiser: the update "
        "alone. rest: the step less these, among it the sum of the gradients over the devices; below zero where "
        "the parts take longer alone than together.",
    )


def _result(row: Row) -> str:
    if row.memory is None:
        return f"{row.status}: {row.message}"
    return "compiled" if row.virtual else row.status


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("devices", lambda r: f"{r.devices}{' virtual' if r.virtual else ''}"),
    ("pairs each", lambda r: f"{r.pairs:,}"),
    ("batch", lambda r: f"{r.batch:,}"),
    ("strategy", lambda r: r.strategy),
    ("precision", lambda r: r.dtype),
    ("pairs/s", lambda r: _number(r.examples_per_second, ",.0f")),
    ("step, ms", lambda r: _number(r.seconds.get("step"), ",.1f", 1e3)),
    ("efficiency", lambda r: _number(r.efficiency if r.devices > 1 else None, ".0f", 100, " %")),
    ("strong", lambda r: _number(r.strong_efficiency if r.devices > 1 else None, ".0f", 100, " %")),
    ("memory", lambda r: _bytes(r.memory)),
    ("allocator", lambda r: _bytes(r.device_memory)),
    ("GFLOP", lambda r: _number(r.flops, ",.2f", 1e-9)),
    ("sent", lambda r: _bytes(r.sent)),
    ("beside all-reduce", lambda r: _bytes(r.sent_beside)),
    *((part, lambda r, part=part: _share(r, part)) for part in PARTS),
    ("result", _result),
)


def _html_table(rows: Sequence[Row]) -> str:
    """Without the columns of which nothing is known."""
    e = html.escape
    columns = [(name, [text(row) for row in rows]) for name, text in _COLUMNS]
    columns = [(name, cells) for name, cells in columns if set(cells) - {"-"}]
    heads = "".join(f'<th scope="col">{e(name)}</th>' for name, _ in columns)
    lines = "".join(
        "<tr>" + "".join(f'<td class="{_align(name)}">{e(cells[i])}</td>' for name, cells in columns) + "</tr>"
        for i in range(len(rows))
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def _align(column: str) -> str:
    return "text" if column in ("strategy", "precision", "result") else "number"


def _share(row: Row, part: str) -> str:
    return _number(row.seconds[part] / row.seconds["step"], ".0f", 100, " %") if part in row.seconds else "-"


def _number(value: float | None, form: str, scale: float = 1.0, unit: str = "") -> str:
    return "-" if value is None else f"{value * scale:{form}}{unit}"


def _bytes(size: float | None) -> str:
    if size is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.3g} {unit}"


def _milliseconds(row: Row, part: str) -> str:
    return f"{1e3 * row.seconds[part]:,.1f} ms"


def _devices(count: int) -> str:
    return f"{count} device{'s' if count > 1 else ''}"


def _pairs(count: int) -> str:
    return f"{count:,} pair{'s' if count > 1 else ''}"


_STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --paper: #ffffff; --card: #f6f8fa; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --card: #161b22; --line: #30363d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
ul { padding-left: 1.2rem; max-width: 50rem; }
li { margin: .4rem 0; }
dl { max-width: 50rem; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; text-align: left; }
th { background: var(--card); }
.number { text-align: right; }
td:last-child { white-space: normal; min-width: 10rem; max-width: 30rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto; }
"""
