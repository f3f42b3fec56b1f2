"""The charts of a study: recalls of the arms side by side, and how each arm learned."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from shnet_jax.evaluation.metrics import CUTS
from shnet_jax.observe.charts import SERIES, SYMBOLS, chart
from shnet_jax.observe.html import Markup
from shnet_jax.types import DIRECTIONS

GAP = 0.7  # height that the arms take of the distance between two recalls

Curve = Sequence[tuple[int, float]]
"""(step, rSum on the validation split) of each evaluation of a run."""


def study_charts(
    recalls: Mapping[str, Sequence[Mapping[str, float]]], curves: Mapping[str, Sequence[Curve]]
) -> list[Markup]:
    """Figures of a study.

    recalls: the metrics of each seed by arm. curves: those of each seed by arm; arms without any are left out.
    """
    looks: dict[str, dict[str, Any]] = {
        arm: {"color": colour, "marker": marker} for arm, colour, marker in _looks([*recalls])
    }

    def plot_recalls(axes: Axes) -> None:
        columns = [(f"{key}_r{cut}", f"{direction} R@{cut}") for key, direction in DIRECTIONS.items() for cut in CUTS]
        for place, (arm, runs) in enumerate(recalls.items()):
            shift = GAP * ((place + 0.5) / len(recalls) - 0.5)
            for row, (name, _) in enumerate(columns):
                values = [metrics[name] for metrics in runs]
                axes.plot([min(values), max(values)], [row + shift] * 2, color=looks[arm]["color"], linewidth=1.5)
                mean, label = statistics.mean(values), arm if not row else None
                axes.plot(mean, row + shift, linestyle="none", markersize=5.5, label=label, **looks[arm])
        axes.set_yticks(range(len(columns)), [title for _, title in columns], fontsize=9.5)
        axes.invert_yaxis()
        axes.set_xlim(right=101)
        axes.legend()

    def plot_curves(axes: Axes) -> None:
        for arm, runs in curves.items():
            for number, curve in enumerate(runs):
                label = arm if not number else None
                axes.plot(*zip(*curve, strict=True), label=label, linewidth=1.5, markersize=4, **looks[arm])
        axes.set_ylabel("rSum")
        axes.legend()

    several = max(map(len, recalls.values())) > 1
    spread = ": mean, and a line from the lowest to the highest seed" if several else ""
    figures = [chart(f"Recall in per cent{spread}", plot_recalls, "recall in per cent", left=0.27)]
    if any(curves.values()):
        figures.append(chart("rSum on the validation split" + (", a curve a seed" if several else ""), plot_curves))
    return figures


def validation_curve(history: Sequence[Mapping[str, Any]]) -> Curve:
    """The curve of a run from the lines of its metrics.jsonl."""
    return [(line["step"], float(line["rsum"])) for line in history if line["kind"] == "eval" and "rsum" in line]


def _looks(arms: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(arm, colour, marker); where there are more arms than colours, markers distinguish them."""
    for number, arm in enumerate(arms):
        yield arm, SERIES[number % len(SERIES)], [*SYMBOLS][number % len(SYMBOLS)]
