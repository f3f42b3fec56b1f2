"""Person search: captions find the images of their person; CMC R@1, 5, 10, mAP, mINP (as IRRA; docs/evaluate.md).

Every image of the person is relevant, whoever of them the caption was written for; nothing is left out of the gallery.
The scores of one tile of captions with all images are on the host at a time, the whole matrix never.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from shnet_jax.evaluation.metrics import PERSON_METRICS, person_scores
from shnet_jax.evaluation.tiles import Items, ItemScore, make_tiling, prefetch_one, programs, size
from shnet_jax.evaluation.top_k import TopK
from shnet_jax.parallel import hosts

SLICE = 256  # captions whose images are sorted at once: 20,000 images of each are 20 MB of scores


def search_persons(
    images: Items,
    texts: Items,
    image_person: np.ndarray,
    caption_person: np.ndarray,
    score: ItemScore,
    tile: int = 512,
    mesh: Mesh | None = None,
    candidates: TopK | None = None,
) -> np.ndarray:
    """Values [t, 5] float64 in 0..1 of PERSON_METRICS for each caption; a metric is their mean over all captions.

    With the ranks r_1 < ... < r_R (best 1) of the R images of a caption's person:

      R@k   1 where r_1 <= k
      mAP   1/R sum_i i / r_i, over the full ranking
      mINP  R / r_R

    Equal scores rank by the smaller index of the image, as everywhere. Several processes call it together, each with a
    mesh of its own devices, and share the tiles of captions.

    Args:
      images, texts, score, tile, mesh: as for `ranks.ranks`.
      image_person, caption_person: [n] and [t] integers, equal ones are the same person.
      candidates: images of each caption that come before all others, by their scores here, as in re-ranking.

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
    values = np.zeros((t, len(PERSON_METRICS)))
    for columns, scores in _columns_of_scores(images, texts, score, tile, mesh):
        for start in range(0, len(columns), SLICE):
            rows = columns[start : start + SLICE]
            first = candidates and TopK(candidates.index[rows], candidates.score[rows])
            order = _order(scores[:, start : start + SLICE].T, first)
            values[rows] = person_scores(image_person[order] == caption_person[rows][:, None])
    return hosts.add_up(values)


def _columns_of_scores(
    images: Items, texts: Items, score: ItemScore, tile: int, mesh: Mesh | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Captions of each tile that is this process's and their scores with all images, [n, captions]."""
    tiling = make_tiling(images, texts, tile, mesh)
    run = programs(score, tiling.mesh)
    scores = np.empty((size(images), tiling.columns), np.float32)
    walk = tiling.walk(hosts.own_part(tiling.caption_tiles))
    for at, values in prefetch_one((at, run.scores(at.placed_images, at.placed_captions)) for at in walk):
        rows = at.images.items[at.images.real]
        scores[rows] = np.asarray(values)[: len(rows)]  # padding comes last
        if at.round == tiling.rounds - 1:
            columns, real = at.captions
            if np.isnan(scores[:, real]).any():
                raise ValueError(f"scores of captions {columns[0]} to {columns[-1]} are NaN, so nothing can be ranked")
            yield columns[real], scores[:, real]


def _order(scores: np.ndarray, first: TopK | None) -> np.ndarray:
    """Rankings [c, n] of n images for c captions.

    scores: [c, n]. first: [c, k] images that come before all others, by their own scores.
    """
    if first is None:
        return np.argsort(-scores, axis=1, kind="stable")
    rows = np.arange(len(scores))[:, None]
    later, new_scores = np.ones(scores.shape, bool), np.zeros(scores.shape, np.float32)
    later[rows, first.index], new_scores[rows, first.index] = False, first.score
    # The old scores of those that come first say nothing.
    return np.lexsort((-np.where(later, scores, 0.0), -new_scores, later), axis=1)
