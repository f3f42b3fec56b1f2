"""Curves of a run from its metrics.jsonl: loss, learning rate, validation recalls; as curves.png and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shnet_jax.observe.charts import INK, MARKERS, RECALLS, theme
from shnet_jax.observe.writer import FILE, read_metrics
from shnet_jax.types import DIRECTIONS

PICTURE = "curves.png"
CUTS = (1, 5, 10)

Lines = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl."""


def run_name(workdir: str | Path) -> str:
    """The name of a run for people: the last two folders of its path."""
    return "/".join(Path(workdir).resolve().parts[-2:]).lstrip("/")


def write_curves(workdir: str | Path) -> Path:
    """Draws `workdir/metrics.jsonl` into `workdir/curves.png` and returns its path."""
    workdir = Path(workdir)
    lines = list(read_metrics(workdir / FILE))
    with matplotlib.rc_context(theme()):
        # Figure without pyplot: no display, and nothing that stays in memory.
        figure = Figure(figsize=(15, 4.6), layout="constrained")
        figure.suptitle(run_name(workdir))
        for axes, plot in zip(figure.subplots(1, 3), (plot_loss, plot_learning_rate, plot_recall), strict=True):
            plot(axes, lines)
            axes.set_xlabel("step")
        path = workdir / PICTURE
        figure.savefig(path, dpi=110, bbox_inches="tight")
    return path


def plot_loss(axes: Axes, lines: Lines) -> None:
    """The training loss and, where there are several, its terms."""
    lines = [line for line in lines if line.get("kind") == "train"]
    axes.set_title("training loss")
    axes.set_ylabel("loss")
    terms = sorted({name for line in lines for name in line if name.endswith("_loss")})
    _curve(axes, lines, "loss", "total", color=INK)
    for name in terms if len(terms) > 1 else []:
        _curve(axes, lines, name, name.removesuffix("_loss"), alpha=0.8, linewidth=1)
    if len(axes.lines) > 1:
        axes.legend()
    values = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float) if math.isfinite(value)]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    _finish(axes)


def plot_learning_rate(axes: Axes, lines: Lines) -> None:
    """The learning rate."""
    axes.set_title("learning rate")
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    train = [line for line in lines if line.get("kind") == "train"]
    _curve(axes, train, "lr", "lr", color=INK)
    axes.set_ylim(bottom=0)
    _finish(axes)


def plot_recall(axes: Axes, lines: Lines) -> None:
    """The recalls of both directions on the validation split."""
    lines = [line for line in lines if line.get("kind") == "eval"]
    rsum = [float(line["rsum"]) for line in lines if "rsum" in line]
    axes.set_title("validation recall" + (f" (last rSum {rsum[-1]:.1f}, best {max(rsum):.1f})" if rsum else ""))
    axes.set_ylabel("recall in per cent")
    for key, direction in DIRECTIONS.items():
        for cut, colour in zip(CUTS, RECALLS[key], strict=True):
            label = f"{direction}, R@{cut}"
            _curve(axes, lines, f"{key}_r{cut}", label, color=colour, marker=MARKERS[key], markersize=4)
    axes.set_ylim(0, 101)
    if axes.lines:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize="small")
    _finish(axes)


def _curve(axes: Axes, lines: Lines, name: str, label: str, **style: Any) -> None:
    points = [(line["step"], float(line[name])) for line in lines if name in line]  # "nan" leaves a gap
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def _finish(axes: Axes) -> None:
    axes.margins(x=0.02)
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color="grey")
