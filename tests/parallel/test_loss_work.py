"""How often a loss with its gradient scores the candidates and sends them around, counted in the compiled program."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from configs import base
from shnet_jax.losses import total
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.observe.work import work
from shnet_jax.parallel import axis, mapping
from shnet_jax.types import DATA, Context, Embedding

SIZE, DIM, DEVICES, FLOAT = 512, 64, 8, 4


def program(loss, strategy):
    """The text of a loss with all that it returns, and the gradients of the embeddings."""
    config = base.get_config().loss
    config.weights, config.pairs = ConfigDict({loss: 1.0}), ConfigDict({"strategy": strategy, "tile": 64})
    params, compute = total.build(config, steps_per_epoch=4)

    def step(step, batch):
        def share(images, texts):
            ctx = Context(step=step, params=params, score=RetrievalModel.score, axis=DATA)
            terms = compute(Embedding(images), Embedding(texts), batch["ids"], ctx)
            return terms["loss"], terms

        gradients, terms = jax.grad(share, argnums=(0, 1), has_aux=True)(batch["images"], batch["texts"])
        return axis.psum((jnp.vdot(*gradients), terms), DATA)

    run = mapping.map_step(step, mapping.data_mesh(jax.devices()[:DEVICES]))
    vectors = jax.ShapeDtypeStruct((SIZE, DIM), jnp.float32)
    batch = {"images": vectors, "texts": vectors, "ids": jax.ShapeDtypeStruct((SIZE,), jnp.int32)}
    return run.lower(jax.ShapeDtypeStruct((), jnp.int32), batch).compile().as_text()


@pytest.mark.parametrize(
    "loss, strategy, products, rounds",
    [
        # Each direction: scores, and two gradients of them; in tiles the scores once more in the backward pass.
        ("infonce", "gathered", 6, 0),
        ("infonce", "streamed", 8, 0),
        # Forward the candidates, backward the candidates and, a visit behind them, their gradients.
        ("infonce", "ring", 8, 6 + 2 / DEVICES),
        # The hardest negatives are searched for, and fetched, in a round each; that of the gradient is the fetching's.
        # One direction, whose gradient comes from the walk that sums: scored once, and sent once around the ring.
        ("sigmoid", "gathered", 3, 0),
        ("sigmoid", "streamed", 3, 0),
        ("sigmoid", "ring", 3, 2 + 1 / DEVICES),
        ("triplet", "gathered", 2, 0),
        ("triplet", "streamed", 2, 0),
        ("triplet", "ring", 2, 6),
    ],
)
def test_candidates_are_scored_and_sent_no_more_often_than_the_gradient_needs(loss, strategy, products, rounds):
    counted = work(program(loss, strategy))
    whole = 2 * SIZE // DEVICES * SIZE * DIM  # operations for the scores of a device's queries with all candidates
    assert products <= counted.flops / whole < products + 0.1  # the scores of the pairs themselves beside them
    sent = counted.collectives.get("collective-permute", 0) / (SIZE * DIM * FLOAT)
    assert rounds <= sent <= 1.05 * rounds  # with ids and rows
