"""Scores of some pairs of a gallery only, such as the candidates of two-stage ranking; see `blocks` for all of them.

An image meets its captions in groups of GROUP: alone, a pair's products are small, and its arrays have axes of 1, whose
sums are slow on a CPU. The last group of an image is filled up with captions that nobody asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shnet_jax.evaluate.blocks import GROUP, LISTED_AT_ONCE, PairScorer, keep
from shnet_jax.evaluate.tiles import Tiling, one_behind
from shnet_jax.observe.clock import Clock
from shnet_jax.observe.progress import Progress
from shnet_jax.types import Embedding

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Pairs of a list, the image of each group being one, groups of a block side by side, in it those of one device.

    pairs: [g, GROUP] number of each pair in the list, -1 for padding.
    starts: [blocks * devices + 1] first group of each device in each block; block tile * rounds + round.
    """

    pairs: np.ndarray
    starts: np.ndarray

    def of(self, block: int, devices: int) -> np.ndarray:
        """Numbers of the pairs of a block."""
        own = self.pairs[self.starts[block * devices] : self.starts[(block + 1) * devices]]
        return own[own >= 0]


def listed_scores(
    images: Embedding,
    texts: Embedding,
    rows: np.ndarray,
    columns: np.ndarray,
    scorer: PairScorer,
    folder: Path | None = None,
) -> np.ndarray:
    """Scores [p] float32 of the pairs (image rows[i], caption columns[i]), block by block.

    folder: of `blocks.open_folder`; the pairs of finished blocks are read from it and written to it.
    """
    tiling = scorer.tiling(images, texts)
    place = np.empty(len(tiling.order), np.int64)
    place[tiling.order] = np.arange(len(tiling.order))
    groups = _grouped(tiling, rows, place[columns] // tiling.columns)
    devices = tiling.mesh.size
    counts = np.diff(groups.starts).reshape(-1, devices)
    size = _chunk(counts)
    scores = np.empty(len(rows), np.float32)
    missing = {int(block): groups.of(int(block), devices) for block in np.flatnonzero(counts.max(axis=1))}
    files: dict[int, Path] = {}
    if folder is not None:
        files = {block: _file(folder, block, rows[own], columns[own]) for block, own in missing.items()}
        there = [block for block, path in files.items() if path.exists()]
        for block in there:
            scores[missing.pop(block)] = np.load(files[block], allow_pickle=False)
        if there:
            log.info("%s: the pairs of %d of %d blocks are there", folder, len(there), len(files))

    def dispatched() -> Iterator[tuple[int | None, np.ndarray, Any]]:
        texts_of, placed = -1, None
        for block in missing:
            tile, round_ = divmod(block, tiling.rounds)
            if tile != texts_of:
                texts_of, placed = tile, scorer.put_texts(tiling, tiling.captions(tile)[0])
            here = tiling.put_images(tiling.image_rows(round_)[0])
            first, last = (groups.starts[block * devices + i : (block + 1) * devices + i, None] for i in (0, 1))
            most = int(counts[block].max())
            for start in range(0, most, size):
                index = first + start + np.arange(size)
                pairs = np.where((index < last)[..., None], groups.pairs[np.minimum(index, len(groups.pairs) - 1)], -1)
                pairs = pairs.reshape(-1, GROUP)
                local = np.where(pairs[:, 0] >= 0, rows[pairs[:, 0]] % tiling.rows, 0)
                column = np.where(pairs >= 0, place[columns[pairs]] % tiling.columns, 0)
                lists = tiling.put_split((local.astype(np.int32), column.astype(np.int32)))
                ended = block if start + size >= most else None
                yield ended, pairs, scorer.listed(scorer.params, here, placed, *lists)

    clock = Clock()
    parts = sum(-(-int(counts[block].max()) // size) for block in missing)
    progress = Progress(parts, what="part of the candidates", unit="pairs")
    with clock:
        for done, (ended, pairs, found) in enumerate(one_behind(dispatched()), start=1):
            real = pairs >= 0
            scores[pairs[real]] = np.asarray(found, np.float32)[real]
            if ended in files:
                keep(files[ended], scores[missing[ended]])
            clock.tick(int(real.sum()))
            progress.update(done, clock)
    progress.close()
    return scores


def _grouped(tiling: Tiling, rows: np.ndarray, tiles: np.ndarray) -> Groups:
    """rows, tiles: [p] image and tile of captions of each pair."""
    devices = tiling.mesh.size
    round_, within = np.divmod(rows, tiling.rows * devices)
    owner = (tiles * tiling.rounds + round_) * devices + within // tiling.rows
    image = owner * tiling.rows + rows % tiling.rows  # in the order of the owners
    order = np.argsort(image, kind="stable")
    image = image[order]
    position = np.arange(len(order)) - np.searchsorted(image, image)  # of a pair among those of its image
    opens = position % GROUP == 0
    pairs = np.full((int(opens.sum()), GROUP), -1)
    pairs[np.cumsum(opens) - 1, position % GROUP] = order
    every = np.arange(tiling.caption_tiles * tiling.rounds * devices + 1)
    return Groups(pairs, np.searchsorted(image[opens] // tiling.rows, every))


def _file(folder: Path, block: int, rows: np.ndarray, columns: np.ndarray) -> Path:
    """Where the scores of a block's pairs are kept: other pairs have another name."""
    name = hashlib.sha256(rows.astype("<i8").tobytes() + columns.astype("<i8").tobytes()).hexdigest()
    return folder / f"block_pairs_{block}_{name[:16]}.npy"


def _chunk(counts: np.ndarray) -> int:
    """Groups of a list: enough for most blocks at once, a multiple of what a device scores at once."""
    typical = int(np.median(counts[counts > 0])) if counts.any() else 1
    return -(-max(typical, 1) // LISTED_AT_ONCE) * LISTED_AT_ONCE
