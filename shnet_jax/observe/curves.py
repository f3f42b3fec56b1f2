"""Curves of a run as one picture, from its metrics.jsonl: loss, learning rate, validation recalls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shnet_jax.observe.writer import FILE, read_metrics

PICTURE = "curves.png"
DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
# One hue for each direction, darker for the stricter recall: readable without colour vision too, by the
# markers.
COLOURS = {"i2t": ("#08519c", "#3182bd", "#9ecae1"), "t2i": ("#a63603", "#e6550d", "#fdae6b")}
MARKERS = {"i2t": "o", "t2i": "s"}
CUTS = (1, 5, 10)


def write_curves(workdir: str | Path) -> Path:
    """Draws `workdir/metrics.jsonl` into `workdir/curves.png` and returns its path."""
    workdir = Path(workdir)
    lines = list(read_metrics(workdir / FILE))
    train, evaluation = ([line for line in lines if line["kind"] == kind] for kind in ("train", "eval"))
    # Figure without pyplot: no display, and nothing that stays in memory.
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    loss, rate, recall = figure.subplots(1, 3)
    _losses(loss, train)
    _learning_rate(rate, train)
    _recalls(recall, evaluation)
    for axes in (loss, rate, recall):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
        if not axes.lines:
            axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color="grey")
    path = workdir / PICTURE
    figure.savefig(path, dpi=110)
    return path


def _losses(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    axes.set_title("training loss")
    axes.set_ylabel("loss")
    terms = sorted({name for line in lines for name in line if name.endswith("_loss")})
    for name in ["loss", *(terms if len(terms) > 1 else [])]:
        style = {"color": "black"} if name == "loss" else {"alpha": 0.8, "linewidth": 1}
        _curve(axes, lines, name, name.removesuffix("_loss") if name != "loss" else "total", **style)
    if len(axes.lines) > 1:
        axes.legend(frameon=False)
    values = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float) if math.isfinite(value)]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")


def _learning_rate(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    axes.set_title("learning rate")
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _curve(axes, lines, "lr", "lr", color="black")
    axes.set_ylim(bottom=0)


def _recalls(axes: Axes, lines: Sequence[dict[str, Any]]) -> None:
    rsum = [float(line["rsum"]) for line in lines if "rsum" in line]
    axes.set_title("validation recall" + (f" (last rSum {rsum[-1]:.1f}, best {max(rsum):.1f})" if rsum else ""))
    axes.set_ylabel("recall in percent")
    for key, direction in DIRECTIONS.items():
        for cut, colour in zip(CUTS, COLOURS[key], strict=True):
            label = f"{direction}, R@{cut}"
            _curve(axes, lines, f"{key}_r{cut}", label, color=colour, marker=MARKERS[key], markersize=4)
    axes.set_ylim(0, 101)
    if axes.lines:
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _curve(axes: Axes, lines: Sequence[dict[str, Any]], name: str, label: str, **style: Any) -> None:
    points = [(line["step"], float(line[name])) for line in lines if name in line]  # "nan" leaves a gap
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)
