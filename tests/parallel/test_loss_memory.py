"""What a loss and its gradient hold beside the embeddings, by the compiler's own account of the program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import base
from shnet_jax.losses import total
from shnet_jax.losses.candidates import PART, tile_size
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA, PAIR_STRATEGIES, Context, Embedding, Keys, Pairs, Queue

SIZE = 32768
DIM, TILE, FLOAT = 64, 512, 4
LOSSES = ("triplet", "infonce", "sigmoid")
WARM = [("triplet", {}), ("triplet", {"rank": 3}), ("triplet", {"softness": 0.1}), ("triplet", {"queue": 4096})]
WARM += [("global_triplet", {})]


@functools.cache
def temporary_bytes(loss, strategy, size, devices, queue=0, memory=0, **options):
    """Per device, at a global batch of `size`; the default options of the loss but for these, its warm-up included."""
    pairs = {"strategy": strategy, "tile": 0 if memory else TILE}
    default = base.get_config().loss[loss].to_dict()
    config = ConfigDict({"weights": {loss: 1.0}, loss: default | options, "pairs": pairs})
    params, compute = total.build(config, steps_per_epoch=4, memory=memory)

    def step(step, batch):
        held = Queue(jnp.zeros((queue, DIM)), jnp.zeros(queue, jnp.int32), jnp.int32(0))
        own = Embedding(batch["images"]), Embedding(batch["texts"])
        keys = Keys(*own, held, held) if queue else None

        def share(images, texts):
            ctx = Context(step=step, params=params, score=RetrievalModel.score, axis=DATA, keys=keys)
            return compute(Embedding(images), Embedding(texts), batch["ids"], ctx)["loss"]

        value, gradients = jax.value_and_grad(share, argnums=(0, 1))(batch["images"], batch["texts"])
        return axis.psum((value, jnp.vdot(*gradients)), DATA)

    run = mapping.map_step(step, mapping.data_mesh(jax.devices()[:devices]))
    vectors = jax.ShapeDtypeStruct((size, DIM), jnp.float32)
    batch = {"images": vectors, "texts": vectors, "ids": jax.ShapeDtypeStruct((size,), jnp.int32)}
    compiled = run.lower(jax.ShapeDtypeStruct((), jnp.int32), batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("loss", LOSSES)
def test_streamed_grows_with_the_batch_only(loss):
    tiles = 8 * SIZE / 8 * TILE * FLOAT
    gathered = 8 * SIZE * DIM * FLOAT
    assert temporary_bytes(loss, "streamed", SIZE, devices=8) < tiles + gathered


@pytest.mark.parametrize("loss", LOSSES)
def test_a_tile_by_memory_takes_its_part_of_the_memory(loss):
    """A device of 512 MiB: tiles of 512. Those for 8 GiB would not do, so the bound means something."""
    gathered = 8 * SIZE * DIM * FLOAT
    for memory, fits in ((2**29, True), (2**33, False)):
        taken = temporary_bytes(loss, "streamed", SIZE, devices=8, memory=memory)
        assert (taken < PART * 2**29 + gathered) is fits


def test_the_size_of_a_tile():
    vectors = Embedding(jax.ShapeDtypeStruct((4096, DIM), jnp.float32))
    sets = dataclasses.replace(vectors, elements=jax.ShapeDtypeStruct((4096, 4, DIM), jnp.float32))
    assert tile_size(Pairs("streamed"), vectors, vectors) == 1024
    assert tile_size(Pairs("streamed", 300, memory=2**34), vectors, vectors) == 300
    sizes = [tile_size(Pairs("streamed", memory=gib * 2**30), vectors, vectors) for gib in (0.01, 1, 1.9, 4, 16)]
    assert sizes == [128, 1024, 1024, 4096, 8192]
    assert tile_size(Pairs("streamed", memory=2**34), sets, sets) == 1024


@pytest.mark.parametrize("loss", LOSSES)
def test_ring_holds_the_block_of_one_device(loss):
    block = (SIZE / 8) ** 2 * FLOAT
    own = SIZE / 8 * DIM * FLOAT
    assert temporary_bytes(loss, "ring", SIZE, devices=8) < 3 * block + 20 * own + 20 * SIZE * FLOAT


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_gathered_is_what_the_others_save(loss):
    """The bounds above mean something: the whole block breaks both."""
    matrix = SIZE * SIZE / 8 * FLOAT
    assert temporary_bytes(loss, "gathered", SIZE, devices=8) > matrix
    for strategy in ("streamed", "ring"):
        assert temporary_bytes(loss, strategy, SIZE, devices=8) < matrix


@pytest.mark.parametrize(
    "strategy, loss, options",
    [(s, *WARM[0]) for s in PAIR_STRATEGIES] + [(s, *case) for s in ("gathered", "streamed") for case in WARM[1:]],
    ids=str,
)
def test_a_warm_up_that_is_over_costs_no_memory(strategy, loss, options):
    """Beside what its branch works in: a block in each direction, forward and backward, and with queues one more.

    What that branch keeps for its backward pass would be 3.5 blocks or more, with queues 4.8. jax 0.10 lets it work
    where the others did, jax 0.12 beside them.
    """
    with_it, without = (
        temporary_bytes(loss, strategy, 2048, devices=1, **options | {"warmup_epochs": epochs}) for epochs in (1.0, 0.0)
    )
    block = 2048 * FLOAT * (TILE if strategy == "streamed" else options.get("queue", 2048))
    assert with_it < without + (3.2 if "queue" in options else 2.2) * block
