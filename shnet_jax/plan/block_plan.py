"""Cost of ranking by a costly score, before anything is encoded: all pairs in blocks, or by re-ranking.

The companion of `rank_plan` for `pair_scores` and `rerank`: the programs are those, compiled from shapes alone.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shnet_jax.evaluation.pair_scores import GROUP, listed_at_once, make_programs
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.observe.compiled import memory
from shnet_jax.observe.work import work
from shnet_jax.parallel.mapping import replicate
from shnet_jax.plan.rank_plan import IN_FLIGHT, Items, RankPlan, item_bytes, item_shapes, random_like
from shnet_jax.types import DATA

SAMPLE = 16
"""Images, and captions, whose pairs are timed."""


@dataclasses.dataclass(frozen=True)
class PairCost:
    """A model's score, of which the cost is planned.

    params: shapes of its "params", the score's at least. items: an image and a caption as the towers give them.
    pair_seconds: of one pair on one device, None when it was not measured.
    """

    model: RetrievalModel
    params: Mapping[str, Any]
    items: Items
    pair_seconds: float | None = None

    @property
    def score_params(self) -> dict[str, Any]:
        """The parameters that the score reads."""
        return {name: self.params[name] for name in self.model.score_params}


def plan_blocks(n: int, t: int, cost: PairCost, mesh: Mesh, tile: int) -> RankPlan:
    """Plans `pair_scores.score_matrix` of n images and t captions: every pair once, in blocks of `tile` by `tile`."""
    rows, columns, rounds = _blocks(n, t, mesh, tile)
    compiled = make_programs(cost.model, mesh)[0].lower(*_sides(cost, rows, columns, mesh)).compile()
    return _plan(cost, (n, t), mesh, tile, compiled, rounds * rows * columns * mesh.size)


def plan_two_stage(first: RankPlan, k: int, cost: PairCost, mesh: Mesh, tile: int) -> RankPlan:
    """Plans re-ranking k candidates, as if no pair were a candidate in both directions.

    first: the plan of ranking by global vectors. The products that find the candidates are not counted again.
    """
    n, t = first.images, first.captions
    rows, columns, rounds = _blocks(n, t, mesh, tile)
    pairs = min(n * t, n * min(k, t) + t * min(k, n))
    full = -(-pairs // (rounds * mesh.size * GROUP)) + rows // 2  # and half a group of padding for each image
    at_once = listed_at_once(mesh)
    size = -(-full // at_once) * at_once * mesh.size
    split = NamedSharding(mesh, P(DATA))
    listed = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split) for shape in ((size,), (size, GROUP))]
    compiled = make_programs(cost.model, mesh)[1].lower(*_sides(cost, rows, columns, mesh), *listed).compile()
    second = _plan(cost, (n, t), mesh, tile, compiled, pairs)
    seconds = None if first.seconds is None or second.seconds is None else first.seconds + second.seconds
    return dataclasses.replace(
        second,
        work=second.work + first.work,
        bytes_per_device=max(second.bytes_per_device, first.bytes_per_device),
        sent_per_device=second.sent_per_device + first.sent_per_device,
        seconds=seconds,
        host_bytes=pairs * 4,
    )


def measure_pairs(cost: PairCost, mesh: Mesh) -> float:
    """Seconds that a device takes for one pair: of a small block of random numbers, after one that compiles."""
    block = make_programs(cost.model, mesh)[0]
    params, images, texts = random_like(_sides(cost, SAMPLE, SAMPLE, mesh))
    placed = replicate(params, mesh), jax.device_put(images, NamedSharding(mesh, P(DATA))), replicate(texts, mesh)
    jax.block_until_ready(block(*placed))
    start = time.perf_counter()
    jax.block_until_ready(block(*placed))
    return (time.perf_counter() - start) / SAMPLE**2


def _sides(cost: PairCost, rows: int, columns: int, mesh: Mesh) -> tuple[Any, Any, Any]:
    """Shapes of the score's parameters, of a round's images and of its captions."""
    split, replicated = NamedSharding(mesh, P(DATA)), NamedSharding(mesh, P())
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=replicated), cost.score_params)
    image, text = cost.items
    return params, item_shapes(image, rows * mesh.size, split), item_shapes(text, columns, replicated)


def _blocks(n: int, t: int, mesh: Mesh, tile: int) -> tuple[int, int, int]:
    """Rows and columns of a block, and rounds in each of which every device scores one."""
    rows, columns = min(tile, n), min(tile, t)
    return rows, columns, -(-n // (rows * mesh.size)) * -(-t // columns)


def _plan(
    cost: PairCost, sizes: tuple[int, int], mesh: Mesh, tile: int, compiled: jax.stages.Compiled, pairs: int
) -> RankPlan:
    (n, t), size = sizes, memory(compiled)
    rows, columns, rounds = _blocks(n, t, mesh, tile)
    image, text = map(item_bytes, cost.items)
    parameters = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cost.score_params))
    return RankPlan(
        images=n,
        captions=t,
        devices=mesh.size,
        rows=rows,
        columns=columns,
        rounds=rounds,
        work=work(compiled.as_text()).times(rounds),
        bytes_per_device=IN_FLIGHT * (size.arguments + size.temporaries + size.outputs),
        sent_per_device=parameters + rounds * rows * image + -(-t // columns) * columns * text,
        seconds=None if cost.pair_seconds is None else cost.pair_seconds * pairs / mesh.size,
        pairs=pairs,
        host_bytes=n * t * 4,
    )
