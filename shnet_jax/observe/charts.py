"""The palette of all charts, and charts by matplotlib as figures of a page: one picture for light, one for dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from shnet_jax.observe.html import Markup, keys, tag

WIDTH, DPI = 5.4, 150  # inches: letters can be read on a telephone, which shows a picture about 350 pixels wide

LIGHT = {"paper": "#ffffff", "ink": "#1f2328", "grid": "#d0d7de", "track": "#8c959f"}
DARK = {"paper": "#212127", "ink": "#e6edf3", "grid": "#35353d", "track": "#7d8590"}

# A hue for each direction, stronger for the stricter recall; markers say the same without colours.
RECALLS = {
    "i2t": {False: ("#08519c", "#3182bd", "#7fb2d9"), True: ("#c6e0f7", "#6fb1e8", "#3b7fbd")},
    "t2i": {False: ("#a63603", "#e6550d", "#f0a35e"), True: ("#fdd9b8", "#f5994c", "#c4641c")},
}
MARKERS = {"i2t": "o", "t2i": "s"}
DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}

# Okabe and Ito's colours, told apart without full colour vision, as far as both papers show them.
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")

# From good to bad.
BANDS = ("#1a7f4b", "#2f7f8f", "#4a66a8", "#8a5a9e", "#a8434f")


def theme(dark: bool = False) -> dict[Any, Any]:
    """Settings of matplotlib (rcParams) for a light or a dark page."""
    colours = DARK if dark else LIGHT
    inked = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "lines.color")
    return {
        **dict.fromkeys(inked, colours["ink"]),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), colours["paper"]),
        "axes.edgecolor": colours["track"],
        "grid.color": colours["grid"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=SERIES),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "font.size": 11,
    }


def png(draw: Callable[[], Figure], dark: bool = False) -> bytes:
    """PNG image of the figure that `draw` makes."""
    with matplotlib.rc_context(theme(dark)):
        out = io.BytesIO()
        draw().savefig(out, format="png", dpi=DPI)
    return out.getvalue()


def picture(caption: str, light: bytes, dark: bytes) -> Markup:
    """Page figure from a light and a dark PNG; the browser's colour scheme decides which one is shown."""
    light_uri, dark_uri = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (light, dark))
    source = tag("source", media="(prefers-color-scheme: dark)", srcset=dark_uri)
    shown = tag("picture", source, tag("img", src=light_uri, alt=caption))
    return tag("figure", tag("figcaption", caption), shown)


def chart(caption: str, plot: Callable[[Axes, bool], None], x_label: str = "step") -> Markup:
    """Page figure with one pair of axes, which `plot` (axes, whether the page is dark) fills."""

    def draw(dark: bool) -> Figure:
        figure = Figure(figsize=(WIDTH, 0.62 * WIDTH), layout="constrained")
        axes = figure.subplots()
        plot(axes, dark)
        axes.set_title("")  # the caption says it
        axes.set_xlabel(x_label)
        return figure

    return picture(caption, png(lambda: draw(False)), png(lambda: draw(True), dark=True))


def shares(parts: Sequence[tuple[str, float]], label: str) -> Markup:
    """Stacked bar of up to five parts (name, share of 1); the legend lists all shares."""
    pieces = [
        tag("div", f"{share:.0%}" if share >= 0.1 else None, style=f"flex-grow:{share:.4f};background:{colour}")
        for (_, share), colour in zip(parts, BANDS, strict=False)
        if share > 0
    ]
    legend = keys((colour, f"{name} {share:.1%}") for (name, share), colour in zip(parts, BANDS, strict=False))
    return tag("figure", tag("figcaption", label), tag("div", pieces, class_="bar"), legend)
