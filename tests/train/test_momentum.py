"""Momentum encoders and queues: whole steps equal a float64 reference, whatever devices, mapping and microbatches."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import user as user_config
from shnet_jax.experiment import assemble
from shnet_jax.losses import total
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.ops.norms import l2norm
from shnet_jax.parallel import sharding
from shnet_jax.parallel.mapping import data_mesh, map_step, put_batch, replicate
from shnet_jax.training import momentum
from shnet_jax.training.setup import build_step, setup_training
from shnet_jax.training.state import create_state
from shnet_jax.training.step import make_step
from shnet_jax.types import DATA, Embedding, Queue
from tests.losses import oracle
from tests.train import tiny

IMAGES, CAPTIONS, DIM, STEPS, RATE = 8, 2, 3, 3, 0.3
PAIRS, QUEUE = IMAGES * CAPTIONS, 20  # texts wrap around in the second step, images in the third
UTO = {"scale": 20.0, "offset": 0.5, "batch_weight": 2.0, "mask_same_image": True}


class Linear(RetrievalModel):
    """Two matrices; `dropout` acts on what they multiply, in training."""

    dropout: float = 0.0

    def setup(self):
        self.image, self.text = (nn.Dense(DIM, use_bias=False) for _ in range(2))
        self.drop = nn.Dropout(self.dropout)

    def encode_image(self, batch, *, train):
        return Embedding(l2norm(self.image(self.drop(batch["features"], deterministic=not train))))

    def encode_text(self, batch, *, train):
        return Embedding(l2norm(self.text(self.drop(batch["tokens"], deterministic=not train))))


@functools.cache
def batches():
    rng, found = np.random.default_rng(0), []
    for _ in range(STEPS):
        index = rng.integers(0, 12, IMAGES).astype(np.int32)  # many return in later batches
        rows = {name: rng.normal(size=shape) for name, shape in (("features", (IMAGES, 5)), ("tokens", (PAIRS, 4)))}
        rows = {name: values.astype(np.float32) for name, values in rows.items()}
        found.append({"image_index": index, "identity": 100 + index // 2, **rows})  # two images of each person
    return found


@functools.cache
def variables():
    rng = np.random.default_rng(1)
    kernels = {name: rng.normal(size=(size, DIM)).astype(np.float32) for name, size in (("image", 5), ("text", 4))}
    return {"params": {name: {"kernel": kernel} for name, kernel in kernels.items()}, "batch_stats": {}}


def options(**changes):
    fields = {"queue": QUEUE, "dim": DIM, "decay": 0.6, "warm": False, "start": "uniform"}
    return momentum.Momentum(**fields | {"image_train": True, "text_train": False} | changes)


@functools.cache
def run(devices, mapping, microbatch=0, from_step=0):
    """[(state, metrics)] after each step of plain descent."""
    model, chosen, tx = Linear(), options(from_step=from_step), optax.sgd(RATE)
    loss_params, total_loss = total.build(ConfigDict({"weights": {"uto": 1.0}, "uto": UTO}), 1, queues=True)
    how = {"prepare_batch": lambda table, raw: raw, "microbatch": microbatch, "axis_name": DATA, "key_options": chosen}
    mesh = data_mesh(jax.devices()[:devices])
    step = map_step(make_step(model, total_loss, tx, **how), mesh, mapping, donate_state=False)
    state, done = replicate(create_state(variables(), loss_params, tx, False, 0, chosen), mesh), []
    for batch in batches():
        state, metrics = step(state, put_batch(batch, mesh, mapping))
        done.append((jax.device_get(state), metrics))
    return done


@functools.cache
def reference():
    """[(loss, parameters, key parameters, {side: (queue, ids, pointer)})] after each step, written down once more."""
    first = momentum.first_state(options(), variables(), seed=0)
    params = {name: np.float64(tower["kernel"]) for name, tower in variables()["params"].items()}
    keys, done = dict(params), []
    queues = {
        s: [np.float64(q.vectors), np.array(q.ids), 0] for s, q in (("image", first.images), ("text", first.texts))
    }
    for batch in batches():
        ids = np.repeat(batch["identity"], CAPTIONS)
        rows = {"image": np.repeat(batch["features"], CAPTIONS, axis=0), "text": batch["tokens"]}
        keys = {name: 0.6 * keys[name] + 0.4 * params[name] for name in params}
        own = {name: oracle.unit(rows[name] @ keys[name]) for name in params}

        def value(params, rows=rows, own=own, ids=ids, queues=queues):
            images, texts = (oracle.unit(rows[name] @ params[name]) for name in ("image", "text"))
            held = [
                ((x * own[other]).sum(1), x @ queues[other][0].T, queues[other][1])
                for x, other in ((images, "text"), (texts, "image"))
            ]
            given = {"scale": 20.0, "offset": 0.5, "weight": 2.0, "mask": True, "queues": held}
            return sum(oracle.uto(images @ texts.T, ids, **given))

        loss = value(params)
        slopes = {n: oracle.gradient(lambda x, n=n: value(params | {n: x}), params[n]) for n in params}  # noqa: B023
        queues = {side: [part.copy() if i < 2 else part for i, part in enumerate(q)] for side, q in queues.items()}
        for side, step in (("image", CAPTIONS), ("text", 1)):  # an image enters once
            vectors, of, pointer = queues[side]
            for vector, number in zip(own[side][::step], ids[::step], strict=True):
                vectors[pointer], of[pointer] = vector, number
                pointer = (pointer + 1) % QUEUE
            queues[side][2] = pointer
        params = {name: params[name] - RATE * slopes[name] for name in params}
        done.append((loss, params, keys, queues))
    return done


WAYS = [(1, "shard_map", 0), (8, "shard_map", 0), (8, "pmap", 0), (2, "shard_map", 4)]
SLOW = [(2, "pmap", 0), (1, "shard_map", 2)]


@pytest.mark.parametrize("way", [*WAYS, *(pytest.param(way, marks=pytest.mark.slow) for way in SLOW)], ids=str)
def test_steps_equal_the_reference(way):
    for (state, metrics), (loss, params, keys, queues) in zip(run(*way), reference(), strict=True):
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
        for name in params:
            np.testing.assert_allclose(state.params["model"][name]["kernel"], params[name], atol=1e-4)
            np.testing.assert_allclose(state.momentum.params[name]["kernel"], keys[name], atol=1e-4)
        for name, queue in (("image", state.momentum.images), ("text", state.momentum.texts)):
            vectors, ids, pointer = queues[name]
            np.testing.assert_allclose(queue.vectors, vectors, atol=1e-4)
            np.testing.assert_array_equal(queue.ids, ids)
            assert queue.pointer == pointer


def test_the_reference_meets_what_matters():
    """Queues that wrap around, random first vectors that are left, persons of the batch in a queue."""
    pointers = [queues["text"][2] for _, _, _, queues in reference()]
    assert pointers == [16, 12, 8]
    assert (reference()[0][3]["text"][1] == -1).sum() == QUEUE - PAIRS
    assert np.isin(batches()[1]["identity"], reference()[0][3]["image"][1]).any()
    assert not np.isin(batches()[1]["identity"], reference()[0][3]["image"][1]).all()
    params, keys = reference()[-1][1:3]
    assert all(np.abs(params[name] - keys[name]).max() > 0.05 for name in params)


@pytest.mark.parametrize("start, smallest, spread", [("uniform", 0.0, 0.75), ("gaussian", -1.0, 0.0)])
def test_first_queues(start, smallest, spread):
    """Unit vectors; uniform ones are all positive, with a mean cosine of 3/4 (published), Gaussian ones of 0."""
    state = momentum.first_state(options(queue=300, dim=200, start=start), variables(), seed=0)
    for queue in (state.images, state.texts):
        np.testing.assert_allclose(np.linalg.norm(queue.vectors, axis=1), 1, atol=1e-5)
        assert queue.vectors.min() >= smallest and (queue.vectors.min() < 0) == (start == "gaussian")
        cosines = np.asarray(queue.vectors @ queue.vectors.T)
        np.testing.assert_allclose(cosines[~np.eye(300, dtype=bool)].mean(), spread, atol=0.01)
        assert (queue.ids == -1).all() and queue.pointer == 0
    assert np.abs(state.images.vectors - state.texts.vectors).max() > 0.01


def test_a_batch_as_large_as_the_queue_fills_it_from_the_pointer_on():
    queue = Queue(jnp.zeros((4, 1)), jnp.full((4,), -1, jnp.int32), jnp.int32(3))
    queue = momentum.put(queue, Embedding(jnp.arange(4.0)[:, None]), jnp.arange(4, dtype=jnp.int32))
    assert queue.ids.tolist() == [1, 2, 3, 0] and queue.vectors[:, 0].tolist() == [1, 2, 3, 0] and queue.pointer == 3


def encoded(model, given=None, **changes):
    """Embeddings of the first batch by the key encoders, images and texts, and their statistics after it."""
    batch, key = batches()[0], jax.random.key(0)
    return momentum.encode(options(**changes), model, given or variables(), batch, key, "batch_stats")


@pytest.mark.parametrize("image_train", [True, False])
@pytest.mark.parametrize("text_train", [True, False])
def test_each_key_encoder_has_dropout_as_in_training_or_not(image_train, text_train):
    how = {"image_train": image_train, "text_train": text_train}
    plain, dropped = (encoded(Linear(rate), **how)[0] for rate in (0.0, 0.5))
    same = [np.array_equal(one.vector, other.vector) for one, other in zip(plain, dropped, strict=True)]
    assert same == [not image_train, not text_train]


class Normed(Linear):
    """Both towers begin with a BatchNorm."""

    def setup(self):
        super().setup()
        self.image_norm, self.text_norm = nn.BatchNorm(), nn.BatchNorm()

    def encode_image(self, batch, *, train):
        features = self.image_norm(batch["features"], use_running_average=not train)
        return super().encode_image(batch | {"features": features}, train=train)

    def encode_text(self, batch, *, train):
        tokens = self.text_norm(batch["tokens"], use_running_average=not train)
        return super().encode_text(batch | {"tokens": tokens}, train=train)


def test_both_key_encoders_leave_the_statistics_of_the_batch():
    batch = batches()[0]
    given = jax.jit(lambda: Normed().init(jax.random.key(0), batch, train=False))()
    _, found = encoded(Normed(), given, image_train=True, text_train=True)
    for tower, rows in (("image_norm", batch["features"]), ("text_norm", batch["tokens"])):
        np.testing.assert_allclose(found[tower]["mean"], 0.01 * rows.mean(0), rtol=1e-4)  # a first mean of 0
    _, found = encoded(Normed(), given, image_train=True, text_train=False)
    assert np.abs(found["image_norm"]["mean"]).min() > 0 and not found["text_norm"]["mean"].any()


def test_averages_follow_faster_at_first_when_warm():
    old, new = {"a": np.float32(1)}, {"a": np.float32(3)}
    state = momentum.MomentumState(old, {"image": old, "text": old}, None, None)
    for warm, step, decay in ((True, 0, 0.1), (True, 5, 0.4), (True, 500, 0.6), (False, 0, 0.6)):
        found = momentum.ema_update(options(warm=warm), state, new, {"image": new, "text": new}, jnp.int32(step))
        expected = decay + 3 * (1 - decay)
        np.testing.assert_allclose(found.params["a"], expected, rtol=1e-6)
        # Statistics of a tower that runs as in training are its own; others need those of the model.
        np.testing.assert_allclose([found.batch_stats[t]["a"] for t in ("image", "text")], [1, expected], rtol=1e-6)


def test_what_is_not_finite_is_noticed_and_leaves_keys_and_queues_alone():
    """A batch, and keys before they take part."""
    tx, chosen = optax.sgd(RATE), options(from_step=2)
    loss_params, total_loss = total.build(ConfigDict({"weights": {"uto": 1.0}, "uto": UTO}), 1, queues=True)
    step = jax.jit(make_step(Linear(), total_loss, tx, prepare_batch=lambda table, raw: raw, key_options=chosen))
    state = create_state(variables(), loss_params, tx, False, 0, chosen)
    assert step(state, batches()[0])[1]["nonfinite"] == 0
    broken_batch = batches()[0] | {"features": np.full((IMAGES, 5), np.nan, np.float32)}
    broken_keys = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.momentum.params)
    of_broken_keys = dataclasses.replace(state, momentum=dataclasses.replace(state.momentum, params=broken_keys))
    for before, batch in ((state, broken_batch), (of_broken_keys, batches()[0])):
        after, metrics = step(before, batch)
        assert metrics["nonfinite"] == 1
        jax.tree.map(np.testing.assert_array_equal, after.momentum, before.momentum)


def configuration(**changes):
    c = user_config.get_config()
    c.update_from_flattened_dict(
        {"model.dim": DIM, "momentum.queue": QUEUE, "train.batch_size": PAIRS, "optim.ema": 0.5, "optim.lr": 0.1}
        | changes
    )
    return c


def built(config, devices=4, model=None):
    return build_step(config, model or Linear(), data_mesh(jax.devices()[:devices]), variables(), 10, 100)


@pytest.mark.slow
def test_split_parameters_give_the_same_keys_and_whole_queues(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST", 8)
    states = []
    for split in (False, True):
        found = built(configuration(**{"parallel.shard_params": split}))
        state = found.first_state(variables())
        mesh = data_mesh(jax.devices()[:4])
        for batch in batches():
            state, _ = found.step(state, put_batch(batch, mesh), {})
        states.append(state)
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    held = states[1].momentum
    assert held.params["text"]["kernel"].addressable_shards[0].data.size == 4 * DIM // 4
    assert held.images.vectors.addressable_shards[0].data.size == QUEUE * DIM


def test_queues_fill_before_they_take_part():
    late, early = run(1, "shard_map", 0, 2), run(1, "shard_map", 0)
    assert [bool(metrics["uto_queue"] != 0) for _, metrics in late] == [step >= 2 for step in range(len(late))]
    assert early[0][1]["uto_queue"] != 0
    np.testing.assert_array_equal(late[0][0].momentum.texts.vectors, early[0][0].momentum.texts.vectors)
    chosen = momentum.options(configuration(**{"momentum.from_epoch": 1.5}), Linear(), steps_per_epoch=7)
    assert chosen.from_step == round(1.5 * 7)


def test_queues_that_would_never_take_part_are_refused():
    late = configuration(**{"momentum.from_epoch": 10.0})
    momentum.check_start(late, 10, 101)
    with pytest.raises(ValueError, match=r"from_epoch is 10\.0, step 100, and the run has 100 steps: its queues"):
        momentum.check_start(late, 10, 100)
    momentum.check_start(configuration(**{"momentum.from_epoch": 10.0, "momentum.queue": 0}), 10, 100)
    config = tiny.config(momentum__queue=64, momentum__from_epoch=2.0, train__steps=3, loss__weights__infonce=1.0)
    with pytest.raises(ValueError, match="its queues would never take part"):
        setup_training(assemble(config))


def test_the_planned_state_has_keys_and_queues():
    like = built(configuration()).like.momentum
    assert like.texts.vectors.shape == (QUEUE, DIM) and like.params["image"]["kernel"].shape == (5, DIM)
    assert built(configuration(**{"momentum.queue": 0})).like.momentum is None


def test_what_a_checkpoint_holds_of_a_queue():
    """A further field, even one that is None, and runs that were begun before it could not go on."""
    plain, sets = (momentum.first_state(options(sets=sizes), variables(), seed=0) for sizes in ((0, 0), (2, 3)))
    assert [field.name for field in dataclasses.fields(plain.images)] == ["vectors", "ids", "pointer"]
    assert (sets.images.elements.shape, sets.texts.elements.shape) == ((QUEUE, 2, DIM), (QUEUE, 3, DIM))
    np.testing.assert_array_equal(sets.texts.vectors, plain.texts.vectors)


class Elsewhere(Linear):
    """A score that is no dot product."""

    @staticmethod
    def score(images, texts):
        return -jnp.square(images.vector[:, None] - texts.vector).sum(-1)


@pytest.mark.parametrize(
    "changes, model, message",
    [
        ({"momentum.queue": PAIRS - 1}, None, r"momentum\.queue is 15; it must hold a whole batch, .*batch_size = 16"),
        ({"momentum.queue": -1}, None, r"momentum\.queue is -1"),
        ({"momentum.decay": 1.0}, None, r"momentum\.decay is 1\.0; it must be at least 0 and below 1"),
        (
            {"momentum.from_epoch": -1.0},
            None,
            r"momentum\.from_epoch is -1\.0; it must be a finite number of epochs >= 0",
        ),
        ({"momentum.start": "zeros"}, None, "'zeros'; choose from uniform, gaussian"),
        ({"loss.weights.sigmoid": 1.0, "loss.weights.uto": 0.0}, None, "sigmoid, none takes queues"),
        ({}, Elsewhere(), "neither the dot product of one vector .* nor one of sets of a fixed size"),
    ],
)
def test_settings_that_do_not_fit(changes, model, message):
    with pytest.raises(ValueError, match=message):
        built(configuration(**changes), model=model)
