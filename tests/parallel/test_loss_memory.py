"""What a loss and its gradient hold beside the embeddings, by the compiler's own account of the program."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from shnet_jax.losses import total
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA, Context, Embedding
from tests.parallel.test_losses import INFONCE, SIGMOID, TRIPLET

SIZES = [pytest.param(1024, marks=pytest.mark.slow), pytest.param(8192, marks=pytest.mark.slow), 32768]
DIM, TILE, FLOAT = 64, 512, 4
LOSSES = {"triplet": TRIPLET, "infonce": INFONCE, "sigmoid": SIGMOID}


def temporary_bytes(loss, strategy, size, devices):
    """Per device, at a global batch of `size`, one array of queries' and candidates' width aside."""
    pairs = {"strategy": strategy, "tile": TILE}
    config = ConfigDict({"weights": {loss: 1.0}, loss: LOSSES[loss], "pairs": pairs})
    params, compute = total.build(config, steps_per_epoch=4)

    def step(step, batch):
        def share(images, texts):
            ctx = Context(step=step, params=params, score=RetrievalModel.score, axis=DATA)
            return compute(Embedding(images), Embedding(texts), batch["ids"], ctx)["loss"]

        gradients = jax.grad(share, argnums=(0, 1))(batch["images"], batch["texts"])
        return axis.psum(jnp.vdot(*gradients), DATA)

    run = mapping.map_step(step, mapping.data_mesh(jax.devices()[:devices]))
    vectors = jax.ShapeDtypeStruct((size, DIM), jnp.float32)
    batch = {"images": vectors, "texts": vectors, "ids": jax.ShapeDtypeStruct((size,), jnp.int32)}
    compiled = run.lower(jax.ShapeDtypeStruct((), jnp.int32), batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", SIZES)
def test_streamed_grows_with_the_batch_only(loss, size):
    tiles = 8 * size / 8 * TILE * FLOAT
    gathered = 8 * size * DIM * FLOAT
    assert temporary_bytes(loss, "streamed", size, devices=8) < tiles + gathered


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", SIZES)
def test_ring_holds_the_block_of_one_device(loss, size):
    block = (size / 8) ** 2 * FLOAT
    own = size / 8 * DIM * FLOAT
    assert temporary_bytes(loss, "ring", size, devices=8) < 3 * block + 20 * own + 20 * size * FLOAT


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("loss", LOSSES)
def test_gathered_is_what_the_others_save(loss):
    """The bounds above mean something: the whole block breaks both."""
    matrix = 8192 * 1024 * FLOAT
    assert temporary_bytes(loss, "gathered", 8192, devices=8) > matrix
    assert temporary_bytes(loss, "streamed", 8192, devices=8) < matrix
    assert temporary_bytes(loss, "ring", 8192, devices=8) < matrix
