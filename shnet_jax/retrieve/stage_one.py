"""Vectors of stage one of a gallery, kept beside its embeddings: in the folder `fde`, as `vector` [n, width] float32.

The folder has the form of a folder of embeddings, so that every index is made of these vectors as of the global ones.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from shnet_jax.evaluation.stage_one import Encodings
from shnet_jax.observe.files import atomic_path, disk_faults, sole_writer, write_json
from shnet_jax.retrieve import tensors
from shnet_jax.retrieve.embeddings import SIDES, SOURCE, Embeddings, read_source
from shnet_jax.types import Embedding

FOLDER = "fde"


def open_encodings(embeddings: Embeddings, stage_one: Encodings) -> Embeddings:
    """The vectors of stage one of both sides, made unless those in the folder are of the same settings.

    Embeddings that lie in memory alone, in no folder, get theirs in memory.
    """
    source = embeddings.source | {"stage_one": dict(stage_one.settings)}
    if "format" not in embeddings.source:
        images, texts = (stage_one(getattr(embeddings, side), side) for side in SIDES)
        return dataclasses.replace(embeddings, source=source, images=images, texts=texts)
    folder = embeddings.folder / FOLDER
    if read_source(folder) != source:
        with sole_writer(embeddings.folder), disk_faults(folder, OSError):
            folder.mkdir(exist_ok=True)
            (folder / SOURCE).unlink(missing_ok=True)  # of other settings; what lies beside it is made again
            for side in SIDES:
                _write(folder / f"{side}.safetensors", getattr(embeddings, side), side, stage_one)
            write_json(folder / SOURCE, source)
    images, texts = (_open(folder / f"{side}.safetensors", len(getattr(embeddings, side).vector)) for side in SIDES)
    return dataclasses.replace(embeddings, folder=folder, source=source, images=images, texts=texts)


def _write(path: Path, items: Embedding, side: str, stage_one: Encodings) -> None:
    """Writes the vectors of a side block by block."""
    with atomic_path(path) as temporary:
        shape = len(items.vector), stage_one.width(items)
        vector = tensors.create(temporary, {"vector": (shape, np.dtype(np.float32))})["vector"]
        for rows, block in stage_one.blocks(items, side):
            vector[rows] = block
        if isinstance(vector, np.memmap):
            vector.flush()


def _open(path: Path, count: int) -> Embedding:
    vector = tensors.open_mapped(path).get("vector")
    if vector is None or vector.ndim != 2 or len(vector) != count or vector.dtype != np.float32:
        raise ValueError(
            f"{path}: expected float32 vectors of {count} items; delete {path.parent}, and it is made again"
        )
    return Embedding(vector)  # type: ignore[arg-type]  # a file may outgrow the device
