"""The images of a page: the photograph of each, or else its label map, or else the boxes of its regions.

A photograph is a file of a folder, or the pixels that the record itself has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shnet_jax.data.records import DataSet
from shnet_jax.observe.html import Markup, keys, tag
from shnet_jax.retrieve.pictures import class_name, inside, label_map, photograph, shares, small

PICTURES = "pictures"  # folder beside the versions of a data set that may hold its photographs
OUTLINES = 12  # boxes drawn of an image that has neither photograph nor label map


def check_pictures(folder: str) -> None:
    """Raises ValueError for a config.page.pictures that is not there."""
    if folder and not Path(folder).is_dir():
        raise ValueError(f"config.page.pictures is {folder!r}: no such folder")


def find_pictures(folder: str, dataset: DataSet) -> Path | None:
    """The folder of photographs: config.page.pictures, or else the one beside the version of the data set, or None."""
    beside = dataset.path.parent / PICTURES
    return Path(folder) if folder else beside if beside.is_dir() else None


@dataclasses.dataclass
class Album:
    """The images that a page shows, each picture kept once, as a rule of the style sheet.

    names: of the classes, [] when they are unknown. photographs: how many images have one.
    """

    dataset: DataSet
    split: str
    pictures: Path | None
    names: Sequence[str] = ()
    photographs: int = 0
    _shown: dict[int, Scene] = dataclasses.field(default_factory=dict)

    def scene(self, row: int) -> Scene:
        """The image `row` of the split."""
        if row not in self._shown:
            fields = [f for f in ("boxes", "seg_map", "region_mask", "image") if f in self.dataset.features]
            record = self.dataset.open_split(self.split, ["image_id", *fields])[row]
            photo = photograph(self.pictures, record["image_id"]) if self.pictures else None
            if photo is None and "image" in record:
                photo = small(Image.fromarray(record["image"]))
            self.photographs += photo is not None
            self._shown[row] = Scene(f"p{len(self._shown)}", record, photo, self.names)
        return self._shown[row]

    def given(self, name: str, picture: Image.Image) -> Scene:
        """A picture that is no part of the split; an album has one."""
        self._shown[-1] = Scene("given", {"image_id": name}, small(picture), self.names)
        return self._shown[-1]

    def style(self) -> Markup:
        """The rules that hold the pictures."""
        return Markup("".join(scene.rule() for scene in self._shown.values()))


@dataclasses.dataclass(frozen=True)
class Scene:
    """One image: `name` is the class of its picture's rule, record has image_id and what the data set has of it."""

    name: str
    record: dict[str, Any]
    photo: tuple[str, float] | None
    names: Sequence[str]

    @property
    def image_id(self) -> str:
        """Id of the image."""
        return self.record["image_id"]

    @property
    def boxes(self) -> np.ndarray:
        """Boxes [k, 4] of the valid regions, x1 y1 x2 y2 in 0..1."""
        boxes = self.record.get("boxes", np.zeros((0, 4), np.float32))
        mask = self.record.get("region_mask")
        return boxes if mask is None or len(mask) != len(boxes) else boxes[mask]

    def rule(self) -> str:
        """The picture as a rule of CSS; data URIs and numbers only."""
        if self.photo is not None:
            source, aspect = self.photo
        elif "seg_map" in self.record:
            source, aspect = label_map(self.record["seg_map"], self.names), 1.0
        else:
            return ""
        pixels = "" if self.photo else "image-rendering:pixelated;"
        shape = f"aspect-ratio:{aspect:.4f};width:{100 * min(aspect, 1):.2f}%"
        return f".{self.name}>.base{{background-image:url({source});{pixels}}}.{self.name}{{{shape}}}\n"

    def classes(self, most: int = 3) -> list[tuple[str, str, float]]:
        """The largest classes of the label map that is shown: (name, colour, share); [] where a photograph is."""
        shown = self.photo is None and "seg_map" in self.record
        return shares(self.record["seg_map"], self.names, most) if shown else []

    def legend(self, most: int) -> Markup | None:
        """The colours and shares of the largest classes; None where no label map is shown."""
        classes = self.classes(most)
        return keys((colour, f"{name} {share:.0%}") for name, colour, share in classes) if classes else None

    def card(self, most: int) -> Markup:
        """The picture alone as a card, with the legend of its `most` largest classes if a label map is shown."""
        legend = self.legend(most)
        return tag("div", self.picture(), tag("div", legend, class_="text") if legend else None, class_="card")

    def inside(self, box: np.ndarray) -> str:
        """The largest class within a box."""
        return shares(inside(self.record["seg_map"], box), self.names, 1)[0][0] if "seg_map" in self.record else ""

    def class_name(self, number: int) -> str:
        """The name of a class of its label map."""
        return class_name(number, self.names)

    def picture(self, *above: Markup, dim: bool = False) -> Markup:
        """The picture in a square frame, with layers above it. dim: the picture steps back behind them."""
        outlines = None
        if self.photo is None and "seg_map" not in self.record and not above:
            outlines = self.overlay(tag("rect", **rectangle(box), class_="outline") for box in self.boxes[:OUTLINES])
        base = tag("div", class_="base dim" if dim else "base")
        layers = tag("div", base, above, outlines, class_=f"pic {self.name}", role="img", aria_label=self.image_id)
        return tag("div", layers, class_="frame")

    def overlay(self, marks: Iterable[Markup]) -> Markup:
        """Marks in per cent of width and height, over the picture."""
        return tag("svg", marks, viewBox="0 0 100 100", preserveAspectRatio="none", class_="over", aria_hidden="true")


def rectangle(box: np.ndarray) -> dict[str, float]:
    """Attributes of a box x1 y1 x2 y2 in 0..1 as a rect of an overlay."""
    x1, y1, x2, y2 = (100 * float(v) for v in np.clip(box, 0, 1))
    return {"x": x1, "y": y1, "width": max(x2 - x1, 0.5), "height": max(y2 - y1, 0.5)}
