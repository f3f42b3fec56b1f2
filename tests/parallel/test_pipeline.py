import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from shnet_jax.parallel import mapping
from shnet_jax.parallel.axis import psum
from shnet_jax.parallel.pipeline import STAGE, bubble_share, pipeline, place_layers
from shnet_jax.types import DATA

WIDTH, ROWS = 32, 3
ROWS_BY_DATA = P(None, DATA)


def layer(params, x, extra):
    """Layers do not commute, and each sees its own microbatch's `extra`."""
    return jnp.tanh(x @ params["w"] + params["b"] + extra[:, None])


def example(layers, microbatches, data=1):
    rng = np.random.default_rng(layers)
    params = [
        {
            "w": rng.normal(scale=WIDTH**-0.5, size=(WIDTH, WIDTH)).astype(np.float32),
            "b": rng.normal(size=WIDTH).astype(np.float32),
        }
        for _ in range(layers)
    ]
    x = rng.normal(size=(microbatches, data * ROWS, WIDTH)).astype(np.float32)
    return params, x, rng.normal(size=x.shape[:2]).astype(np.float32)


def expected(params, x, extra):
    x = x.astype(np.float64)
    for p in params:
        x = np.tanh(x @ p["w"].astype(np.float64) + p["b"] + extra[..., None])
    return x


def everywhere(out):
    return psum(out, STAGE)


def compiled(mesh, layers, finish=everywhere, out_specs=ROWS_BY_DATA):
    def run(params, x, extra):
        # Only the first stage may read x: the others get something else.
        x = jnp.where(jax.lax.axis_index(STAGE) == 0, x, jnp.nan)
        return finish(pipeline(layer, params, x, extra, STAGE, layers))

    return mapping.map_specs(run, mesh, (P(STAGE), ROWS_BY_DATA, ROWS_BY_DATA), out_specs)


@functools.cache
def grid(data, stages):
    return mapping.grid_mesh(jax.devices()[: data * stages], {DATA: data, STAGE: stages})


@pytest.mark.parametrize(
    ("data", "stages", "layers", "microbatches"),
    [(1, 1, 3, 2), (1, 4, 4, 1), (2, 4, 8, 5), (4, 2, 2, 3), (2, 4, 6, 2), (1, 8, 12, 3), (1, 4, 5, 9)],
)
def test_equals_one_layer_after_another(data, stages, layers, microbatches):
    mesh = grid(data, stages)
    params, x, extra = example(layers, microbatches, data)
    found = compiled(mesh, layers)(place_layers(params, mesh), x, extra)
    np.testing.assert_allclose(found, expected(params, x, extra), atol=2e-6)


def test_one_stage_needs_no_mapping():
    params, x, extra = example(3, 2)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *params)
    found = pipeline(layer, stacked, jnp.asarray(x), jnp.asarray(extra), None, 3)
    np.testing.assert_allclose(found, expected(params, x, extra), atol=2e-6)


def test_the_result_lies_on_the_last_stage():
    mesh = grid(1, 4)
    params, x, extra = example(4, 2)
    run = compiled(mesh, 4, finish=lambda out: out[None], out_specs=P(STAGE))
    found = np.asarray(run(place_layers(params, mesh), x, extra))
    np.testing.assert_array_equal(found[:-1], 0)
    np.testing.assert_allclose(found[-1], expected(params, x, extra), atol=2e-6)


@pytest.mark.parametrize(("layers", "places"), [(8, 2), (6, 2), (9, 3)])
def test_a_device_holds_the_layers_of_its_stage_only(layers, places):
    mesh = grid(2, 4)
    params, *_ = example(layers, 1)
    placed = place_layers(params, mesh)
    stage_of = {device: stage for row in mesh.devices for stage, device in enumerate(row)}
    assert len(placed["w"].addressable_shards) == 8
    for shard in placed["w"].addressable_shards:
        first = stage_of[shard.device] * places
        own = [p["w"] for p in params[first : first + places]]
        assert shard.data.shape == (places, WIDTH, WIDTH)
        np.testing.assert_array_equal(shard.data[: len(own)], np.reshape(own, (-1, WIDTH, WIDTH)))
        np.testing.assert_array_equal(shard.data[len(own) :], 0)


def test_a_program_is_given_its_share_of_the_layers():
    params, x, extra = example(8, 2)
    weights = sum(leaf.nbytes for p in params for leaf in p.values())
    for stages in (1, 4, 8):
        mesh = grid(1, stages)
        lowered = compiled(mesh, 8).lower(place_layers(params, mesh), x, extra)
        memory = lowered.compile().memory_analysis()
        assert memory.argument_size_in_bytes == weights // stages + x.nbytes + extra.nbytes
        assert memory.temp_size_in_bytes < weights // 4  # nor is a copy of all layers made while it runs


def test_microbatches_reach_a_stage_one_after_another():
    """In m + stages - 1 ticks, as `bubble_share` says: the layers run that often and no more."""
    mesh = grid(1, 4)
    params, x, extra = example(4, 6)
    calls = []

    def counted(params, x, extra):
        jax.debug.callback(lambda: calls.append(None))
        return layer(params, x, extra)

    def run(params, x, extra):
        return everywhere(pipeline(counted, params, x, extra, STAGE, 4))

    jax.block_until_ready(mapping.map_specs(run, mesh, (P(STAGE), P(), P()), P())(place_layers(params, mesh), x, extra))
    jax.effects_barrier()
    assert len(calls) == 4 * (6 + 4 - 1)
    assert bubble_share(6, 4) == pytest.approx(1 - 4 * 6 / len(calls))


@pytest.mark.parametrize(("microbatches", "stages", "share"), [(1, 1, 0.0), (9, 1, 0.0), (1, 4, 0.75), (5, 4, 3 / 8)])
def test_bubble_share(microbatches, stages, share):
    assert bubble_share(microbatches, stages) == share


def test_errors():
    with pytest.raises(ValueError, match=r"4 stages for 3 layers: .* use at most 3"):
        place_layers(example(3, 1)[0], grid(1, 4))
    with pytest.raises(ValueError, match="not 0 and 4"):
        bubble_share(0, 4)
