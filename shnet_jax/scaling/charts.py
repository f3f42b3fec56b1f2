"""The charts of a scaling study, by matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from ml_collections import ConfigDict

from shnet_jax.observe.charts import INK, SERIES
from shnet_jax.scaling.rows import PARTS, Row, collective_kinds, has_all_parts, scaling_lines
from shnet_jax.scaling.sweep import count

Draw = Callable[[], Figure]

# Markers repeat what the colours say.
_STRATEGIES = {"gathered": (SERIES[0], "o"), "streamed": (SERIES[1], "s"), "ring": (SERIES[2], "^")}
_STRATEGIES["local"] = SERIES[3], "v"
_LAYERS = (*(SERIES[number] for number in (3, 0, 1, 4, 2)), "#8c959f")


def charts(scale: ConfigDict, rows: Sequence[Row]) -> Iterator[tuple[str, str, Draw]]:
    """Charts for which the rows have figures: (file name without suffix, caption, drawing) each."""
    compiled = [row for row in rows if row["memory"] is not None]
    for name, size, efficiency, ideal, line in scaling_lines(scale, compiled):
        several = [row for row in line if row["devices"] > 1]
        if len({row["devices"] for row in line}) < 2:
            continue
        if any(row["examples_per_second"] for row in several):
            caption = f"Pairs/s over all devices. Dotted: the ideal, {ideal}, times the devices."
            yield f"speed_{name}", caption, partial(_speed, f"Speed, {size}", line, efficiency)
            caption = f"Speed as a fraction of the ideal, {ideal}, times the devices. Dotted: 80 %."
            yield f"efficiency_{name}", caption, partial(_efficiency, f"Efficiency, {size}", line, efficiency)
        caption = "Arguments, results and temporaries of the training step on one device, by the compiler."
        yield f"memory_{name}", caption, partial(_bars, f"Memory, {size}", line, "memory")
        caption = (
            "Bytes that one device hands in to collectives, or receives from them, in one step, except all-reduce, by "
            "the compiler: the exchange of embeddings and of their gradients."
        )
        yield f"sent_{name}", caption, partial(_bars, f"Sent, {size}", several, "exchange_bytes")
    most = max((row["devices"] for row in compiled), default=0)
    if most > 1:
        largest = [row for row in compiled if row["devices"] == most]
        kinds = collective_kinds(rows[0])
        layers = {kind: [row[f"{kind}_bytes"] / 2**20 for row in largest] for kind in kinds}
        caption = (
            "All-reduce is mostly the gradient, the same for all strategies. The rest is the exchange of embeddings."
        )
        yield "collectives", caption, partial(_stacked, f"Sent, {count(most, 'device')}", largest, layers, "MiB")
    timed = [row for row in compiled if has_all_parts(row)]
    timed.sort(key=lambda row: (row["pairs"], row["dtype"], row["strategy"]))
    for devices in sorted({1, max((row["devices"] for row in timed), default=1)}):
        group = [row for row in timed if row["devices"] == devices]
        if group:
            layers = {
                part: [max(0.0, 100 * row[f"{part}_seconds"] / row["step_seconds"]) for row in group] for part in PARTS
            }
            caption = "Each part, compiled and timed alone, divided by the step. rest: the time that no part explains."
            title = f"Time of a step, {count(devices, 'device')}"
            yield f"shares_{devices}", caption, partial(_stacked, title, group, layers, "% of the step")


def _figure(title: str, height: float = 3.6) -> tuple[Figure, Axes]:
    # 5 inches: the letters can be read on a telephone, which shows a picture about 350 pixels wide.
    figure = Figure(figsize=(5.0, height), layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    options: dict[str, Any] = {"ncols": columns, "handlelength": 1.8, "fontsize": 10}
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", **options)


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each (strategy, dtype), by number of devices."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["devices"]):
        groups.setdefault((row["strategy"], row["dtype"]), []).append(row)
    return groups


def _lines(rows: Sequence[Row], column: str, title: str, factor: float = 1.0) -> tuple[Figure, Axes]:
    """A line over the devices for each strategy and precision; bfloat16 is dashed and hollow."""
    figure, axes = _figure(title)
    for (strategy, dtype), group in _groups(rows).items():
        colour, marker = _STRATEGIES[strategy]
        hollow: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "none"} if dtype == "bfloat16" else {}
        points = [(row["devices"], factor * row[column]) for row in group if row[column] is not None]
        axes.plot(*np.reshape(points, (-1, 2)).T, color=colour, marker=marker, label=f"{strategy}, {dtype}", **hollow)
    devices = sorted({row["devices"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(devices, [str(number) for number in devices])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("devices")
    _legend(figure, axes, 2)
    return figure, axes


def _speed(title: str, rows: Sequence[Row], efficiency: str) -> Figure:
    figure, axes = _lines(rows, "examples_per_second", title)
    for (strategy, _), group in _groups(rows).items():
        ideal = [(row["devices"], row["examples_per_second"] / row[efficiency]) for row in group if row[efficiency]]
        axes.plot(*np.reshape(ideal, (-1, 2)).T, color=_STRATEGIES[strategy][0], linestyle=":")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("pairs/s")
    return figure


def _efficiency(title: str, rows: Sequence[Row], efficiency: str) -> Figure:
    figure, axes = _lines(rows, efficiency, title, 100.0)
    axes.axhline(80, linestyle=":", linewidth=1.2, color=INK)
    axes.set_ylim(0, max(105.0, axes.get_ylim()[1]))
    axes.set_ylabel("% of the ideal")
    return figure


def _bars(title: str, rows: Sequence[Row], column: str) -> Figure:
    """Bars in MiB, side by side for each number of devices; bfloat16 is hatched."""
    figure, axes = _figure(title)
    groups, devices = _groups(rows), sorted({row["devices"] for row in rows})
    width = 0.84 / len(groups)
    for number, ((strategy, dtype), group) in enumerate(groups.items()):
        colour = _STRATEGIES[strategy][0]
        fill: dict[str, Any] = {"color": "none", "hatch": "////"} if dtype == "bfloat16" else {"color": colour}
        x = [devices.index(row["devices"]) + (number - (len(groups) - 1) / 2) * width for row in group]
        height = [row[column] / 2**20 for row in group]
        axes.bar(x, height, 0.9 * width, label=f"{strategy}, {dtype}", edgecolor=colour, **fill)
    axes.set_xticks(range(len(devices)), [str(number) for number in devices])
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("devices")
    axes.set_ylabel("MiB")
    _legend(figure, axes, 2)
    return figure


def _stacked(title: str, rows: Sequence[Row], layers: Mapping[str, Sequence[float]], unit: str) -> Figure:
    """A horizontal bar for each row, made of `layers`."""
    figure, axes = _figure(title, 1.7 + 0.34 * len(rows))
    left = np.zeros(len(rows))
    for (name, values), colour in zip(layers.items(), _LAYERS, strict=False):
        axes.barh(range(len(rows)), values, 0.7, left=left, label=name, color=colour)
        left += np.asarray(values)
    labels = [f"{row['strategy']}, {row['dtype']}, {row['pairs']} each" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.03 * max(left) or 1.0)
    axes.set_xlabel(unit)
    axes.grid(visible=False, axis="y")
    _legend(figure, axes, 3)
    return figure
