"""Both mappings give one device's results: what goes in, what comes out, what is donated, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA

MAPPINGS = pytest.mark.parametrize("how", mapping.MAPPINGS)
DEVICES = pytest.mark.parametrize("devices", [1, 2, 8])


def step(state, batch, table):
    """Sum over the global batch of the table's rows that it names."""
    total = axis.psum(table[batch["row"]].sum(), DATA)
    return {"total": state["total"] + total, "steps": state["steps"] + 1}, {"here": total}


@MAPPINGS
@DEVICES
def test_map_step(how, devices):
    mesh = mapping.data_mesh(jax.devices()[:devices])
    table = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    rows = np.arange(16, dtype=np.int32)[::-1].copy()
    start = {"total": jnp.zeros(()), "steps": jnp.int32(0)}
    state, resident = mapping.replicate(start, mesh), mapping.replicate(table, mesh)
    run = mapping.map_step(step, mesh, how)
    for _ in range(3):  # the result of a step is the input of the next
        state, metrics = run(state, mapping.put_batch({"row": rows}, mesh, how), resident)
    np.testing.assert_allclose(metrics["here"], table[:16].sum(), rtol=1e-5)
    np.testing.assert_allclose(state["total"], 3 * table[:16].sum(), rtol=1e-5)
    assert state["steps"] == 3
    assert state["steps"].shape == ()
    assert not start["total"].is_deleted()  # donation did not reach the source of replicate()


@MAPPINGS
@pytest.mark.parametrize("donate", [True, False])
def test_donation(how, donate):
    mesh = mapping.data_mesh(jax.devices()[:2])
    state = mapping.replicate({"total": jnp.zeros(()), "steps": jnp.int32(0)}, mesh)
    batch = mapping.put_batch({"row": np.arange(4, dtype=np.int32)}, mesh, how)
    mapping.map_step(step, mesh, how, donate_state=donate)(state, batch, jnp.ones((4, 3)))
    assert state["total"].is_deleted() is donate


@MAPPINGS
@DEVICES
def test_map_encode_keeps_the_order_of_rows(how, devices):
    mesh = mapping.data_mesh(jax.devices()[:devices])
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    params = mapping.replicate({"w": np.arange(3, dtype=np.float32)}, mesh)
    encode = mapping.map_encode(lambda p, b: {"out": b["x"] * p["w"], "mask": b["x"] > 0}, mesh, how)
    for _ in range(2):  # params survive
        out = encode(params, mapping.put_batch({"x": x}, mesh, how))
    np.testing.assert_array_equal(out["out"], x * np.arange(3, dtype=np.float32))
    np.testing.assert_array_equal(out["mask"], x > 0)


@MAPPINGS
def test_lower_gives_the_cost_of_one_device(how):
    mesh = mapping.data_mesh(jax.devices()[:2])
    run = mapping.map_step(lambda s, b: axis.psum((b @ s).sum(), DATA), mesh, how, donate_state=False)
    lowered = run.lower(mapping.replicate(np.ones((8, 8), np.float32), mesh), np.ones((64, 8), np.float32))
    flops = lowered.compile().cost_analysis()["flops"]
    assert 2 * 32 * 8 * 8 <= flops < 2 * 64 * 8 * 8


@MAPPINGS
def test_rows_that_do_not_divide_are_named(how):
    mesh = mapping.data_mesh(jax.devices())
    with pytest.raises(ValueError, match=r"'image\.tokens' has 12 rows, which do not divide among 8 devices"):
        mapping.put_batch({"image": {"tokens": np.zeros((12, 3))}}, mesh, how)


def test_unknown_mapping_and_empty_mesh_are_errors():
    mesh = mapping.data_mesh(jax.devices()[:1])
    with pytest.raises(ValueError, match="shard_map or pmap, not 'xmap'"):
        mapping.map_step(step, mesh, "xmap")
    with pytest.raises(ValueError, match="at least one device"):
        mapping.data_mesh([])
