"""The work of an extraction in blocks of photographs, each one file, so that it resumes and spreads over machines."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from data_prep import schema
from data_prep.bad_records import Bad
from data_prep.captions import Captioned, Splits
from data_prep.extract.images import BrokenImage, Photographs
from data_prep.extract.settings import Settings
from data_prep.schema import DataError, Record

SIZE = 64  # photographs of a block: as many are lost when a run is killed
_ROWS, _MODELS = "rows", "models"
_BUILT = "built"  # file that says that the data set was written from the blocks, which are gone
_THREADS = 4


class Extract(Protocol):
    """Visual fields of photographs, called by their names.

    models: SHA-256 of each file that the models were loaded from.
    """

    models: Mapping[str, str]

    def __call__(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[Record]:
        """The fields of each photograph."""


@dataclass(frozen=True)
class Block:
    """Photographs first..first + len(items) of a split. path: the file of their features."""

    path: Path
    split: str
    items: tuple[Captioned, ...]


def plan(folder: Path, settings: Settings, splits: Splits) -> list[Block]:
    """The blocks of an extraction, whose files lie in `folder`, which is made.

    Raises DataError when the folder holds the blocks of other settings or photographs.
    """
    listing = "\n".join(f"{split}\t{item.file}" for split, items in splits.items() for item in items)
    wanted = settings.as_json() | {"photographs": hashlib.sha256(listing.encode()).hexdigest(), "block": SIZE}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        for key in wanted:
            if begun.get(key) != wanted[key]:
                raise DataError(
                    f"{path}: an extraction with {key} = {begun.get(key)!r} was begun here, now it is {wanted[key]!r}; "
                    f"finish that one, or begin anew: rm -r {shlex.quote(str(folder))}"
                )
    else:
        _write(path, lambda file: file.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8"))
    return [
        Block(folder / f"{split}-{start // SIZE:06d}.npz", split, tuple(items[start : start + SIZE]))
        for split, items in splits.items()
        for start in range(0, len(items), SIZE)
    ]


def extract(
    block: Block,
    photographs: Photographs,
    extractor: Extract,
    batch_size: int,
    on_broken: Callable[[str], None],
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Write the file of a block, which says with which models it was made.

    on_broken: called with name and reason of each photograph that cannot be read, which is left out if that returns.
    on_done: called after each photograph.
    """
    files = [item.file for item in block.items]
    places = [photographs.place(file) for file in files]  # a name that cannot be is an error before the work
    rows: list[int] = []
    records: list[Record] = []
    for start, loaded in _batches(photographs, files, batch_size):
        good = []
        for row, image in enumerate(loaded, start):
            if isinstance(image, BrokenImage):
                on_broken(str(image))
            else:
                good.append((row, image))
        if good:
            records += extractor([image for _, image in good], [places[row] for row, _ in good])
            rows += [row for row, _ in good]
        for _ in loaded:
            on_done()
    fields: dict[str, Any] = {_ROWS: np.array(rows, np.int64), _MODELS: np.array(json.dumps(dict(extractor.models)))}
    for name in records[0] if records else ():
        fields[name] = np.stack([record[name] for record in records])

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **fields)

    _write(block.path, write)


def _batches(
    photographs: Photographs, files: Sequence[str], size: int
) -> Iterator[tuple[int, list[Image.Image | BrokenImage]]]:
    """First row and photographs of each batch; the next one is read while this one is worked on."""

    def load(file: str) -> Image.Image | BrokenImage:
        try:
            return photographs.load(file)
        except BrokenImage as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        upcoming = pool.map(load, files[:size])
        for start in range(0, len(files), size):
            loaded = list(upcoming)
            upcoming = pool.map(load, files[start + size : start + 2 * size])
            yield start, loaded


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a name of its own, then rename: two workers may do the same block."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def records(blocks: Sequence[Block], feature_dtype: str) -> Iterator[Record | Bad]:
    """The records of blocks that were extracted, with their captions."""
    for block in blocks:
        with np.load(block.path, allow_pickle=False) as arrays:
            fields = {name: arrays[name] for name in arrays.files}
        rows = fields.pop(_ROWS)
        fields.pop(_MODELS, None)
        for place, row in enumerate(rows.tolist()):
            item = block.items[row]
            visual = {
                name: schema.as_field(name, values[place], where=item.file, dtype=feature_dtype)
                for name, values in fields.items()
            }
            record = item.record()
            yield record if isinstance(record, Bad) else record | visual


def models(block: Block) -> dict[str, str]:
    """The models that a block was extracted with; see `Extract`. Empty for one of a version that did not note them."""
    with np.load(block.path, allow_pickle=False) as arrays:
        return json.loads(arrays[_MODELS].item()) if _MODELS in arrays.files else {}


def check_models(folder: Path, begun: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises DataError where two blocks in `folder` are, or would be, made with different models."""
    for name in sorted({*begun, *now}):
        if begun.get(name) != now.get(name):
            raise DataError(
                f"{folder}: begun with another {name}: sha256: expected {begun.get(name, 'no such file')}, found "
                f"{now.get(name, 'no such file')}; put that file back, or begin anew: "
                f"rm -r {shlex.quote(str(folder))}"
            )


def skipped(blocks: Sequence[Block]) -> list[str]:
    """The photographs that could not be read, of blocks that were extracted."""
    names = []
    for block in blocks:
        with np.load(block.path, allow_pickle=False) as arrays:
            kept = set(arrays[_ROWS].tolist())
        names += [item.file for row, item in enumerate(block.items) if row not in kept]
    return names


def remove(folder: Path, *, keep_settings: bool = False) -> None:
    """Delete the blocks of a finished extraction.

    keep_settings: leave what `is_built` and `plan` look at, as there is work to do on the data set.
    """
    if not keep_settings:
        shutil.rmtree(folder)
        return
    (folder / _BUILT).touch()
    for path in folder.glob("*.npz"):
        path.unlink()


def is_built(folder: Path) -> bool:
    """Whether the data set of the extraction in `folder` was written, and what follows is not done."""
    return (folder / _BUILT).is_file()
