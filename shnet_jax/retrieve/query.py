"""From words or an image to ranked results: which side is searched, by what, and how the answer is written down."""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.data.gallery import text_batches
from shnet_jax.data.tokenise import tokenise_captions
from shnet_jax.evaluate.nearest import Found, is_dot_product, top_k, turned
from shnet_jax.evaluate.report import Table
from shnet_jax.evaluate.tiles import take
from shnet_jax.evaluate.towers import Tower, encode_parts, make_towers
from shnet_jax.evaluate.two_stage import best_candidates, two_stage_top_k
from shnet_jax.experiment import Experiment
from shnet_jax.retrieve.folder import Embeddings
from shnet_jax.retrieve.indexes import check_index, open_index, rescored
from shnet_jax.types import Embedding, Score

FORMAT = 1  # of the results as JSON
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
    """What a query (words, or an image id) found among the images or the captions ("target")."""

    query: str
    kind: str  # "text" | "image"
    target: str  # "images" | "captions"
    hits: tuple[Hit, ...]


class Searcher:
    """A gallery that is searched: exactly, or by the index of config.search.index.

    score: of the model; search, tile: config.search and config.eval.tile; mesh: devices.
    candidates: of a query, which the vectors find and a score that is more than their product re-ranks; 0: the score
      sees the whole gallery.
    """

    def __init__(
        self, embeddings: Embeddings, score: Score, search: ConfigDict, tile: int, mesh: Mesh, candidates: int = 0
    ):
        check_index(search.index, score, candidates)
        self._candidates = 0 if is_dot_product(score) else candidates
        self.embeddings, self._score, self._search, self._tile, self._mesh = embeddings, score, search, tile, mesh
        self._indexes: dict[str, Any] = {}
        self.known: dict[str, dict] = {}  # what is known of each index that was used, by side

    @property
    def about(self) -> dict[str, Any]:
        """How results were found, as JSON values. candidates: that the score re-ranked, 0 for no second stage."""
        return {"kind": self._search.index, "sides": self.known, "candidates": self._candidates}

    def images_by_text(self, queries: Sequence[str], texts: Embedding, k: int) -> list[Answer]:
        """The images that fit each sentence best. texts: the sentences, encoded."""
        found = self._find("images", texts, k, self._score)
        return [Answer(query, "text", IMAGES, self._images(found, i)) for i, query in enumerate(queries)]

    def by_image(self, image_ids: Sequence[str], k: int) -> list[Answer]:
        """The captions that fit each image of the gallery best, and the images most like it but itself.

        A model whose score is no dot product compares images with captions only: there are no images in its answers.
        Raises ValueError for an id that the gallery does not have.
        """
        ids = self.embeddings.ids
        rows = np.array([self._row(name) for name in image_ids], np.int64)
        queries = take(self.embeddings.images, rows)
        found = self._find("texts", queries, k, turned(self._score) if not is_dot_product(self._score) else self._score)
        answers = []
        like = self._find("images", queries, k + 1, self._score) if is_dot_product(self._score) else None
        for i, name in enumerate(image_ids):
            answers.append(Answer(name, "image", CAPTIONS, self._captions(found, i)))
            if like is not None:
                answers.append(Answer(name, "image", IMAGES, self._images(like, i, without=ids.rows[name])[:k]))
        return answers

    def _row(self, name: str) -> int:
        rows = self.embeddings.ids.rows
        if name not in rows:
            near = difflib.get_close_matches(name, rows, n=3)
            hint = f"near it: {', '.join(near)}" if near else f"the first is {next(iter(rows))!r}"
            raise ValueError(f"{self.embeddings.folder}: no image {name!r} among {len(rows)}; {hint}")
        return rows[name]

    def _find(self, side: str, queries: Embedding, k: int, score: Score) -> Found:
        gallery = getattr(self.embeddings, side)
        how = score, self._tile, self._mesh
        if self._search.index == "exact" and self._candidates:
            return two_stage_top_k(queries, gallery, k, self._candidates, *how)
        if self._search.index == "exact":
            return top_k(queries, gallery, k, *how)
        if side not in self._indexes:
            self._indexes[side], self.known[side] = open_index(
                self._search, self.embeddings, side, self._tile, self._mesh
            )
        vectors = np.asarray(queries.vector, np.float32)
        found = self._indexes[side].search(vectors, min(max(k, self._candidates), len(gallery.vector)))
        if self._candidates:
            return best_candidates(queries, gallery, found.index, k, *how)
        return rescored(found, vectors, gallery.vector)

    def _images(self, found: Found, query: int, without: int = -1) -> tuple[Hit, ...]:
        ids = self.embeddings.ids
        rows = [(r, s) for r, s in zip(found.index[query], found.score[query], strict=True) if r >= 0 and r != without]
        return tuple(
            Hit(rank, float(score), ids.image_ids[row], captions=tuple(ids.captions_of(row)))
            for rank, (row, score) in enumerate(rows, start=1)
        )

    def _captions(self, found: Found, query: int) -> tuple[Hit, ...]:
        ids = self.embeddings.ids
        rows = [(r, s) for r, s in zip(found.index[query], found.score[query], strict=True) if r >= 0]
        return tuple(
            Hit(rank, float(score), ids.image_ids[ids.caption_image[row]], ids.caption_ids[row], ids.captions[row])
            for rank, (row, score) in enumerate(rows, start=1)
        )


def encode_texts(experiment: Experiment, tower: Tower, texts: Sequence[str]) -> Embedding:
    """Sentences of any kind -> their embeddings on the host. Raises ValueError for one without words."""
    texts = list(texts)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise ValueError(f"query {number} of {len(texts)}: expected text, found {text!r:.80}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # what a terminal of another encoding sent
            raise ValueError(f"query {number} of {len(texts)}: expected text in UTF-8, found {text!r:.80}")
    blank = [number for number, text in enumerate(texts) if not text.strip()]
    if blank:
        raise ValueError(f"query {blank[0] + 1} of {len(texts)} has no words")
    if not texts:
        raise ValueError("no query: nothing to encode")
    captions = tokenise_captions([texts], experiment.tokenizer)
    rows = experiment.config.eval.batch_size * tower.mesh.size
    return encode_parts(tower, text_batches(captions, experiment.tokenizer, experiment.config.data, rows), len(texts))


def place_towers(experiment: Experiment, variables: dict[str, Any], mesh: Mesh) -> tuple[Tower, Tower]:
    """The towers of images and of captions, their variables on the devices."""
    return make_towers(experiment, mesh, mesh)(variables)


def read_queries(query: str, query_file: str) -> list[str]:
    """The sentence of --query and those of --query_file, one a line; empty lines are passed over."""
    found = [query] if query.strip() else []
    if query_file:
        path = Path(query_file)
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # U+2028 and the like are text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected queries in UTF-8: {error}") from None
        found += [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"{path}: no query, expected one a line")
    return found


def document(answers: Sequence[Answer], searcher: Searcher) -> dict[str, Any]:
    """The results as JSON values: {"format", "gallery", "index", "results": [{"query", "kind", "target", "hits"}]}."""
    results = [
        {"query": a.query, "kind": a.kind, "target": a.target, "hits": [_hit(hit) for hit in a.hits]} for a in answers
    ]
    return {"format": FORMAT, "gallery": searcher.embeddings.source, "index": searcher.about, "results": results}


def _hit(hit: Hit) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(hit).items() if value not in (None, ())}


def tables(answers: Sequence[Answer]) -> str:
    """The results for people: a Markdown table for each query."""
    texts = []
    for answer in answers:
        rows = [
            [str(h.rank), f"{h.score:.4f}", h.image_id, textwrap.shorten(h.caption or (h.captions or ("",))[0], 80)]
            for h in answer.hits
        ]
        by = "image " if answer.kind == "image" else ""
        heading = ["", "score", "image", "caption" if answer.target == CAPTIONS else "first caption"]
        title = f"{by}{textwrap.shorten(answer.query, 200)!r} -> {answer.target}"
        texts.append(f"{title}\n{Table(title, heading, rows, words=True)}")
    return "\n".join(texts)
