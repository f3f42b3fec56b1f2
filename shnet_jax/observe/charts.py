"""The style and palette of all charts, and charts by matplotlib as SVG in the colours of the page around them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from shnet_jax.observe.html import Markup, keys, tag

WIDTH = 5.4  # inches: letters can be read on a telephone, which shows a picture about 350 pixels wide
INK = "#1d1d22"  # of text and axes; on a page it becomes the colour of the text

# A hue for each direction, stronger for the stricter recall; markers say the same without colours.
RECALLS = {"i2t": ("#08519c", "#3182bd", "#7fb2d9"), "t2i": ("#a63603", "#e6550d", "#f0a35e")}
DARK = {
    **{"#08519c": "#c6e0f7", "#3182bd": "#6fb1e8", "#7fb2d9": "#3b7fbd"},
    **{"#a63603": "#fdd9b8", "#e6550d": "#f5994c", "#f0a35e": "#c4641c"},
}
"""Colours of a light page that a dark one has others for."""
MARKERS = {"i2t": "o", "t2i": "s"}
SYMBOLS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "*": "★"}
"""Markers as characters of a page."""

# Okabe and Ito's colours, told apart without full colour vision, as far as both papers show them.
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")

# From good to bad.
BANDS = ("#1a7f4b", "#2f7f8f", "#4a66a8", "#8a5a9e", "#a8434f")


def theme() -> dict[Any, Any]:
    """Settings of matplotlib (rcParams)."""
    inked = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys((*inked, "lines.color", "grid.color"), INK),
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=SERIES),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.15,
        "legend.frameon": False,
        "font.size": 11,
        "svg.hashsalt": "same",  # equal charts are equal texts
    }


def svg(figure: Figure) -> Markup:
    """The figure as SVG in the colours of the page that it is put into, light or dark."""
    out = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    text = out.getvalue().replace(INK, "currentColor").replace("xlink:href", "href")
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text[text.index("<svg") :])
    for light, dark in DARK.items():
        text = re.sub(rf"(fill|stroke): {light}", rf"\g<0>; \1: light-dark({light}, {dark})", text)
    return Markup(text)


def chart(caption: str, plot: Callable[[Axes], None], x_label: str = "step", left: float = 0.13) -> Markup:
    """Page figure with one pair of axes, which `plot` fills; their legend stands below them as text of the page.

    left: share of the width that is left to the labels of the vertical axis. Charts side by side have axes of one size.
    """
    with matplotlib.rc_context(theme()):
        figure = Figure(figsize=(WIDTH, 0.62 * WIDTH))
        figure.subplots_adjust(left=left, right=0.98, top=0.97, bottom=0.16)
        axes = figure.subplots()
        plot(axes)
        axes.set_title("")  # the caption says it
        axes.set_xlabel(x_label)
        legend = _legend(axes)
        return tag("figure", tag("figcaption", caption), svg(figure), legend)


def _legend(axes: Axes) -> Markup | None:
    """Takes the legend out of the axes: symbols and names of the curves, which wrap on a narrow page; None without."""
    drawn = axes.get_legend()
    if drawn is None:
        return None
    drawn.remove()
    curves = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    names = [str(line.get_label()) for line in curves]
    symbols = [
        tag("b", SYMBOLS.get(str(line.get_marker()), "━"), style=_coloured(to_hex(line.get_color()))) for line in curves
    ]
    return tag("div", [tag("span", *entry) for entry in zip(symbols, names, strict=True)], class_="keys")


def _coloured(colour: str) -> str:
    """CSS of text in the colour of a curve; for browsers without light-dark(), the light colour stands before it."""
    light = "currentColor" if colour == INK else colour
    dark = {of_light.lower(): of_dark for of_light, of_dark in DARK.items()}.get(colour.lower())
    return f"color:{light}" + (f";color:light-dark({light},{dark})" if dark else "")


def shares(parts: Sequence[tuple[str, float]], label: str) -> Markup:
    """Stacked bar of up to five parts (name, share of 1); the legend lists all shares."""
    pieces = [
        tag("div", f"{share:.0%}" if share >= 0.1 else None, style=f"flex-grow:{share:.4f};background:{colour}")
        for (_, share), colour in zip(parts, BANDS, strict=False)
        if share > 0
    ]
    legend = keys((colour, f"{name} {share:.1%}") for (name, share), colour in zip(parts, BANDS, strict=False))
    return tag("figure", tag("figcaption", label), tag("div", pieces, class_="bar"), legend)
