"""Collectives: the identity when not mapped, and what they promise on 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np

from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA, Embedding


def test_identity_when_not_mapped():
    tree = {"a": jnp.arange(3)}
    assert axis.psum(tree, None) is tree
    assert axis.pmean(tree, None) is tree
    assert axis.all_gather(tree, None) is tree
    assert (axis.axis_index(None), axis.axis_size(None)) == (0, 1)


def test_on_eight_devices():
    def fn(_, batch):
        out = {
            "sum": axis.psum(batch.vector.sum(), DATA),
            "mean": axis.pmean(batch.vector.sum(), DATA),
            "all": axis.all_gather(batch, DATA),
            "indices": axis.all_gather(axis.axis_index(DATA)[None], DATA),
        }
        return out | {"size": jnp.int32(axis.axis_size(DATA))}

    vector = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    batch = Embedding(vector, elements=vector[:, None], mask=vector[:, :1] > 20)
    mesh = mapping.data_mesh(jax.devices())
    out = mapping.map_step(fn, mesh)(None, mapping.put_batch(batch, mesh))
    assert out["sum"] == vector.sum()
    assert out["mean"] == vector.sum() / 8
    assert out["size"] == 8
    np.testing.assert_array_equal(out["indices"], np.arange(8))
    jax.tree.map(np.testing.assert_array_equal, out["all"], batch)
