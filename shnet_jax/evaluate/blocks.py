"""Scores that cost far more than a dot product: every pair is scored once, and what is done is kept.

The gallery is cut into blocks of `tile` images by `tile` captions; in a round each device scores its own images with
the same captions. What the score makes inside a block is its own affair, what is kept of it are float32 scores, 4 bytes
a pair (COCO 5K: 0.5 GB), in memory and, where a folder is given, as a file for each finished block: an evaluation that
is stopped goes on with the same command. Captions of equal length lie in one block and are cut to the first token
bucket that holds them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from shnet_jax.evaluate.rank import Ranks, ranks
from shnet_jax.evaluate.tiles import Tiling, one_behind
from shnet_jax.models.contract import RetrievalModel, scorer
from shnet_jax.observe.clock import Clock
from shnet_jax.observe.files import whole, write_text
from shnet_jax.observe.progress import Progress
from shnet_jax.parallel.mapping import Mapped, map_specs, replicate
from shnet_jax.types import DATA, Array, Embedding

IDENTITY = "identity.json"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PairScorer:
    """The score of a model with its variables, on the devices of a mesh.

    params: those that the score reads, on every device.
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
        n, t = len(images.vector), len(texts.vector)
        lengths = np.zeros(t) if texts.mask is None else np.asarray(texts.mask).sum(axis=1)
        order = np.argsort(lengths, kind="stable")
        return Tiling(images, texts, np.zeros(t, np.int64), order, min(self.tile, n), min(self.tile, t), self.mesh)

    def put_texts(self, tiling: Tiling, index: np.ndarray) -> Embedding:
        """Those captions, whole on every device, cut to their bucket."""
        texts = jax.tree.map(lambda a: np.asarray(a[index]), tiling.texts)
        if texts.mask is not None and self.buckets:
            longest = int(texts.mask.sum(axis=1).max())
            length = next((b for b in self.buckets if b >= longest), texts.mask.shape[1])
            texts = dataclasses.replace(texts, elements=texts.elements[:, :length], mask=texts.mask[:, :length])
        return tiling.put_whole(texts)


GROUP = 8
"""Captions of a list that an image meets at a time: so much of the list is padding, so large are the products."""

LISTED_AT_ONCE = 4
"""Such groups that a device scores at once."""


def make_programs(model: RetrievalModel, mesh: Mesh) -> tuple[Mapped, Mapped]:
    """`PairScorer.block` and `listed`; compiled for the shapes they meet, once for all variables."""

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

        return jax.lax.map(one, (rows, columns), batch_size=min(LISTED_AT_ONCE, rows.shape[0]))

    split, whole = P(DATA), P()
    return (
        map_specs(block, mesh, (whole, split, whole), split),
        map_specs(listed, mesh, (whole, split, whole, split, split), split),
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
    own = replicate({name: params[name] for name in model.score_params}, mesh)
    return PairScorer(own, *programs, mesh, tile, tuple(buckets))


def score_matrix(images: Embedding, texts: Embedding, scorer: PairScorer, folder: Path | None = None) -> np.ndarray:
    """Scores [n, t] float32 of every image with every caption.

    folder: of `open_folder`; finished blocks are read from it and written to it. Shows progress and time left.
    """
    tiling = scorer.tiling(images, texts)
    n, t = len(images.vector), len(texts.vector)
    scores = np.empty((n, t), np.float32)
    missing: list[tuple[int, int]] = []
    for tile in range(tiling.caption_tiles):
        for round_ in range(tiling.rounds):
            path = _file(folder, tile, round_)
            if path is not None and path.exists():
                _place(scores, tiling, tile, round_, np.load(path, allow_pickle=False))
            else:
                missing.append((tile, round_))
    blocks = tiling.caption_tiles * tiling.rounds
    if len(missing) < blocks:
        log.info("%s: %d of %d blocks of scores are there", folder, blocks - len(missing), blocks)

    def dispatched() -> Iterator[tuple[int, int, Any]]:
        texts_of, placed = -1, None
        for tile, round_ in missing:
            if tile != texts_of:
                texts_of, placed = tile, scorer.put_texts(tiling, tiling.captions(tile)[0])
            rows, _ = tiling.image_rows(round_)
            yield tile, round_, scorer.block(scorer.params, tiling.put_images(rows), placed)

    clock, progress = Clock(), Progress(len(missing), what="block of scores", unit="pairs")
    with clock:
        for done, (tile, round_, found) in enumerate(one_behind(dispatched()), 1):
            block = np.asarray(found, np.float32)
            _place(scores, tiling, tile, round_, block)
            if (path := _file(folder, tile, round_)) is not None:
                keep(path, block)
            clock.tick(block.size)
            progress.update(done, clock)
    progress.close()
    return scores


def ranks_of(scores: np.ndarray, owner: np.ndarray, tile: int, mesh: Mesh) -> Ranks:
    """Ranks of recorded scores [n, t], by the rule and the code of `rank.ranks`."""
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

    Only of a folder with the file IDENTITY, by which we know it as ours, blocks are deleted.
    """
    if not folder.is_dir():
        return [folder.name] if folder.exists() else []
    if (folder / IDENTITY).is_file():
        for pattern in ("block_*.npy", "block_*.tmp"):
            for path in (*folder.glob(pattern), *folder.glob(f"*_images_*/{pattern}")):
                path.unlink()
        for fold in folder.glob("*_images_*"):  # see compare.py
            if fold.is_dir() and not any(fold.iterdir()):
                fold.rmdir()
        (folder / IDENTITY).unlink()  # the last to go: a killed removal can go on
    (folder / f"{IDENTITY}.tmp").unlink(missing_ok=True)
    left = sorted(path.name for path in folder.iterdir())
    if not left and not folder.is_symlink():
        folder.rmdir()
    return left


def digest(tree: Any) -> str:
    """SHA-256 of all arrays of a tree, with their places."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def _file(folder: Path | None, tile: int, round_: int) -> Path | None:
    return None if folder is None else folder / f"block_{tile}_{round_}.npy"


def keep(path: Path, block: np.ndarray) -> None:
    """Writes scores, whole or not at all."""
    with whole(path) as temporary, temporary.open("wb") as file:
        np.save(file, block, allow_pickle=False)


def _place(scores: np.ndarray, tiling: Tiling, tile: int, round_: int, block: np.ndarray) -> None:
    captions, real_captions = tiling.captions(tile)
    rows, real_rows = tiling.image_rows(round_)
    scores[np.ix_(rows[real_rows], captions[real_captions])] = block[np.ix_(real_rows, real_captions)]
