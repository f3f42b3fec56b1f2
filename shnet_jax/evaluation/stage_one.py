"""Stage one of two-stage ranking: vectors whose dot products select the candidates that the score re-ranks.

They are the global vectors or, for a model that scores sets, encodings of its whole score (`models.encodings`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.evaluation.tiles import prefetch_one, show_progress, size, take, vectors_of
from shnet_jax.models.encodings import ScoreEncoding, score_encoding
from shnet_jax.parallel.mapping import Mapped, map_specs, replicate
from shnet_jax.types import DATA, Array, Embedding, Score

CHOICES = ("vectors", "fde")
ROWS = 64  # sets that a device encodes at once


@dataclasses.dataclass(frozen=True)
class GlobalVectors:
    """The global vectors find the candidates.

    name, description: for tables and the protocol card. settings: JSON values that the vectors depend on, beside the
    embeddings; {}: the global vectors themselves.
    """

    name: str = "global vectors"
    description: str = "global vectors"

    @property
    def settings(self) -> Mapping[str, Any]:
        """JSON values that the vectors depend on, beside the embeddings; always empty."""
        return {}

    def __call__(self, items: Embedding, side: str) -> Embedding:
        """The vectors of a side ("images", "texts"), of which the dot product is taken, on the host or a device."""
        return vectors_of(items)

    def width(self, items: Embedding) -> int:
        """Length of a vector. items: embeddings, or their shapes."""
        return items.vector.shape[1]


GLOBAL_VECTORS = GlobalVectors()


@dataclasses.dataclass(frozen=True)
class Encodings:
    """Encodings of global vector and set find the candidates; see `GlobalVectors` for what both have.

    mesh: its devices share the sets, which get the same bits on any number of devices.
    """

    encoding: ScoreEncoding
    mesh: Mesh
    name: str = "encodings"

    @property
    def description(self) -> str:
        """For the protocol card."""
        return self.encoding.description

    @property
    def settings(self) -> Mapping[str, Any]:
        """JSON values that the vectors depend on, beside the embeddings."""
        return self.encoding.settings

    def __call__(self, items: Embedding, side: str) -> Embedding:
        """The vectors [n, width] of a side, on the host. Raises ValueError for embeddings without elements."""
        vectors = np.empty((size(items), self.width(items)), np.float32)
        for rows, block in self.blocks(items, side):
            vectors[rows] = block
        return Embedding(vectors)  # type: ignore[arg-type]  # on the host

    def blocks(self, items: Embedding, side: str) -> Iterator[tuple[slice, np.ndarray]]:
        """Iterates over the rows of a side and their vectors [rows, width], block by block; shows progress."""
        n, step = size(items), ROWS * self.mesh.size
        split, random = NamedSharding(self.mesh, P(DATA)), self.encoding.draw(items)
        program, random = _program(self.encoding, side, self.mesh), replicate(random, self.mesh)

        def dispatch(start: int) -> tuple[slice, Array]:
            rows = np.minimum(np.arange(start, start + step), n - 1)  # padding repeats the last set
            placed = jax.device_put(jax.tree.map(np.asarray, take(items, rows)), split)
            return slice(start, min(start + step, n)), program(placed, random)

        total = -(-n // step)
        shown = (
            show_progress(total, f"encodings of {side}: block", side) if total > 1 else nullcontext(lambda rows: None)
        )
        with shown as advance:  # a few queries show none
            for rows, on_devices in prefetch_one(map(dispatch, range(0, n, step))):
                yield rows, np.asarray(on_devices)[: rows.stop - rows.start]
                advance(rows.stop - rows.start)

    def width(self, items: Embedding) -> int:
        """Length of a vector. items: embeddings, or their shapes."""
        return self.encoding.width(items)


StageOne = GlobalVectors | Encodings


def make_stage_one(evaluation: ConfigDict | FrozenConfigDict, score: Score, seed: int, mesh: Mesh) -> StageOne:
    """The stage one that config.eval.stage_one names; the global vectors where config.eval.two_stage is 0.

    seed: config.seed. Raises ValueError for an unknown one, and as `score_encoding`.
    """
    if evaluation.stage_one not in CHOICES:
        raise ValueError(f"config.eval.stage_one is {evaluation.stage_one!r}; choose from {', '.join(CHOICES)}")
    if evaluation.stage_one == "vectors" or not evaluation.two_stage:
        return GLOBAL_VECTORS
    return Encodings(score_encoding(score, evaluation.fde.to_dict(), seed), mesh)


@lru_cache(maxsize=8)
def _program(encoding: ScoreEncoding, side: str, mesh: Mesh) -> Mapped:
    """The program (embeddings [n], split over the devices, random numbers) -> vectors [n, width] of a side."""
    return map_specs(partial(encoding.encode, side=side), mesh, (P(DATA), P()), P(DATA))
