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
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shnet_jax.evaluate.pair_scores import GROUP, LISTED_AT_ONCE, make_programs
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.observe.compiled import memory
from shnet_jax.observe.work import work
from shnet_jax.parallel.mapping import replicate
from shnet_jax.plan.rank_plan import IN_FLIGHT, Items, RankPlan, item_bytes, plan_ranking
from shnet_jax.types import DATA, Embedding

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
    rows, columns = min(tile, n), min(tile, t)
    rounds = -(-n // (rows * mesh.size)) * -(-t // columns)
    compiled = make_programs(cost.model, mesh)[0].lower(*_sides(cost, rows, columns, mesh)).compile()
    return _plan(cost, n, t, mesh, (rows, columns), rounds, compiled, rounds * rows * columns * mesh.size)


def plan_two_stage(n: int, t: int, k: int, cost: PairCost, mesh: Mesh, tile: int) -> RankPlan:
    """Plans `rerank.rerank` with k candidates, as if no pair were a candidate in both directions.

    The ranking by global vectors is counted once; the products that find the candidates are not counted again.
    """
    rows, columns = min(tile, n), min(tile, t)
    rounds = -(-n // (rows * mesh.size)) * -(-t // columns)
    pairs = min(n * t, n * min(k, t) + t * min(k, n))
    full = -(-pairs // (rounds * mesh.size * GROUP)) + rows // 2  # and half a group of padding for each image
    size = -(-full // LISTED_AT_ONCE) * LISTED_AT_ONCE * mesh.size
    split = NamedSharding(mesh, P(DATA))
    listed = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split) for shape in ((size,), (size, GROUP))]
    compiled = make_programs(cost.model, mesh)[1].lower(*_sides(cost, rows, columns, mesh), *listed).compile()
    reranking = _plan(cost, n, t, mesh, (rows, columns), rounds, compiled, pairs)
    vectors = [Embedding(item.vector) for item in cost.items]
    first = plan_ranking(n, t, (vectors[0], vectors[1]), mesh, tile, RetrievalModel.score)
    return dataclasses.replace(
        reranking,
        work=reranking.work + first.work,
        bytes_per_device=max(reranking.bytes_per_device, first.bytes_per_device),
        sent_per_device=reranking.sent_per_device + first.sent_per_device,
        host_bytes=pairs * 4,
    )


def measure_pairs(cost: PairCost, mesh: Mesh) -> float:
    """Seconds that a device takes for one pair: of a small block of random numbers, after one that compiles."""
    rng = np.random.default_rng(0)

    def random(leaf: Any) -> np.ndarray:
        return np.ones(leaf.shape, bool) if leaf.dtype == bool else rng.standard_normal(leaf.shape, np.float32)

    block = make_programs(cost.model, mesh)[0]
    params, images, texts = jax.tree.map(random, _sides(cost, SAMPLE, SAMPLE, mesh))
    placed = replicate(params, mesh), jax.device_put(images, NamedSharding(mesh, P(DATA))), replicate(texts, mesh)
    jax.block_until_ready(block(*placed))
    start = time.perf_counter()
    jax.block_until_ready(block(*placed))
    return (time.perf_counter() - start) / SAMPLE**2


def _sides(cost: PairCost, rows: int, columns: int, mesh: Mesh) -> tuple[Any, Any, Any]:
    """Shapes of the score's parameters, of a round's images and of its captions."""

    def shapes(tree: Any, count: int | None, spec: P) -> Any:
        def shape(leaf: Any) -> jax.ShapeDtypeStruct:
            whole = leaf.shape if count is None else (count, *leaf.shape[1:])
            dtype = leaf.dtype if leaf.dtype == bool else jnp.float32
            return jax.ShapeDtypeStruct(whole, dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(shape, tree)

    return (
        shapes(cost.score_params, None, P()),
        shapes(cost.items[0], rows * mesh.size, P(DATA)),
        shapes(cost.items[1], columns, P()),
    )


def _plan(
    cost: PairCost,
    n: int,
    t: int,
    mesh: Mesh,
    tile: tuple[int, int],
    rounds: int,
    compiled: jax.stages.Compiled,
    pairs: int,
) -> RankPlan:
    held = memory(compiled)
    image, text = map(item_bytes, cost.items)
    seconds = None if cost.pair_seconds is None else cost.pair_seconds * pairs / mesh.size
    parameters = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cost.score_params))
    return RankPlan(
        images=n,
        captions=t,
        devices=mesh.size,
        rows=tile[0],
        columns=tile[1],
        rounds=rounds,
        work=work(compiled.as_text()).times(rounds),
        bytes_per_device=IN_FLIGHT * (held.arguments + held.temporaries + held.outputs),
        sent_per_device=parameters + rounds * tile[0] * image + -(-t // tile[1]) * tile[1] * text,
        seconds=seconds,
        pairs=pairs,
        host_bytes=n * t * 4,
    )
