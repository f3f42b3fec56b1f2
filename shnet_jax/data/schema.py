"""The record of a data set: one description of each field, for all that write, check, plan, read or document one.

The checks of the importers (`data_prep.schema`), the shapes of `--mode=plan`, the fields in `types.Batch` and the table
in docs/data.md are made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

FEATURE_DTYPES = ("float16", "bfloat16", "float32")
VECTOR_DTYPES = ("float32", "float16", "bfloat16")
"""Dtypes of vectors of frozen models, which an import keeps as they are given."""
PER_CAPTION = "n"
"""Letter of the number of captions of an image, the one size that differs between the records of a set."""
SIZES = {
    "n": "captions",
    "K, D": "regions and their width",
    "G, Dg": "grid cells and their width",
    "C": "classes",
    "h, w": "rows and columns of the map of a class",
    "H, W": "rows and columns of the label map",
    "R": "relations",
    "E, F, Fw": "numbers of the vector of an image, a caption, a token",
    "L": "tokens",
    "Y, X": "rows and columns of pixels of the picture",
}
"""The letters of sizes, by what they count."""
MAP_VOID = 255
"""Unlabelled pixel in COCO's label maps; stored as class number C, so that ids stay contiguous."""
MASKS = {"regions": "region_mask", "grid": "grid_mask"}
"""The mask of each field of units."""
COLUMNS = ("image_embedding", "caption_embeddings", "caption_tokens", "caption_token_mask")
"""Fields that lie beside the records, as columns (data/columns.py), in the sets that data_prep writes."""
ONE_MODEL = "one_model"
"""Metadata: whether one dual encoder made the vectors of both sides; absent where the import reads one model's only."""
VISUAL_FIELDS = ("regions", "grid", "seg_semantic", "image_embedding", "image")
"""Fields of which a record has at least one."""

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Field(NamedTuple):
    """One field of a record.

    shape: size of each axis, a number or a letter; equal letters agree within a record, and n is as above.
    dtypes: accepted dtypes; importers cast to the first, but features keep theirs.
    doc: contents and unit. low, high: bounds of the values, as far as there are any. readers: who needs it.
    """

    shape: tuple[str, ...]
    dtypes: tuple[str, ...]
    doc: str
    readers: str
    low: float | None = None
    high: float | None = None

    @property
    def dtype(self) -> np.dtype:
        """The dtype that an import without other wishes stores."""
        return dtype_of(self.dtypes[0])

    @property
    def kind(self) -> str:
        """Its dtype in tables: "float" for one of FEATURE_DTYPES."""
        return "float" if {*self.dtypes} == {*FEATURE_DTYPES} else self.dtypes[0]

    @property
    def counts_units(self) -> bool:
        """Whether its first axis is that of regions, cells or relations, of which an image may have any number."""
        return self.shape[:1] in (("K",), ("G",), ("R",))

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
        """Its shape where each letter has a size, None where one has none."""
        if any(not axis.isdigit() and axis not in sizes for axis in self.shape):
            return None
        return tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in self.shape)


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype of a name, "bfloat16" included."""
    return _BFLOAT16 if name == "bfloat16" else np.dtype(name)


TEXT_FIELDS: dict[str, Field] = {
    "image_id": Field((), ("text",), "unique in its split", "all"),
    "captions": Field(("n",), ("text",), "sentences of the image, any number; 0: it is only searched", "all"),
    "caption_ids": Field(("n",), ("int64",), "numbers of the captions", "`--mode=embed`, judgements"),
}

FIELDS: dict[str, Field] = {
    "regions": Field(("K", "D"), FEATURE_DTYPES, "detector features, zero where masked", "all models"),
    "region_mask": Field(("K",), ("bool",), "valid regions; absent when all are", "with regions"),
    "boxes": Field(
        ("K", "4"), ("float32",), "x1 y1 x2 y2 divided by image width and height", "cmsei, pages, relations", 0, 1
    ),
    "box_classes": Field(("K",), ("int32",), "the detector's label", "relations", 0),
    "box_scores": Field(("K",), ("float32",), "the detector's confidence", "relations"),
    "grid": Field(("G", "Dg"), FEATURE_DTYPES, "grid or patch tokens, row by row", "shnet, esa, user"),
    "grid_mask": Field(("G",), ("bool",), "valid tokens; absent when all are", "with grid"),
    "seg_semantic": Field(("C", "h", "w"), FEATURE_DTYPES, "map of each class", "shnet"),
    "seg_map": Field(("H", "W"), ("uint8",), "class of each pixel; C is void, and 255 becomes C", "shnet, pages"),
    "categories": Field(("C",), ("bool",), "classes present", "shnet"),
    "relations": Field(("R", "3"), ("int32",), "subject box, predicate, object box; padded rows are -1", "cmsei"),
    "relation_scores": Field(
        ("K", "K"), FEATURE_DTYPES, "largest confidence in any predicate of each ordered pair", "cmsei", 0, 1
    ),
    "image_embedding": Field(
        ("E",), VECTOR_DTYPES, "global vector of a pretrained model", "align, shnet, esa, user, the zero-shot row"
    ),
    "caption_embeddings": Field(
        ("n", "F"),
        VECTOR_DTYPES,
        "vector of each caption by a pretrained model",
        "`text.tower=vectors`, the [zero-shot row](evaluate.md#zero-shot-row)",
    ),
    "caption_tokens": Field(
        ("n", "L", "Fw"), VECTOR_DTYPES, "vectors of its tokens, zero where masked", "`text.source=caption_tokens`"
    ),
    "caption_token_mask": Field(("n", "L"), ("bool",), "valid tokens; absent when all are", "with caption_tokens"),
    "identity": Field((), ("int64",), "number of the person in the image", "person search", 0),
    "image": Field(("Y", "X", "3"), ("uint8",), "the picture itself, RGB, all of one size", "esa, pages"),
}
"""All fields but the texts."""


def markdown_table() -> str:
    """The sizes and the table of all fields in docs/data.md."""
    lines = [
        "The letters in the shapes are these sizes:",
        "",
        *(f"- {letters}: {counted}" for letters, counted in SIZES.items()),
        "",
        "| field | shape, dtype | meaning | read by |",
        "|---|---|---|---|",
    ]
    for name, field in (TEXT_FIELDS | FIELDS).items():
        shape = f"[{', '.join(field.shape)}] " if field.shape else ""
        lines.append(f"| {name} | {shape}{field.kind} | {field.doc}{_bounds(field)} | {field.readers} |")
    return "\n".join(lines)


def _bounds(field: Field) -> str:
    if field.high is not None:
        return f", {field.low:g}..{field.high:g}"
    return f", >= {field.low:g}" if field.low == 0 else ""


def batch_lines() -> str:
    """The image fields of a batch of n images, as `types.Batch` lists them."""
    lines = []
    for name, field in FIELDS.items():
        if PER_CAPTION not in field.shape and name != "identity":
            shape = f"[{', '.join(('n', *field.shape))}] {field.kind}"
            lines.append(f"  {name:16}{shape:22}{field.doc}{_bounds(field)}")
    return "\n".join(lines)
