"""Collectives of the one data axis over two TPU slices, as the TPU compiler has them (docs/launch/multislice.md)."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shnet_jax.observe.hardware import target_devices
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA
from tests.test_plan import needs_libtpu

ROWS, COLUMNS = 128, 512
INSIDE = "replica_groups={{0,1,2,3,4,5,6,7}}"  # of each slice of 8


@pytest.fixture(scope="module")
def mesh():
    target_devices("tpu:v5e:2x4")  # tells libtpu that there is no TPU
    two = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:2x4", chips_per_host_bounds=(2, 2, 1), num_slices=2
    )
    devices = sorted(two.devices, key=lambda device: (device.process_index, device.id))  # as in make_mesh
    assert [device.slice_index for device in devices] == [0] * 8 + [1] * 8
    return mapping.data_mesh(devices)


def compiled(fn, mesh, result):
    block = jax.ShapeDtypeStruct((16 * ROWS, COLUMNS), jnp.float32, sharding=NamedSharding(mesh, P(DATA)))
    return mapping.map_specs(fn, mesh, P(DATA), result).lower(block).compile().as_text()


def sent(text):
    """Numbers that a device hands to the other slice in each transfer."""
    shapes = re.findall(r"= \(\w+\[([\d,]+)\]\S* u32\[\]\S* token\[\]\) send\(", text)
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


@needs_libtpu
def test_a_sum_crosses_the_slices_in_parts(mesh):
    """Summed inside of a slice first; each device then exchanges its eighth."""
    text = compiled(lambda x: axis.psum(x, DATA), mesh, P())
    assert sent(text) == [ROWS * COLUMNS // 8]
    assert re.search(rf" reduce-scatter\(.*{re.escape(INSIDE)}", text)
    assert re.search(rf" all-gather\(.*{re.escape(INSIDE)}", text)


@needs_libtpu
def test_a_gather_sends_each_block_once(mesh):
    text = compiled(lambda x: axis.all_gather(x, DATA), mesh, P())
    assert sent(text) == [ROWS * COLUMNS] and INSIDE in text


@needs_libtpu
def test_a_shift_of_the_ring_has_its_two_ends_in_other_slices(mesh):
    text = compiled(lambda x: axis.ring_shift(x, DATA), mesh, P(DATA))
    assert sent(text) == [ROWS * COLUMNS]
    assert "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7}}" in text
