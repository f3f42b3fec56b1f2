"""Person search: captions find the images of their person; CMC R@1, 5, 10, mAP, mINP (as IRRA; docs/evaluate.md).

Every image of the person is relevant, whoever of them the caption was written for; nothing is left out of the gallery.
The scores of one tile of captions with all images are on the host at a time, the whole matrix never.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from shnet_jax.evaluate.nearest import Found
from shnet_jax.evaluate.recall import CUTS, Metrics
from shnet_jax.evaluate.tiles import Items, ItemScore, make_tiling, one_behind, programs, size
from shnet_jax.parallel import hosts
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.types import Array

SLICE = 256  # captions whose images are sorted at once: 20,000 images of each are 20 MB of scores

NAMES = ("person_r1", "person_r5", "person_r10", "person_map", "person_minp")


def search_persons(
    images: Items,
    texts: Items,
    image_person: np.ndarray,
    caption_person: np.ndarray,
    score: ItemScore,
    tile: int = 512,
    mesh: Mesh | None = None,
    first: Found | None = None,
) -> np.ndarray:
    """What each caption gives to the numbers NAMES, [t, 5] float64, 0..1; the number is their mean over all captions.

    With the ranks r_1 < ... < r_R (best 1) of the R images of a caption's person:

      R@k   1 where r_1 <= k
      mAP   1/R sum_i i / r_i, over the full ranking
      mINP  R / r_R

    Equal scores rank by the smaller index of the image, as everywhere. Several processes call it together, each with a
    mesh of its own devices, and share the tiles of captions.

    Args:
      images, texts, score, tile, mesh: as for `rank.ranks`.
      image_person, caption_person: [n] and [t] integers, equal ones are the same person.
      first: images of each caption that come before all others, by their scores here, as in two stages.

    Raises:
      ValueError: a caption of a person without image, NaN among the scores, persons that are not as many as items.
    """
    n, t = size(images), size(texts)
    if image_person.shape != (n,) or caption_person.shape != (t,):
        raise ValueError(
            f"expected a person for each of {n} images and {t} captions, found {image_person.shape} and "
            f"{caption_person.shape}"
        )
    absent = np.flatnonzero(~np.isin(caption_person, image_person))
    if absent.size:
        raise ValueError(
            f"{absent.size} captions describe persons without image; row {absent[0]} is of person "
            f"{caption_person[absent[0]]}"
        )
    found = np.zeros((t, len(NAMES)))
    for columns, scores in _tiles(images, texts, score, tile, mesh or data_mesh(jax.devices()[:1])):
        for start in range(0, len(columns), SLICE):
            rows = columns[start : start + SLICE]
            order = _order(scores[:, start : start + SLICE], first and Found(first.index[rows], first.score[rows]))
            found[rows] = _of_rankings(image_person[order] == caption_person[rows])
    return hosts.add_up(found)


def person_metrics(found: np.ndarray) -> Metrics:
    """The numbers NAMES in percent, of what `search_persons` gave."""
    return {name: 100.0 * float(value) for name, value in zip(NAMES, found.mean(axis=0), strict=True)}


def _tiles(
    images: Items, texts: Items, score: ItemScore, tile: int, mesh: Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Captions of each tile that is this process's and their scores with all images, [n, captions]."""
    n, t = size(images), size(texts)
    tiling = make_tiling(images, texts, np.zeros(t, np.int64), np.arange(t), tile, mesh)
    run = programs(score, mesh)

    def dispatched() -> Iterator[tuple[int, np.ndarray, Array]]:
        for number in hosts.own_part(tiling.caption_tiles):
            placed = tiling.put_texts(tiling.captions(number)[0])
            for round_ in range(tiling.rounds):
                rows, real = tiling.image_rows(round_)
                yield number, rows[real], run.scores(tiling.put_images(rows), placed)

    scores = np.empty((n, tiling.columns), np.float32)
    for number, rows, found in one_behind(dispatched()):
        scores[rows] = np.asarray(found)[: len(rows)]  # padding comes last
        if rows[-1] == n - 1:
            columns, real = tiling.captions(number)
            if np.isnan(scores[:, real]).any():
                raise ValueError(f"scores of captions {columns[0]} to {columns[-1]} are NaN, so nothing can be ranked")
            yield columns[real], scores[:, real]


def _order(scores: np.ndarray, first: Found | None) -> np.ndarray:
    """scores [n, c] -> [n, c] image at each place of each caption's ranking; first: see `search_persons`, [c, k]."""
    if first is None:
        return np.argsort(-scores, axis=0, kind="stable")
    columns = np.arange(scores.shape[1])[:, None]
    later, again = np.ones(scores.shape, bool), np.zeros(scores.shape, np.float32)
    later[first.index, columns], again[first.index, columns] = False, first.score
    # Of those that come first the old score says nothing.
    return np.lexsort((-np.where(later, scores, 0.0), -again, later), axis=0)


def _of_rankings(relevant: np.ndarray) -> np.ndarray:
    """relevant [n, c] bool, each column with at least one True -> [c, 5] the numbers of each caption, 0..1."""
    places = np.arange(1, len(relevant) + 1)[:, None]
    found = np.cumsum(relevant, axis=0)
    count = found[-1]
    first = relevant.argmax(axis=0) + 1
    last = len(relevant) - relevant[::-1].argmax(axis=0)
    average = (relevant * found / places).sum(axis=0) / count
    return np.stack([*(first <= k for k in CUTS), average, count / last], axis=1)


def person_chance(image_person: np.ndarray, caption_person: np.ndarray) -> Metrics:
    """The same numbers for a random order, in expectation."""
    n = len(image_person)
    people, images = np.unique(image_person, return_counts=True)
    of_caption = images[np.searchsorted(people, caption_person)]
    sizes, captions = np.unique(of_caption, return_counts=True)
    rows = [_chance(n, int(size)) for size in sizes]
    return {name: float(np.average([row[name] for row in rows], weights=captions)) for name in NAMES}


def _chance(n: int, size: int) -> Metrics:
    """Percent, for `size` of n images being relevant."""
    last = np.arange(size, n + 1)  # rank that the last one may have
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])

    def log_choose(a: np.ndarray, b: int) -> np.ndarray:
        return log_factorial[a] - log_factorial[b] - log_factorial[a - b]

    share = np.exp(log_choose(last - 1, size - 1) - log_choose(np.array(n), size))
    found = {"person_minp": float(np.sum(share * size / last))}
    # An image at rank r is relevant with chance size / n, and then so is each before it with (size - 1) / (n - 1).
    harmonic = float(np.sum(1 / np.arange(1, n + 1)))
    found["person_map"] = (harmonic + (size - 1) * (n - harmonic) / max(n - 1, 1)) / n
    for k in CUTS:
        missed = np.prod([max(n - size - i, 0) / (n - i) for i in range(min(k, n))])
        found[f"person_r{k}"] = 1 - float(missed)
    return {name: 100 * value for name, value in found.items()}
