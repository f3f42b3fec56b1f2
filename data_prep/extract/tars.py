"""Photographs and captions as members of tar files: WebDataset, and what img2dataset writes.

KEY.jpg (or another picture), KEY.txt with a caption a line, KEY.json with `caption` and perhaps `split`. Members are
read where they lie; nothing is unpacked.
"""

from __future__ import annotations

import itertools
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from data_prep import rows
from data_prep.extract.images import BrokenImage, ByName, broken_images
from data_prep.files import data_errors, read_json
from data_prep.names import EXTENSIONS
from data_prep.rows import Row
from data_prep.schema import DataError, is_text
from shnet_jax import untrusted

TEXTS = (".txt", ".json")
MAX_TEXT_BYTES = 2**20
"""Largest size of a .txt or .json member."""

_TAR_FAULTS = (tarfile.TarError, OSError, EOFError, ValueError, LookupError, OverflowError)


class Member(NamedTuple):
    """A file in a tar: which one, and its bytes."""

    tar: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    def read(self, most: int) -> bytes:
        """Bytes of the member. Raises ValueError when there are more than `most`, or the tar has become shorter."""
        if self.size > most:
            raise ValueError(f"{self}: {self.size} bytes, more than {most}")
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise ValueError(f"{self}: expected {self.size} bytes, found {len(data)}")
        return data


class Tars:
    """The photographs of tars, by the names of their members; by TAR/MEMBER where two tars have one name."""

    def __init__(self, paths: Sequence[Path], root: Path, caption_from: str | None = None):
        """root: of the tars' own names. caption_from: "txt" or "json" where a photograph has both and they differ.

        Raises DataError naming the tar for one that is damaged or cut off, and for members that are links, have no
        name inside of a folder, or come twice.
        """
        self._root, self._caption_from = root, caption_from
        self._pictures: ByName[Member] = ByName(root)
        self._texts: dict[Member, dict[str, Member]] = {}  # of each photograph, by ending
        others: list[Member] = []
        for path in paths:
            photographs = 0
            for parts in _by_key(path):
                pictures = [member for ending, member in parts.items() if ending in EXTENSIONS]
                texts = {ending: parts[ending] for ending in TEXTS if ending in parts and pictures}
                if len(pictures) > 1:
                    raise DataError(f"{pictures[0]}: expected one picture of this name, found {pictures[1].name} too")
                if pictures:
                    self._texts[pictures[0]] = texts
                    photographs += 1
                others += [m for end, m in parts.items() if end not in EXTENSIONS and end not in texts]
            _compare_stats(path, photographs)
        names = Counter(member.name for member in self._texts)
        for member in self._texts:
            tar = member.tar.name if member.tar == root else str(member.tar.relative_to(root))
            self._pictures.add(member.name if names[member.name] == 1 else f"{tar}/{member.name}", member)
        if others:
            print(f"{root}: {len(others)} members of no photograph, such as {others[0]}", file=sys.stderr)

    def place(self, file: str) -> str:
        """Location of a photograph; see `images.Photographs`."""
        return str(self._pictures.find(file) or f"{self._root}/{file}")

    def load(self, file: str) -> Image.Image:
        """Decoded photograph; see `images.Photographs`."""
        member = self._pictures.find(file)
        if member is None:
            raise BrokenImage(f"{self._root}/{file}: no such member of the tars")
        with broken_images():
            return untrusted.parse_picture(member.read(untrusted.MAX_PICTURE_BYTES), str(member))

    def rows(self, split: str | None) -> Iterator[Row]:
        """Captions beside the photographs; see `images.Photographs`."""
        for file, member in self._pictures.items():
            try:
                row = self._row(file, member)
            except DataError as error:  # begins with the member that spoils the record of its photograph
                place = next(m for m in (*self._texts[member].values(), member) if str(error).startswith(f"{m}: "))
                row = Row(file, (), where=str(place), fault=str(error).removeprefix(f"{place}: "))
            yield row if row.split else row._replace(split=split or rows.split_of_name(member.tar, self._root))

    def _row(self, file: str, member: Member) -> Row:
        texts = self._texts[member]
        values = {}
        if ".json" in texts:
            with data_errors():
                values = untrusted.parse_json(texts[".json"].read(MAX_TEXT_BYTES), texts[".json"])
            if not isinstance(values, dict):
                raise DataError(f"{texts['.json']}: expected a JSON object, found {type(values).__name__}")
        row = rows.parse(values, str(texts.get(".json", member)), file)
        if ".txt" not in texts or (row.captions and self._caption_from == "json"):
            return row
        text = _text(texts[".txt"])
        if row.captions and self._caption_from is None and text.split():
            if text.split() != " ".join(row.captions).split():
                raise DataError(
                    f"{texts['.txt']}: expected the caption of {texts['.json'].name}, {row.captions[0]!r:.80}, found "
                    f"{text!r:.80}; choose with --caption_from=txt or --caption_from=json"
                )
            return row  # of web pages a caption may have several lines, which .txt alone cannot say
        lines = tuple(" ".join(line.split()) for line in text.split("\n") if line.strip())
        return row._replace(captions=lines or row.captions, numbers=() if lines else row.numbers)


def _text(member: Member) -> str:
    with data_errors():
        data = member.read(MAX_TEXT_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{member}: expected UTF-8 text: {error}") from None


def holds(path: Path) -> tuple[list[str], str | None]:
    """Endings of the first members of a tar, and the split that the first .json of them tells."""
    members = list(itertools.islice(_members(path), 20))
    split = None
    for member in members:
        if split is None and member.name.endswith(".json"):
            with data_errors():
                values = untrusted.parse_json(_text(member), member)
            split = values.get(rows.SPLIT) if isinstance(values, dict) else None
    return sorted({Path(member.name).suffix.lower() for member in members}), split


def _by_key(path: Path) -> Iterable[dict[str, Member]]:
    """The members of a tar by ending, for each KEY. Raises DataError for two that differ in case alone."""
    keys: dict[str, dict[str, Member]] = defaultdict(dict)
    for member in _members(path):
        key, _, ending = member.name.rpartition(".")
        first = keys[key or member.name].setdefault(f".{ending.lower()}", member)
        if first is not member:
            raise DataError(f"{first}: expected one member of this name, found {member.name} too")
    return keys.values()


def _members(path: Path) -> Iterator[Member]:
    """The files of a tar, without hidden ones. Raises DataError as `Tars`."""
    with data_errors():
        untrusted.check_kind(path)
    with path.open("rb") as file:
        kind = untrusted.kind_of(file.read(64))
    try:
        yield from _walk(path)
    except DataError:
        raise
    except _TAR_FAULTS as error:
        raise DataError(f"{path}: expected a tar file that is not compressed{kind}: {error}") from error


def _walk(path: Path) -> Iterator[Member]:
    seen: set[str] = set()
    end = 0
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE * member.isreg()
            if member.isdir():
                continue
            name = member.name.removeprefix("./")
            if not member.isreg() or member.sparse is not None:
                raise DataError(f"{path}: member {name!r:.200} is a link or no plain file, which is not followed")
            parts = PurePosixPath(name).parts
            if not is_text(name) or not parts or name.startswith("/") or ".." in parts or "\0" in name:
                raise DataError(f"{path}: member {name!r:.200} is no name of a file in a folder")
            if name in seen:
                raise DataError(f"{path}: member {name!r:.200}: expected it once, found it twice")
            seen.add(name)
            if not parts[-1].startswith("."):  # ._KEY.jpg, which macOS adds
                yield Member(path, name, member.offset_data, member.size)
        # tarfile takes a damaged header, and the end of the file, for the end of the archive.
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
        rest = not any(block) and any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(1 << 20), b""))
    if block != bytes(tarfile.BLOCKSIZE):
        raise DataError(
            f"{path}: expected the empty block that ends a tar at byte {end}, found {len(block)} other bytes (cut off, "
            "or damaged there?)"
        )
    if rest:
        raise DataError(
            f"{path}: expected nothing behind the end of the tar, at byte {end}, found more bytes (several tars in one "
            "file?); give each a file of its own"
        )


def _compare_stats(path: Path, photographs: int) -> None:
    """Compares a tar with the number of photographs that img2dataset noted beside it."""
    stats = path.with_name(f"{path.stem}_stats.json")
    if stats.is_file():
        noted = read_json(stats)
        count = noted.get("successes") if isinstance(noted, dict) else None
        if type(count) is int and count != photographs:
            raise DataError(f"{path}: expected {count} photographs as in {stats.name}, found {photographs}")
