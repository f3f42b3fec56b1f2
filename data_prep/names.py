"""The names under which tools know an image, and the entry of a file or folder that belongs to it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from data_prep.files import inside
from data_prep.schema import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2", ".ppm")
"""File extensions of pictures. Other endings, as in v1.5, are part of a name."""

# 000000391895, COCO_val2014_000000391895 and, in UNITER's files, coco_val2014_000000391895 are image 391895
_NUMBERED = re.compile(r"(?:(?:COCO_[a-z]+[0-9]*|coco_[a-z]+[0-9]*|flickr30k|vg|gqa)_)?([0-9]+)")

_ANY = "*"  # stands for a folder that the image's id does not name

T = TypeVar("T")


class Absent(DataError):
    """A file or folder has nothing for an image."""


class Ambiguous(DataError):
    """Two images are known by one name, or one image by the names of two entries. It ends an import."""


def keys(image_id: str) -> Iterator[str]:
    """The names under which other tools may know an image: its id, without extension, COCO's and Flickr's number."""
    yield from dict.fromkeys((image_id, stem := _stem(image_id), _number(stem) or stem))


def is_number(stem: str) -> bool:
    """Whether a name is the number of an image, as COCO, Flickr30k and Visual Genome write it."""
    return _number(stem) is not None


def _stem(image_id: str) -> str:
    suffix = Path(image_id).suffix
    return image_id.removesuffix(suffix) if suffix.lower() in EXTENSIONS else image_id


def _number(stem: str) -> str | None:
    match = _NUMBERED.fullmatch(stem)
    return (match[1].lstrip("0") or "0") if match else None


def _keys(stem: str, folder: str) -> Iterator[str]:
    """Lookup keys of a name: itself or its number, and both below `folder` where the name itself has none."""
    parent, _, last = stem.rpartition("/")
    for key in dict.fromkeys((last, _number(last) or last)):
        yield f"{parent}/{key}" if parent else key
    if folder:
        for key in dict.fromkeys((last, _number(last) or last)):
            yield f"{_ANY}/{key}"


class Names(Generic[T]):
    """The entries of a joined file, each found by the id of its image.

    An image belongs to the entry of its own name, with or without the extension of pictures; else to the only one
    with the same number (see `keys`); else, where its id has no folder, to the only one of that name or number in any
    folder (val2014/42). where: of the entries, for errors.
    """

    def __init__(self, where: object):
        self._where = where
        self._entries: dict[str, T] = {}
        self._names: dict[str, str] = {}  # stem or number -> the entry's name
        self._shared: dict[str, str] = {}  # stem or number -> the name of another entry with it
        self._taken: dict[int, str] = {}  # identity of an entry -> the image that has it

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries.values())

    @property
    def none_found(self) -> str:
        """The end of an error about an image without an entry: what there is instead."""
        return (
            f"none among {len(self)} others, such as {next(iter(self._entries))!r:.80}" if len(self) else "none at all"
        )

    def add(self, name: str, entry: T) -> None:
        """Note an entry, in the place of one of exactly that name. One object may be added under several names."""
        self._entries[name] = entry
        for key in _keys(_stem(name), name.rpartition("/")[0]):
            first = self._names.setdefault(key, name)
            if self._entries[first] is not entry:
                self._shared[key] = name

    def find(self, image_id: str) -> T | None:
        """The entry of an image, None without one.

        Raises Ambiguous, naming both, when two entries fit equally well, or when another image has the entry already.
        """
        stem = _stem(image_id)
        name = next((key for key in (image_id, stem) if key in self._entries), None)
        if name is None:
            key = next((key for key in _keys(stem, "" if "/" in stem else _ANY) if key in self._names), None)
            if key is None:
                return None
            name = self._names[key]
            if key in self._shared:
                raise Ambiguous(
                    f"{self._where}: image {image_id!r}: expected one entry of this name or number, found "
                    f"{name!r} and {self._shared[key]!r}; give one the whole name of the image"
                )
        entry = self._entries[name]
        other = self._taken.setdefault(id(entry), image_id)
        if other != image_id:
            raise Ambiguous(
                f"{self._where}: entry {name!r}: expected one image that it belongs to, found {other!r} and "
                f"{image_id!r}; give each image an entry of its whole name, or rename the images"
            )
        return entry

    def need(self, image_id: str, expected: str) -> T:
        """The entry of an image, as `find`. Raises Absent, which says what was expected, where there is none."""
        entry = self.find(image_id)
        if entry is None:
            raise self.absent(image_id, expected)
        return entry

    def absent(self, image_id: str, expected: str) -> Absent:
        """The error about an image without an entry."""
        return Absent(f"{self._where}: image {image_id!r}: expected {expected}, found {self.none_found}")


class FileNames:
    """The files in and below a folder, `ID` and one of `suffixes`; of these an earlier one counts before a later."""

    def __init__(self, folder: Path, suffixes: Sequence[str]):
        self._folder, self._suffixes = folder, suffixes

    def find(self, image_id: str) -> Path | None:
        """The file of an image, None without one.

        Raises Ambiguous as `Names.find`, DataError for an id that leads out of the folder.
        """
        file = self.names.find(image_id)
        if file is None and "/" in image_id:
            inside(self._folder, image_id)
        return None if file is None else inside(self._folder, file)

    def need(self, image_id: str, expected: str) -> Path:
        """The file of an image, as `find`. Raises Absent, which says what was expected, where there is none."""
        path = self.find(image_id)
        if path is None:
            raise self.names.absent(image_id, expected)
        return path

    @cached_property
    def names(self) -> Names[str]:
        """The files' paths below the folder, by these without their endings. Folders that are links are not listed."""
        files = sorted(
            os.path.relpath(os.path.join(folder, file), self._folder)
            for folder, _, inner in os.walk(self._folder)
            for file in inner
        )
        names: Names[str] = Names(self._folder)
        for suffix in self._suffixes:
            for file in files:
                if file.endswith(suffix) and (name := file.removesuffix(suffix)) not in names:
                    names.add(name, file)
        return names
