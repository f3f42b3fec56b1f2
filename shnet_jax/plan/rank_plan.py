"""Cost of ranking a gallery, before it is encoded: tiles, operations, memory and traffic of a device, time."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shnet_jax.evaluation.tiles import Queries, Tiling, programs, score_inputs, tile_shape
from shnet_jax.observe.compiled import memory
from shnet_jax.observe.work import Work, work
from shnet_jax.types import DATA, Embedding, Score

IN_FLIGHT = 2  # rounds whose arrays a device may hold at once: see `tiles.prefetch_one`

Items = tuple[Embedding, Embedding]
"""An image and a caption as the towers give them: arrays or shapes [1, ...]."""


@dataclasses.dataclass(frozen=True)
class RankPlan:
    """Ranking n images and t captions with float32 scores, both directions.

    rows, columns: images and captions of a tile. devices: that share the work.
    rounds: in each of which every device scores one tile: to count, and before that to find the matches' scores.
    work: of one device in all rounds, padding included.
    bytes_per_device: most that a device holds, by the compiler's account of the programs; depends on the tile only.
    sent_per_device: bytes of embeddings that travel to each device in all.
    seconds: of all rounds; None when no round was measured.
    pairs: that the score is computed for, all devices together and padding included; None for all, by the tile.
    host_bytes: of scores that the host keeps, 0: none.
    """

    images: int
    captions: int
    devices: int
    rows: int
    columns: int
    rounds: int
    work: Work
    bytes_per_device: int
    sent_per_device: int
    seconds: float | None
    pairs: int | None = None
    host_bytes: int = 0

    @property
    def tiles(self) -> int:
        """Tiles that are scored, over all devices."""
        return self.rounds * self.devices

    def __str__(self) -> str:
        took = "not measured" if self.seconds is None else f"about {self.seconds:,.1f} s"
        took = took if self.pairs is None else f"{self.pairs:,} pairs scored, {took}"
        moved = f"{self.sent_per_device / 2**30:.2f} GiB received"
        moved += f", {self.host_bytes / 2**30:.2f} GiB of scores on the host" if self.host_bytes else ""
        return (
            f"{self.images:,} images x {self.captions:,} captions on {self.devices} devices: {self.tiles:,} tiles of "
            f"{self.rows} x {self.columns} in {self.rounds:,} rounds; on each device {self.work.flops:.3g} FLOP, "
            f"{self.bytes_per_device / 2**20:.1f} MiB held, {moved}; {took}"
        )


def plan_ranking(
    n: int, t: int, items: Items, mesh: Mesh, tile: int, score: Score, round_seconds: float | None = None
) -> RankPlan:
    """Plans `ranks.ranks` of n images and t captions; compiles its programs, computes nothing.

    round_seconds: time of a round on this mesh, as `measure_round` gives it.
    """
    rows, columns = tile_shape(n, t, tile)
    across, down = -(-t // columns), -(-n // (rows * mesh.size))
    # The matches' scores lie on a staircase, as captions are tiled in the order of their images.
    staircase = across + down - 1
    rounds = across * down + staircase
    scored, counted = _compile_round(rows, columns, items, mesh, score)
    image, text = (item_bytes(score_inputs(score, item)) for item in items)
    one, two = memory(scored), memory(counted)  # the scores are the first one's output and the second one's argument
    held = one.arguments + one.temporaries + two.arguments + two.temporaries + two.outputs
    return RankPlan(
        images=n,
        captions=t,
        devices=mesh.size,
        rows=rows,
        columns=columns,
        rounds=rounds,
        work=work(scored.as_text()).times(rounds) + work(counted.as_text()).times(rounds - staircase),
        bytes_per_device=IN_FLIGHT * held,
        sent_per_device=rounds * rows * image + 2 * across * columns * text,
        seconds=None if round_seconds is None else round_seconds * rounds,
    )


def item_bytes(item: Embedding) -> int:
    """Bytes of one item on a device: floats in float32, as `encode` keeps them."""
    return sum(math.prod(leaf.shape) * (1 if leaf.dtype == bool else 4) for leaf in jax.tree.leaves(item))


def item_shapes(item: Any, count: int, sharding: NamedSharding | None = None) -> Any:
    """Shapes of `count` items like this one on a device: bool, or float32 as `encode` keeps them."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        dtype = leaf.dtype if leaf.dtype == bool else jnp.float32
        return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), dtype, sharding=sharding)

    return jax.tree.map(shape, item)


def random_like(shapes: Any) -> Any:
    """Random numbers of these shapes, True for bool."""
    rng = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.ones(leaf.shape, bool) if leaf.dtype == bool else rng.standard_normal(leaf.shape, np.float32)

    return jax.tree.map(values, shapes)


def _compile_round(
    rows: int, columns: int, items: Items, mesh: Mesh, score: Score
) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """The programs that score tiles of rows x columns and count."""
    split, replicated = NamedSharding(mesh, P(DATA)), NamedSharding(mesh, P())

    def queries(count: int, sharding: NamedSharding) -> Queries:
        dtypes: Any = Queries(jnp.int32, bool, jnp.int32, jnp.float32)  # type: ignore[arg-type]
        return jax.tree.map(lambda dtype: jax.ShapeDtypeStruct((count,), dtype, sharding=sharding), dtypes)

    run, total = programs(score, mesh), rows * mesh.size
    image, text = (score_inputs(score, item) for item in items)
    scored = run.scores.lower(item_shapes(image, total, split), item_shapes(text, columns, replicated))
    scores = jax.ShapeDtypeStruct((total, columns), scored.out_info.dtype, sharding=split)
    counted = run.count.lower(scores, queries(total, split), queries(columns, replicated))
    return scored.compile(), counted.compile()


def measure_round(items: Items, mesh: Mesh, tile: int, score: Score, repeats: int = 3) -> float:
    """Seconds of a round on this mesh with tiles of full size: the fastest of `repeats`, after one that compiles.

    Of random numbers; includes the transfers: the images, their queries and the counts.
    """
    rows, columns = tile_shape(tile * mesh.size, tile * 2**16, tile)
    sizes = zip(items, (rows * mesh.size, columns), strict=True)
    images, texts = (random_like(item_shapes(score_inputs(score, item), count)) for item, count in sizes)
    n, every = rows * mesh.size, np.arange(columns)
    tiling = Tiling(images, texts, every % n, every, rows, columns, mesh)
    run, took = programs(score, mesh), []
    captions = tiling.put_texts(every)

    def side(m: int, others: int) -> Queries:
        index = np.arange(m)
        return Queries(index, np.ones(m, bool), index % others, np.zeros(m))

    queries = tiling.put_whole(side(columns, n))
    for _ in range(repeats + 1):
        start = time.perf_counter()
        images_placed = tiling.put_images(np.arange(n))
        counts = run.count(run.scores(images_placed, captions), tiling.put_split(side(n, columns)), queries)
        jax.block_until_ready(counts)
        took.append(time.perf_counter() - start)
    return min(took[1:])
