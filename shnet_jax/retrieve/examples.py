"""Chooses what a page shows of a gallery: numbers, evenly spaced queries, the worst-ranked ones, highlighting."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.evaluation.evaluator import embedded_split, evaluate_embedded, make_ranking_methods
from shnet_jax.evaluation.extra_metrics import NO_EXTRA_METRICS
from shnet_jax.evaluation.metrics import QueryRanks
from shnet_jax.evaluation.protocols import Provenance
from shnet_jax.evaluation.ranking_methods import candidates
from shnet_jax.evaluation.stage_one import make_stage_one
from shnet_jax.evaluation.tiles import take, tile_size
from shnet_jax.evaluation.top_k import TopK, is_dot_product
from shnet_jax.experiment import Experiment
from shnet_jax.retrieve.embeddings import Embeddings
from shnet_jax.retrieve.highlight import highlights
from shnet_jax.retrieve.page import Contents, Example, Likeness
from shnet_jax.retrieve.searcher import Searcher
from shnet_jax.types import Score


def collect(
    experiment: Experiment,
    variables: dict[str, Any],
    embeddings: Embeddings,
    config: ConfigDict,
    provenance: Provenance,
    mesh: Mesh,
) -> Contents:
    """Ranks the gallery and chooses what is shown of it, by config.page; the same whenever it is asked for.

    In two stages where config.eval.exact is False. Raises ValueError for a number of config.page below 0 (page.results:
    below 1).
    """
    counts = config.page
    _check_counts(counts)
    methods = make_ranking_methods(experiment, mesh)
    gallery = embedded_split(
        experiment, provenance.split, variables, embeddings.images, embeddings.texts, provenance, methods
    )
    if not config.eval.exact:
        gallery = dataclasses.replace(gallery, method=methods.rerank(variables))
    # The examples are of the whole gallery, whatever the numbers are of.
    protocol = config.eval.protocols[0]
    evaluation = ConfigDict(config.eval.to_dict() | {"protocols": tuple(dict.fromkeys((protocol, "whole")))})
    by_protocol = evaluate_embedded(gallery, NO_EXTRA_METRICS, evaluation, mesh, intervals=False)
    ranks = by_protocol["whole"].queries
    assert ranks is not None  # `evaluate_embedded` gives them

    tile, k = tile_size(config.eval, mesh), counts.results
    first = make_stage_one(config.eval, gallery.score, experiment.config.seed, mesh)
    searcher = Searcher(embeddings, gallery.score, tile, mesh, candidates(config.eval), stage_one=first)
    ids, n = embeddings.ids, len(embeddings.ids.image_ids)
    rows = spaced(n, counts.queries)
    captions = ids.first[rows] + np.arange(len(rows)) % np.diff(ids.first)[rows]  # not the first caption of each
    highlighted = [int(row) for row in spaced(n, counts.highlights)]
    looks = highlights(experiment, variables, provenance.split, highlighted)
    return Contents(
        title=str(config.name),
        results=by_protocol[protocol],
        ranks=ranks,
        ids=ids,
        persons=gallery.image_person,
        captions=_by_caption(searcher, captions, ranks, k),
        images=_by_image(searcher, spaced(n, counts.queries, offset=0.75), ranks, k),
        caption_failures=_by_caption(searcher, worst(ranks.t2i, counts.failures), ranks, k),
        image_failures=_by_image(searcher, worst(ranks.i2t, counts.failures), ranks, k),
        highlights=list(zip(highlighted, looks, strict=True)),
    )


def collect_likeness(
    experiment: Experiment,
    variables: dict[str, Any],
    embeddings: Embeddings,
    score: Score,
    config: ConfigDict,
    mesh: Mesh,
) -> Likeness:
    """Chooses what is shown of a gallery without captions of every image, by config.page.

    Raises ValueError as `collect`, and for a score that does not compare images with each other.
    """
    counts, split = config.page, embeddings.source["split"]
    _check_counts(counts)
    if not is_dot_product(score):
        experiment.dataset.check_captioned(split)
    searcher, ids = Searcher(embeddings, score, tile_size(config.eval, mesh), mesh), embeddings.ids
    rows = spaced(len(ids.image_ids), counts.queries)
    best = searcher.best_images(take(embeddings.images, rows), counts.results + 1)
    likes = []
    for row, index, scores in zip(rows.tolist(), best.index.tolist(), best.score.tolist(), strict=True):
        others = [(other, value) for other, value in zip(index, scores, strict=True) if other != row and other >= 0]
        likes.append((row, others[: counts.results]))
    highlighted = [int(row) for row in spaced(len(ids.image_ids), counts.highlights)]
    looks = highlights(experiment, variables, split, highlighted)
    source = str(experiment.dataset.path.parent.name)
    return Likeness(str(config.name), "", source, split, ids, likes, list(zip(highlighted, looks, strict=True)))


def _check_counts(counts: ConfigDict) -> None:
    for name, least in (("queries", 0), ("failures", 0), ("highlights", 0), ("results", 1)):
        if counts[name] < least:
            raise ValueError(f"config.page.{name} is {counts[name]}; it must be at least {least}")


def spaced(count: int, most: int, offset: float = 0.5) -> np.ndarray:
    """Up to `most` different rows of `count`, evenly spaced, that begin `offset` of a gap behind the first."""
    size = min(count, most)
    return np.floor((np.arange(size) + offset) * count / max(size, 1)).astype(np.int64)


def worst(ranks: np.ndarray, most: int) -> np.ndarray:
    """Up to `most` rows with the largest ranks; those that come first are no failures."""
    order = np.argsort(-ranks, kind="stable")[:most]
    return order[ranks[order] > 0]


def _by_caption(searcher: Searcher, rows: np.ndarray, ranks: QueryRanks, k: int) -> list[Example]:
    """The k images that each caption finds."""
    embeddings = searcher.embeddings
    owners = np.asarray(embeddings.ids.caption_image, np.int64)[rows]
    return _examples(rows, ranks.t2i, owners, searcher.best_images(take(embeddings.texts, rows), k))


def _by_image(searcher: Searcher, rows: np.ndarray, ranks: QueryRanks, k: int) -> list[Example]:
    """The k captions that each image finds."""
    best = searcher.best_captions(take(searcher.embeddings.images, rows), k)
    best_own = np.array([searcher.best_own_caption(row) for row in rows.tolist()], np.int64)
    return _examples(rows, ranks.i2t, best_own, best)


def _examples(rows: np.ndarray, ranks: np.ndarray, matches: np.ndarray, best: TopK) -> list[Example]:
    lines = zip(rows.tolist(), matches.tolist(), best.index.tolist(), best.score.tolist(), strict=True)
    return [
        Example(row, int(ranks[row]) + 1, match, list(zip(index, scores, strict=True)))
        for row, match, index, scores in lines
    ]
