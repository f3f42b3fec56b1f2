"""Embeds a split part by part, so that a killed run resumes where it stopped.

Each batch becomes a file; in the end all of them become one file for the images and one for the captions. Neither step
holds more than a batch. A batch has the same rows and shapes whenever it is encoded, so a resumed run ends with the
same bytes as one that was never killed.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from shnet_jax.data.gallery import Part, open_gallery
from shnet_jax.evaluation.encode import Tower, Towers, host_fields
from shnet_jax.evaluation.prefix import prefix
from shnet_jax.evaluation.tiles import prefetch_one, show_progress
from shnet_jax.experiment import Experiment
from shnet_jax.observe.files import atomic_path, disk_faults, sole_writer, write_json
from shnet_jax.parallel import hosts
from shnet_jax.retrieve import tensors
from shnet_jax.retrieve.embeddings import FORMAT, IDS, SOURCE, Embeddings, make_ids, open_embeddings, read_source

PARTS = "parts"


def embed(
    experiment: Experiment, variables: dict[str, Any], split: str, mesh: Mesh, folder: str | Path, source: dict
) -> Embeddings:
    """Writes the embeddings of a split to `folder`, or goes on writing them; a complete folder stays as it is.

    Several processes call this together, each with a mesh of its own devices, and share the batches.

    Args:
      variables: {"params", "batch_stats"}.
      mesh: devices that share each batch of config.eval.batch_size rows a device.
      source: their origin (`modes.embed.origin`), kept in embeddings.json; JSON values. Its "dims", if there, are
        the numbers of each vector that are kept (`evaluation.prefix`).

    Raises:
      ValueError: the folder holds embeddings of another source, or parts of them.
      FolderInUse: another process is writing it.
    """
    folder = Path(folder)
    rows = experiment.config.eval.batch_size * mesh.size
    if rows < 1:
        raise ValueError(f"config.eval.batch_size is {experiment.config.eval.batch_size}; it must be at least 1")
    source = {"format": FORMAT} | source | {"batch_rows": rows}
    with ExitStack() as held:

        def begin() -> None:
            if (stored := read_source(folder)) is not None:
                check_source(folder / SOURCE, stored, source)
                shutil.rmtree(folder / PARTS, ignore_errors=True)  # left by a killed run
                return
            held.enter_context(sole_writer(folder))
            _open_parts(folder / PARTS, source)

        hosts.by_first(begin)
        if not (folder / SOURCE).exists():
            with disk_faults(folder, SafetensorError):
                _write(experiment, variables, split, mesh, folder, source)
    return open_embeddings(folder)


def _open_parts(parts: Path, source: dict[str, Any]) -> None:
    """Makes the folder of the batches that are done, or checks it; ValueError for one that holds something else."""
    stored = read_source(parts)
    if stored is None:
        parts.mkdir(parents=True, exist_ok=True)
        if others := sorted(path.name for path in parts.iterdir() if not path.match(f"{SOURCE}*.tmp")):
            raise ValueError(
                f"{parts} is where parts of embeddings are kept, and holds {', '.join(others[:3])}, which --mode=embed "
                "did not write: move it, or choose another config.search.embeddings"
            )
        write_json(parts / SOURCE, source)
    else:
        check_source(parts / SOURCE, stored, source)


def _write(
    experiment: Experiment, variables: dict[str, Any], split: str, mesh: Mesh, folder: Path, source: dict[str, Any]
) -> None:
    parts, rows, dims = folder / PARTS, source["batch_rows"], source.get("dims", 0)
    gallery = open_gallery(
        *(experiment.config, experiment.dataset, split, experiment.tokenizer),
        *(experiment.fields, experiment.text_fields),
    )
    image, text = Towers(experiment, mesh, mesh).place(variables)
    sides = (
        ("images", image, gallery.images, gallery.image_batches),
        ("texts", text, len(gallery.captions), gallery.text_batches),
    )
    written = hosts.of_first([(folder / f"{side}.safetensors").exists() for side, *_ in sides])
    for done, (side, tower, count, batches) in zip(written, sides, strict=True):
        path = folder / f"{side}.safetensors"
        if done:
            continue
        if count:
            with hosts.ending_together():
                _encode(parts, side, tower, count, rows, batches, dims)
            hosts.by_first(partial(assemble, parts, side, count, path))
        else:
            hosts.by_first(partial(_write_none, path, folder / "images.safetensors"))

    def end() -> None:
        write_json(folder / IDS, dataclasses.asdict(make_ids(experiment.dataset, split)))
        write_json(folder / SOURCE, source)
        shutil.rmtree(parts)

    hosts.by_first(end)


def _write_none(path: Path, like: Path) -> None:
    """Writes the embeddings of no captions, of the widths of the images' embeddings in `like`."""
    shapes = {name: ((0, *array.shape[1:]), array.dtype) for name, array in tensors.open_mapped(like).items()}
    with atomic_path(path) as temporary:
        tensors.create(temporary, shapes)


def check_source(
    path: Path, stored: dict[str, Any], expected: dict[str, Any], field: str = "config.search.embeddings"
) -> None:
    """Raises ValueError, naming what differs, unless both origins are the same. field: that names the folder."""
    lines = [
        f"{key}: {stored.get(key)!r} there, {expected.get(key)!r} here"
        for key in sorted(stored.keys() | expected.keys())
        if stored.get(key) != expected.get(key)
    ]
    if lines:
        raise ValueError(
            f"{path} says that what lies beside it was made otherwise; choose another folder "
            f"({field}) or delete this one:\n  " + "\n  ".join(lines)
        )


def _part(parts: Path, side: str, number: int) -> Path:
    return parts / f"{side}-{number:06d}.safetensors"


def _encode(
    parts: Path,
    side: str,
    tower: Tower,
    count: int,
    rows: int,
    batches: Callable[[int, int], Iterator[Part]],
    dims: int,
) -> None:
    """Encodes and writes the missing parts of this process, each atomically.

    dims: numbers of a vector that are kept; 0: all.
    """
    local_parts = hosts.own_range(-(-count // rows))
    first = next((i for i in local_parts if not _part(parts, side, i).exists()), local_parts.stop)
    local_batches = itertools.islice(batches(rows, first), local_parts.stop - first)
    dispatched = (
        (number, part, tower.apply(tower.put(part.batch))) for number, part in enumerate(local_batches, first)
    )
    with show_progress(len(local_parts), f"{side}: batch", side, done=first - local_parts.start) as advance:
        for number, part, embedding in prefetch_one(dispatched):
            kept = prefix(embedding, dims) if dims else embedding
            arrays = host_fields(kept, part.valid) | {"rows": part.numbers[: part.valid].astype(np.int64)}
            with atomic_path(_part(parts, side, number)) as temporary:
                save_file(arrays, temporary)
            advance(part.valid)


def assemble(parts: Path, side: str, count: int, path: Path) -> None:
    """Puts the rows of all parts of a side at their places in one file; holds one part at a time.

    Where parts differ in their number of elements (captions of several lengths), shorter ones get zeros that the mask
    excludes. Raises ValueError for a row in no part or in two.
    """
    files = sorted(parts.glob(f"{side}-*.safetensors"))
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for file in files:
        for name, values in tensors.open_mapped(file).items():
            if name != "rows":
                longest = np.maximum(shapes[name][0][1:], values.shape[1:]) if name in shapes else values.shape[1:]
                shapes[name] = ((count, *map(int, longest)), values.dtype)
    with atomic_path(path) as temporary:
        arrays, times = tensors.create(temporary, shapes), np.zeros(count, np.int8)
        for file in files:
            part = tensors.open_mapped(file)
            rows = np.array(part.pop("rows"))
            for name, values in part.items():
                index: Any = (rows, *map(slice, values.shape[1:]))
                arrays[name][index] = values
            np.add.at(times, rows, 1)
        wrong = np.flatnonzero(times != 1)
        if wrong.size:
            raise ValueError(f"{parts}: row {wrong[0]} of the {side} came {times[wrong[0]]} times; delete this folder")
        for array in arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
