"""Features kept as one .npz file an image."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_prep.files import check_folder, data_errors, open_array
from data_prep.names import FileNames
from data_prep.places import SAMPLE, Place, Recognised
from data_prep.schema import DataError, Record
from data_prep.sources.detections import DEFAULT, FEATURES, NAMES, Detections, Reading, described, note_unread
from shnet_jax.untrusted import MAX_IMAGE_BYTES, read_npz


@dataclass(frozen=True)
class NpzFiles(Detections):
    """Regions or a grid of each image from ID.npz in a folder, compressed or not.

    Layouts: `x`, `bbox`, `image_w`, `image_h` of github.com/MILVLG/bottom-up-attention.pytorch and openvqa; `feat` of
    github.com/ruotianluo/self-critical.pytorch, whose folder NAME_att has the boxes of its images in NAME_box/ID.npy.
    """

    folder: Path
    reading: Reading = DEFAULT

    def __post_init__(self) -> None:
        """Raises DataError when there is no such folder, or nothing to read in it."""
        check_folder(self.folder, ".npz")

    @property
    def where(self) -> str:
        """The files, for error messages."""
        return f"{self.folder}/ID.npz"

    @cached_property
    def _arrays(self) -> FileNames:
        return FileNames(self.folder, (".npz",))

    @cached_property
    def _boxes(self) -> FileNames | None:
        """The files of NAME_box beside a folder NAME_att."""
        folder = self.folder.resolve()
        beside = folder.with_name(f"{folder.name.removesuffix('_att')}_box")
        return FileNames(beside, (".npy",)) if folder.name.endswith("_att") and beside.is_dir() else None

    def read(self, image_id: str) -> Record:
        """regions [K, D] and boxes [K, 4] in 0..1, or grid [G, D]."""
        return self.record(image_id, self._arrays.need(image_id, "a file ID.npz"))

    def record(self, image_id: str, path: Path) -> Record:
        """Record of the image in a file, as `read` returns it."""
        with data_errors():
            arrays = read_npz(path, NAMES, MAX_IMAGE_BYTES)
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        if not set(FEATURES) & set(arrays):
            raise DataError(f"{path}: expected an array named {' or '.join(FEATURES)}, found {described(names)}")
        note_unread(names, NAMES, path)
        if self._boxes is not None and self.reading.form != "none":
            beside = self._boxes.find(image_id)
            if beside is None:
                raise DataError(
                    f"{path}: expected its boxes in {self.folder.name.removesuffix('_att')}_box, found none"
                )
            arrays = arrays | {"bbox": open_array(beside)}
        return self.reading.record(image_id, arrays, str(path))


def recognise(place: Place) -> Iterator[Recognised]:
    """A folder of ID.npz."""
    files = place.of(".npz")
    if not files or place.path.is_file():
        return
    with data_errors():
        names = sorted(read_npz(files[0], NAMES, MAX_IMAGE_BYTES))
    if set(FEATURES) & set(names):

        def read(reading: Reading) -> Iterator[Record]:
            source = NpzFiles(place.path, reading)
            return (source.record(file.stem, file) for file in files[:SAMPLE])

        contents = f"{len(files)} files ID.npz with {', '.join(names)}"
        yield Recognised(contents, "from_npz", {"npz": str(place.path)}, read=read)
