"""Segmentation of each image from COCO panoptic files (PNG and JSON) or from UPSNet's PNG."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import coco_panoptic, label_maps
from data_prep.files import inside, read_json, read_label_map
from data_prep.names import FileNames, Names
from data_prep.places import Place, Recognised, ends, has_keys
from data_prep.schema import DataError, Record, refuse
from data_prep.sources.base import Absent

FIELDS = ("seg_semantic", "seg_map", "categories")


@dataclass(frozen=True)
class Panoptic:
    """COCO panoptic annotations, or predictions in that format.

    annotations: the JSON; its `images` may be absent, as in the files that evaluation takes.
    folder: the PNG that its entries name.
    """

    annotations: Path
    folder: Path

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The names of the classes."""
        return {"class_names": list(coco_panoptic.NAMES)}

    @property
    def files(self) -> Mapping[str, str]:
        """Files that each field comes from."""
        return dict.fromkeys(FIELDS, str(self.annotations))

    @cached_property
    def _entries(self) -> Names[tuple[str, dict[int, int]]]:
        """Entries (PNG, segment -> category) of images, by the number and the name that the JSON gives each."""
        content = read_json(self.annotations)
        try:
            names = {image["id"]: image["file_name"] for image in content.get("images", [])}
            entries: Names[tuple[str, dict[int, int]]] = Names(self.annotations)
            for entry in content["annotations"]:
                categories = {segment["id"]: segment["category_id"] for segment in entry["segments_info"]}
                number, item = entry["image_id"], (entry["file_name"], categories)
                for name in dict.fromkeys((str(number), names.get(number, entry["file_name"]))):
                    refuse(name in entries, f"{self.annotations}: image {name!r}", "one annotation", "two")
                    entries.add(name, item)
        except KeyError as error:
            raise DataError(
                f"{self.annotations}: expected the key {error.args[0]!r}, found an entry without"
            ) from error
        except (TypeError, AttributeError) as error:  # a list or a number where an object or text should be
            raise DataError(f"{self.annotations}: expected entries of the panoptic format: {error}") from error
        return entries

    def read(self, image_id: str) -> Record:
        """seg_semantic [133, 7, 7], seg_map [64, 64] and categories [133]."""
        entry = self._entries.find(image_id)
        if entry is None:
            raise Absent(f"{self.annotations}: image {image_id!r}: expected an annotation, found none")
        file, categories = entry
        refuse(not isinstance(file, str), f"{self.annotations}: image {image_id!r}", "a file name", f"{file!r:.80}")
        path = inside(self.folder, file)
        segments = coco_panoptic.segment_ids(read_label_map(path, "RGB"))
        return label_maps.fields(coco_panoptic.label_map(segments, categories, str(path)), coco_panoptic.CLASSES)


@dataclass(frozen=True)
class Upsnet:
    """Label maps that UPSNet's test script writes for COCO: `pan_2ch` (class, instance, 0) or `ssegs` (class)."""

    folder: Path

    def __post_init__(self) -> None:
        """Raises DataError when there is no such folder."""
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder")

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The names of the classes."""
        return {"class_names": list(coco_panoptic.NAMES)}

    @property
    def files(self) -> Mapping[str, str]:
        """Files that each field comes from."""
        return dict.fromkeys(FIELDS, f"{self.folder}/ID.png")

    def read(self, image_id: str) -> Record:
        """seg_semantic [133, 7, 7], seg_map [64, 64] and categories [133], classes in COCO's order."""
        path = self._labels.find(image_id)
        if path is None:
            raise Absent(f"{self.folder}: image {image_id!r}: expected its label map as PNG, found none")
        pixels = read_label_map(path)
        labels = pixels if pixels.ndim == 2 else pixels[..., 0]
        if pixels.ndim == 3 and pixels.shape[2] > 2 and pixels[..., 2].any() and (pixels[..., 2] != labels).any():
            raise DataError(f"{path}: expected grey, or class, instance and 0 as in pan_2ch, found colours")
        refuse(labels.dtype != np.uint8, path, "classes of 8 bits", labels.dtype)
        return label_maps.fields(coco_panoptic.from_stuff_first(labels, str(path)), coco_panoptic.CLASSES)

    @cached_property
    def _labels(self) -> FileNames:
        """The PNG of each image; ssegs keeps the photograph's extension, COCO 2017 pads numbers to 12 digits."""
        return FileNames(self.folder, (".png",))


def recognise_panoptic(place: Place) -> Iterator[Recognised]:
    """COCO's panoptic JSON, and the folder of its PNG."""
    for path in place.of(".json"):
        text = ends(path)
        if not has_keys(text, "segments_info"):
            continue
        names = re.findall(r'"file_name": *"([^"]+\.png)"', text)[-1:]
        folders = [path.with_suffix(""), *place.folders, path.parent]
        folder = next((folder for folder in folders for name in names if (folder / name).is_file()), None)
        yield Recognised(
            f"COCO panoptic annotations in {path.name}",
            "from_panoptic",
            {"panoptic": str(path)} | ({"panoptic_png": str(folder)} if folder else {}),
            lacks=() if folder else ("the folder of its PNG files: --panoptic_png=DIR",),
        )


def recognise_upsnet(place: Place) -> Iterator[Recognised]:
    """A folder of label maps that UPSNet wrote."""
    files = place.of(".png")
    if files and not place.path.is_file() and is_label_map(files[0]):
        yield Recognised(f"{len(files)} label maps of UPSNet", "from_upsnet", {"upsnet": str(place.path)})


def is_label_map(path: Path) -> bool:
    """Whether a PNG holds class numbers, as `Upsnet` reads them, and no photograph."""
    try:
        pixels = read_label_map(path)
        labels = pixels if pixels.ndim == 2 else pixels[..., 0]
        coco_panoptic.from_stuff_first(labels, str(path))
    except (DataError, IndexError):
        return False
    return pixels.ndim == 2 or not pixels[..., 2].any()
