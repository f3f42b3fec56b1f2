"""USER's checks on recordings written here: values by the float64 oracles, in torch's names and layouts."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from configs import user as user_config
from shnet_jax.interop.published import text_encoder_slots
from shnet_jax.interop.torch_weights import Slots, text_head_slots, user_image_encoder_slots
from shnet_jax.models.bert import BERT
from tests.losses import oracle
from tests.models import image_oracle as image
from tests.models.test_shnet import random_variables
from tests.models.user_oracle import Encoder, unit
from tests.parity import convert, user, user_train_steps
from tests.parity.__main__ import main
from tests.parity.compare import Fixture

DIM, FEATURES, BATCH, QUEUE = 4, 6, 3, 7


def torch_arrays(flat: dict[tuple[str, ...], np.ndarray], slots: Slots) -> dict[str, np.ndarray]:
    """Our arrays, by collection and path, in torch's names and layouts."""
    found = {}
    for name, slot in slots.items():
        array = np.asarray(flat[slot.collection, *slot.path])
        array = array[..., None] if slot.squeeze else array
        found[name] = array if slot.axes is None else array.transpose(np.argsort(slot.axes))
    return found


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@functools.cache
def tower():
    """(variables of a small image encoder, regions)."""
    regions = np.abs(draw(BATCH, 36, FEATURES))
    batch = {"regions": regions, "region_mask": np.ones((BATCH, 36), bool)}
    return random_variables(user.encoder(DIM, 1.0), batch), regions


def encoder_arrays() -> dict[str, np.ndarray]:
    variables, regions = tower()
    slots, mask, cotangent = user_image_encoder_slots(), np.ones((BATCH, 36), bool), draw(BATCH, DIM)
    arrays = {"in.images": regions, "in.image_lengths": np.full(BATCH, 36), "in.cotangent": cotangent}
    arrays["meta.attention_lamda"] = np.float32(1)
    for name, array in torch_arrays(traverse_util.flatten_dict(variables), slots).items():
        arrays[f"{'buffer' if slots[name].collection == 'batch_stats' else 'param'}.{name}"] = array
    for mode in ("eval", "train"):
        stats = variables["batch_stats"] if mode == "eval" else None
        found = Encoder(variables["params"], stats, ("sge",), "slots", 1.0)
        arrays[f"{mode}.out.embedding"] = found({"regions": regions}, {"regions": mask})
        arrays[f"{mode}.out.sge_new_global"] = found.guide("regions", np.float64(regions), mask)

    def value(params, regions):  # gradients: the model's own, turned to torch's layout
        given = {"regions": regions, "region_mask": mask}
        out, updated = user.encoder(DIM, 1.0).apply(
            variables | {"params": params}, given, train=True, mutable=["batch_stats"]
        )
        return (out * cotangent).sum(), updated["batch_stats"]

    (gradients, of_regions), stats = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(
        variables["params"], regions
    )
    flat = traverse_util.flatten_dict({"params": gradients, "batch_stats": stats})
    for name, array in torch_arrays(flat, slots).items():
        prefix = "train.buffer_after" if slots[name].collection == "batch_stats" else "train.grad.param"
        arrays[f"{prefix}.{name}"] = array
    return arrays | {"train.grad.in.images": of_regions, "train.buffer_after.mlp.bns.1.running_mean": np.zeros(DIM)}


def guide_arrays() -> dict[str, np.ndarray]:
    variables, regions = tower()
    mean, arrays = draw(BATCH, FEATURES), {"in.local": regions, "meta.attention_lamda": np.float32(1)}
    arrays["in.raw_global"] = mean
    slots = {n.removeprefix("v_sa."): s for n, s in user_image_encoder_slots().items() if n.startswith("v_sa.")}
    for name, array in torch_arrays(traverse_util.flatten_dict(variables), slots).items():
        arrays[f"{'buffer' if slots[name].collection == 'batch_stats' else 'param'}.{name}"] = array
    for mode in ("eval", "train"):
        stats = variables["batch_stats"] if mode == "eval" else None
        found, x = Encoder(variables["params"], stats, ("sge",), "slots", 1.0), np.float64(regions)
        mask = np.ones((BATCH, 36), bool)
        arrays[f"{mode}.out"] = x + found._written(x, mask, found.guide("regions", x, mask, np.float64(mean)))
    return arrays


def head_arrays() -> dict[str, np.ndarray]:
    hidden, lengths, cotangent = draw(BATCH, 5, FEATURES), np.array([5, 2, 3]), draw(BATCH, DIM)
    model, mask = user.TextEncoder(user.Given(), dim=DIM), np.arange(5) < lengths[:, None]
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), hidden, mask, train=False))
    params = jax.tree.map(lambda leaf: 0.4 * draw(*leaf.shape), shapes)["params"]
    words = np.float64(hidden) @ params["head"]["kernel"] + params["head"]["bias"]
    weights = [image.gpo_weights(length, params["pool"]) for length in lengths]
    vectors = [image.pool(w[: len(own)], own) for w, own in zip(words, weights, strict=True)]

    def value(params, hidden):
        return (model.apply({"params": params}, hidden, mask, train=True).vector * cotangent).sum()

    gradients = jax.jit(jax.grad(value, argnums=(0, 1)))(params, hidden)
    arrays = {"in.hidden": hidden, "in.lengths": lengths, "in.cotangent": cotangent, "grad.in.hidden": gradients[1]}
    arrays["out.embedding"] = unit(np.stack(vectors))
    arrays["out.gpo_pool_weights"] = np.stack([np.pad(w, (0, 5 - len(w))) for w in weights])[..., None]
    for prefix, tree in (("param", params), ("grad.param", gradients[0])):
        flat = traverse_util.flatten_dict({"params": tree})
        arrays |= {f"{prefix}.{name}": a for name, a in torch_arrays(flat, text_head_slots()).items()}
    return arrays


def loss_arrays() -> dict[str, np.ndarray]:
    arrays = {"meta.mu": np.float32(90), "meta.gama": np.float32(0.5)}
    for number, case in enumerate(("random", "aligned")):
        names = ("im", "s", "v_k", "t_k")
        given = {n: oracle.unit(np.float32(draw(BATCH, DIM + i + number)[:, :DIM])) for i, n in enumerate(names)}
        queues = {n: oracle.unit(np.float32(draw(QUEUE, DIM + i)[:, :DIM])) for i, n in enumerate(("v", "t"))}
        arrays |= {f"{case}.in.{name}": a for name, a in given.items()}
        arrays |= {f"{case}.in.{name}_queue": a.T for name, a in queues.items()}
        for side, part in enumerate(("batch", "queue")):

            def value(side=side, queues=queues, **x):
                of = np.full(QUEUE, -1)
                sides = ("im", "t"), ("s", "v")
                held = [((x[a] * x[f"{b}_k"]).sum(1), x[a] @ queues[b].T, of) for a, b in sides]
                options = {"scale": 90.0, "offset": 0.5, "weight": 1.0, "mask": False}
                return oracle.uto(x["im"] @ x["s"].T, range(BATCH), **options, queues=held)[side]

            arrays[f"{case}.{part}.out.loss"] = np.float64(value(**given))
            for name in names if part == "queue" else names[:2]:
                slope = oracle.gradient(lambda a, name=name: value(**given | {name: a}), given[name])  # noqa: B023
                arrays[f"{case}.{part}.grad.in.{name}"] = slope
    return {name: np.asarray(a, np.float32) for name, a in arrays.items()}


def momentum_arrays() -> dict[str, np.ndarray]:
    query, key = {"fc.weight": draw(3, 2), "fc.bias": draw(4)}, {"fc.weight": draw(2, 3).T, "fc.bias": 2 * draw(4)}
    arrays = {
        "meta.moco_r": np.float32(0.9),
        "queue.v_before": draw(DIM, QUEUE),
        "queue.t_before": draw(DIM, QUEUE) + 1,
    }
    for name in query:
        arrays |= {f"momentum.query.{name}": query[name], f"momentum.key_before.{name}": key[name]}
        arrays[f"momentum.key_after.{name}"] = 0.9 * np.float64(key[name]) + 0.1 * query[name]
    queues, pointer = {side: arrays[f"queue.{side}_before"].copy() for side in "vt"}, 0
    for step in range(3):
        for number, side in enumerate("vt"):
            keys = draw(BATCH, DIM) + step + 10 * number
            for i, vector in enumerate(keys):
                queues[side][:, (pointer + i) % QUEUE] = vector
            arrays |= {f"queue.step{step}.{side}_keys": keys, f"queue.step{step}.{side}_after": queues[side].copy()}
        pointer = (pointer + BATCH) % QUEUE
        arrays[f"queue.step{step}.ptr_after"] = np.array([pointer])
    return arrays


WRITTEN = {
    "user_image_encoder": encoder_arrays,
    "user_sge": guide_arrays,
    "user_text_head": head_arrays,
    "user_loss": loss_arrays,
    "user_momentum_queue": momentum_arrays,
}


@pytest.mark.slow
def test_every_array_that_was_changed_is_missed_and_no_other(tmp_path, capsys):
    """One of each file."""
    changes = {
        "user_image_encoder": "train.grad.param.v_sa.embedding_common.0.weight",
        "user_sge": "eval.out",
        "user_text_head": "out.embedding",
        "user_loss": "aligned.queue.out.loss",
        "user_momentum_queue": "queue.step2.t_after",
    }
    results = 0
    for file, make in WRITTEN.items():
        arrays = make()
        arrays[changes[file]] = arrays[changes[file]] * 1.05 + 0.01
        np.savez(tmp_path / f"{file}.npz", **arrays)
        results += len(Fixture(tmp_path / f"{file}.npz").expected())
    status, text = main(tmp_path, ("user",)), capsys.readouterr().out
    assert status == 1
    assert text.endswith(f"{results - 1} arrays compared, 1 skipped, 5 missed\n")  # the norm that is never applied
    assert all(f" {name}: error" in text for name in changes.values())


def test_the_published_settings_of_a_recording_reach_the_step(tmp_path):
    meta = {
        "learning_rate": 1e-3,
        "bert_lr_factor": 0.2,
        "weight_decay": 1e-3,
        "grad_clip": 3.0,
        "mu": 80.0,
        "gama": 0.4,
    }
    meta |= {"loss_lamda": 5.0, "attention_lamda": 2.0, "moco_r": 0.8, "queue_size": 12.0}
    arrays = {f"meta.{name}": np.float64(value) for name, value in meta.items()}
    arrays |= {"step0.in.images": np.zeros((4, 36, 2)), "out.final_eval_image_embedding": np.zeros((4, 9))}
    np.savez(tmp_path / "user_train_steps.npz", **arrays)
    c = user_train_steps.published(Fixture(tmp_path / "user_train_steps.npz"))
    assert (c.optim.lr, c.optim.text_lr_factor, c.optim.weight_decay, c.optim.clip_norm) == (1e-3, 0.2, 1e-3, 3.0)
    assert (c.loss.uto.scale, c.loss.uto.offset, c.loss.uto.batch_weight) == (80.0, 0.4, 5.0)
    assert not c.loss.uto.mask_same_image and c.model.user.attention_scale == 2.0
    assert (c.momentum.decay, c.momentum.queue, c.train.batch_size, c.model.dim) == (0.8, 12, 4, 9)


@pytest.mark.slow
def test_a_converted_checkpoint_takes_the_attention_scale_of_its_recording(tmp_path):
    (variables, regions), scale = tower(), 4.0
    tokens, mask = np.array([[1, 5, 2, 0], [3, 4, 5, 1], [2, 2, 0, 0]]), np.ones((BATCH, 36), bool)
    texts = user.TextEncoder(BERT(vocab_size=6, layers=1, width=8, heads=2, mlp_dim=8, max_positions=32), dim=DIM)
    shapes = jax.eval_shape(lambda: texts.init(jax.random.key(0), tokens, tokens > 0, train=False))
    of_texts = {"params": jax.tree.map(lambda leaf: 0.4 * draw(*leaf.shape), shapes)["params"]}
    arrays = {"meta.num_heads": np.float32(2), "meta.attention_lamda": np.float32(scale)}
    arrays |= {"step0.in.input_ids": tokens, "step0.in.images": regions}
    for side, tree, slots in (("img", variables, user_image_encoder_slots()), ("txt", of_texts, text_encoder_slots(1))):
        for name, array in torch_arrays(traverse_util.flatten_dict(tree), slots).items():
            arrays[f"{'buffer' if slots[name].collection == 'batch_stats' else 'param'}_after.{side}.{name}"] = array
    oracle_of_images = Encoder(variables["params"], variables["batch_stats"], ("sge",), "slots", scale)
    arrays["out.final_eval_image_embedding"] = oracle_of_images({"regions": regions}, {"regions": mask})
    arrays["out.final_eval_text_embedding"] = texts.apply(of_texts, tokens, tokens > 0, train=False).vector
    np.savez(tmp_path / "user_train_steps.npz", **arrays)
    rows = convert._check(Fixture(tmp_path / "user_train_steps.npz"), user_config.get_config())
    assert len(rows) == 2 and all(row.ok for row in rows), rows
