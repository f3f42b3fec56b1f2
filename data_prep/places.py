"""Folders looked at from outside: names, and the first bytes of files, for `shnet data FOLDER`.

The recognisers beside the readers (`recognise`) take a `Place` and yield what they would read in it.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from data_prep.schema import DataError, Record
from shnet_jax.paths import to_paths

MOST = 100_000  # entries of a folder that are looked at
SAMPLE = 16  # images whose features are read
_ENDS = 2**16  # bytes at either end of a file
_NO_PATHS = ("split", "as", "segmenter", "backbone")
_SPLIT = re.compile(r"(?<![A-Za-z])(train|restval|val|valid|validation|dev|test)(?![a-z])")

LIBRARIES = {"hdf5": "h5py", "lmdb": "lmdb", "parquet": "pyarrow", "extract": "torch"}
"""The library that each extra of this folder installs."""


@dataclass(frozen=True)
class Place:
    """A folder with the first MOST of its entries, hidden ones left out; or a file, alone.

    more: there are entries that were not looked at.
    """

    path: Path
    files: tuple[Path, ...]
    folders: tuple[Path, ...] = ()
    more: bool = False

    def of(self, *suffixes: str) -> list[Path]:
        """Files of the place with one of these endings, in any case."""
        return [file for file in self.files if file.name.lower().endswith(suffixes)]

    def kinds(self) -> str:
        """Number of entries of each kind, in words."""
        kinds = Counter(file.suffix.lower() or "no ending" for file in self.files)
        listed = [f"{count} {kind}" for kind, count in kinds.most_common(6)]
        folders = ", ".join(folder.name for folder in self.folders[:4]) + (", ..." if len(self.folders) > 4 else "")
        listed += [f"{len(self.folders)} folders ({folders})"] if self.folders else []
        return (", ".join(listed) or "nothing") + (f" among the first {MOST} entries" if self.more else "")


@dataclass(frozen=True)
class Recognised:
    """A layout that an importer takes.

    what: the layout, in words. module: `data_prep.MODULE` imports it with these flags, beside --name and --out.
    captions: it needs captions from elsewhere. extra: what has to be installed.
    read: the first records of a reading (`detections.Reading`, whose module needs this one); a DataError that names
      flags as --FLAG=VALUE says which to add. pads: the flag of a field that pads it; pool: the one that pools a grid.
    lacks: what has to be found before the command works.
    """

    what: str
    module: str
    flags: Mapping[str, str]
    captions: bool = True
    extra: str = ""
    read: Callable[..., Iterable[Record]] | None = None
    pads: Mapping[str, str] = field(default_factory=lambda: {"regions": "max_regions", "grid": "max_cells"})
    pool: str = "pool_grids"
    lacks: tuple[str, ...] = ()

    @property
    def paths(self) -> list[Path]:
        """The files and folders that it takes."""
        paths = (path for flag, text in self.flags.items() if flag not in _NO_PATHS for path in to_paths(text))
        return [path for path in paths if path.exists()]


def look(path: Path) -> Place:
    """The place at a path. Raises DataError when nothing is there."""
    if path.is_file():
        return Place(path, (path,))
    if not path.is_dir():
        raise DataError(f"{path}: no such folder or file")
    with os.scandir(path) as scan:
        # Pipes and devices are left out, links that lead nowhere are not: opening them says so.
        entries = [(e.name, e.is_dir(), e.is_file() or e.is_symlink()) for e in islice(scan, MOST + 1)]
    seen = sorted((name, is_dir) for name, is_dir, is_file in entries[:MOST] if (is_dir or is_file) and name[0] != ".")
    files, folders = (tuple(path / name for name, is_dir in seen if is_dir == kind) for kind in (False, True))
    return Place(path, files, folders, len(entries) > MOST)


def listed(paths: Iterable[Path]) -> str:
    """Paths as flags take them."""
    return ",".join(map(str, paths))


def missing(extra: str) -> bool:
    """Whether the library of an extra is not installed."""
    return bool(extra) and find_spec(LIBRARIES[extra]) is None


def split_of(path: Path) -> str:
    """The split that a file's name has in it, "" without one: captions_train2014, Flickr_8k.devImages."""
    match = _SPLIT.search(path.stem)
    name = match[1] if match else ""
    return "val" if name in ("valid", "validation", "dev") else name


def ends(path: Path) -> str:
    """The first and last bytes of a text file, in which the names of its keys are found."""
    with path.open("rb") as file:
        start = file.read(_ENDS)
        file.seek(max(len(start), path.stat().st_size - _ENDS))
        encoding = json.detect_encoding(start)
        return start.decode(encoding, "replace") + file.read().decode(encoding, "replace")


def first_object(text: str) -> dict[str, object]:
    """The first object of a JSON list, or of JSONL; {} where there is none."""
    try:
        content, _ = json.JSONDecoder().raw_decode(text.lstrip("\ufeff \t\r\n[").lstrip())
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def has_keys(text: str, *keys: str) -> bool:
    """Whether JSON text has all of these names."""
    return all(f'"{key}"' in text for key in keys)
