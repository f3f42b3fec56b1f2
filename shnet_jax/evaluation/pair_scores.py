"""Pair scores that cost far more than a dot product: each pair is scored once, and finished blocks are kept.

`score_matrix` scores every pair of a gallery, `listed_scores` a list of pairs, such as the candidates of re-ranking.
The gallery is cut into blocks of `tile` images by `tile` captions; in a round each device scores its own images with
the same captions. The host keeps float32 scores, 4 bytes a pair (COCO 5K: 0.5 GB). Where a folder is given, each
finished block is also a file: an evaluation that is stopped goes on with the same command. Captions of equal length lie
in one block and are cut to the first token bucket that holds them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from shnet_jax.evaluation.ranks import Ranks, ranks
from shnet_jax.evaluation.tiles import Side, Tile, Tiling, make_tiling, prefetch_one, show_progress
from shnet_jax.models.contract import RetrievalModel, scorer
from shnet_jax.observe.files import atomic_path, write_text
from shnet_jax.parallel import hosts
from shnet_jax.parallel.mapping import Mapped, map_specs, on_cpu, replicate
from shnet_jax.types import DATA, Array, Embedding

IDENTITY = "identity.json"
Block = tuple[int, int]
"""A block of pairs: its tile of captions and its round of images."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PairScorer:
    """The score of a model with its variables, on the devices of a mesh.

    params: parameters that the score reads, on every device.
    block: (params, images split over the devices, captions) -> scores [devices * rows, columns].
    listed: (params, images split, captions, rows, columns split) -> scores [devices * groups, GROUP] of each device's
      images rows[i] with captions columns[i]; rows [devices * groups], columns [devices * groups, GROUP].
    tile: images, and captions, of a block. buckets: lengths that captions are cut to, ascending; (): none.
    """

    params: Any
    block: Mapped
    listed: Mapped
    mesh: Mesh
    tile: int
    buckets: tuple[int, ...] = ()

    def tiling(self, images: Embedding, texts: Embedding) -> Tiling:
        """The blocks of a gallery; captions in the order of their length."""
        t = len(texts.vector)
        lengths = np.zeros(t) if texts.mask is None else np.asarray(texts.mask).sum(axis=1)
        order = np.argsort(lengths, kind="stable")
        tiling = make_tiling(images, texts, self.tile, self.mesh, order=order)
        return dataclasses.replace(tiling, columns=min(self.tile, t))

    def put_texts(self, tiling: Tiling, index: np.ndarray) -> Embedding:
        """Captions, whole on every device, cut to their bucket."""
        texts = jax.tree.map(lambda a: np.asarray(a[index]), tiling.texts)
        if texts.mask is not None and self.buckets:
            longest = int(texts.mask.sum(axis=1).max())
            length = next((b for b in self.buckets if b >= longest), texts.mask.shape[1])
            texts = dataclasses.replace(texts, elements=texts.elements[:, :length], mask=texts.mask[:, :length])
        return tiling.put_whole(texts)

    def walk(self, tiling: Tiling, blocks: Collection[Block]) -> Iterator[Tile]:
        """Visits the given blocks; captions are cut to their bucket."""
        return tiling.walk(
            include=lambda _, tile, round_: (tile, round_) in blocks,
            place_captions=lambda index: self.put_texts(tiling, index),
        )


GROUP = 8
"""Captions of a list that are scored with an image at a time; more make larger products and more padding.

Alone, a pair has arrays with axes of 1, whose sums are slow on a CPU."""

LISTED_ON_CPU, LISTED = 4, 128


def listed_at_once(mesh: Mesh) -> int:
    """Groups that a device of the mesh scores at once: few on a CPU, many where starting a kernel costs more."""
    return LISTED_ON_CPU if on_cpu(mesh) else LISTED


def make_programs(model: RetrievalModel, mesh: Mesh) -> tuple[Mapped, Mapped]:
    """The programs `PairScorer.block` and `listed`; compiled for the shapes they meet, once for all variables."""

    def block(params: Any, images: Embedding, texts: Embedding) -> Array:
        return scorer(model, params)(images, texts)

    def listed(params: Any, images: Embedding, texts: Embedding, rows: Array, columns: Array) -> Array:
        score = scorer(model, params)

        def one(group: tuple[Array, Array]) -> Array:
            image, texts_of = (
                jax.tree.map(lambda a, i=i: a[i], items)
                for items, i in zip((images, texts), (group[0][None], group[1]), strict=True)
            )
            return score(image, texts_of)[0]

        return jax.lax.map(one, (rows, columns), batch_size=min(listed_at_once(mesh), rows.shape[0]))

    split, copied = P(DATA), P()
    return (
        map_specs(block, mesh, (copied, split, copied), split),
        map_specs(listed, mesh, (copied, split, copied, split, split), split),
    )


def pair_scorer(
    model: RetrievalModel,
    programs: tuple[Mapped, Mapped],
    params: Mapping[str, Any],
    mesh: Mesh,
    tile: int,
    buckets: Sequence[int] = (),
) -> PairScorer:
    """The scorer of a model with its "params"; programs: of `make_programs` on the same mesh."""
    score_params = replicate({name: params[name] for name in model.score_params}, mesh)
    return PairScorer(score_params, *programs, mesh, tile, tuple(buckets))


def score_matrix(images: Embedding, texts: Embedding, scorer: PairScorer, folder: Path | None = None) -> np.ndarray:
    """Scores [n, t] float32 of every image with every caption.

    folder: of `open_folder`; finished blocks are read from it and written to it. Shows progress and time left.
    Several processes call this together, each with a scorer on its own devices, and share the blocks.
    """
    tiling = scorer.tiling(images, texts)
    scores = np.zeros((len(images.vector), len(texts.vector)), np.float32)  # others add their blocks to it
    blocks = [(tile, round_) for tile in range(tiling.caption_tiles) for round_ in range(tiling.rounds)]
    files = {} if folder is None else {block: folder / f"block_{block[0]}_{block[1]}.npy" for block in blocks}
    missing, finished = _divide(files, blocks)
    for block, values in _read(files, finished):
        _place(scores, tiling.image_rows(block[1]), tiling.captions(block[0]), values)
    walk = scorer.walk(tiling, missing)
    dispatched = ((tile, scorer.block(scorer.params, tile.placed_images, tile.placed_captions)) for tile in walk)
    with show_progress(len(missing), "block of scores", "pairs") as advance:
        for tile, on_device in prefetch_one(dispatched):
            values = np.asarray(on_device, np.float32)
            _place(scores, tile.images, tile.captions, values)
            if files:
                keep(files[tile.number, tile.round], values)
            advance(values.size)
    return hosts.add_up(scores)


@dataclasses.dataclass(frozen=True)
class ListedPairs:
    """A list of pairs laid out over the blocks of a tiling, in groups of GROUP captions with one image.

    The last group of an image is filled up with captions whose scores are not used. The groups of a block lie side by
    side, in it those of one device.

    rows: [p] image of each pair. place: [p] position of each pair's caption in the order of the tiling.
    groups: [g, GROUP] number of each pair in the list, -1 for padding.
    starts: [blocks * devices + 1] first group of each device in each block; block tile * rounds + round.
    chunk: groups that a device takes at once.
    """

    tiling: Tiling
    rows: np.ndarray
    place: np.ndarray
    groups: np.ndarray
    starts: np.ndarray
    chunk: int

    def blocks(self) -> dict[Block, np.ndarray]:
        """Numbers of the pairs of each block that has any."""
        ends = self.starts[:: self.tiling.mesh.size]
        filled = {divmod(i, self.tiling.rounds): self.groups[ends[i] : ends[i + 1]] for i in range(len(ends) - 1)}
        return {block: groups[groups >= 0] for block, groups in filled.items() if groups.size}

    def parts(self, block: Block) -> int:
        """Dispatches that a block takes."""
        first, last = self._bounds(block)
        return -(-int((last - first).max()) // self.chunk)

    def chunks(self, block: Block) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Numbers of pairs [devices * chunk, GROUP], -1 for padding; their images and captions within the tile."""
        first, last = self._bounds(block)
        for part in range(self.parts(block)):
            index = first + part * self.chunk + np.arange(self.chunk)
            pairs = np.where((index < last)[..., None], self.groups[np.minimum(index, len(self.groups) - 1)], -1)
            pairs = pairs.reshape(-1, GROUP)
            row = np.where(pairs[:, 0] >= 0, self.rows[pairs[:, 0]] % self.tiling.rows, 0)
            column = np.where(pairs >= 0, self.place[pairs] % self.tiling.columns, 0)
            yield pairs, row.astype(np.int32), column.astype(np.int32)

    def _bounds(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """First group of each device in a block, and the one behind its last, [devices, 1] each."""
        devices = self.tiling.mesh.size
        start = (block[0] * self.tiling.rounds + block[1]) * devices
        return self.starts[start : start + devices, None], self.starts[start + 1 : start + devices + 1, None]


def listed_scores(
    images: Embedding,
    texts: Embedding,
    rows: np.ndarray,
    columns: np.ndarray,
    scorer: PairScorer,
    folder: Path | None = None,
) -> np.ndarray:
    """Scores [p] float32 of the pairs (image rows[i], caption columns[i]), block by block.

    folder: of `open_folder`; the pairs of finished blocks are read from it and written to it. Several processes share
    the blocks, as in `score_matrix`.
    """
    tiling = scorer.tiling(images, texts)
    listed = _lay_out(tiling, rows, columns)
    scores, blocks = np.zeros(len(rows), np.float32), listed.blocks()
    files: dict[Block, Path] = {}
    if folder is not None:
        files = {
            block: _pairs_file(folder, block[0] * tiling.rounds + block[1], rows[pairs], columns[pairs])
            for block, pairs in blocks.items()
        }
    missing, finished = _divide(files, list(blocks))
    for block, values in _read(files, finished):
        scores[blocks[block]] = values

    def dispatch(tile: Tile) -> Iterator[tuple[Block, bool, np.ndarray, Any]]:
        """Yields (block, whether it ends here, numbers of pairs, their scores on the devices)."""
        block = tile.number, tile.round
        for part, (pairs, *lists) in enumerate(listed.chunks(block), 1):
            placed = tile.placed_images, tile.placed_captions, *tiling.put_split(tuple(lists))
            yield block, part == listed.parts(block), pairs, scorer.listed(scorer.params, *placed)

    dispatched = (part for tile in scorer.walk(tiling, missing) for part in dispatch(tile))
    with show_progress(sum(map(listed.parts, missing)), "part of the candidates", "pairs") as advance:
        for block, ended, pairs, on_device in prefetch_one(dispatched):
            real = pairs >= 0
            scores[pairs[real]] = np.asarray(on_device, np.float32)[real]
            if ended and files:
                keep(files[block], scores[blocks[block]])
            advance(int(real.sum()))
    return hosts.add_up(scores)


def _lay_out(tiling: Tiling, rows: np.ndarray, columns: np.ndarray) -> ListedPairs:
    devices, position = tiling.mesh.size, np.empty(len(tiling.order), np.int64)
    position[tiling.order] = np.arange(len(tiling.order))
    place = position[columns]
    round_, within = np.divmod(rows, tiling.rows * devices)
    device = (place // tiling.columns * tiling.rounds + round_) * devices + within // tiling.rows  # counted over blocks
    image = device * tiling.rows + rows % tiling.rows  # ascending in the order of the blocks and devices
    order = np.argsort(image, kind="stable")
    image = image[order]
    number = np.arange(len(order)) - np.searchsorted(image, image)  # of a pair among those of its image
    opens = number % GROUP == 0
    groups = np.full((int(opens.sum()), GROUP), -1)
    groups[np.cumsum(opens) - 1, number % GROUP] = order
    every = np.arange(tiling.caption_tiles * tiling.rounds * devices + 1)
    starts = np.searchsorted(image[opens] // tiling.rows, every)
    # A chunk holds most blocks at once, and is a multiple of what a device scores at once.
    counts = np.diff(starts)
    typical = int(np.median(counts[counts > 0])) if counts.any() else 1
    at_once = listed_at_once(tiling.mesh)
    chunk = -(-max(typical, 1) // at_once) * at_once
    return ListedPairs(tiling, rows, place, groups, starts, chunk)


def _pairs_file(folder: Path, block: int, rows: np.ndarray, columns: np.ndarray) -> Path:
    """File with the scores of a block's pairs; other pairs have another name."""
    name = hashlib.sha256(rows.astype("<i8").tobytes() + columns.astype("<i8").tobytes()).hexdigest()
    return folder / f"block_pairs_{block}_{name[:16]}.npy"


def _divide(files: Mapping[Block, Path], blocks: Sequence[Block]) -> tuple[set[Block], list[Block]]:
    """The blocks that this process scores, and those that it reads: process 0 all that have a file, as it sees them."""
    exist = hosts.of_first([block in files and files[block].exists() for block in blocks])
    missing = [block for block, there in zip(blocks, exist, strict=True) if not there]
    finished = [block for block, there in zip(blocks, exist, strict=True) if there and hosts.is_first()]
    return {missing[number] for number in hosts.own_part(len(missing))}, finished


def _read(files: Mapping[Block, Path], finished: Sequence[Block]) -> Iterator[tuple[Block, np.ndarray]]:
    """Reads the finished blocks, and logs how many there are."""
    for block in finished:
        yield block, np.load(files[block], allow_pickle=False)
    if finished:
        log.info("%s: %d of %d blocks of scores are there", files[finished[0]].parent, len(finished), len(files))


def ranks_of(scores: np.ndarray, owner: np.ndarray, tile: int, mesh: Mesh) -> Ranks:
    """Ranks of recorded scores [n, t], by the rule and the code of `ranks.ranks`."""
    columns = np.arange(scores.shape[1], dtype=np.int32)[:, None]
    return ranks(Embedding(scores), Embedding(columns), owner, _recorded, tile, mesh)  # type: ignore[arg-type]


def _recorded(images: Embedding, texts: Embedding) -> Array:
    return images.vector[:, texts.vector[:, 0]]


def open_folder(folder: Path, identity: Mapping[str, Any]) -> Path:
    """The folder of finished blocks of this evaluation; blocks of another one are removed, nothing else is.

    identity: JSON values that say which scores these are. Raises ValueError for a folder that holds other files.
    """
    path, text = folder / IDENTITY, json.dumps(identity, sort_keys=True, indent=1)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return folder
    if path.exists():
        log.info("%s: blocks of another evaluation are removed", folder)
    if others := remove_folder(folder):
        raise ValueError(
            f"{folder} is where finished blocks of scores are kept, and holds {', '.join(others[:3])}, which no "
            "evaluation wrote: move it, or choose another --workdir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return folder


def remove_folder(folder: Path) -> list[str]:
    """Deletes the blocks in a folder of `open_folder` and, if nothing else is in it, the folder; -> what is left.

    Blocks are deleted in a folder that has the file IDENTITY, and in no other one.
    """
    if not folder.is_dir():
        return [folder.name] if folder.exists() else []
    if (folder / IDENTITY).is_file():
        for pattern in ("block_*.npy", "block_*.tmp"):
            for path in (*folder.glob(pattern), *folder.glob(f"*_images_*/{pattern}")):
                path.unlink()
        for fold in folder.glob("*_images_*"):  # see ranking_methods.py
            if fold.is_dir() and not any(fold.iterdir()):
                fold.rmdir()
        (folder / IDENTITY).unlink()  # the last to go: a killed removal can go on
    for path in folder.glob(f"{IDENTITY}*.tmp"):
        path.unlink()
    left = sorted(path.name for path in folder.iterdir())
    if not left and not folder.is_symlink():
        folder.rmdir()
    return left


def digest(tree: Any) -> str:
    """SHA-256 of all arrays of a tree, with their places."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sha.update(jax.tree_util.keystr(path).encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def keep(path: Path, block: np.ndarray) -> None:
    """Writes scores atomically."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, block, allow_pickle=False)


def _place(scores: np.ndarray, images: Side, captions: Side, block: np.ndarray) -> None:
    rows_columns = np.ix_(images.items[images.real], captions.items[captions.real])
    scores[rows_columns] = block[np.ix_(images.real, captions.real)]
