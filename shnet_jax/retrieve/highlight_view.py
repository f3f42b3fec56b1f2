"""Draws a model's highlighting over an image: gates as boxes and cells, attention as heat, pooling as curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from shnet_jax.observe.charts import chart
from shnet_jax.observe.html import Child, Markup, tag
from shnet_jax.retrieve.highlight import Highlight
from shnet_jax.retrieve.pictures import heat
from shnet_jax.retrieve.scene import Scene, rectangle

PANELS = 6  # of one image: what fits side by side
MARKED = 3  # regions with the largest, and with the smallest gates
LABEL = (0.2, 0.11)  # width and height of a label, as shares of the picture
SIZES = 6  # curves of the pooling weights, at most


def panels(scene: Scene, look: Highlight, captions: Sequence[str]) -> Markup | None:
    """The panels of one image under its first caption; None when the model shows neither gate nor attention."""
    gates = [panel for panel in (_region_gates(scene, look), _cell_gates(scene, look)) if panel]
    drawn = [*gates, *_attention(scene, look, PANELS - 1 - len(gates))]
    if not drawn:
        return None
    legend = scene.legend(6)
    title = tag("div", "The scene, by classes" if legend else "The image", legend)
    first = tag("div", scene.picture(), tag("div", title, class_="text"), class_="card")
    say = tag("p", "“", tag("bdi", captions[0]), "”", class_="say")
    return tag("div", say, tag("div", first, drawn, class_="cards"), class_="query")


def _panel(picture: Markup, title: str, note: str) -> Markup:
    text = tag("div", title, tag("div", note, class_="sub"), class_="text")
    return tag("div", picture, text, class_="card")


def _by_gate(look: Highlight) -> np.ndarray:
    """Rows of the valid regions, those with the largest gates first."""
    rows = np.flatnonzero(look.valid[: look.units.get("regions", 0)])
    return rows if look.gate is None else rows[np.argsort(-look.gate[rows], kind="stable")]


def _region_gates(scene: Scene, look: Highlight) -> Markup | None:
    """The regions with the largest gates (solid) and the smallest (dashed), each with its gate."""
    boxes, rows = scene.record.get("boxes"), _by_gate(look)
    if look.gate is None or boxes is None or not len(rows):
        return None
    high, low = rows[:MARKED], rows[MARKED:][-MARKED:]
    marks = [
        *(tag("rect", **rectangle(boxes[r]), class_=c) for r in low for c in ("halo thin", "low")),
        *(tag("rect", **rectangle(boxes[r]), class_=c) for r in high[::-1] for c in ("halo", "high")),
    ]
    labelled = [*high, *low]
    labels = [
        tag(
            "span",
            f"{look.gate[row]:.2f}",
            class_="tag" if place < len(high) else "tag weak",
            style=f"left:{100 * left:.1f}%;top:{100 * top:.1f}%",
        )
        for place, (row, (left, top)) in enumerate(zip(labelled, place_labels(boxes[labelled]), strict=True))
    ]
    gates = look.gate[rows]
    note = f"Largest and smallest of {len(rows)} regions; all lie between {gates.min():.2f} and {gates.max():.2f}."
    return _panel(scene.picture(scene.overlay(marks), *labels), "Semantic gate of the regions", note)


def place_labels(boxes: np.ndarray) -> list[tuple[float, float]]:
    """Left and top of a label for each box [k, 4] in 0..1: a corner of the box, or as near as no other label lies."""
    width, height = LABEL
    taken: list[tuple[float, float]] = []
    for x1, y1, x2, y2 in np.clip(boxes, 0, 1).tolist():
        corners = [(x1, y1), (x1, y2 - height), (x2 - width, y1), (x2 - width, y2 - height)]
        rows = np.arange(0, 1 - height, height / 2)
        below = sorted(((x, float(y)) for x in (x1, x2 - width) for y in rows), key=lambda p: abs(p[1] - y1))
        places = [(min(max(x, 0.01), 0.99 - width), min(max(y, 0.01), 0.99 - height)) for x, y in (*corners, *below)]
        free = (
            (x, y) for x, y in places if all(abs(x - left) >= width or abs(y - top) >= height for left, top in taken)
        )
        taken.append(next(free, places[0]))
    return taken


def _cell_gates(scene: Scene, look: Highlight) -> Markup | None:
    """The gates of a square grid as heat."""
    side = math.isqrt(cells := look.units.get("grid", 0))
    if look.gate is None or not cells or side * side != cells:
        return None
    first = look.units.get("regions", 0)
    gates = np.where(look.valid, look.gate, 0)[first : first + cells]
    note = f"Darkest = {gates.max():.2f}, transparent = {gates.min():.2f}."
    return _panel(_heated(scene, (gates - gates.min()).reshape(side, side)), "Semantic gate of the grid cells", note)


def _attention(scene: Scene, look: Highlight, most: int) -> list[Markup]:
    """Up to `most` panels: the mean attention, and that of the regions with the largest gates."""
    if look.attention is None or "seg_map" not in scene.record:
        return []
    shape, rows = scene.record["seg_map"].shape, np.flatnonzero(look.valid)
    mean = look.attention[rows].mean(axis=0).reshape(shape)
    note = "Of all units: " if len(rows) > 1 else "It looks at: "
    drawn = [_panel(_heated(scene, mean), "Spatial attention, mean", note + _top_classes(scene, mean))]
    boxes = scene.record.get("boxes")
    if boxes is None:
        return drawn
    for row in _by_gate(look)[: most - 1]:
        weights = look.attention[row].reshape(shape)
        frame = scene.overlay(tag("rect", **rectangle(boxes[row]), class_=c) for c in ("halo", "high"))
        note = f"Box of mostly {scene.inside(boxes[row])}. It looks at: {_top_classes(scene, weights)}"
        drawn.append(_panel(_heated(scene, weights, frame), "Spatial attention of one region", note))
    return drawn


def _heated(scene: Scene, values: np.ndarray, *above: Markup) -> Markup:
    return scene.picture(tag("img", src=heat(values), alt="", class_="over"), *above, dim=True)


def _top_classes(scene: Scene, weights: np.ndarray) -> str:
    """The two classes of the label map that get most of the attention."""
    seg_map = scene.record["seg_map"]
    classes = np.unique(seg_map)
    sums = np.array([float(weights[seg_map == c].sum()) for c in classes])
    order = np.argsort(-sums, kind="stable")[:2]
    return ", ".join(f"{scene.class_name(int(classes[i]))} {sums[i]:.0%}" for i in order if sums[i] >= 0.005) + "."


def pooling_section(weights: Sequence[np.ndarray | None]) -> Child:
    """The pooling weights by rank as curves, one for each size of set."""
    sizes = {len(w): w for w in weights if w is not None and len(w)}
    if not sizes:
        return None

    def plot(axes: Axes) -> None:
        for size in sorted(sizes)[-SIZES:]:
            axes.plot(np.arange(1, size + 1), 100 * sizes[size], label=f"{size} members")
        axes.set_ylim(bottom=0)
        axes.legend()

    return [
        tag("h3", "How the set is pooled"),
        tag(
            "p",
            "GPO sorts every channel of the set and weighs the values by rank: all weight on rank 1 is max pooling, "
            "equal weights are mean pooling. The weights depend on the size of the set alone.",
        ),
        chart("Weight of each rank in per cent", plot, "rank"),
    ]
