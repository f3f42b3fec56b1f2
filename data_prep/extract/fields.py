"""Extraction of record fields from a batch of photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image

from data_prep import schema
from data_prep.extract import convolutional, weights
from data_prep.extract.backbone import Backbone
from data_prep.extract.pool import box_average
from data_prep.extract.segment import Segmenter
from data_prep.extract.settings import TIMM, Settings
from data_prep.schema import DataError, Record


class Extractor:
    """The models of an extraction, loaded once.

    models: SHA-256 of each file that they were loaded from, as "backbone NAME: weights".
    """

    def __init__(self, settings: Settings, device: str = ""):
        """device: cpu, cuda, cuda:1, ...; "" is the first GPU if there is one."""
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._settings = settings
        self.models: Mapping[str, str] = {}
        self._segmenter = None
        if settings.segmenter:
            sha = weights.check("segmenter", settings.segmenter, settings.segmenter_sha256)
            with weights.no_bar():
                self._segmenter = Segmenter(
                    settings.segmenter,
                    place,
                    regions=settings.regions,
                    region_score=settings.region_score,
                    seg_map=settings.seg_map,
                )
            self._note("segmenter", settings.segmenter, {"weights": sha} | weights.described(settings.segmenter))
        self._backbone: Backbone | convolutional.ConvNet | None = None
        if settings.backbone.startswith(TIMM):
            if settings.tokens == "projected" or settings.backbone_sha256:
                raise DataError(
                    f"backbone {settings.backbone}: --tokens=projected and --backbone_sha256 are not for timm"
                )
            self._backbone = convolutional.load(settings.backbone, place, settings.image_size)
            self._note("backbone", settings.backbone, {"weights": self._backbone.sha256()})
        elif settings.backbone:
            sha = weights.check("backbone", settings.backbone, settings.backbone_sha256)
            projected = settings.tokens == "projected"
            with weights.no_bar():
                self._backbone = Backbone(settings.backbone, place, settings.image_size, projected=projected)
            self._note("backbone", settings.backbone, {"weights": sha} | weights.described(settings.backbone))

    def _note(self, role: str, name: str, files: Mapping[str, str]) -> None:
        self.models = {**self.models, **{f"{role} {name}: {file}": sha for file, sha in files.items()}}

    def __call__(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[Record]:
        """Visual fields of each image, as they are stored. names: for error messages."""
        records: list[Record] = [{} for _ in images]
        if self._segmenter is not None:
            records = self._segmenter(images)
        if self._backbone is not None:
            for record, (grid, vector) in zip(records, self._backbone(images), strict=True):
                record["image_embedding"] = vector
                if self._settings.tokens == "none":
                    continue
                if "boxes" in record:
                    record["regions"] = box_average(grid, record["boxes"])
                    record["region_mask"] = np.ones(len(record["boxes"]), bool)
                record["grid"] = grid.reshape(-1, grid.shape[-1])
        return [self._stored(record, name) for record, name in zip(records, names, strict=True)]

    def _stored(self, record: Record, name: str) -> Record:
        """Regions padded to their number, everything in its dtype; bfloat16, which a block cannot hold, comes later."""
        dtype = "float16" if self._settings.feature_dtype == "float16" else "float32"
        out: Record = {}
        for field, value in record.items():
            if schema.FIELDS[field].shape[0] == "K":
                missing = self._settings.regions - len(value)
                value = np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1))
            out[field] = schema.as_field(field, value, where=name, dtype=dtype)
        return out
