"""Ranking methods of a model: exactly by its score, by re-ranking candidates, or by the global vectors alone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from shnet_jax.data.batches import token_buckets
from shnet_jax.evaluate.pair_scores import PairScorer, make_programs, pair_scorer, ranks_of, score_matrix
from shnet_jax.evaluate.person_search import search_persons
from shnet_jax.evaluate.ranks import Ranks, ranks
from shnet_jax.evaluate.rerank import caption_candidates, rerank
from shnet_jax.evaluate.tiles import vectors_of
from shnet_jax.evaluate.top_k import TopK
from shnet_jax.models.contract import RetrievalModel, has_static_score
from shnet_jax.types import Embedding


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A ranked gallery and what ranking it took.

    pairs: how many the model's score was computed for. seconds: compilation included.
    candidates: the re-ranked images of each caption with their new scores; None for other methods.
    """

    ranks: Ranks
    pairs: int
    candidates: TopK | None = None
    seconds: float = 0.0


PersonSearch = Callable[[Embedding, Embedding, np.ndarray, np.ndarray, TopK | None], np.ndarray]
"""Function of (images, captions, person in each image, person of each caption, `Ranked.candidates` or None)
-> the result of `person_search.search_persons`."""


@dataclasses.dataclass(frozen=True)
class RankingMethod:
    """A way to rank a gallery; it keeps nothing between calls.

    function: (images, captions, image of each caption, number of the fold) -> Ranked.
    description: for the protocol card; "": the usual, every pair by the model's score.
    persons: the person search of such a ranking; None: by the score.
    """

    name: str
    function: Callable[[Embedding, Embedding, np.ndarray, int], Ranked]
    description: str = ""
    persons: PersonSearch | None = None

    @property
    def exact(self) -> bool:
        """Whether every pair is ranked by the model's score."""
        return not self.description

    def rank(self, images: Embedding, texts: Embedding, owner: np.ndarray, fold: int = 0) -> Ranked:
        """Ranks a gallery and takes the time."""
        start = time.perf_counter()
        ranked = self.function(images, texts, owner, fold)
        return dataclasses.replace(ranked, seconds=time.perf_counter() - start)


class RankingMethods:
    """The ranking methods of one model; programs are compiled once for all variables.

    A static score streams through `ranks.ranks`. A score that is a method (with parameters, or costly) is computed once
    for each pair, in blocks.
    """

    def __init__(self, model: RetrievalModel, config: FrozenConfigDict, mesh: Mesh):
        self._model, self._config, self._mesh = model, config, mesh
        self._programs = make_programs(model, mesh)

    def exact(self, variables: Mapping[str, Any], folder: Path | None = None) -> RankingMethod:
        """Exact ranking of every query against the whole gallery. folder: `pair_scores.open_folder`, for blocks."""
        evaluation, scorer = self._config.eval, self._scorer(variables)

        def streamed(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranked:
            dtype = evaluation.score_dtype
            ranked = ranks(images, texts, owner, self._model.score, evaluation.tile, self._mesh, dtype)
            return Ranked(ranked, len(images.vector) * len(texts.vector))

        def in_blocks(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranked:
            scores = score_matrix(images, texts, scorer, _fold_folder(folder, images, fold))
            return Ranked(ranks_of(scores, owner, evaluation.tile, self._mesh), scores.size)

        return RankingMethod("exact", streamed if has_static_score(self._model) else in_blocks)

    def rerank(self, variables: Mapping[str, Any], folder: Path | None = None) -> RankingMethod:
        """Re-ranking of the candidates of the global vectors; see `rerank`. folder: as for `exact`."""
        k, scorer = self._config.eval.two_stage, self._scorer(variables)

        def function(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranked:
            reranked = rerank(images, texts, owner, k, scorer, _fold_folder(folder, images, fold))
            return Ranked(reranked.ranks, reranked.pairs, reranked.candidates)

        def persons(
            images: Embedding,
            texts: Embedding,
            image_person: np.ndarray,
            caption_person: np.ndarray,
            candidates: TopK | None,
        ) -> np.ndarray:
            if candidates is None:  # ranked in folds
                candidates = caption_candidates(images, texts, k, scorer)
            return self._persons(images, texts, image_person, caption_person, candidates)

        text = f"two stages: {k} candidates of each query by global vectors, re-ranked by the score; then as exact"
        return RankingMethod(f"two-stage {k}", function, text, persons)

    def vectors(self) -> RankingMethod:
        """Ranking by the global vectors alone."""

        def function(images: Embedding, texts: Embedding, owner: np.ndarray, fold: int) -> Ranked:
            vectors = vectors_of(images), vectors_of(texts)
            return Ranked(ranks(*vectors, owner, RetrievalModel.score, self._config.eval.tile, self._mesh), 0)

        text = "by the product of global vectors alone"
        return RankingMethod("global vectors", function, text, self._persons)

    def _persons(
        self,
        images: Embedding,
        texts: Embedding,
        image_person: np.ndarray,
        caption_person: np.ndarray,
        candidates: TopK | None,
    ) -> np.ndarray:
        vectors, tile = (vectors_of(images), vectors_of(texts)), self._config.eval.tile
        return search_persons(
            *vectors, image_person, caption_person, RetrievalModel.score, tile, self._mesh, candidates
        )

    def _scorer(self, variables: Mapping[str, Any]) -> PairScorer:
        tile, buckets = self._config.eval.tile, token_buckets(self._config.data)
        return pair_scorer(self._model, self._programs, variables["params"], self._mesh, tile, buckets)


def _fold_folder(folder: Path | None, images: Embedding, fold: int) -> Path | None:
    """The folder for the finished blocks of a fold."""
    if folder is None:
        return None
    of_fold = folder / f"{len(images.vector)}_images_{fold}"
    of_fold.mkdir(exist_ok=True)
    return of_fold
