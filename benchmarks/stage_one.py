"""Two-stage search of sets against exact search, with global vectors and with encodings in stage one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks.rows import Row, compare
from benchmarks.timing import interleave
from shnet_jax.evaluation.ranking_methods import rerank_top_k
from shnet_jax.evaluation.stage_one import GLOBAL_VECTORS, Encodings, StageOne
from shnet_jax.evaluation.top_k import top_k
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.models.encodings import ScoreEncoding
from shnet_jax.models.esa import SetScore
from shnet_jax.ops.fixed_encoding import EncodingOptions
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.types import Embedding

DEPTH = 10  # first results by the exact score, which the candidates should hold


@dataclasses.dataclass(frozen=True)
class Case:
    """Sets of a gallery and of queries. similarity: of `SetScore`; elements, words: of an image and of a caption."""

    similarity: str
    elements: int
    words: int
    dim: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """images: of the gallery; queries: captions; candidates: of the two stages; encodings: (k_sim, r_reps, d_proj)."""

    cases: tuple[Case, ...] = (Case("smooth_chamfer", 4, 4, 256), Case("maxsim_texts", 36, 16, 128))
    images: int = 2000
    queries: int = 128
    candidates: int = 50
    encodings: tuple[tuple[int, int, int], ...] = ((2, 10, 16), (3, 10, 16), (3, 20, 32))
    rounds: int = 3


FULL = Sizes()
QUICK = Sizes(
    (Case("smooth_chamfer", 3, 2, 16),), images=60, queries=12, candidates=20, encodings=((2, 2, 4),), rounds=1
)


def gallery(case: Case, sizes: Sizes) -> tuple[Embedding, Embedding]:
    """Random images and captions on the host. An image mixes 200 concepts; its caption has noisy elements of it.

    The global vector is the mean of the elements, of unit length.
    """
    rng = np.random.default_rng(0)

    def unit(x: np.ndarray) -> np.ndarray:
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    concepts = unit(rng.standard_normal((200, case.dim)))
    noise = partial(rng.normal, scale=0.7 / case.dim**0.5)
    shape = sizes.images, case.elements
    images = unit(concepts[rng.integers(0, len(concepts), shape)] + noise(size=(*shape, case.dim)))
    owners = rng.choice(sizes.images, sizes.queries, replace=False)[:, None]
    chosen = images[owners, rng.integers(0, case.elements, (sizes.queries, case.words))]
    captions = unit(chosen + noise(size=chosen.shape))
    sides = (Embedding(unit(side.mean(axis=1)), side) for side in (images, captions))  # type: ignore[arg-type]  # host
    return next(sides), next(sides)


def measure(case: Case, sizes: Sizes) -> list[Row]:
    """A row for each stage one: time of a two-stage search against the exact one, and recall of its candidates."""
    images, queries = gallery(case, sizes)
    mesh, score, tile = data_mesh(jax.devices()[:1]), SetScore(case.similarity, 16.0, 1.0), 512
    ways: list[StageOne] = [GLOBAL_VECTORS]
    ways += [
        Encodings(ScoreEncoding(score, EncodingOptions(*chosen, d_final=0), 0), mesh) for chosen in sizes.encodings
    ]
    calls: dict[str, Callable[[], Any]] = {"exact": partial(top_k, queries, images, DEPTH, score, tile, mesh)}
    best, notes = calls["exact"]().index, {}
    for way in ways:
        vectors = way(images, "images")
        candidates = top_k(way(queries, "texts"), vectors, sizes.candidates, RetrievalModel.score, tile, mesh)
        held = np.mean([np.isin(b, f).mean() for b, f in zip(best, candidates.index, strict=True)])
        sizes_of = f"{way.width(images):,} numbers"
        notes[way.description] = (
            f"{sizes_of}; the {sizes.candidates} candidates hold {held:.1%} of the exact first {DEPTH}"
        )
        calls[way.description] = partial(
            _two_stages, way, vectors, images, queries, score, sizes.candidates, tile, mesh
        )
    times = interleave(calls, sizes.rounds)
    shape = f"{case.similarity}, {case.elements} x {case.words} elements, D {case.dim}"
    return [
        compare(
            "stage_one",
            f"{sizes.queries} queries of {sizes.images:,} sets ({shape}), two stages by {first_stage}",
            times[first_stage],
            "every pair scored",
            times["exact"],
            work=float(sizes.queries),
            unit="queries",
            note=note,
        )
        for first_stage, note in notes.items()
    ]


def _two_stages(way: StageOne, vectors: Embedding, images: Embedding, queries: Embedding, *options: Any) -> Any:
    """A search whose gallery is encoded already. options: score, candidates, tile, mesh."""
    score, candidates, tile, mesh = options
    first = way(queries, "texts"), vectors
    return rerank_top_k(queries, images, DEPTH, candidates, score, tile, mesh, first)


def run(sizes: Sizes) -> list[Row]:
    """Rows of every case."""
    return [row for case in sizes.cases for row in measure(case, sizes)]
