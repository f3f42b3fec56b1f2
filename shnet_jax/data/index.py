"""Sidecar file index_SPLIT.npz: ids and captions of a split, which otherwise take a pass over all its records.

Its arrays are `image_ids` unicode [N], `caption_counts` int32 [N], `caption_text` uint8 [B], the UTF-8 of all captions
one after the other, and `caption_ends` int64 [T], where each caption ends in it; `identities` int64 [N] where the
records have the field `identity`.
"""

from __future__ import annotations

import io
import mmap
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from shnet_jax.data.errors import DataError
from shnet_jax.untrusted import read_npz

REMEDY = "copy the file again, or remove it: its content is then read from the records, each time"


@dataclass(frozen=True)
class Index:
    """Ids and captions of the N images of a split, in record order.

    image_ids: unicode [N].
    caption_counts: int32 [N], captions of each image.
    text: UTF-8 of all T captions, one after the other; in memory, or a file that is mapped.
    ends: int64 [T], where each caption ends in `text`.
    identities: int64 [N], person in each image; None where the data set has none.
    """

    image_ids: np.ndarray
    caption_counts: np.ndarray
    text: bytes | mmap.mmap
    ends: np.ndarray
    identities: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    @cached_property
    def _first(self) -> np.ndarray:
        """First caption of each image, [N + 1]."""
        return np.concatenate([[0], np.cumsum(self.caption_counts)])

    def captions(self, row: int) -> list[str]:
        """The captions of image `row`."""
        first, last = self._first[row : row + 2].tolist()
        ends = self.ends[first:last].tolist()
        starts = [int(self.ends[first - 1]) if first else 0, *ends[:-1]][: len(ends)]  # an image may have none
        return [self.text[a:b].decode() for a, b in zip(starts, ends, strict=True)]

    def all_captions(self) -> Iterator[list[str]]:
        """The captions of each image in turn."""
        return map(self.captions, range(len(self)))


class IndexBuilder:
    """Collects an index image by image, once; holds ids, 8 bytes a caption, and the text unless a folder is given."""

    def __init__(self, folder: Path | None = None) -> None:
        """Starts an empty index. folder: holds the text meanwhile, in an unnamed file; None: it stays in memory."""
        self._ids: list[str] = []
        self._text = tempfile.TemporaryFile(dir=folder) if folder else io.BytesIO()  # noqa: SIM115  # closed with the builder
        self._counts, self._ends, self._size = array("i"), array("q"), 0
        self._identities = array("q")

    def add(self, image_id: str, captions: Sequence[str], identity: int | None = None) -> None:
        """Add the next image; all of them have an identity, or none."""
        if identity is not None:
            self._identities.append(identity)
        self._ids.append(image_id)
        self._counts.append(len(captions))
        for caption in captions:
            self._size += self._text.write(caption.encode())
            self._ends.append(self._size)

    def build(self) -> Index:
        """The index of the images so far."""
        counts, ends = np.array(self._counts, np.int32), np.array(self._ends, np.int64)
        identities = np.array(self._identities, np.int64) if self._identities else None
        return Index(np.array(self._ids, np.str_), counts, self._whole_text(), ends, identities)

    def _whole_text(self) -> bytes | mmap.mmap:
        if isinstance(self._text, io.BytesIO):
            return self._text.getvalue()
        with self._text:  # the mapping keeps the file open
            self._text.flush()
            return mmap.mmap(self._text.fileno(), self._size, access=mmap.ACCESS_READ) if self._size else b""


def _cuts_letters(index: Index) -> bool:
    """Whether a caption ends within the bytes of a character; ends lie within the text."""
    inner = index.ends[index.ends < len(index.text)]
    return bool((np.frombuffer(index.text, np.uint8)[inner] & 0xC0 == 0x80).any())


def index_file(split: str) -> str:
    """Name of the sidecar of a split."""
    return f"index_{split}.npz"


def write_index(folder: Path, split: str, index: Index) -> None:
    """Write the sidecar of a split."""
    arrays = {} if index.identities is None else {"identities": index.identities}
    arrays |= {
        "image_ids": index.image_ids,
        "caption_counts": index.caption_counts,
        "caption_text": np.frombuffer(index.text, np.uint8),
        "caption_ends": index.ends,
    }
    np.savez(folder / index_file(split), allow_pickle=False, **arrays)


def read_index(folder: Path, split: str) -> Index | None:
    """The index of a split; None when there is no sidecar or, as in older data sets, one without captions.

    Raises DataError, naming the file, when it is damaged or its arrays do not fit together.
    """
    path = folder / index_file(split)
    if not path.is_file():
        return None
    expectation = "expected an index as data_prep writes it"
    try:
        arrays = read_npz(path)
    except ValueError as error:
        raise _damaged(path, f"{expectation}: {error}") from None
    if "caption_text" not in arrays:
        return None
    expected = {"image_ids": "U", "caption_counts": "iu", "caption_text": "u", "caption_ends": "i"}
    expected |= {"identities": "i"} if "identities" in arrays else {}
    for name, kinds in expected.items():
        if name not in arrays or arrays[name].ndim != 1 or arrays[name].dtype.kind not in kinds:
            shape = f"{arrays[name].dtype} {list(arrays[name].shape)}" if name in arrays else "none"
            raise _damaged(path, f"{expectation}: {name} [n] of dtype kind {kinds}, found {shape}")
    index = Index(
        arrays["image_ids"],
        arrays["caption_counts"],
        arrays["caption_text"].tobytes(),
        arrays["caption_ends"],
        arrays.get("identities"),
    )
    try:
        index.text[:].decode()
    except ValueError as error:
        raise _damaged(path, f"{expectation}: its text is no Unicode: {error}") from None
    for name in ("caption_counts", "identities"):
        if name in arrays and len(arrays[name]) != len(index):
            raise _damaged(path, f"expected as many {name} as image_ids, found {len(arrays[name])} and {len(index)}")
    captions, ends = sum(index.caption_counts.tolist()), index.ends
    bounds = np.concatenate([[0], ends, [len(index.text)]])
    negative = index.caption_counts.min(initial=0) < 0
    if negative or len(ends) != captions or (bounds[:-1] > bounds[1:]).any() or _cuts_letters(index):
        raise _damaged(
            path,
            f"expected {captions} captions that end in order within {len(index.text)} bytes, "
            f"found {len(ends)}: {ends.tolist()[:3]} ... {ends.tolist()[-1:]}",
        )
    return index


def read_counts(folder: Path, split: str) -> np.ndarray | None:
    """Captions of each image of a split, int32 [N], from its sidecar; None without one.

    Raises DataError for counts that are damaged.
    """
    path = folder / index_file(split)
    if not path.is_file():
        return None
    try:
        counts = read_npz(path, {"caption_counts"}).get("caption_counts")
    except ValueError as error:
        raise _damaged(path, f"expected an index as data_prep writes it: {error}") from None
    if counts is None:
        return None
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or counts.min(initial=0) < 0:
        raise _damaged(path, f"expected numbers of captions, found {counts.dtype} {list(counts.shape)}")
    return counts


def _damaged(path: Path, fault: str) -> DataError:
    return DataError(f"{path}: {fault}; {REMEDY}", file=path.name)
