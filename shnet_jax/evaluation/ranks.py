"""Ranks of the matching items in both directions, counted by tiles: the whole score matrix never exists."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
from jax.sharding import Mesh

from shnet_jax.evaluation.bf16_screening import check_score_dtype, screen_programs
from shnet_jax.evaluation.tiles import (
    Items,
    ItemScore,
    Queries,
    Side,
    Tile,
    Tiling,
    check_no_nan,
    make_tiling,
    prefetch_one,
    programs,
    score_inputs,
    size,
)
from shnet_jax.parallel import hosts
from shnet_jax.types import Array

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Ranks of the matches, 0-based; 0 is the top of the list.

    i2t: [n] int64, for each image the rank of its best-ranked own caption among all captions.
    t2i: [t] int64, for each caption the rank of its image among all images.
    """

    i2t: np.ndarray
    t2i: np.ndarray


def ranks(
    images: Items,
    texts: Items,
    caption_image: np.ndarray,
    score: ItemScore,
    tile: int = 512,
    mesh: Mesh | None = None,
    score_dtype: str = "float32",
) -> Ranks:
    """Ranks every gallery item for every query.

    Several processes call this together, with the same gallery, each with a mesh of its own devices. They share the
    tiles of captions, and all of them get all ranks.

    The rank of an item is the number of items that score strictly higher plus the number of those that score
    the same and have a smaller index, so a constant score ranks by index and gives chance, never 100 %. Infinite scores
    are numbers like others: all that are -inf tie, behind the finite ones.

    Args:
      images: n embeddings, arrays on the host (np.memmap too) or the device; for an ensemble a tuple of such.
      texts: t embeddings, likewise, in any order, any number >= 1 of captions for each image.
      caption_image: [t] integers, row in `images` of each caption's image.
      score: (some images, some texts) -> scores of all their pairs; it is jitted.
      tile: images of a tile; it has `tiles.CAPTIONS_PER_ROW` times as many captions. A device holds a few at once.
      mesh: devices that share the work (`mapping.data_mesh`); None: the first one. The ranks are the same.
      score_dtype: "float32", or "bfloat16": scored in bfloat16, and in float32 where the order is in doubt (see
        `bf16_screening`); the ranks are the same. For the default score only.

    Raises:
      ValueError: a caption of an image that is not there, an image without caption, NaN among the scores, a score_dtype
        that does not exist or does not fit the score.
    """
    check_score_dtype(score, score_dtype)
    images, texts = score_inputs(score, images), score_inputs(score, texts)
    n, t = size(images), size(texts)
    owner = check_captions(caption_image, n, t)
    order = np.argsort(owner, kind="stable")  # captions of an image side by side: few tiles hold all matches
    tiling = make_tiling(images, texts, tile, mesh, owner, order)
    positive = match_scores(tiling, score)
    best = best_captions(positive, owner)
    tiles = hosts.own_part(tiling.caption_tiles)
    counts = (count if score_dtype == "float32" else count_screened)(tiling, score, positive, best, tiles)
    i2t, t2i, nans = hosts.add_up((counts.i2t, counts.t2i, np.array([counts.nans])))
    check_no_nan(int(nans[0]), n, t)
    return Ranks(i2t, t2i)


def check_captions(caption_image: np.ndarray, n: int, t: int) -> np.ndarray:
    """The image of each caption as [t] int64; checks that each image has a caption, each caption an image."""
    owner = np.asarray(caption_image)
    if owner.shape != (t,) or owner.dtype.kind not in "iu":
        raise ValueError(
            f"caption_image: expected one integer for each of {t} captions, found {owner.dtype} of shape {owner.shape}"
        )
    wrong = np.flatnonzero((owner < 0) | (owner >= n))
    if wrong.size:
        raise ValueError(
            f"caption_image: {wrong.size} captions belong to no image; "
            f"row {wrong[0]} says {owner[wrong[0]]}, expected 0 to {n - 1}"
        )
    missing = np.flatnonzero(np.bincount(owner.astype(np.int64), minlength=n) == 0)
    if missing.size or not n:
        raise ValueError(
            f"caption_image: {missing.size} of {n} images have no caption (rows {missing[:5].tolist()}); "
            "recall from image to text needs at least one for each image, and at least one image"
        )
    return owner.astype(np.int64)


def match_scores(tiling: Tiling, score: ItemScore) -> np.ndarray:
    """Score [t] float64 of each caption with its image, from the tiles that hold a match."""
    run = programs(score, tiling.mesh)
    positive = np.empty(len(tiling.owner), np.float64)

    def inside(captions: Side, round_: int) -> np.ndarray:
        rows = tiling.image_rows(round_).items
        return (tiling.owner[captions.items] >= rows[0]) & (tiling.owner[captions.items] <= rows[-1])

    def at_matches(tile: Tile) -> Array:
        local = tiling.put_whole(tiling.owner[tile.captions.items] - tile.images.items[0])
        return cast(Array, run.at(run.scores(tile.placed_images, tile.placed_captions), local))

    tiles = tiling.walk(include=lambda captions, _, round_: bool(inside(captions, round_).any()))
    for tile, values in prefetch_one((tile, at_matches(tile)) for tile in tiles):
        matched = inside(tile.captions, tile.round)
        positive[tile.captions.items[matched]] = np.asarray(values)[matched]
    return positive


def best_captions(positive: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Best-ranked own caption [n] of each image: highest score, then smallest index."""
    order = np.lexsort((np.arange(len(owner)), -positive, owner))
    return order[np.unique(owner[order], return_index=True)[1]]


@dataclasses.dataclass
class Counts:
    """Number of items found before each match so far.

    i2t: [n] int64, for the best caption of each image. t2i: [t] int64. nans: scores that are NaN.
    """

    i2t: np.ndarray
    t2i: np.ndarray
    nans: int = 0

    def add(self, rows: Queries, columns: Queries, by_row: Any, by_column: Any, nans: Any = 0) -> None:
        """Adds what was counted in one round, waiting for it."""
        self.i2t[rows.index[rows.real]] += np.asarray(by_row)[rows.real]
        self.t2i[columns.index[columns.real]] += np.asarray(by_column)[columns.real]
        self.nans += int(nans)


def count(
    tiling: Tiling, score: ItemScore, positive: np.ndarray, best: np.ndarray, tiles: Sequence[int] | None = None
) -> Counts:
    """Counts what comes before each match: each score is computed once, for both directions.

    positive: [t] `match_scores`. best: [n] `best_captions`.
    tiles: those tiles of captions only (None: all), to measure a part or to share the work between machines; the
      counts of all parts add up.
    """
    run, counts = programs(score, tiling.mesh), _no_counts(tiling)
    dispatched = (
        (rows, columns, run.count(run.scores(*placed), tiling.put_split(rows), tile.extra))
        for tile, rows, columns, placed in _walk(tiling, positive, best, tiles)
    )
    for rows, columns, counted in prefetch_one(dispatched):
        counts.add(rows, columns, *counted)
    return counts


def count_screened(
    tiling: Tiling, score: ItemScore, positive: np.ndarray, best: np.ndarray, tiles: Sequence[int]
) -> Counts:
    """`count` with bfloat16 scores where they settle the order, and float32 scores for the other captions.

    Logs how many pairs were scored again.
    """
    run, screen, counts = programs(score, tiling.mesh), screen_programs(tiling.mesh), _no_counts(tiling)
    doubtful = [np.empty(0, np.int64) for _ in range(tiling.rounds)]  # captions in doubt with each round's images
    pairs = sum(int(tiling.captions(tile).real.sum()) for tile in tiles) * len(best)
    doubtful_pairs = rescored = 0

    def recheck(round_: int, captions: np.ndarray) -> int:
        """Counts the captions with the images of a round by their float32 scores; returns how many pairs these are."""
        real = np.arange(tiling.columns) < len(captions)
        padded = np.pad(captions, (0, tiling.columns - len(captions)), mode="edge")
        columns = _caption_side(tiling, positive, Side(padded, real))
        rows = _image_side(positive, best, tiling.image_rows(round_))
        scores = run.scores(tiling.put_images(rows.index), tiling.put_texts(padded))
        counts.add(rows, columns, *run.count(scores, tiling.put_split(rows), tiling.put_whole(columns)))
        return len(captions) * int(rows.real.sum())

    dispatched = (
        (tile.round, rows, columns, screen.settle(*screen.scores(*placed), tiling.put_split(rows), tile.extra))
        for tile, rows, columns, placed in _walk(tiling, positive, best, tiles)
    )
    for round_, rows, columns, (by_row, by_column, aside, pairs_aside) in prefetch_one(dispatched):
        counts.add(rows, columns, by_row, by_column)
        doubtful_pairs += int(pairs_aside)
        waiting = np.append(doubtful[round_], columns.index[columns.real & np.asarray(aside)])
        if len(waiting) >= tiling.columns:
            rescored += recheck(round_, waiting[: tiling.columns])
            waiting = waiting[tiling.columns :]
        doubtful[round_] = waiting
    rescored += sum(recheck(round_, captions) for round_, captions in enumerate(doubtful) if len(captions))
    if pairs:
        shares = f"{doubtful_pairs / pairs:.2%} of {pairs} pairs in doubt; {rescored / pairs:.2%} were scored again"
        log.info("bfloat16 scores left the order of %s in float32", shares)
    return counts


def _walk(
    tiling: Tiling, positive: np.ndarray, best: np.ndarray, tiles: Sequence[int] | None
) -> Iterator[tuple[Tile, Queries, Queries, tuple[Items, Items]]]:
    """Tiles with the queries of their images, those of their captions, and both sides' embeddings on the devices.

    `Tile.extra` holds the queries of the captions on the devices.
    """
    for tile in tiling.walk(
        tiles, place_extra=lambda captions: tiling.put_whole(_caption_side(tiling, positive, captions))
    ):
        rows, columns = _image_side(positive, best, tile.images), _caption_side(tiling, positive, tile.captions)
        yield tile, rows, columns, (tile.placed_images, tile.placed_captions)


def _no_counts(tiling: Tiling) -> Counts:
    return Counts(np.zeros(size(tiling.images), np.int64), np.zeros(len(tiling.owner), np.int64))


def _image_side(positive: np.ndarray, best: np.ndarray, side: Side) -> Queries:
    """Images as queries, each with the best-ranked of its own captions."""
    return Queries(*side, best[side.items], positive[best[side.items]])


def _caption_side(tiling: Tiling, positive: np.ndarray, side: Side) -> Queries:
    """Captions as queries, each with its image."""
    return Queries(*side, tiling.owner[side.items], positive[side.items])
