"""--mode=mine: lists of hard negatives of the training split, by a trained run, for `config.data.negatives`.

Each block of queries becomes a file, so that a killed run resumes where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.data.checksums import sha256
from shnet_jax.data.negatives import CAPTIONS, FORMAT, IMAGES, NONE, SOURCE
from shnet_jax.evaluation.hard_negatives import Mining, make_mining
from shnet_jax.evaluation.tiles import show_progress, tile_size, vectors_of
from shnet_jax.evaluation.top_k import is_dot_product
from shnet_jax.modes.embed import origin, split_embeddings
from shnet_jax.observe.files import atomic_path, sole_writer, write_json
from shnet_jax.parallel import hosts
from shnet_jax.parallel.mapping import make_mesh, own_devices
from shnet_jax.retrieve.embed import check_source
from shnet_jax.retrieve.embeddings import Embeddings
from shnet_jax.training.load import Loaded, load
from shnet_jax.untrusted import read_object

log = logging.getLogger(__name__)

PARTS = "parts"


@dataclasses.dataclass(frozen=True)
class _Gallery:
    """The embeddings of a split, and the rule of a negative.

    owner: [T] image of each caption. first: [N + 1], first caption of each image. ids: [N], equal where images are no
    negatives of each other.
    """

    embeddings: Embeddings
    owner: np.ndarray
    first: np.ndarray
    ids: np.ndarray
    share: float

    def caption_limit(self, captions: np.ndarray) -> np.ndarray:
        """Largest score [b] of negatives of captions: the share of the score with their own image."""
        return self._share_of(self._positive(captions))

    def image_limit(self, images: np.ndarray) -> np.ndarray:
        """Largest score [b] of negatives of images: the share of the mean score of their own captions."""
        counts = self.first[images + 1] - self.first[images]
        ends = np.cumsum(counts)
        captions = np.arange(ends[-1]) + np.repeat(self.first[images] - (ends - counts), counts)
        sums = np.bincount(np.repeat(np.arange(len(images)), counts), self._positive(captions), len(images))
        return self._share_of((sums / counts).astype(np.float32))

    def _share_of(self, positive: np.ndarray) -> np.ndarray:
        """The share of the scores of positives; of one below 0 the score itself, as no negative may score higher."""
        return np.minimum(positive, np.float32(self.share) * positive) if self.share < 1 else self.share * positive

    def _positive(self, captions: np.ndarray) -> np.ndarray:
        images, texts = self.embeddings.images.vector, self.embeddings.texts.vector
        return np.einsum("td,td->t", np.asarray(texts[captions]), np.asarray(images[self.owner[captions]]))


def mine(config: ConfigDict, workdir: str | Path) -> None:
    """Writes the hard negatives of each caption and of each image of config.data.train_split.

    The folder is config.mine.folder; a killed run goes on with the same command. Several processes share the work.
    Scores are products of the global vectors, with every model. Raises ValueError for options out of range, or a folder
    of other hard negatives.
    """
    options, workdir, mesh = config.mine, Path(workdir), own_devices(make_mesh(config.parallel.devices))
    if options.per_item < 1 or not options.max_relative_score > 0:
        raise ValueError(
            f"config.mine.per_item is {options.per_item} and max_relative_score {options.max_relative_score}; "
            "per_item must be at least 1, max_relative_score above 0"
        )
    loaded, split = load(workdir, config), config.data.train_split
    dataset = loaded.experiment.dataset
    dataset.check_captioned(split)
    source = _source(loaded, config, workdir, mesh)
    folder = Path(options.folder or workdir / "negatives" / f"{dataset.path.parent.name}_{split}_{loaded.step}")
    with ExitStack() as held:

        def begin() -> None:
            if (folder / SOURCE).is_file():
                stored = read_object(folder / SOURCE)
                made = {name: stored.pop(name, None) for name in ("files", "summary")}
                check_source(folder / SOURCE, stored, source, "config.mine.folder")
                shutil.rmtree(folder / PARTS, ignore_errors=True)
                _say(folder, made["summary"])
                return
            if not is_dot_product(loaded.score):
                log.warning("%s scores pairs in a way of its own; it is mined by its global vectors", config.model.name)
            held.enter_context(sole_writer(folder))
            _open_parts(folder / PARTS, source)

        hosts.by_first(begin)
        if not (folder / SOURCE).is_file():
            _write(loaded, config, workdir, mesh, folder, source)


def _source(loaded: Loaded, config: ConfigDict, workdir: Path, mesh: Mesh) -> dict[str, Any]:
    """Source and settings of the lists, as JSON values."""
    dataset, split = loaded.experiment.dataset, config.data.train_split
    return {
        "format": FORMAT,
        **origin(loaded, workdir, split, mesh.size),
        "images": dataset.splits[split],
        "captions": int(dataset.first_captions(split)[-1]),
        "ids": "identity" if _by_person(config, loaded) else "image",
        "per_item": config.mine.per_item,
        "max_relative_score": config.mine.max_relative_score,
        "tile": tile_size(config.eval, mesh),
    }


def _by_person(config: ConfigDict, loaded: Loaded) -> bool:
    return bool(config.data.identity) and "identity" in loaded.experiment.dataset.features


def _open_parts(parts: Path, source: dict[str, Any]) -> None:
    """Makes the folder of the blocks that are done, or checks it; ValueError for one that holds something else."""
    parts.mkdir(exist_ok=True)
    if (parts / SOURCE).is_file():
        check_source(parts / SOURCE, read_object(parts / SOURCE), source, "config.mine.folder")
    elif others := sorted(path.name for path in parts.iterdir() if not path.match(f"{SOURCE}*.tmp")):
        raise ValueError(
            f"{parts} is where parts of hard negatives are kept, and holds {', '.join(others[:3])}, which --mode=mine "
            "did not write: move it, or choose another config.mine.folder"
        )
    else:
        write_json(parts / SOURCE, source)


def _write(loaded: Loaded, config: ConfigDict, workdir: Path, mesh: Mesh, folder: Path, source: dict[str, Any]) -> None:
    parts = folder / PARTS
    directions = _directions(_open_gallery(loaded, config, workdir, mesh), config, mesh)
    blocks = [(name, number) for name, mining in directions.items() for number in range(mining.blocks)]
    local_blocks = [blocks[place] for place in hosts.own_part(len(blocks))]
    missing = [(name, number) for name, number in local_blocks if not _part(parts, name, number).exists()]
    rounds = sum(directions[name].tiling.rounds for name, _ in missing)
    done = sum(directions[name].tiling.rounds for name, _ in local_blocks) - rounds
    progress = show_progress(rounds + done, "tile of scores", "pairs", done=done)
    with hosts.ending_together(), progress as advance:
        for name, number in missing:
            hardest = directions[name].block(number, advance).index.astype(np.int32)
            with atomic_path(_part(parts, name, number)) as temporary, temporary.open("wb") as file:
                np.save(file, hardest, allow_pickle=False)

    def end() -> None:
        for name, mining in directions.items():
            _assemble(parts, name, mining, folder / name)
        summary = {name: _summary(np.load(folder / name, mmap_mode="r")) for name in directions}
        files = {name: sha256(folder / name) for name in directions}
        write_json(folder / SOURCE, source | {"files": files, "summary": summary})
        shutil.rmtree(parts)
        _say(folder, summary)

    hosts.by_first(end)


def _open_gallery(loaded: Loaded, config: ConfigDict, workdir: Path, mesh: Mesh) -> _Gallery:
    """The embeddings of the training split, which are made unless they are there, and its ids."""
    gallery_config = ConfigDict(config.to_dict())
    split = gallery_config.search.split = config.data.train_split
    gallery_config.search.dims, gallery_config.search.embeddings = 0, ""
    dataset = loaded.experiment.dataset
    first = dataset.first_captions(split)
    ids = np.arange(len(first) - 1)
    persons = dataset.identities(split) if _by_person(config, loaded) else None
    if persons is not None:
        ids = np.unique(persons, return_inverse=True)[1]
    embeddings = split_embeddings(loaded, gallery_config, workdir, mesh)
    return _Gallery(
        embeddings, np.repeat(np.arange(len(ids)), np.diff(first)), first, ids, config.mine.max_relative_score
    )


def _directions(gallery: _Gallery, config: ConfigDict, mesh: Mesh) -> dict[str, Mining]:
    """The two directions of mining, by the name of their file."""
    images, texts = (vectors_of(items) for items in (gallery.embeddings.images, gallery.embeddings.texts))
    of_images, of_captions = gallery.ids, gallery.ids[gallery.owner]
    how: Any = config.mine.per_item, tile_size(config.eval, mesh), mesh
    return {
        IMAGES: make_mining(images, texts, (of_images, of_captions), gallery.caption_limit, *how),
        CAPTIONS: make_mining(texts, images, (of_captions, of_images), gallery.image_limit, *how),
    }


def _part(parts: Path, name: str, number: int) -> Path:
    return parts / f"{Path(name).stem}-{number:06d}.npy"


def _assemble(parts: Path, name: str, mining: Mining, path: Path) -> None:
    """Puts all blocks of a direction, which are in the order of the queries, into one file; holds one at a time."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        descr = np.lib.format.dtype_to_descr(np.dtype(np.int32))
        header = {"descr": descr, "fortran_order": False, "shape": (len(mining.query_ids), mining.k)}
        np.lib.format.write_array_header_1_0(file, header)
        for number in range(mining.blocks):
            file.write(np.load(_part(parts, name, number), allow_pickle=False).tobytes())


def _rows_at_once(lists: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(lists), 65536):
        yield np.asarray(lists[start : start + 65536])


def _summary(lists: np.ndarray) -> dict[str, float | int]:
    """Lists, the share of them that are full, and how many are empty."""
    counts = np.concatenate([(rows != NONE).sum(axis=1) for rows in _rows_at_once(lists)])
    full = float((counts == lists.shape[1]).mean())
    return {"lists": len(lists), "full": full, "empty": int((counts == 0).sum())}


def _say(folder: Path, summary: Any) -> None:
    for name, items in ((IMAGES, "captions"), (CAPTIONS, "images")):
        about = summary[name]
        print(
            f"{folder / name}: hard negatives of {about['lists']} {items}; {about['full']:.1%} of the lists are full, "
            f"{about['empty']} are empty"
        )
    print(f"train with them: --config.data.negatives.folder={folder} --config.data.negatives.count=1")
