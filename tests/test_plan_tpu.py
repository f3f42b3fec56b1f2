"""Programs compiled for TPU slices that this machine lacks."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from configs import base, scenes
from data_prep.scenes import write
from data_prep.scenes.features import REGION_SIZE
from shnet_jax.losses import total
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.models.text import build_encoder
from shnet_jax.modes import plan as plan_mode
from shnet_jax.observe.compiled import compile_lowered, memory
from shnet_jax.observe.hardware import GIB, target_devices
from shnet_jax.parallel import axis
from shnet_jax.parallel.mapping import data_mesh, map_step
from shnet_jax.plan import programs
from shnet_jax.plan.planned_run import describe, variable_shapes
from shnet_jax.types import DATA, Context, Embedding
from tests.test_plan import needs_libtpu, small


@needs_libtpu
@pytest.mark.slow
def test_microbatches_are_counted_for_tpu():
    """Four times the batch in microbatches of one size: the towers do four times as much."""
    mesh, found = data_mesh(target_devices("tpu:v5e:2x4")), []
    for pairs in (10, 40):
        run = describe(small(train__microbatch=5, train__microbatch_statistics="local"))
        lowered = programs.lower_train(run, mesh, pairs)
        found.append(programs.compile_program(lambda lowered=lowered: lowered, pairs, 16 * GIB, effort=-1.0))
    once, more = found
    assert once.fits and more.fits and once.work.loops_once == more.work.loops_once == 0
    assert 3.9 < more.work.flops / once.work.flops < 5  # the scores of the loss grow with the square


@needs_libtpu
@pytest.mark.slow
def test_the_warm_up_is_known_on_tpu():
    mesh = data_mesh(target_devices("tpu:v5e:2x4"))
    run = describe(small(model__name="tests.train.toy", loss__weights__triplet=1.0, loss__weights__infonce=0.0))
    found = programs.compile_program(lambda: programs.lower_train(run, mesh, 40), 40, 16 * GIB, effort=-1.0)
    assert found.warm_up.flops - found.work.flops >= 2 * 3 * 2 * 40 * 320 * run.config.model.dim
    assert found.work.float32["highest"] > found.work.flops / 2


@needs_libtpu
@pytest.mark.slow
def test_the_scenes_are_planned_for_tpu(tmp_path, capsys):
    """`--mode=plan --target=tpu:v5e:2x4`: configs/scenes.py as it is, and the sizes of its data set."""
    config = scenes.get_config()
    data = {"images": write.SIZES["train"], "gallery": write.SIZES["test"], "regions": 16, "region_dim": REGION_SIZE}
    config.data.dir, config.text.vocab_size = "", 134
    config.plan.update(data | {"search": False, "effort": -1.0})  # a third of the time
    assert config.model.semantic and config.model.spatial and config.train.batch_size == 320
    plan_mode.plan(config, tmp_path, "tpu:v5e:2x4")
    report = json.loads((tmp_path / "plan_tpu_v5e_2x4.json").read_text())
    assert (report["devices"], report["device_kind"]) == (8, "TPU v5 lite")
    compiled = report["programs"]
    assert [*compiled] == ["train", "encode images", "encode captions"]
    assert all(
        found["fits"] and found["memory"]["peak"] > 0 and found["work"]["flops"] > 0 for found in compiled.values()
    )
    sent = compiled["train"]["work"]["collectives"]
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(describe(config))["params"]))
    assert sent["all-reduce"] == pytest.approx(weights, rel=0.02)  # the gradients
    assert sent["all-gather"] == 2 * 320 * 256 * 4  # all embeddings
    assert compiled["encode images"]["work"]["collectives"] == compiled["encode captions"]["work"]["collectives"] == {}
    ranking = report["rankings"]["exact"]
    assert ranking["fits"] and ranking["bytes_per_device"] > 0 and ranking["work"]["collectives"]["all-reduce"] > 0
    assert ranking["work"]["flops"] >= 2 * 500 * 2500 * 256 / 8
    output = capsys.readouterr().out
    assert all(line in output for line in ("\nall-reduce ", "\nall-gather ", "\npeak ", "ranking, exact: 500 images"))


@needs_libtpu
@pytest.mark.slow
def test_a_global_batch_of_32768_fits():
    """The published sizes (BERT base, 36 regions, 133 classes, a 64 x 64 map) in bfloat16 on 8 v5e chips of 16 GiB.

    Of BERT's 12 layers two are compiled, and what the others take is added.
    """
    config, pairs = base.get_config(), 4096
    config.model.dtype = config.text.dtype = "bfloat16"
    config.text.layers = 2
    config.train.batch_size = 8 * pairs
    config.train.microbatch = 64
    config.train.microbatch_statistics = "local"
    config.loss.pairs.strategy = "streamed"
    run, mesh = describe(config), data_mesh(target_devices("tpu:v5e:2x4"))
    # With the least effort the compiler takes a tenth of the time, and more memory than it has to.
    plan = programs.compile_program(lambda: programs.lower_train(run, mesh, pairs), pairs, 16 * GIB, effort=-1.0)
    # BERT base has 10 layers more. Of each: five copies of its parameters (gradients, moments, averages) and, for the
    # captions of a microbatch, what 40 arrays of the width of the tower take, where 20 are kept for the backward pass.
    layer = 5 * 4 * 7_087_872 + 40 * 2 * config.train.microbatch * 32 * config.text.width
    assert plan.fits and plan.needed + 10 * layer < 16 * GIB, plan.why
    assert plan.work.loops_once == 0
    # Two forward passes and a backward one, as much as two: 4 x 2 operations for each weight of the layers and token.
    assert plan.work.flops > 8 * 2 * 7_087_872 * pairs * 32


@needs_libtpu
@pytest.mark.slow
def test_bfloat16_activations_take_40_percent_less_memory_on_tpu():
    """Gradients of four layers of BERT base and the head behind them, on 256 captions. Measured: 48 % less."""

    def temporaries(activations, operands):
        c = base.get_config()
        c.text.layers, c.text.vocab_size = 4, 30_522
        c.model.activation_dtype, c.text.dtype = activations, operands
        encoder = build_encoder(c)
        at = SingleDeviceSharding(target_devices("tpu:v5e:2x2")[0])
        tokens, mask = jnp.zeros((256, 32), jnp.int32), jnp.ones((256, 32), bool)
        params = jax.eval_shape(lambda: encoder.init(jax.random.key(0), tokens, mask, train=False))

        def loss(params, tokens, mask, key):
            rngs = {"dropout": jax.random.wrap_key_data(key)}
            vector = encoder.apply(params, tokens, mask, train=True, rngs=rngs).vector
            return jnp.sum(vector * jnp.cos(jnp.arange(vector.size)).reshape(vector.shape))

        given = (params, tokens, mask, jax.random.key_data(jax.random.key(0)))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), given)
        return memory(compile_lowered(jax.jit(jax.grad(loss)).lower(*shapes), -1.0)).temporaries

    assert temporaries("bfloat16", "bfloat16") < 0.6 * temporaries("float32", "float32")


@needs_libtpu
@pytest.mark.slow
def test_a_ring_sends_while_it_scores():
    """Blocks travel during the products of a visit: alone with the scores, with gradients during all three products.

    A product is a fusion of kind kOutput on a TPU; of the sums of gradients two products are left to wait for. The
    sigmoid loss scores each block once, so a training step has one loop.
    """
    mesh = data_mesh(target_devices("tpu:v5e:2x4"))
    params, compute = total.build(
        ConfigDict(
            {
                "weights": {"sigmoid": 1.0},
                "sigmoid": base.get_config().loss.sigmoid.to_dict(),
                "pairs": {"strategy": "ring", "tile": 128},
            }
        ),
        4,
    )

    size, dim = 2048, 256
    vectors = jax.ShapeDtypeStruct((size, dim), jnp.float32)
    batch = {"images": vectors, "texts": vectors, "ids": jax.ShapeDtypeStruct((size,), jnp.int32)}
    block = f"f32[{size // mesh.size},{dim}]"

    def products_in_loops(with_gradients):
        def step(step, batch):
            def local_loss(images, texts):
                context = Context(step=step, params=params, score=RetrievalModel.score, axis=DATA)
                return compute(Embedding(images), Embedding(texts), batch["ids"], context)["loss"]

            if not with_gradients:
                return axis.psum(local_loss(batch["images"], batch["texts"]), DATA)
            value, gradients = jax.value_and_grad(local_loss, argnums=(0, 1))(batch["images"], batch["texts"])
            return axis.psum((value, jnp.vdot(*gradients)), DATA)

        text = map_step(step, mesh).lower(jax.ShapeDtypeStruct((), jnp.int32), batch).compile().as_text()
        bodies = re.split(r"\n(?=%)", text.split("\nENTRY")[0])
        return [counts for body in bodies if (counts := _products_meanwhile(body, block))]

    assert products_in_loops(with_gradients=False) == [[1]]
    assert products_in_loops(with_gradients=True) == [[2, 3]]


def _products_meanwhile(body, shape):
    """How many products are computed while each array of this shape is on its way, in a body of a loop."""
    started, products, counts = {}, 0, []
    for line in body.splitlines():
        name = line.split("=")[0].strip().lstrip("%")
        if "collective-permute-start(" in line and f"({shape}" in line:
            started[name] = products
        elif "collective-permute-done(" in line and (source := line.split("done(%")[-1].split(")")[0]) in started:
            counts.append(products - started[source])
        products += "kind=kOutput" in line
    return sorted(counts)
