"""Vectors of images and captions from the folders that `--mode=embed` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.files import data_errors
from data_prep.names import Names
from data_prep.schema import DataError, Record, refuse
from data_prep.sources.base import Absent
from shnet_jax.retrieve import embeddings, tensors

FIELDS = ("image_embedding", "caption_embeddings")


class _Entry(NamedTuple):
    """An image of a folder: its row, and its captions from row `first` on, with their ids."""

    folder: Path
    row: int
    first: int
    captions: list[str]
    ids: list[str]


@dataclass(frozen=True)
class Embeddings:
    """image_embedding and caption_embeddings, from one or more folders (a split each).

    An image is found by its id. Its captions are found by their numbers where both sides have any, else by their order;
    either way the texts are compared.
    """

    folders: Sequence[Path]

    @property
    def files(self) -> Mapping[str, str]:
        """Files that each field comes from."""
        return dict.fromkeys(FIELDS, ", ".join(map(str, self.folders)))

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Description of the models that made the vectors: embeddings.json of each folder."""
        return {"embeddings": [embeddings.read_source(folder) for folder in self.folders]}

    @cached_property
    def _entries(self) -> Names[_Entry]:
        entries: Names[_Entry] = Names(self.files[FIELDS[0]])
        for folder in self.folders:
            try:
                with data_errors():
                    ids = embeddings.open_embeddings(folder).ids
            except FileNotFoundError as error:
                raise DataError(str(error)) from error
            for row, image_id in enumerate(ids.image_ids):
                first, last = int(ids.first[row]), int(ids.first[row + 1])
                refuse(image_id in entries, f"{folder}: image {image_id!r}", "it once", "it in a second place")
                entries.add(image_id, _Entry(folder, row, first, ids.captions[first:last], ids.caption_ids[first:last]))
        return entries

    def read(self, image_id: str) -> Record:
        """image_embedding [E] float32."""
        entry = self._find(image_id)
        return {"image_embedding": _rows(entry.folder, "images", [entry.row])[0]}

    def read_captions(self, record: Record) -> Record:
        """caption_embeddings [n, E] float32. Raises DataError naming image and caption where their texts differ."""
        entry = self._find(record["image_id"])
        rows = [entry.first + place for place in _places(entry, record)]
        return {"caption_embeddings": _rows(entry.folder, "texts", rows)}

    def _find(self, image_id: str) -> _Entry:
        entry = self._entries.find(image_id)
        if entry is None:
            raise Absent(f"{self.files[FIELDS[0]]}: image {image_id!r}: expected its vectors, found none")
        return entry


def _places(entry: _Entry, record: Record) -> list[int]:
    """The place of each caption of the record among those of the entry."""
    captions, where = record["captions"], f"{entry.folder / embeddings.IDS}: image {record['image_id']!r}"
    numbers = [str(number) for number in record.get("caption_ids", ())]
    if numbers and all(name.isdecimal() for name in entry.ids):
        known = {name: place for place, name in enumerate(entry.ids)}
        if missing := [number for number in numbers if number not in known]:
            raise DataError(f"{where}: expected a vector of caption {missing[0]}, found those of {', '.join(known)}")
        places = [known[number] for number in numbers]
    elif len(captions) == len(entry.captions):
        places = list(range(len(captions)))
    else:
        raise DataError(f"{where}: expected vectors of {len(captions)} captions, found {len(entry.captions)}")
    for number, (caption, place) in enumerate(zip(captions, places, strict=True)):
        if caption.split() != entry.captions[place].split():
            which = numbers[number] if numbers else number
            raise DataError(
                f"{where}: caption {which}: expected {caption!r:.80} as in the captions given, found "
                f"{entry.captions[place]!r:.80}"
            )
    return places


def _rows(folder: Path, side: str, rows: Sequence[int]) -> np.ndarray:
    """Vectors copied out of a file, which is mapped anew: an open map would keep every page it read resident."""
    with data_errors():
        return np.array(tensors.open_mapped(folder / f"{side}.safetensors")["vector"][list(rows)])
