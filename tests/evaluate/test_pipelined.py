import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import base
from shnet_jax.evaluation.pipelined import (
    check_pipeline,
    make_pipelined_text_encoder,
    place_variables,
    placed_shapes,
    stage_mesh,
)
from shnet_jax.models import shnet
from shnet_jax.parallel import mapping
from shnet_jax.parallel.pipeline import STAGE
from shnet_jax.types import DATA, Embedding

CAPTIONS, LENGTH = 16, 6
LAYERS = 5  # divide by neither 2 nor 4 stages
OFF = {"semantic": False, "spatial": False, "scene_tokens": False, "category_token": False}


def build(tower, **text):
    c = base.get_config()
    c.model.update(OFF | {"dim": 8})
    small = {"tower": tower, "layers": LAYERS, "vocab_size": 20, "width": 16, "heads": 2, "mlp_dim": 24}
    c.text.update(small | {"max_positions": LENGTH} | text)
    return shnet.build(c)


def captions(count=CAPTIONS):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, LENGTH + 1, count)
    mask = np.arange(LENGTH) < lengths[:, None]
    mask[-1] = False  # the last rows of a split's last batch are padding
    return {"tokens": np.where(mask, rng.integers(1, 20, mask.shape), 0).astype(np.int32), "token_mask": mask}


def shapes(model, batch, method="encode_text"):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), batch, train=False, method=method))


def randomised(shapes):
    """Every parameter random, biases and norms too."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: rng.normal(scale=0.3, size=s.shape).astype(np.float32), shapes)


@functools.cache
def example(tower):
    """Model, variables, its embedding of `captions()` on one device."""
    model = build(tower)
    variables = randomised(shapes(model, captions()))
    encode = jax.jit(functools.partial(model.apply, train=False, method="encode_text"))
    return model, variables, np.asarray(encode(variables, captions()).vector)


def mesh(data, stages):
    return stage_mesh(mapping.data_mesh(jax.devices()[: data * stages]), stages)


@functools.cache
def encoder(tower, data, stages, microbatches):
    return make_pipelined_text_encoder(example(tower)[0], mesh(data, stages), microbatches)


@pytest.mark.parametrize(
    ("tower", "data", "stages", "microbatches"),
    [
        pytest.param("bert", 1, 1, 1, marks=pytest.mark.slow),
        pytest.param("bert", 1, 4, 8, marks=pytest.mark.slow),
        ("bert", 2, 4, 4),
        pytest.param("transformer", 2, 4, 1, marks=pytest.mark.slow),
        ("clip", 2, 2, 2),
        pytest.param("siglip", 2, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_equals_the_encoder_of_one_device(tower, data, stages, microbatches):
    model, variables, expected = example(tower)
    placed = place_variables(model, variables, mesh(data, stages))
    found = encoder(tower, data, stages, microbatches)(placed, captions())
    assert isinstance(found, Embedding) and found.elements is None
    np.testing.assert_allclose(found.vector, expected, atol=1e-5)


def test_every_layer_counts_and_in_its_order():
    """The comparison above sees it when two layers of different stages are exchanged."""
    model, variables, expected = example("bert")
    tower = variables["params"]["text"]["tower"]
    swapped = tower | {"layer_0": tower["layer_4"], "layer_4": tower["layer_0"]}
    variables = {"params": {"text": variables["params"]["text"] | {"tower": swapped}}}
    swapped_embedding = encoder("bert", 2, 4, 4)(place_variables(model, variables, mesh(2, 4)), captions())
    assert np.abs(swapped_embedding.vector - expected).max() > 1e-2


def test_each_of_several_processes_gets_all_rows(monkeypatch):
    model, variables, expected = example("transformer")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    encode = make_pipelined_text_encoder(model, mesh(2, 2), 1)
    monkeypatch.undo()
    found = encode(place_variables(model, variables, mesh(2, 2)), captions())
    assert found.vector.is_fully_replicated
    np.testing.assert_allclose(found.vector, expected, atol=1e-5)


def test_the_evaluator_of_a_split_can_use_it():
    """Batches lie as for `map_encode` on the mesh of one axis, and the shared variables serve the image tower there."""
    model, variables, expected = example("transformer")
    flat = mapping.data_mesh(jax.devices())
    regions = {"regions": np.random.default_rng(2).normal(size=(8, 3, 5)).astype(np.float32)}
    both = randomised(shapes(model, regions, "encode_image"))
    both["params"] |= variables["params"]
    placed = place_variables(model, both, stage_mesh(flat, 4))
    texts = make_pipelined_text_encoder(model, stage_mesh(flat, 4), 2)(placed, mapping.put_batch(captions(), flat))
    np.testing.assert_allclose(texts.vector, expected, atol=1e-5)

    def image(variables, batch):
        return model.apply(variables, batch, train=False, method="encode_image")

    images = mapping.map_encode(image, flat)(placed.shared, mapping.put_batch(regions, flat))
    np.testing.assert_allclose(images.vector, jax.jit(image)(both, regions).vector, atol=1e-5)


def test_a_device_holds_its_share_of_the_layers():
    model, variables, _ = example("bert")
    grid = mesh(2, 4)
    placed = place_variables(model, variables, grid)
    names = {f"layer_{i}" for i in range(LAYERS)}
    tower = variables["params"]["text"]["tower"]
    assert placed.shared["params"]["text"]["tower"].keys() == tower.keys() - names
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(placed.layers):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert {*held.values()} == {2 * count_bytes(tower["layer_0"])}  # the last three of the 8 places are empty
    assert "layer_0" in tower  # what is placed is a copy


@pytest.mark.slow
def test_the_program_is_given_its_share_and_keeps_no_copy():
    model, batch = build("bert", layers=4, width=64, mlp_dim=256), captions(8)
    layers = 4 * count_bytes(shapes(model, batch)["params"]["text"]["tower"]["layer_0"])
    used = {stages: memory(model, mesh(1, stages), batch, microbatches=2) for stages in (1, 4)}
    one_row = count_bytes(batch) // 8
    saved = used[1].argument_size_in_bytes - used[4].argument_size_in_bytes
    assert saved == layers * 3 // 4 + 6 * one_row  # the captions too lie on four devices instead of one
    assert used[4].temp_size_in_bytes < layers // 4


def memory(model, mesh, batch, microbatches):
    """memory_analysis() of one device's program for variables that exist nowhere."""
    sharding = NamedSharding(mesh, P((DATA, STAGE)))
    rows = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), batch)
    encode = make_pipelined_text_encoder(model, mesh, microbatches)
    return encode.lower(placed_shapes(model, shapes(model, batch), mesh), rows).compile().memory_analysis()


def test_the_shapes_are_those_of_what_is_placed():
    model, variables, _ = example("bert")
    for grid in (mesh(1, 4), mesh(2, 2)):
        placed, shaped = place_variables(model, variables, grid), placed_shapes(model, variables, grid)
        for leaf, like in zip(*map(jax.tree.leaves, (placed, shaped)), strict=True):
            assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def count_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_errors():
    gru = build("bigru")
    with pytest.raises(ValueError, match="text tower BiGRU, which has no layers; set it to 1, or"):
        make_pipelined_text_encoder(gru, mesh(1, 4), 2)
    model, variables, _ = example("bert")
    with pytest.raises(ValueError, match="8 stages for 5 layers"):
        place_variables(model, variables, mesh(1, 8))
    with pytest.raises(ValueError, match=r"config\.eval\.stages is 3, which does not divide the 8 devices"):
        stage_mesh(mapping.data_mesh(jax.devices()), 3)
    with pytest.raises(ValueError, match=r"eval\.microbatches is 3, .* divide the 8 captions of a pipeline"):
        make_pipelined_text_encoder(model, mesh(2, 4), 3).lower(
            place_variables(model, variables, mesh(2, 4)), captions()
        )
    for rows, microbatches, message in ((2, 0, "microbatches is 0"), (2, 3, "microbatches is 3, .* the 8 captions")):
        with pytest.raises(ValueError, match=rf"config\.eval\.{message}"):
            check_pipeline(model, mesh(2, 4), microbatches, rows)
    with pytest.raises(ValueError, match="8 stages for 5 layers"):
        check_pipeline(model, mesh(1, 8), 1, 1)
    check_pipeline(model, mesh(2, 4), 4, 2)
