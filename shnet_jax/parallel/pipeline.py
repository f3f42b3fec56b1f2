"""Layers spread over the devices of a `stage` axis, through which microbatches flow (GPipe, Huang et al., 2019).

Forward only: stage s runs its layers on microbatch m at tick m + s, then hands the result to stage s + 1. All
stages are busy but at both ends, where `bubble_share` of the time is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shnet_jax.parallel.axis import axis_index, axis_size, ring_shift
from shnet_jax.types import Array

STAGE = "stage"
"""Name of the device axis along which the layers of a tower lie."""

Tree = TypeVar("Tree")


def bubble_share(microbatches: int, stages: int) -> float:
    """Share of the ticks in which a stage has no microbatch: (stages - 1) / (microbatches + stages - 1)."""
    if microbatches < 1 or stages < 1:
        raise ValueError(f"a pipeline has at least 1 microbatch and 1 stage, not {microbatches} and {stages}")
    return (stages - 1) / (microbatches + stages - 1)


def pipeline(
    layer: Callable[[Any, Array, Any], Array], params: Any, x: Array, extra: Any, axis: str | None, layers: int
) -> Array:
    """Runs all layers of all stages on every microbatch; a per-device function.

    Args:
      layer: (parameters of one layer, x [rows, ...], extra [rows, ...]) -> x of the same shape and dtype.
      params: this stage's layers, each leaf [places, ...]; together the stages hold layers 0, 1, ... in order
        (see `place_layers`).
      x: [microbatches, rows, ...]; read on the first stage only.
      extra: what every layer sees of a microbatch (a mask), each leaf [microbatches, rows, ...], equal on all
        stages.
      axis: name of the stage axis; None: there is one stage.
      layers: number of layers; the places behind them pass x on unchanged.

    Returns:
      [microbatches, rows, ...] on the last stage, zeros on the others: a `psum` over the axis gives the result to
      all stages, a `sum_scatter` a part of it to each.
    """
    stages, stage = axis_size(axis), axis_index(axis)
    microbatches = x.shape[0]
    places = jax.tree.leaves(params)[0].shape[0]
    padded = layers < stages * places

    def through(x: Array, extra: Any) -> Array:
        def one(x: Array, at: tuple[Array, Any]) -> tuple[Array, None]:
            number, layer_params = at
            out = layer(layer_params, x, extra)
            return (jnp.where(number < layers, out, x) if padded else out), None

        return lax.scan(one, x, (stage * places + jnp.arange(places), params))[0]

    def tick(arrived: Array, time: Array) -> tuple[Array, Array]:
        # In the bubble a stage computes a microbatch whose result is not used: a branch would save no time.
        m = jnp.clip(time - stage, 0, microbatches - 1)
        out = through(jnp.where(stage == 0, x[m], arrived), jax.tree.map(lambda e: e[m], extra))
        return ring_shift(out, axis), out

    _, outs = lax.scan(tick, jnp.zeros_like(x[0]), jnp.arange(microbatches + stages - 1))
    return jnp.where(stage == stages - 1, outs[stages - 1 :], 0)


def layer_places(layers: int, mesh: Mesh, axis: str = STAGE) -> int:
    """Largest number of layers that a stage holds. Raises ValueError when there are more stages than layers."""
    stages = mesh.shape[axis]
    if stages > layers:
        raise ValueError(f"{stages} stages for {layers} layers: some would have none, use at most {layers}")
    return -(-layers // stages)


def place_layers(layers: Sequence[Tree], mesh: Mesh, axis: str = STAGE) -> Tree:
    """Stacks the parameters of all layers to leaves [stages * places, ...] that are split along the axis.

    Every device is given the layers of its stage only, and no stack of all layers is made anywhere. Where the layers
    do not divide by the stages, the last places are zeros: as the stage with the most layers sets the pace, these
    places cost no time, while an error would leave most numbers of stages to few towers.

    Raises ValueError when there are more stages than layers.
    """
    stages, places = mesh.shape[axis], layer_places(len(layers), mesh, axis)
    sharding = NamedSharding(mesh, P(axis))

    def put(*leaves: Any) -> Array:
        like = leaves[0]

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(stages * places)
            arrays = [np.asarray(leaf) for leaf in leaves[first:last]]
            return np.stack(arrays + [np.zeros(like.shape, like.dtype)] * (last - first - len(arrays)))

        return jax.make_array_from_callback((stages * places, *like.shape), sharding, part)

    return jax.tree.map(put, *layers)
