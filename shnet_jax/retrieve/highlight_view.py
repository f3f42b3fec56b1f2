"""What a model looked at, drawn over an image: gates as boxes and cells, attention as heat, pooling as a curve."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shnet_jax.retrieve import charts
from shnet_jax.retrieve.highlight import Highlight
from shnet_jax.retrieve.html import Child, Markup, tag
from shnet_jax.retrieve.pictures import heat
from shnet_jax.retrieve.scene import Scene, rectangle

PANELS = 6  # of one image: what fits side by side
MARKED = 3  # regions with the largest, and with the smallest gates


def view(scene: Scene, found: Highlight, captions: Sequence[str]) -> Markup | None:
    """Panels of one image; None when the model shows neither gate nor attention."""
    gates = _gates(scene, found)
    panels = [*gates, *_attention(scene, found, PANELS - 1 - len(gates))]
    if not panels:
        return None
    keys = [
        tag("span", tag("i", style=f"background:{colour}"), tag("bdi", name), f" {share:.0%}")
        for name, colour, share in scene.classes(6)
    ]
    title = tag("div", "The scene, by classes" if keys else "The image", tag("div", keys, class_="keys sub"))
    first = tag("div", scene.picture(), tag("div", title, class_="text"), class_="card")
    say = tag("p", "“", tag("bdi", captions[0]), "”", class_="say")
    return tag("div", say, tag("div", first, panels, class_="cards"), class_="query")


def _panel(picture: Markup, title: str, note: str) -> Markup:
    text = tag("div", title, tag("div", note, class_="sub"), class_="text")
    return tag("div", picture, text, class_="card")


def _regions(found: Highlight) -> np.ndarray:
    """Rows of the valid regions."""
    return np.flatnonzero(found.valid[: found.units.get("regions", 0)])


def _by_gate(found: Highlight) -> np.ndarray:
    """The valid regions, those that pass most first."""
    rows = _regions(found)
    return rows if found.gate is None else rows[np.argsort(-found.gate[rows], kind="stable")]


def _gates(scene: Scene, found: Highlight) -> list[Markup]:
    if found.gate is None:
        return []
    panels, rows = [], _by_gate(found)
    boxes = scene.record.get("boxes")
    if boxes is not None and len(rows):
        high, low = rows[:MARKED], rows[MARKED:][-MARKED:]
        marks = [
            *(tag("rect", **rectangle(boxes[r]), class_=c) for r in low for c in ("halo thin", "low")),
            *(tag("rect", **rectangle(boxes[r]), class_=c) for r in high[::-1] for c in ("halo", "high")),
        ]
        labels = [
            *(_label(boxes[r], f"{found.gate[r]:.2f}", weak=True) for r in low),
            *(_label(boxes[r], f"{found.gate[r]:.2f}") for r in high[::-1]),
        ]
        gates = found.gate[rows]
        note = f"Most and least of {len(rows)} regions; all lie between {gates.min():.2f} and {gates.max():.2f}."
        panels.append(_panel(scene.picture(scene.overlay(marks), *labels), "Semantic gate of the regions", note))
    side = math.isqrt(cells := found.units.get("grid", 0))
    if cells and side * side == cells:
        first = found.units.get("regions", 0)
        gates = np.where(found.valid, found.gate, 0)[first : first + cells]
        note = f"Deepest colour {gates.max():.2f}, none {gates.min():.2f}."
        spread = gates - gates.min()
        panels.append(_panel(_heated(scene, spread.reshape(side, side)), "Semantic gate of the grid cells", note))
    return panels


def _label(box: np.ndarray, text: str, weak: bool = False) -> Markup:
    left, top = (100 * float(np.clip(v, 0, 0.86)) for v in box[:2])
    return tag("span", text, class_="tag weak" if weak else "tag", style=f"left:{left:.1f}%;top:{top:.1f}%")


def _attention(scene: Scene, found: Highlight, most: int) -> list[Markup]:
    if found.attention is None or "seg_map" not in scene.record:
        return []
    shape, rows = scene.record["seg_map"].shape, np.flatnonzero(found.valid)
    mean = found.attention[rows].mean(axis=0).reshape(shape)
    panels = [_panel(_heated(scene, mean), "Spatial attention, mean", _top_classes(scene, mean, len(rows)))]
    boxes = scene.record.get("boxes")
    if boxes is None:
        return panels
    for row in _by_gate(found)[: most - 1]:
        weights = found.attention[row].reshape(shape)
        frame = scene.overlay(tag("rect", **rectangle(boxes[row]), class_=c) for c in ("halo", "high"))
        what = scene.inside(boxes[row])
        note = f"Box of mostly {what}. " + _top_classes(scene, weights)
        panels.append(_panel(_heated(scene, weights, frame), "Spatial attention of one region", note))
    return panels


def _heated(scene: Scene, values: np.ndarray, *above: Markup) -> Markup:
    return scene.picture(tag("img", src=heat(values), alt="", class_="over"), *above, dim=True)


def _top_classes(scene: Scene, weights: np.ndarray, units: int = 1) -> str:
    """Where the attention lies, by class of the label map: the two that get most of it."""
    seg_map = scene.record["seg_map"]
    classes = np.unique(seg_map)
    sums = np.array([float(weights[seg_map == c].sum()) for c in classes])
    order = np.argsort(-sums, kind="stable")[:2]
    names = [f"{scene.class_name(int(classes[i]))} {sums[i]:.0%}" for i in order if sums[i] >= 0.005]
    return ("Of all units: " if units > 1 else "It looks at: ") + ", ".join(names) + "."


def pooling_section(weights: Sequence[np.ndarray | None]) -> Child:
    """The weights of the ranks as curves, one for each size of set."""
    sizes = {len(w): w for w in weights if w is not None and len(w)}
    if not sizes:
        return None
    series = {
        f"{size} members": [(k, 100 * float(v)) for k, v in enumerate(sizes[size], start=1)]
        for size in sorted(sizes)[-6:]
    }
    return [
        tag("h3", "How the set is pooled"),
        tag(
            "p",
            "GPO sorts every channel of the set and weighs the values by rank: all weight on rank 1 is max pooling, "
            "equal weights are mean pooling. The weights depend on the size of the set alone.",
        ),
        charts.lines(series, "rank", "Weight of each rank in per cent"),
    ]
