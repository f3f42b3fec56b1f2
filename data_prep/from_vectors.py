"""Imports vectors of images and of texts that frozen models made, row by row, as SAIL stores them.

    shnet data from_vectors --image_vectors=DIR --text_vectors=DIR --name=NAME --out=DATA_DIR

Both flags take folders, several by commas, of .pt files (a tensor [rows, E] each, from torch.save) or .npy files, which
are read in natural order of their names, one after the other. Text i belongs to image i mod N, the number of images.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from data_prep import command
from data_prep.builder import write_dataset
from data_prep.counts import Found
from data_prep.files import check_file, data_errors, open_array, read_lines
from data_prep.notes import note
from data_prep.schema import DataError, Record, as_field, refuse
from data_prep.torch_files import described
from shnet_jax.data.schema import ONE_MODEL
from shnet_jax.interop.torch_file import TorchFile, open_torch_file
from shnet_jax.interop.torch_pickle import Tensor
from shnet_jax.paths import to_path, to_paths

SUFFIXES = (".pt", ".npy")
_BLOCK = 1024  # rows read at once
_OPEN = 64  # files open at once: texts are read in as many places as an image has captions


def natural(path: Path) -> list[tuple[int, str]]:
    """Sort key by the numbers in a name: 2.pt before 10.pt."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


@dataclass(frozen=True)
class Rows:
    """The rows of all files of some folders, one after the other."""

    folders: Sequence[Path]

    @cached_property
    def _files(self) -> list[tuple[Path, tuple[int, int]]]:
        """Files and their shapes; not their maps, of which a process may have some 1,000 only."""
        files = []
        for folder in self.folders:
            refuse(not folder.is_dir(), folder, "a folder of vectors", "none")
            vector_files = sorted((path for path in folder.iterdir() if path.suffix in SUFFIXES), key=natural)
            refuse(not vector_files, folder, f"files {' or '.join(SUFFIXES)}", "none")
            files += [(path, _shape(path)) for path in vector_files]
        first_path, (_, width) = files[0]
        for path, shape in files:
            refuse(shape[1] != width, path, f"as wide as {first_path.name}, {width}", shape[1])
        return files

    @cached_property
    def _map(self) -> Callable[[Path], np.ndarray]:
        """Opens a file, unless it is one of the last."""
        return lru_cache(maxsize=_OPEN)(_open)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *np.cumsum([shape[0] for _, shape in self._files]).tolist()]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, field: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, copied, in a dtype that `field` may have; they may lie in several files."""
        parts = []
        while start < stop:
            number = bisect_right(self._starts, start) - 1
            path, shape = self._files[number]
            array, place = self._map(path), start - self._starts[number]
            refuse(array.shape != shape, path, f"{list(shape)}, as before", list(array.shape))
            rows = np.array(array[place : place + stop - start])
            parts.append(as_field(field, rows, where=f"rows from {place}", file=path.name))
            start += len(rows)
        return np.concatenate(parts)


def _tensor(path: Path) -> tuple[TorchFile, Tensor]:
    """The one tensor of a .pt file. Raises DataError for another content."""
    check_file(path)
    file = open_torch_file(path)
    if not isinstance(file.content, Tensor):
        raise DataError(f"{path}: expected a tensor [rows, E], found {described(file.content)}")
    return file, file.content


def _shape(path: Path) -> tuple[int, int]:
    """Rows and width of a file, whose vectors are not read. Raises DataError for anything else."""
    with data_errors():
        if path.suffix == ".npy":
            shape = open_array(path).shape
        else:
            file, tensor = _tensor(path)
            shape = file.shape(tensor)
    refuse(len(shape) != 2 or 0 in shape, path, "[rows, E]", list(shape))
    return shape[0], shape[1]


def _open(path: Path) -> np.ndarray:
    """The array of a file, mapped; of a .pt its checksum is verified. Raises DataError for a damaged one."""
    with data_errors():
        if path.suffix == ".npy":
            return open_array(path)
        file, tensor = _tensor(path)
        return file.array(tensor)


@dataclass(frozen=True)
class Split:
    """Images start to stop with their texts as records. captions: of all texts; () where nobody gave any."""

    images: Rows
    texts: Rows
    captions: Sequence[str]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Record]:
        count = len(self.images)
        copies = range(len(self.texts) // count)
        for first in range(self.start, self.stop, _BLOCK):
            last = min(first + _BLOCK, self.stop)
            images = self.images.read("image_embedding", first, last)
            texts = [self.texts.read("caption_embeddings", i * count + first, i * count + last) for i in copies]
            for row, image in enumerate(range(first, last)):
                numbers = [i * count + image for i in copies]
                yield {
                    "image_id": f"{image:09d}",
                    "captions": [self.captions[n] if self.captions else f"text {n}" for n in numbers],
                    "caption_ids": np.array(numbers, np.int64),
                    "image_embedding": images[row],
                    "caption_embeddings": np.stack([part[row] for part in texts]),
                }


def import_vectors(
    image_vectors: Sequence[Path],
    text_vectors: Sequence[Path],
    name: str,
    out: Path,
    *,
    captions: Path | None = None,
    split: str = "train",
    val: int = 0,
    one_model: bool = False,
    overwrite: bool = False,
) -> Path:
    """Import folders and return the version folder of the data set; see `--help` for the arguments."""
    images, texts = Rows(image_vectors), Rows(text_vectors)
    refuse(len(texts) % len(images), text_vectors[0], f"a multiple of {len(images)} texts, the images", len(texts))
    sentences = read_lines(captions) if captions else []
    refuse(captions and len(sentences) != len(texts), captions, f"{len(texts)} lines, one a text", len(sentences))
    if not captions:
        note("no --captions: the texts are called 'text NUMBER'", name)
    refuse(not 0 <= val < len(images), "--val", f"fewer than the {len(images)} images", val)
    middle = len(images) - val
    splits = {split: Split(images, texts, sentences, 0, middle)}
    if val:
        refuse(split == "val", "--split", "another than val, which --val makes", split)
        splits["val"] = Split(images, texts, sentences, middle, len(images))
    source = f"data_prep.from_vectors of {image_vectors[0].name} and {text_vectors[0].name}"
    source_counts = Found(len(texts), len(images), len(texts))
    metadata = {"source": source, ONE_MODEL: one_model}
    return write_dataset(out, name, splits, metadata, total=len(images), found=source_counts, overwrite=overwrite)


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("from_vectors", __doc__)
    parser.add_argument("--image_vectors", required=True, help="folders of .pt or .npy of the images, by commas")
    parser.add_argument("--text_vectors", required=True, help="folders of .pt or .npy of the texts, by commas")
    parser.add_argument(
        "--captions", type=to_path, help="the texts themselves, one a line, in the order of the vectors"
    )
    parser.add_argument("--split", default="train", help="name of the split; default: train")
    parser.add_argument("--val", type=command.at_least(0), default=0, help="last images that become the split val")
    parser.add_argument(
        "--one_model", action="store_true", help="one dual encoder made both sides: evaluation adds its zero-shot row"
    )
    command.add_writing_arguments(parser)
    args = parser.parse_args(argv)
    folders = to_paths(args.image_vectors), to_paths(args.text_vectors)
    chosen = {
        "captions": args.captions,
        "split": args.split,
        "val": args.val,
        "one_model": args.one_model,
        "overwrite": args.overwrite,
    }
    print(import_vectors(*folders, args.name, args.out, **chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
