"""Small charts as inline SVG: curves of a run, shares as one bar. Colours are classes of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from shnet_jax.retrieve.html import Markup, tag

WIDTH, HEIGHT = 560, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
Points = Sequence[tuple[float, float]]


def lines(series: Mapping[str, Points], x_label: str, label: str) -> Markup:
    """Curves of up to 6 series by name, of values >= 0, with a legend; those without a point are left out."""
    series = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return tag("p", "Nothing recorded yet.", class_="muted")
    xs, ys = zip(*(p for points in series.values() for p in points), strict=True)
    marks = ticks(0.0, max(ys))
    x0, x1, y0, y1 = min(xs), max(xs), marks[0], marks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * ((x - x0) / (x1 - x0) if x1 > x0 else 0.5),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y0) / (y1 - y0),
        )

    parts = []
    for y in marks:
        _, py = at(x0, y)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=py, y2=py, class_="grid"))
        parts.append(tag("text", f"{y:g}", x=LEFT - 7, y=py + 4, text_anchor="end"))
    for x, anchor in ((x0, "start"), (x1, "end")):
        parts.append(tag("text", f"{x:g}", x=at(x, y0)[0], y=HEIGHT - 7, text_anchor=anchor))
    parts.append(tag("text", x_label, x=(LEFT + WIDTH) / 2, y=HEIGHT - 7, text_anchor="middle"))
    for number, points in enumerate(series.values()):
        places = [at(*p) for p in points]
        parts.append(tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), class_=f"s{number}"))
        if len(places) <= 30:
            parts += [tag("circle", cx=x, cy=y, r=3, class_=f"s{number}") for x, y in places]
    legend = [tag("span", tag("i", class_=f"s{number}"), name) for number, name in enumerate(series)]
    drawing = tag("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="chart")
    return tag("figure", tag("figcaption", label), drawing, tag("div", legend, class_="legend"))


def ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers that hold both."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def shares(parts: Sequence[tuple[str, float]], label: str) -> Markup:
    """One bar that is divided: (name, share of 1) each; shares below 7 % are told in the legend only."""
    pieces = [
        tag("div", f"{share:.0%}" if share >= 0.07 else None, style=f"flex-grow:{share:.4f}", class_=f"q{number}")
        for number, (_, share) in enumerate(parts)
        if share > 0
    ]
    legend = [
        tag("span", tag("i", class_=f"q{number}"), f"{name} {share:.1%}") for number, (name, share) in enumerate(parts)
    ]
    return tag(
        "figure", tag("figcaption", label), tag("div", pieces, class_="bar"), tag("div", legend, class_="legend")
    )
