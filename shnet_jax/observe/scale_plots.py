"""The plots of a scaling study, each for a light and for a dark page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullLocator

from shnet_jax.observe.scale_rows import ENOUGH, PARTS, Row, devices_text, efficiency_of, kinds, pairs_text

MIB = 2**20

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
_PARTS = dict(zip(PARTS, ("#CC79A7", "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#8c959f"), strict=True))
_KINDS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_WIDTH = 5.4  # inches: letters can be read on a telephone, which shows a picture about 350 pixels wide


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
        figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def plots(rows: Sequence[Row]) -> Iterator[tuple[str, str, Draw]]:
    """(name, caption, drawing) of what there is to see in these rows."""
    done = [row for row in rows if row.memory is not None]
    for kind, size in dict.fromkeys(series for row in rows for series in row.series):
        on = [row for row in done if (kind, size) in row.series]
        title = f"{pairs_text(size)} on each device" if kind == "weak" else f"{pairs_text(size)} over all devices"
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
        yield (
            "collectives",
            _COLLECTIVES,
            _bound(_stacked_kinds, on, f"Sent in a step with {devices_text(most)}, by kind"),
        )
    timed = [row for row in done if {*PARTS} <= row.seconds.keys()]
    if timed:
        most = max(row.devices for row in timed)
        for devices in dict.fromkeys((1, most)):
            on = [row for row in timed if row.devices == devices]
            on.sort(key=lambda row: (row.pairs, row.dtype, row.strategy))
            if on:
                title = f"Where the time of a step goes, {devices_text(devices)}"
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


def _figure(title: str, height: float = 3.8) -> tuple[Figure, Axes]:
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
    figure.legend(handles, names, loc="outside lower left", ncols=3, fontsize="small", handlelength=1.0)
    return figure, axes


def _stacked_kinds(rows: Sequence[Row], title: str) -> Figure:
    labels = [f"{row.strategy}, {row.dtype}, {row.pairs} each" for row in rows]
    layers = {kind: [row.collectives.get(kind, 0.0) / MIB for row in rows] for kind in kinds(rows)}
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
