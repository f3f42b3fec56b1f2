"""Regions that `torch.save` wrote as one dictionary by image, as Oscar's retrieval has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import data_errors
from data_prep.names import Names
from data_prep.places import SAMPLE, Place, Recognised, listed
from data_prep.schema import DataError, Record
from data_prep.sources.detections import Detections, Reading
from data_prep.sources.vinvl import Geometry, split_geometry
from data_prep.torch_files import described, open_by_image, peek
from shnet_jax.interop.torch_file import TorchFile
from shnet_jax.interop.torch_pickle import Array, Tensor


@dataclass(frozen=True)
class TorchDict(Detections):
    """regions [K, D] of each image from files {image: tensor [K, D]}, boxes where D is 2,054 as VinVL has it.

    geometry: see `vinvl.split_geometry`.
    """

    paths: Sequence[Path]
    reading: Reading
    geometry: Geometry | None = None

    def __post_init__(self) -> None:
        """Raises DataError when a file is none or of another kind."""
        _ = self._tensors

    @property
    def where(self) -> str:
        """The files, for error messages."""
        return ", ".join(map(str, self.paths))

    @cached_property
    def _tensors(self) -> Names[tuple[TorchFile, str, Any]]:
        """File, name and value of each image."""
        names: Names[tuple[TorchFile, str, Any]] = Names(self.where)
        for path in self.paths:
            file, content = open_by_image(path)
            for key, value in content.items():
                if (name := str(key)) in names:
                    raise DataError(f"{path}: image {name!r:.80}: expected it once, found it twice")
                names.add(name, (file, name, value))
        return names

    def read(self, image_id: str) -> Record:
        """regions [K, D] and boxes [K, 4] in 0..1."""
        return self._record(image_id, *self._tensors.need(image_id, "its tensor"))

    def first(self, count: int) -> Iterator[Record]:
        """The records of some images."""
        return (self._record(entry[1], *entry) for entry in islice(self._tensors, count))

    def _record(self, image_id: str, file: TorchFile, name: str, value: Any) -> Record:
        where = f"{file.path}, image {name!r}"
        with data_errors():
            array = file.array(value) if isinstance(value, Tensor) else getattr(value, "value", None)
        if not isinstance(value, Tensor | Array) or array is None:
            raise DataError(f"{where}: expected a tensor [K, D], found {described(value)}")
        return self.reading.record(image_id, split_geometry(np.asarray(array), self.geometry, where), where)


_LITTLE = 2**28  # bytes of a file that is opened to look at it: all of its pickle is read


def recognise(place: Place) -> Iterator[Recognised]:
    """FILE.pt with a dictionary of tensors."""
    files = [file for file in place.of(".pt", ".pth") if peek(file) == "tensors"]
    if files:
        little = [file for file in files if file.stat().st_size <= _LITTLE][:1]
        read = (lambda reading: TorchDict(little, reading).first(SAMPLE)) if little else None
        contents = f"tensors by image in {', '.join(file.name for file in files)}"
        yield Recognised(contents, "from_torch", {"torch": listed(files)}, read=read)
