"""Searches a gallery by sentences or by an image, exactly or with a vector index."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.data.gallery import text_batches, vector_text_batches
from shnet_jax.data.tokenise import tokenise_captions
from shnet_jax.evaluation.encode import Tower, encode_parts
from shnet_jax.evaluation.prefix import prefix
from shnet_jax.evaluation.ranking_methods import best_candidates, rerank_top_k
from shnet_jax.evaluation.stage_one import GLOBAL_VECTORS, Encodings, StageOne
from shnet_jax.evaluation.tiles import take, vectors_of
from shnet_jax.evaluation.top_k import TopK, is_dot_product, top_k, transpose_score
from shnet_jax.experiment import Experiment, sentence_vectors
from shnet_jax.observe import html
from shnet_jax.retrieve.approximate import OpenIndex, check_index, check_options, find, open_index
from shnet_jax.retrieve.embeddings import Embeddings
from shnet_jax.retrieve.stage_one import open_encodings
from shnet_jax.types import Embedding, Score

CAPTIONS, IMAGES = "captions", "images"


@dataclasses.dataclass(frozen=True)
class Hit:
    """One result. rank: 1 is the best. caption_id, caption: of a caption; captions: those of an image."""

    rank: int
    score: float
    image_id: str
    caption_id: str | None = None
    caption: str | None = None
    captions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """The results of a query (words, or an image id) among the images or the captions ("target")."""

    query: str
    kind: str  # "text" | "image"
    target: str  # "images" | "captions"
    hits: tuple[Hit, ...]

    def __repr__(self) -> str:
        """The query, how many results it has, and the first one."""
        first = f", first {self.hits[0].image_id!r} with {self.hits[0].score:.3f}" if self.hits else ""
        return f"Answer({self.query!r}: {len(self.hits)} {self.target}{first})"

    def _repr_html_(self) -> str:
        """The results as a table, for notebooks."""
        rows = [
            [str(hit.rank), f"{hit.score:.3f}", hit.image_id, hit.caption or next(iter(hit.captions), "")]
            for hit in self.hits
        ]
        return html.table(["", "score", "image", "caption"], rows, words=True)


class Searcher:
    """A gallery that is searched exactly, or by the index of config.search.index.

    Args:
      embeddings: of the gallery.
      score: of the model.
      tile: of `tiles.tile_size`.
      mesh: devices.
      candidates: items of each query that the vectors find and a score other than their product re-ranks; 0: the score
        sees the whole gallery.
      search: config.search; None: exact search.
      stage_one: what finds these candidates.
    """

    def __init__(
        self,
        embeddings: Embeddings,
        score: Score,
        tile: int,
        mesh: Mesh,
        candidates: int = 0,
        search: ConfigDict | None = None,
        stage_one: StageOne = GLOBAL_VECTORS,
    ):
        self._kind = search.index if search else "exact"
        check_index(self._kind, score, candidates)
        if search is not None:
            check_options(search)
        self._dot_product = is_dot_product(score)
        self._candidates = 0 if self._dot_product else candidates
        self.embeddings, self._search, self._options = embeddings, search, (tile, mesh)
        self._score, self._captions_first = score, score if self._dot_product else transpose_score(score)
        self.indexes: dict[str, OpenIndex] = {}  # the indexes used so far, by side
        self._stage_one = stage_one if self._candidates else GLOBAL_VECTORS

    @property
    def about(self) -> dict[str, Any]:
        """The ranking method as JSON values.

        candidates: items that the score re-ranks; 0: no second stage. stage_one: what finds them.
        """
        reports = {side: index.report for side, index in self.indexes.items()}
        first = {"stage_one": self._stage_one.description} if self._candidates else {}
        return {"kind": self._kind, "sides": reports, "candidates": self._candidates} | first

    @cached_property
    def _first(self) -> Embeddings:
        """The gallery as stage one sees it: with its vectors in place of the global ones."""
        if isinstance(self._stage_one, Encodings):
            return open_encodings(self.embeddings, self._stage_one)
        return self.embeddings

    def images_by_text(self, queries: Sequence[str], texts: Embedding, k: int) -> list[Answer]:
        """The k best images of each sentence. texts: the sentences, encoded."""
        best = self.best_images(texts, k)
        return [Answer(query, "text", IMAGES, self._hits(IMAGES, best, i, k)) for i, query in enumerate(queries)]

    def by_image(self, image_ids: Sequence[str], k: int) -> list[Answer]:
        """The k best captions of each image of the gallery, and the k images most like it but itself.

        A model whose score is no dot product compares images with captions only: there are no images in its answers.
        A gallery without captions has none in its answers.
        Raises ValueError for an id that the gallery does not have.
        """
        rows = np.array([self._row(name) for name in image_ids], np.int64)
        queries = take(self.embeddings.images, rows)
        captions = self.best_captions(queries, k) if self.embeddings.ids.captions else None
        images = self.best_images(queries, k + 1) if self._dot_product else None
        answers = []
        for i, name in enumerate(image_ids):
            if captions is not None:
                answers.append(Answer(name, "image", CAPTIONS, self._hits(CAPTIONS, captions, i, k)))
            if images is not None:
                answers.append(Answer(name, "image", IMAGES, self._hits(IMAGES, images, i, k, without=int(rows[i]))))
        return answers

    def images_like(self, names: Sequence[str], images: Embedding, k: int) -> list[Answer]:
        """The k images most like each of n others, which are no part of the gallery.

        names: n, of these. images: their embeddings. Raises ValueError for a score that is no dot product.
        """
        if not self._dot_product:
            raise ValueError("images are compared with each other by the dot product only, which this score is not")
        best = self.best_images(images, k)
        return [Answer(name, "image", IMAGES, self._hits(IMAGES, best, i, k)) for i, name in enumerate(names)]

    def best_images(self, texts: Embedding, k: int) -> TopK:
        """Rows and scores of the k best images for each of t captions."""
        return self._find("images", texts, k, self._score)

    def best_captions(self, images: Embedding, k: int) -> TopK:
        """Rows and scores of the k best captions for each of n images."""
        return self._find("texts", images, k, self._captions_first)

    def best_own_caption(self, image: int) -> int:
        """Row of the caption that fits its image, a row of the gallery, best."""
        first = self.embeddings.ids.first
        rows = np.arange(first[image], first[image + 1])
        query, captions = take(self.embeddings.images, np.array([image])), take(self.embeddings.texts, rows)
        return int(rows[top_k(query, captions, 1, self._captions_first, *self._options).index[0, 0]])

    def _row(self, name: str) -> int:
        rows = self.embeddings.ids.rows
        if name not in rows:
            near = difflib.get_close_matches(name, rows, n=3)
            hint = f"near it: {', '.join(near)}" if near else f"the first is {next(iter(rows))!r}"
            raise ValueError(f"{self.embeddings.folder}: no image {name!r} among {len(rows)}; {hint}")
        return rows[name]

    def _find(self, side: str, queries: Embedding, k: int, score: Score) -> TopK:
        gallery, asked = getattr(self.embeddings, side), "texts" if side == "images" else "images"
        if self._dot_product:
            queries = prefix(queries, gallery.vector.shape[1])  # embeddings may be cut to config.search.dims
        if (self._search is None or self._kind == "exact") and not self._candidates:
            return top_k(queries, gallery, k, score, *self._options)
        first = self._stage_one(queries, asked), vectors_of(getattr(self._first, side))
        if self._search is None or self._kind == "exact":
            return rerank_top_k(queries, gallery, k, self._candidates, score, *self._options, first)
        if side not in self.indexes:
            self.indexes[side] = open_index(self._search, self._first, side, *self._options)
        vectors: Any = first[1].vector  # on the host, or in a file
        index, wanted = self.indexes[side].index, min(max(k, self._candidates), len(vectors))
        tile, mesh = self._options
        asking = np.asarray(first[0].vector, np.float32)
        nearest = find(index, asking, wanted, vectors, self._search.rescore, tile, mesh)
        if self._candidates:
            return best_candidates(queries, gallery, nearest.index, k, score, mesh)
        return nearest

    def _hits(self, target: str, best: TopK, query: int, k: int, without: int = -1) -> tuple[Hit, ...]:
        """The first k results of a query, but the row `without`; places without a result have a negative row."""
        pairs = zip(best.index[query].tolist(), best.score[query].tolist(), strict=True)
        kept = [(row, score) for row, score in pairs if row >= 0 and row != without][:k]
        ids, hits = self.embeddings.ids, []
        for rank, (row, score) in enumerate(kept, start=1):
            if target == IMAGES:
                hits.append(Hit(rank, score, ids.image_ids[row], captions=tuple(ids.captions_of(row))))
            else:
                image_id = ids.image_ids[ids.caption_image[row]]
                hits.append(Hit(rank, score, image_id, ids.caption_ids[row], ids.captions[row]))
        return tuple(hits)


def encode_texts(experiment: Experiment, tower: Tower, texts: Sequence[str]) -> Embedding:
    """Encodes sentences; embeddings are on the host. Raises ValueError for one without words."""
    texts = list(texts)
    for number, text in enumerate(texts, 1):
        query = f"query {number} of {len(texts)}"
        if not isinstance(text, str):
            raise ValueError(f"{query}: expected text, found {text!r:.80}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # surrogates, from a terminal of another encoding
            raise ValueError(f"{query}: expected text in UTF-8, found {text!r:.80}")
        if not text.strip():
            raise ValueError(f"{query} has no words")
    if not texts:
        raise ValueError("no query: nothing to encode")
    if experiment.text_fields:
        return encode_vectors(experiment, tower, {"caption_embeddings": sentence_vectors(experiment, texts)})
    captions = tokenise_captions([texts], experiment.tokenizer)
    on_each = -(-len(texts) // tower.parts)
    rows = tower.parts * min(experiment.config.eval.batch_size, 1 << (on_each - 1).bit_length())
    return encode_parts(tower, text_batches(captions, experiment.tokenizer, experiment.config.data, rows), len(texts))


@dataclasses.dataclass(frozen=True)
class _Given:
    """Vectors in memory, as `data.gallery` reads them."""

    values: np.ndarray

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number."""
        return self.values[rows]


def encode_vectors(experiment: Experiment, tower: Tower, given: Mapping[str, np.ndarray]) -> Embedding:
    """Encodes queries given as stored vectors are, [q, E] or [q, L, E] by field; embeddings are on the host.

    Tokens whose vector is zero are masked, where the data set has a mask.

    Raises ValueError for vectors of another shape than those of the data set, for NaN or infinity, and for a query of
    masked tokens alone.
    """
    for name, values in given.items():
        expected = experiment.dataset.features[name].shape[1:]
        if values.shape[1:] != expected or not len(values) or values.dtype.kind != "f":
            raise ValueError(
                f"vectors of queries: expected floats [queries, {', '.join(map(str, expected))}] as {name} of "
                f"{experiment.dataset.path}, found {values.dtype} {list(values.shape)}"
            )
        finite = np.isfinite(values.astype(np.float32)).reshape(len(values), -1).all(axis=1)
        if not finite.all():
            raise ValueError(f"vectors of queries: row {int(np.argmin(finite))} is not finite")
    given = dict(given)
    if "caption_tokens" in given and "caption_token_mask" in experiment.dataset.features:
        mask = (given["caption_tokens"] != 0).any(axis=-1)  # stored vectors are zero where masked
        if not mask.any(axis=1).all():
            raise ValueError(f"vectors of queries: row {int(np.argmin(mask.any(axis=1)))} is all zero: it has no token")
        given["caption_token_mask"] = mask
    count = len(next(iter(given.values())))
    on_each = -(-count // tower.parts)
    rows = tower.parts * min(experiment.config.eval.batch_size, 1 << (on_each - 1).bit_length())
    return encode_parts(tower, vector_text_batches({n: _Given(v) for n, v in given.items()}, count, rows), count)
