"""What a page shows of a gallery: results, evenly spaced queries, the worst ones, what the model looked at."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.evaluate.extra import NOTHING
from shnet_jax.evaluate.nearest import Found, is_dot_product, top_k, turned
from shnet_jax.evaluate.protocols import Subject
from shnet_jax.evaluate.split import embedded_split, evaluate_embedded, make_rankings
from shnet_jax.evaluate.tiles import take
from shnet_jax.evaluate.two_stage import candidates, two_stage_top_k
from shnet_jax.experiment import Experiment
from shnet_jax.retrieve.folder import Embeddings
from shnet_jax.retrieve.highlight import highlights
from shnet_jax.retrieve.page import Contents, Shown
from shnet_jax.types import Embedding, Score


def collect(
    experiment: Experiment,
    variables: dict[str, Any],
    embeddings: Embeddings,
    config: ConfigDict,
    subject: Subject,
    mesh: Mesh,
) -> Contents:
    """Ranks the gallery and chooses what is shown of it, by config.page; the same whenever it is asked for.

    In two stages where config.eval.exact is False.

    Raises ValueError for a number of config.page below 0 (page.results: below 1).
    """
    shown, tile = config.page, config.eval.tile
    for name in ("queries", "failures", "highlights"):
        if shown[name] < 0:
            raise ValueError(f"config.page.{name} is {shown[name]}; it must be at least 0")
    if shown.results < 1:
        raise ValueError(f"config.page.results is {shown.results}; it must be at least 1")
    images, texts, ids = embeddings.images, embeddings.texts, embeddings.ids
    owner = np.asarray(ids.caption_image, np.int64)
    rankings = make_rankings(experiment, mesh)
    gallery = embedded_split(experiment, subject.split, variables, images, texts, subject, rankings)
    if not config.eval.exact:
        gallery = dataclasses.replace(gallery, method=rankings.rerank(variables))
    score, protocol = gallery.score, config.eval.protocols[0]
    # The examples are of the whole gallery, whatever the numbers are of.
    protocols = tuple(dict.fromkeys((protocol, "whole")))
    evaluation = ConfigDict(config.eval.to_dict() | {"protocols": protocols})
    by_protocol = evaluate_embedded(gallery, NOTHING, evaluation, mesh, intervals=False)
    found = by_protocol["whole"].queries
    assert found is not None  # `evaluate_embedded` gives them

    captions_first = score if is_dot_product(score) else turned(score)

    count = 0 if is_dot_product(score) else candidates(config.eval)

    def search(queries: Embedding, items: Embedding, score: Score) -> Found:
        if count:
            return two_stage_top_k(queries, items, shown.results, count, score, tile, mesh)
        return top_k(queries, items, shown.results, score, tile, mesh)

    def by_caption(rows: np.ndarray) -> list[Shown]:
        return _shown(rows, found.t2i, owner[rows], search(take(texts, rows), images, score))

    def by_image(rows: np.ndarray) -> list[Shown]:
        best = search(take(images, rows), texts, captions_first)
        return _shown(rows, found.i2t, np.array([own_best(int(row)) for row in rows], np.int64), best)

    def own_best(row: int) -> int:
        own = np.arange(ids.first[row], ids.first[row + 1])
        return int(
            own[top_k(take(images, np.array([row])), take(texts, own), 1, captions_first, tile, mesh).index[0, 0]]
        )

    n = len(ids.image_ids)
    some = spaced(n, shown.queries)
    captions = ids.first[some] + np.arange(len(some)) % np.diff(ids.first)[some]  # not the first caption of each
    looked = [int(row) for row in spaced(n, shown.highlights)]
    return Contents(
        title=str(config.name),
        results=by_protocol[protocol],
        ranks=found,
        ids=ids,
        persons=gallery.image_person,
        captions=by_caption(captions),
        images=by_image(spaced(n, shown.queries, offset=0.75)),
        caption_failures=by_caption(worst(found.t2i, shown.failures)),
        image_failures=by_image(worst(found.i2t, shown.failures)),
        highlights=list(zip(looked, highlights(experiment, variables, subject.split, looked), strict=True)),
        history=(),
    )


def spaced(count: int, most: int, offset: float = 0.5) -> np.ndarray:
    """Up to `most` different rows of `count`, evenly spaced, that begin `offset` of a gap behind the first."""
    wanted = min(count, most)
    return np.floor((np.arange(wanted) + offset) * count / max(wanted, 1)).astype(np.int64)


def worst(ranks: np.ndarray, most: int) -> np.ndarray:
    """Up to `most` rows with the largest ranks; those that come first are no failures."""
    order = np.argsort(-ranks, kind="stable")[:most]
    return order[ranks[order] > 0]


def _shown(rows: np.ndarray, ranks: np.ndarray, matches: np.ndarray, best: Found) -> list[Shown]:
    found = zip(rows.tolist(), matches.tolist(), best.index.tolist(), best.score.tolist(), strict=True)
    return [
        Shown(row, int(ranks[row]) + 1, match, list(zip(index, scores, strict=True)))
        for row, match, index, scores in found
    ]
