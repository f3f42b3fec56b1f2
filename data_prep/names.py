"""The names under which tools know an image, and the entry of a file or folder that belongs to it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from data_prep.files import inside
from data_prep.schema import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2", ".ppm")
"""Of pictures. Other endings, as in v1.5, are part of a name."""

# 000000391895, COCO_val2014_000000391895 and, in UNITER's files, coco_val2014_000000391895 are image 391895
_NUMBERED = re.compile(r"(?:(?:COCO_[a-z]+[0-9]*|coco_[a-z]+[0-9]*|flickr30k|vg|gqa)_)?([0-9]+)")

T = TypeVar("T")


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


class Names(Generic[T]):
    """The entries of a joined file, each found by the id of its image.

    An image belongs to the entry of its own name, with or without the extension of pictures; else to the only one
    with the same number (see `keys`). where: of the entries, for errors.
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

    def add(self, name: str, entry: T) -> None:
        """Note an entry, in the place of one of exactly that name. One object may be added under several names."""
        self._entries[name] = entry
        for key in {stem := _stem(name), _number(stem) or stem}:
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
            key = next((key for key in (stem, _number(stem)) if key in self._names), None)
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


class FileNames:
    """The files of a folder, `ID` and one of `suffixes`, of which an earlier one counts before a later one."""

    def __init__(self, folder: Path, suffixes: Sequence[str]):
        self._folder, self._suffixes = folder, suffixes
        self._listed: dict[Path, Names[str]] = {}  # folder below it -> its files

    def find(self, image_id: str) -> Path | None:
        """The file of an image, None without one.

        Raises Ambiguous as `Names.find`, DataError for an id that leads out of the folder.
        """
        parent, last = Path(image_id).parent, Path(image_id).name
        if parent not in self._listed:
            self._listed[parent] = self._list(inside(self._folder, str(parent)) if parent.parts else self._folder)
        file = self._listed[parent].find(last)
        return None if file is None else inside(self._folder, str(parent / file))

    def _list(self, folder: Path) -> Names[str]:
        names: Names[str] = Names(folder)
        if folder.is_dir():
            with os.scandir(folder) as entries:
                files = sorted(entry.name for entry in entries if not entry.is_dir(follow_symlinks=False))
            for suffix in self._suffixes:
                for file in files:
                    if file.endswith(suffix) and (name := file.removesuffix(suffix)) not in names:
                        names.add(name, file)
        return names
