"""What ranking a gallery will take, before it is encoded: tiles, operations, memory and traffic of a device, time."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shnet_jax.evaluate.tiles import Queries, Tiling, programs, tile_shape
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import DATA, Embedding, Score

IN_FLIGHT = 2  # rounds whose arrays a device may hold at once: see `tiles.one_behind`


@dataclasses.dataclass(frozen=True)
class RankPlan:
    """Ranking n images and t captions with float32 scores of vectors, both directions.

    rows, columns: images and captions of a tile. devices: that share the work.
    rounds: in each of which every device scores one tile: to count, and before that to find the matches' scores.
    flops: floating point operations of all scores, over all devices, padding included.
    bytes_per_device: most that a device holds, by the compiler's account of the programs; depends on the tile only.
    sent_per_device: bytes of embeddings that travel to each device in all.
    seconds: of all rounds; None when no tile was measured.
    """

    images: int
    captions: int
    dim: int
    devices: int
    rows: int
    columns: int
    rounds: int
    flops: float
    bytes_per_device: int
    sent_per_device: int
    seconds: float | None

    @property
    def tiles(self) -> int:
        """Tiles that are scored, over all devices."""
        return self.rounds * self.devices

    def __str__(self) -> str:
        took = "not measured" if self.seconds is None else f"about {self.seconds:,.0f} s"
        return (
            f"{self.images} images x {self.captions} captions, d = {self.dim}, {self.devices} devices: "
            f"{self.tiles} tiles of {self.rows} x {self.columns} in {self.rounds} rounds, {self.flops:.3g} FLOPs, "
            f"{self.bytes_per_device / 2**20:.1f} MiB on each device, {self.sent_per_device / 2**30:.2f} GiB sent to "
            f"each, {took}"
        )


def plan_ranking(
    n: int,
    t: int,
    dim: int,
    mesh: Mesh,
    tile: int = 512,
    score: Score = RetrievalModel.score,
    tile_seconds: float | None = None,
) -> RankPlan:
    """Plans `rank.ranks` of n images and t captions with vectors [dim]; compiles its programs, computes nothing.

    tile_seconds: time of a round on this mesh, as `measure_round` gives it.
    """
    rows, columns = tile_shape(n, t, tile)
    across, down = -(-t // columns), -(-n // (rows * mesh.size))
    # The matches' scores lie on a staircase, as captions are tiled in the order of their images.
    rounds = across * down + across + down - 1
    return RankPlan(
        images=n,
        captions=t,
        dim=dim,
        devices=mesh.size,
        rows=rows,
        columns=columns,
        rounds=rounds,
        flops=2.0 * rounds * mesh.size * rows * columns * dim,
        bytes_per_device=bytes_per_device(rows, columns, dim, mesh, score),
        sent_per_device=4 * dim * (rounds * rows + 2 * across * columns),
        seconds=None if tile_seconds is None else tile_seconds * rounds,
    )


def bytes_per_device(rows: int, columns: int, dim: int, mesh: Mesh, score: Score = RetrievalModel.score) -> int:
    """Most bytes that a device holds while tiles of rows x columns are scored and counted.

    Arguments, results and temporary memory of both programs as the compiler states them, for IN_FLIGHT rounds.
    """
    split, whole = NamedSharding(mesh, P(DATA)), NamedSharding(mesh, P())

    def vectors(count: int, sharding: NamedSharding) -> Embedding:
        shape: Any = jax.ShapeDtypeStruct((count, dim), jnp.float32, sharding=sharding)
        return Embedding(shape)

    def queries(count: int, sharding: NamedSharding) -> Queries:
        def field(dtype: type) -> Any:
            return jax.ShapeDtypeStruct((count,), dtype, sharding=sharding)

        return Queries(field(jnp.int32), field(bool), field(jnp.int32), field(jnp.float32))

    run, total = programs(score, mesh), rows * mesh.size
    scored = run.scores.lower(vectors(total, split), vectors(columns, whole))
    scores = jax.ShapeDtypeStruct((total, columns), scored.out_info.dtype, sharding=split)
    counted = run.count.lower(scores, queries(total, split), queries(columns, whole))
    first, second = (cast(Any, program.compile().memory_analysis()) for program in (scored, counted))
    # The scores are the first program's result and the second one's argument: they count once.
    return IN_FLIGHT * (
        first.argument_size_in_bytes
        + first.temp_size_in_bytes
        + second.argument_size_in_bytes
        + second.temp_size_in_bytes
        + second.output_size_in_bytes
    )


def measure_round(
    dim: int, mesh: Mesh, tile: int = 512, score: Score = RetrievalModel.score, repeats: int = 3
) -> float:
    """Seconds of a round on this mesh with tiles of full size: the fastest of `repeats`, after one that compiles.

    Of random unit vectors; includes what travels: the images, their queries and the counts.
    """
    rows, columns = tile_shape(tile * mesh.size, tile * 2**16, tile)
    rng = np.random.default_rng(0)
    images, texts = (rng.standard_normal((m, dim)).astype(np.float32) for m in (rows * mesh.size, columns))
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    every = np.arange(columns)
    tiling = Tiling(Embedding(images), Embedding(texts), every % len(images), every, rows, columns, mesh)
    run, took = programs(score, mesh), []
    captions = tiling.put_texts(every)

    def side(m: int, others: int) -> Queries:
        index = np.arange(m)
        return Queries(index, np.ones(m, bool), index % others, np.zeros(m))

    queries = tiling.put_whole(side(columns, len(images)))
    for _ in range(repeats + 1):
        start = time.perf_counter()
        found = tiling.put_images(np.arange(len(images)))
        counts = run.count(run.scores(found, captions), tiling.put_split(side(len(images), columns)), queries)
        jax.block_until_ready(counts)
        took.append(time.perf_counter() - start)
    return min(took[1:])
