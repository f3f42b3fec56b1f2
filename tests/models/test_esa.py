"""ESA-style models: towers, sets and score behind the contract, and CLIP from pictures to an updated parameter."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import esa as esa_config
from data_prep import people
from data_prep.builder import write_dataset
from shnet_jax.experiment import assemble, init_variables
from shnet_jax.models import esa
from shnet_jax.models.contract import RetrievalModel, has_static_score
from shnet_jax.models.esa import SetScore
from shnet_jax.ops.set_similarity import SIMILARITIES, set_similarity
from shnet_jax.training.loop import train_and_evaluate
from shnet_jax.types import Embedding
from tests.train import tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "clip"


def config(**changes):
    c = esa_config.get_config()
    c.text.vocab_size, c.text.width, c.model.dim, c.data.token_buckets = 20, 16, 16, (8,)
    c.model.dtype = c.text.dtype = "float32"  # "auto" is settled by experiment.assemble
    c.update_from_flattened_dict(changes)
    return c


def batch(n=3, tokens=8):
    rng = np.random.default_rng(0)
    lengths = np.array([[8], [5], [2]])[:n]
    mask = jnp.asarray(np.arange(tokens) < lengths)
    return {
        "grid": jnp.float32(rng.normal(size=(n, 7, 6))),
        "image_embedding": jnp.float32(rng.normal(size=(n, 6))),
        "tokens": jnp.asarray(rng.integers(1, 20, (n, tokens)) * mask),
        "token_mask": mask,
    }


def encode(c, b):
    """The model, its first variables, and its embeddings of both sides."""
    model = esa.build(c)

    @jax.jit
    def run(b):
        embeddings, variables = model.init_with_output(jax.random.key(0), b, train=False)
        return variables, embeddings

    return model, *run(b)


@pytest.mark.slow
def test_sets_of_different_sizes_around_the_global_vectors():
    model, _, (images, texts) = encode(config(**{"model.esa.size": 3, "model.esa.text_size": 2}), batch())
    assert images.elements.shape == (3, 3, 16) and texts.elements.shape == (3, 2, 16)
    for side in (images, texts):
        np.testing.assert_allclose(np.linalg.norm(side.elements, axis=-1), 1, rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(side.vector, axis=-1), 1, rtol=1e-5)
    expected = images.vector @ texts.vector.T
    expected += set_similarity(images.elements, None, texts.elements, None, "smooth_chamfer", 16.0)
    np.testing.assert_allclose(model.score(images, texts), expected, atol=1e-5)
    assert has_static_score(model)
    # Compiled programs are found again by the score: equal models have equal ones.
    assert model.score == esa.build(config()).score and hash(model.score) == hash(SetScore("smooth_chamfer", 16.0, 1.0))


@pytest.mark.slow
def test_without_sets_it_is_the_plain_model():
    none = {"model.esa.size": 0, "model.esa.text_size": 0}
    model, _, (images, texts) = encode(config(**none), batch())
    assert model.score is RetrievalModel.score and images.elements is None and texts.elements is None
    _, _, (with_sets, _) = encode(config(), batch())
    np.testing.assert_allclose(images.vector, with_sets.vector, atol=1e-6)


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_a_set_of_the_global_vector_alone_ranks_as_the_plain_model(kind):
    """Sets of one element, the vector itself, score 1 + eta times the dot product."""
    rng, eta = np.random.default_rng(0), 0.7
    vectors = [jnp.float32(rng.normal(size=(9, 16))) for _ in range(2)]
    items = [Embedding(v, v[:, None]) for v in (v / jnp.linalg.norm(v, axis=1, keepdims=True) for v in vectors)]
    plain, found = RetrievalModel.score(*items), SetScore(kind, 16.0, eta)(*items)
    np.testing.assert_allclose(found, (1 + eta) * plain, atol=2e-6)
    for axis in (0, 1):
        np.testing.assert_array_equal(np.argsort(found, axis), np.argsort(plain, axis))


@pytest.mark.slow
def test_tokens_of_a_frozen_backbone():
    """Their global vector is that of the record, and nothing is learned before the set head."""
    c = config(**{"model.esa.head": "none", "model.dim": 6, "text.tower": "clip", "text.projection": 6})
    c.update_from_flattened_dict({"text.layers": 1, "text.heads": 2, "text.mlp_dim": 8, "model.esa.heads": 2})
    assert esa.image_fields(c) == ("grid", "image_embedding")
    b = batch()
    model, variables, (images, texts) = encode(c, b)
    vector = np.asarray(b["image_embedding"])
    np.testing.assert_allclose(images.vector, vector / np.linalg.norm(vector, axis=1, keepdims=True), atol=1e-6)
    assert set(variables["params"]) == {"text", "image_set", "text_set"}
    # The vector of a caption is its last valid token's.
    states = model.apply(
        variables, b["tokens"], b["token_mask"], method=lambda m, t, k: m.text.tower(t, k, train=False)
    )
    last = np.asarray(states)[np.arange(3), [7, 4, 1]]
    np.testing.assert_allclose(texts.vector, last / np.linalg.norm(last, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("field", ["grid", "image_embedding"])
def test_given_tokens_that_lie_in_another_space_are_refused(field):
    """As a backbone's hidden states do, which are wider than its image embedding."""
    c = config(**{"model.esa.head": "none", "model.dim": 6, "text.projection": 6})
    given = batch() | {field: jnp.zeros((*batch()[field].shape[:-1], 9))}
    with pytest.raises(
        ValueError, match=rf"{field} is 9 wide, expected 6, .*config\.model\.dim, .* --tokens=projected"
    ):
        jax.eval_shape(lambda: esa.build(c).init(jax.random.key(0), given, train=False))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.esa.similarity": "dot"}, r"similarity is 'dot'"),
        ({"model.esa.size": 0}, r"size is 0 and text_size 4"),
        ({"model.esa.source": "picture"}, r"needs head 'none'"),
        ({"model.esa.head": "none", "text.projection": 5}, r"text.projection is 5, config.model.dim 16"),
        ({"model.units": ("words",)}, r"units is \('words',\)"),
    ],
)
def test_what_does_not_fit_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        esa.build(config(**changes))


@pytest.fixture(scope="module")
def figures():
    splits = {s: list(people.records(3, first, first + 8)) for s, first in (("train", 0), ("val", 800), ("test", 1600))}
    for records in splits.values():
        for record in records:
            record["image"] = record["image"][:, :32][:32]  # 32 x 32 pixels: patches of 8
            del record["grid"]
    return write_dataset(tiny.folder(), "figures", splits, {"source": "made by the tests"})


def clip_config(folder, variant="cuhk_pedes", **more):
    """A configuration made tiny, with the recorded CLIP; `more` by dotted name with "__" for the dot."""
    c = esa_config.get_config(variant)
    changes = {
        "data.dir": str(folder),
        "data.max_tokens": 40,
        "data.token_buckets": (40,),
        "data.image_pad": 2,
        "data.read_threads": 1,
        "data.prefetch": 2,
        "text.weights": str(GOLDEN),
        "text.dtype": "float32",
        "model.dtype": "float32",
        "model.dim": 20,
        "model.esa.heads": 2,
        "model.esa.depth": 1,
        "optim.warmup_epochs": 0.0,
        "train.batch_size": 8,
        "train.steps": 2,
        "train.log_steps": 1,
        "parallel.devices": 1,
        "eval.batch_size": 8,
    }
    c.update_from_flattened_dict(changes | {name.replace("__", "."): value for name, value in more.items()})
    return c


@pytest.mark.slow
def test_a_clip_folder_gives_both_towers(figures):
    experiment = assemble(clip_config(figures))
    assert experiment.config.model.clip.grid == (4, 4) and experiment.config.text.projection == 20
    assert experiment.config.loss.identity.to_dict() == {"classes": 2, "dim": 20}
    params = init_variables(experiment, 0)["params"]
    assert params["image"]["vision_tower"]["positions"].shape == (17, 24)
    assert params["text"]["tower"]["words"].shape == (525, 32)
    with np.load(GOLDEN / "outputs.npz") as recorded:
        pixels = jnp.asarray(recorded["pixels"])
        run = partial(experiment.model.apply, train=False, method="encode_image")
        found = jax.jit(run)({"params": params}, {"image": pixels})
        expected = recorded["image_vectors"] / np.linalg.norm(recorded["image_vectors"], axis=1, keepdims=True)
    np.testing.assert_allclose(found.vector, expected, atol=1e-5)


@pytest.mark.slow
def test_fine_tuning_from_pictures(figures, tmp_path):
    with tiny.quick():
        results = train_and_evaluate(clip_config(figures), tmp_path)
    assert set(results.metrics) >= {"person_r1", "person_map", "person_minp"}
    assert results.metrics["person_r10"] == 100.0  # of 8 images of 2 persons
    assert all(np.isfinite(line["loss"]) for line in tiny.lines(tmp_path) if line["kind"] == "train")


@pytest.mark.slow
def test_training_set_heads_on_the_tokens_of_records(tmp_path):
    """Frozen parameters stay what they were, bit by bit, under a decay that would show; those of the set heads move."""
    rng = np.random.default_rng(0)

    def record(name):
        given = {"grid": rng.normal(size=(4, 20)), "image_embedding": rng.normal(size=20)}
        words = " ".join(rng.choice(["red", "man", "woman", "in", "bag"], 3))
        return {"image_id": name, "captions": [f"the {words}."]} | {n: np.float32(x) for n, x in given.items()}

    splits = {split: [record(f"{split}{i}") for i in range(8)] for split in ("train", "val", "test")}
    data = write_dataset(tiny.folder(), "tokens", splits, {"source": "made by the tests"})
    c = clip_config(data, "frozen", text__frozen_layers=2, optim__weight_decay=0.1, train__eval_epochs=0.0)
    experiment = assemble(c)
    assert experiment.fields == ("grid", "image_embedding")
    with tiny.quick():
        before = init_variables(experiment, c.seed)["params"]
        results = train_and_evaluate(c, tmp_path)
    assert set(before) == {"text", "image_set", "text_set"} and set(before["text"]) == {"tower"}
    after, moved = tiny.arrays(tmp_path, 2), 0
    for path, old in jax.tree_util.tree_leaves_with_path(before):
        new = after["model" + jax.tree_util.keystr(path)]
        if path[0].key == "text":
            np.testing.assert_array_equal(new, old, err_msg=jax.tree_util.keystr(path))
        elif new.ndim > 1:  # biases that cancel in a softmax learn nothing
            assert np.abs(new - old).max() > c.optim.lr / 2, jax.tree_util.keystr(path)
            moved += 1
    assert moved > 10
    assert 0 < results.metrics["rsum"] <= 600 and all(np.isfinite(x) for x in results.metrics.values())


def test_the_reported_split_chooses_no_checkpoint(figures, tmp_path):
    c = clip_config(figures)
    c.data.val_split = "test"
    with pytest.raises(ValueError, match=r"val_split is 'test': the checkpoint of a person search is never chosen"):
        train_and_evaluate(c, tmp_path)


def test_a_classifier_of_persons_needs_persons(figures):
    c = clip_config(figures)
    c.data.identity = False
    with pytest.raises(
        ValueError, match=r"config.loss.weights.identity is above 0, which needs a data set with the field"
    ):
        assemble(c)
