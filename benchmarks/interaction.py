"""A score of elements (CMSEI-style) against the dot product, and exact against two-stage ranking with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.rows import Row, compare
from benchmarks.timing import interleave
from shnet_jax.evaluation.pair_scores import make_programs, pair_scorer, ranks_of, score_matrix
from shnet_jax.evaluation.ranking_methods import rerank
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.ops.interaction import Interaction, interaction_scores
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.types import Array, Embedding


@dataclasses.dataclass(frozen=True)
class Sizes:
    """images, captions: of the gallery; regions, tokens, dim: of an item; candidates: of the two stages."""

    images: int = 64
    captions: int = 320
    regions: int = 36
    tokens: int = 16
    dim: int = 1024
    candidates: int = 8
    rounds: int = 3


FULL = Sizes()
QUICK = Sizes(images=16, captions=80, regions=8, tokens=6, dim=32, candidates=4, rounds=1)

HOW = Interaction()


class Scored(RetrievalModel):
    """A model that is nothing but the score."""

    def score(self, images: Embedding, texts: Embedding) -> Array:  # type: ignore[override]  # a method: see contract
        """See `ops.interaction`."""
        return interaction_scores(images, texts, HOW)


def gallery(sizes: Sizes) -> tuple[Embedding, Embedding, np.ndarray]:
    """Random images and captions, in host memory as an encoded gallery is, and the image of each caption."""
    rng = np.random.default_rng(0)

    def items(count: int, size: int) -> Embedding:
        vectors = rng.standard_normal((count, sizes.dim), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        elements: Any = rng.standard_normal((count, size, 3 * sizes.dim), np.float32)
        mask: Any = np.ones((count, size), bool)
        return Embedding(vectors, elements, mask)  # type: ignore[arg-type]  # NumPy, as `evaluate.encode` gives it

    owner = np.arange(sizes.captions) % sizes.images
    return items(sizes.images, sizes.regions), items(sizes.captions, sizes.tokens), owner


def contenders(sizes: Sizes) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Timed calls by name, and the number of image-text pairs that each scores."""
    images, texts, owner = gallery(sizes)
    mesh = data_mesh(jax.devices()[:1])
    scorer = pair_scorer(Scored(), make_programs(Scored(), mesh), {}, mesh, tile=512)
    on_device = jax.tree.map(jnp.asarray, (images, texts))
    both = {
        "interaction": jax.jit(lambda images, texts: interaction_scores(images, texts, HOW)),
        "dot product": jax.jit(RetrievalModel.score),
    }

    def waited(run: Callable[..., Array]) -> Array:
        return jax.block_until_ready(run(*on_device))

    calls: dict[str, Callable[[], Any]] = {name: partial(waited, run) for name, run in both.items()}
    calls["exact"] = lambda: ranks_of(score_matrix(images, texts, scorer), owner, 512, mesh)
    calls["two stages"] = lambda: rerank(images, texts, owner, sizes.candidates, scorer)
    everything = sizes.images * sizes.captions
    listed = rerank(images, texts, owner, sizes.candidates, scorer).pairs
    return calls, {name: listed if name == "two stages" else everything for name in calls}


def run(sizes: Sizes) -> list[Row]:
    """Pairs per second of the score against the dot product; seconds of exact against two-stage ranking."""
    calls, pairs = contenders(sizes)
    times = interleave(calls, sizes.rounds)
    shape = f"{sizes.images} x {sizes.captions}, {sizes.regions} regions, {sizes.tokens} tokens, d {sizes.dim}"
    everything = float(pairs["exact"])
    return [
        compare(
            "interaction",
            f"CMSEI-style score, {shape}",
            times["interaction"],
            "dot product of the vectors",
            times["dot product"],
            work=everything,
            reference_work=everything,
            unit="pairs",
        ),
        compare(
            "interaction",
            f"two stages, {sizes.candidates} candidates: {pairs['two stages']} of {pairs['exact']} pairs scored",
            times["two stages"],
            "exact ranking by the score of every pair",
            times["exact"],
            work=everything,
            reference_work=everything,
            unit="pairs ranked",
        ),
    ]
