"""Sources of photographs: files of a folder, members of tars, cells of a Parquet file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Generic, Protocol, TypeVar

from PIL import Image

from data_prep.files import inside
from data_prep.names import EXTENSIONS
from data_prep.rows import Row
from data_prep.schema import DataError, is_text
from shnet_jax import untrusted

T = TypeVar("T")


class BrokenImage(Exception):
    """A photograph that cannot be read; says which and why."""


@contextmanager
def broken_images() -> Iterator[None]:
    """Turns faults of a photograph into BrokenImage. Those inside say which photograph it is."""
    try:
        yield
    except FileNotFoundError as error:
        raise BrokenImage(f"{error.filename}: no such file") from error
    except (ValueError, OSError) as error:
        raise BrokenImage(str(error)) from error


class Photographs(Protocol):
    """Photographs that an extraction reads. `file` is the name of one in the captions (`Captioned.file`)."""

    def place(self, file: str) -> str:
        """Location of a photograph, for messages. Raises DataError for a name that leads out, or that two have."""

    def load(self, file: str) -> Image.Image:
        """The photograph, see `untrusted.parse_picture`. Raises BrokenImage, DataError as `place`."""

    def rows(self, split: str | None) -> Iterator[Row]:
        """Names, with the captions and splits stored beside the photographs; `split` is that of rows that name none.

        Raises DataError where there is nothing.
        """


class ByName(Generic[T]):
    """Entries by the whole names of photographs, or by their last parts where captions know other folders."""

    def __init__(self, where: Path):
        self._where = where
        self._entries: dict[str, T] = {}
        self._last: dict[str, str | None] = {}  # last part of a name -> the name, None of several

    def add(self, file: str, entry: T) -> T:
        """Note the entry, unless there is one of this name; returns the one that counts."""
        if file not in self._entries:
            self._entries[file] = entry
            last = PurePosixPath(file).name
            self._last[last] = None if last in self._last else file
        return self._entries[file]

    def items(self) -> Iterable[tuple[str, T]]:
        """Names and entries, in their order."""
        return self._entries.items()

    def find(self, file: str) -> T | None:
        """The entry, None without one. Raises DataError for the last part of several names."""
        last = PurePosixPath(file).name
        name = file if file in self._entries else self._last.get(last, "")
        if name is None:
            raise DataError(f"{self._where}: image {file!r:.200}: expected one photograph {last!r:.200}, found several")
        return self._entries.get(name)


class Folder:
    """Photographs as files of a folder; captions, if any, come from a file of their own."""

    def __init__(self, folder: Path):
        self._folder = folder

    def find(self, file: str) -> Path:
        """The file below the folder, or directly in it where the captions know subfolders (COCO's).

        Raises DataError for a name that leads out of the folder.
        """
        path = inside(self._folder, file)
        return path if path.is_file() else inside(self._folder, Path(file).name)

    def place(self, file: str) -> str:
        """Location of a photograph; see `Photographs`."""
        return str(self.find(file))

    def load(self, file: str) -> Image.Image:
        """Decoded photograph; see `Photographs`."""
        path = self.find(file)
        with broken_images():
            return untrusted.read_picture(path)

    def rows(self, split: str | None) -> Iterator[Row]:
        """The photographs in and below the folder by name, without captions; see `Photographs`."""
        for file in files_below(self._folder):
            if not is_text(file):
                raise DataError(f"{self._folder}: expected names in UTF-8, found {file!r:.200}; rename this photograph")
            yield Row(file, (), split=split, where=str(self._folder))


def files_below(folder: Path) -> list[str]:
    """The photographs in and below a folder, by name: paths below it, without hidden ones. DataError without any."""
    photographs = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS
    )
    files = [file for file in photographs if not any(part.startswith(".") for part in PurePosixPath(file).parts)]
    if not files:
        raise DataError(f"{folder}: expected photographs ({', '.join(EXTENSIONS)}), found none in or below it")
    return files
