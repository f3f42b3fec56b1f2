"""The hardest negatives of each query among a gallery, streamed in tiles over the devices: no score matrix exists.

A negative is an item of another id, image or person, whose score is at most a share of that of the query's positive:
what scores higher is likely to be right, and only not said to be (NV-Retriever, arXiv 2407.15831).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from shnet_jax.evaluation.tiles import Tile, Tiling, check_no_nan, make_tiling, prefetch_one, programs, size
from shnet_jax.evaluation.top_k import NONE as NO_ITEM
from shnet_jax.evaluation.top_k import TopK, keep_best, merge_devices
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import Mapped, map_specs
from shnet_jax.types import DATA, Array, Embedding


@dataclasses.dataclass(frozen=True)
class Mining:
    """A gallery of n items and q queries, cut into blocks of queries.

    tiling: the gallery as its images, the queries as its captions; embeddings may be `np.memmap`.
    gallery_ids: [n] int32, query_ids: [q] int32; equal ids are no negatives.
    limit: rows of queries [b] -> the largest score [b] float32 of their negatives.
    k: negatives of a query, at most.
    """

    tiling: Tiling
    gallery_ids: np.ndarray
    query_ids: np.ndarray
    limit: Callable[[np.ndarray], np.ndarray]
    k: int

    @property
    def blocks(self) -> int:
        """Blocks that hold all queries."""
        return self.tiling.caption_tiles

    def block(self, number: int, advance: Callable[[int], None] = lambda pairs: None) -> TopK:
        """The hardest negatives of the queries of a block, in query order; -1 and -inf where there are fewer than k.

        advance: called after each tile with its number of pairs. Raises ValueError for NaN among the scores.
        """
        tiling, k = self.tiling, min(self.k, size(self.tiling.images))
        scores, allowed = programs(RetrievalModel.score, tiling.mesh).scores, _allowed(tiling.mesh)
        keep, devices = keep_best(tiling.mesh, k, 0), tiling.mesh.size
        best: Any = tiling.put_split(
            (
                np.full((devices, tiling.columns, k), -np.inf, np.float32),
                np.full((devices, tiling.columns, k), NO_ITEM, np.int32),
            )
        )
        queries = tiling.captions(number)
        rules = tiling.put_whole((self.query_ids[queries.items], self.limit(queries.items)))
        real = tiling.put_whole(queries.real)

        def update(tile: Tile) -> tuple[Tile, Array]:
            nonlocal best
            rows = tiling.put_split(np.where(tile.images.real, tile.images.items, NO_ITEM).astype(np.int32))
            ids = tiling.put_split(self.gallery_ids[tile.images.items])
            masked = allowed(scores(tile.placed_images, tile.placed_captions), ids, *rules)
            best, bad, _ = keep(best, masked, rows, real)
            return tile, bad

        nans = 0
        for tile, bad in prefetch_one(map(update, tiling.walk([number]))):
            nans += int(bad)
            advance(int(tile.images.real.sum() * queries.real.sum()))
        check_no_nan(nans, size(tiling.images), int(queries.real.sum()))
        merged = merge_devices(best, queries.real, k)
        none = np.isneginf(merged.score)
        missing = ((0, 0), (0, self.k - k))
        index = np.pad(np.where(none, -1, merged.index), missing, constant_values=-1)
        return TopK(index, np.pad(merged.score, missing, constant_values=-np.inf))


def make_mining(
    gallery: Embedding,
    queries: Embedding,
    ids: tuple[np.ndarray, np.ndarray],
    limit: Callable[[np.ndarray], np.ndarray],
    k: int,
    tile: int,
    mesh: Mesh,
) -> Mining:
    """The mining of a gallery in tiles of `tile` items. ids: of the gallery, of the queries. Others: see `Mining`."""
    of_gallery, of_queries = (np.asarray(each, np.int32) for each in ids)
    return Mining(make_tiling(gallery, queries, tile, mesh), of_gallery, of_queries, limit, k)


@lru_cache(maxsize=8)
def _allowed(mesh: Mesh) -> Mapped:
    """The program (scores [devices * rows, columns], ids of rows, ids and limits of columns) -> scores of negatives.

    Others get -inf; NaN stays, to be found.
    """

    def allowed(scores: Array, rows: Array, columns: Array, limits: Array) -> Array:
        negative = (rows[:, None] != columns[None, :]) & (scores <= limits[None, :])
        return jnp.where(negative | jnp.isnan(scores), scores, -jnp.inf)

    return map_specs(allowed, mesh, (P(DATA), P(DATA), P(), P()), P(DATA))
