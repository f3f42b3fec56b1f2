"""USER's image encoder, its self-guide alone, the text head, the objective, key averages and queues, as recorded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from shnet_jax.interop.torch_weights import (
    text_head_slots,
    to_variables,
    user_guide_slots,
    user_image_encoder_slots,
)
from shnet_jax.losses import uto
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.models.mlp import MLP
from shnet_jax.models.text import TextEncoder
from shnet_jax.models.user import ImageEncoder, SelfGuide, write_back
from shnet_jax.training import momentum
from shnet_jax.types import Context, Embedding, Keys, Queue
from tests.parity.compare import Fixture, Row, compare, compare_gradient, skip

UNUSED = "counters and BatchNorms that the published code never applies"


def encoder(dim: int, attention_scale: float) -> ImageEncoder:
    """The published region model of width `dim`, without dropout."""
    return ImageEncoder(
        dim=dim,
        units=("regions",),
        guides=("sge",),
        attention_scale=attention_scale,
        dropout=0.0,
        norm="slots",
        feature_dropout=0.0,
        mlp=partial(MLP),
        axis=None,
        dtype="float32",
    )


def check(folder: Path) -> list[Row]:
    """One row per recorded array of the five user_*.npz that hold parts of a step."""
    return [row for part in (_image, _guide, _text_head, _loss, _momentum) for row in part(folder)]


def at(tree: Any, path: tuple[str, ...]) -> Any:
    """The leaf at a path of names."""
    for key in path:
        tree = tree[key]
    return tree


def _image(folder: Path) -> list[Row]:
    group, fixture = "user image encoder", Fixture(folder / "user_image_encoder.npz")
    slots = user_image_encoder_slots()
    variables = to_variables(fixture.section("param.") | fixture.section("buffer."), slots)
    images = jnp.asarray(fixture["in.images"])
    mask = jnp.arange(images.shape[1]) < fixture["in.image_lengths"][:, None]
    model = encoder(fixture["eval.out.embedding"].shape[-1], float(fixture["meta.attention_lamda"]))
    rows: list[Row] = []
    for mode in ("eval", "train"):

        def run(params, images, train=mode == "train"):
            out, updated = model.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                {"regions": images, "region_mask": mask},
                train=train,
                mutable=["batch_stats", "intermediates"],
            )
            return jnp.sum(out * fixture["in.cotangent"]), (out, updated)

        (_, (out, updated)), grads = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(variables["params"], images)
        sown = updated["intermediates"]
        ours = {
            "sge_local": sown["regions_sge"]["locals"][0],
            "sge_global_in": sown["regions_sge"]["globals"][0],
            "sge_weights": sown["regions_sge"]["weights"][0],
            "sge_new_global": sown["guide"][0],
            "sge_output": sown["enhanced"][0],
            "gpo_in_features": sown["pooled_set"][0],
            "gpo_pooled": sown["pooled"][0],
            "gpo_pool_weights": sown["pool"]["weights"][0][..., None],
            "embedding": out,
        }
        for name, recorded in fixture.section(f"{mode}.out.").items():
            atol, rtol = (1e-5, 0.0) if name == "embedding" else (2e-5, 1e-4)
            full = f"{mode}.out.{name}"
            rows.append(compare(group, full, ours[name], recorded, atol, rtol, fixture.rounding(full)))
    for name, recorded in fixture.section("train.grad.param.").items():
        full, gradient = f"train.grad.param.{name}", at(grads[0], slots[name].path)
        rounding = fixture.rounding(full)
        rows.append(compare_gradient(group, full, gradient, slots[name].ours(recorded), rounding=rounding))
    name = "train.grad.in.images"
    rows.append(compare_gradient(group, name, grads[1], fixture[name]))
    for name, recorded in fixture.section("train.buffer_after.").items():
        full = f"train.buffer_after.{name}"
        if name in slots:
            stat = at(updated["batch_stats"], slots[name].path)
            rows.append(compare(group, full, stat, recorded, 1e-6, 1e-4, fixture.rounding(full)))
        else:
            rows.append(skip(group, full, UNUSED))
    return rows


def _guide(folder: Path) -> list[Row]:
    fixture = Fixture(folder / "user_sge.npz")
    variables = to_variables(fixture.section("param.") | fixture.section("buffer."), user_guide_slots(""))
    units, mean = jnp.asarray(fixture["in.local"]), jnp.asarray(fixture["in.raw_global"])
    mask, scale = jnp.ones(units.shape[:2], bool), float(fixture["meta.attention_lamda"])
    model = SelfGuide(0.0, "slots", None, "float32")
    rows = []
    for mode in ("eval", "train"):
        guide, _ = model.apply(variables, units, mean, mask, train=mode == "train", mutable=["batch_stats"])
        ours = units + write_back(units, guide, mask, scale)
        rows.append(compare("user self-guide", f"{mode}.out", ours, fixture[f"{mode}.out"], 2e-5, 1e-4))
    return rows


class Given(nn.Module):
    """A text tower whose hidden states are given in place of tokens."""

    def __call__(self, tokens, mask, *, train):
        return tokens


def _text_head(folder: Path) -> list[Row]:
    group, fixture, slots = "user text head", Fixture(folder / "user_text_head.npz"), text_head_slots()
    params = to_variables(fixture.section("param."), slots)["params"]
    hidden = jnp.asarray(fixture["in.hidden"])
    mask = jnp.arange(hidden.shape[1]) < fixture["in.lengths"][:, None]
    model = TextEncoder(Given(), dim=fixture["out.embedding"].shape[-1])

    def run(params, hidden):
        out, sown = model.apply({"params": params}, hidden, mask, train=True, mutable=["intermediates"])
        return jnp.sum(out.vector * fixture["in.cotangent"]), (out.vector, sown["intermediates"])

    (_, (vector, sown)), grads = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(params, hidden)
    weights = sown["pool"]["weights"][0][..., None]
    rows = [
        compare(group, "out.embedding", vector, fixture["out.embedding"], 1e-5),
        compare(group, "out.gpo_pool_weights", weights, fixture["out.gpo_pool_weights"], 2e-5, 1e-4),
        compare_gradient(group, "grad.in.hidden", grads[1], fixture["grad.in.hidden"]),
    ]
    for name, recorded in fixture.section("grad.param.").items():
        gradient = at(grads[0], slots[name].path)
        rows.append(compare_gradient(group, f"grad.param.{name}", gradient, slots[name].ours(recorded)))
    return rows


def queue_of(recorded: np.ndarray, pointer: int = 0) -> Queue:
    """A recorded queue, one vector in each column, of unknown images."""
    ids = jnp.full((recorded.shape[1],), -1, jnp.int32)
    return Queue(jnp.asarray(recorded.T), ids, jnp.asarray(pointer, jnp.int32))


def _loss(folder: Path) -> list[Row]:
    group, fixture = "user objective", Fixture(folder / "user_loss.npz")
    options = {"scale": float(fixture["meta.mu"]), "offset": float(fixture["meta.gama"]), "mask_same_image": False}
    rows = []
    for case in ("random", "aligned"):
        names = ("im", "s", "v_k", "t_k")
        given = [jnp.asarray(fixture[f"{case}.in.{name}"]) for name in names]
        queues = [queue_of(fixture[f"{case}.in.{name}_queue"]) for name in ("v", "t")]

        def value(part, images, texts, image_keys, text_keys, queues=queues):
            keys = Keys(Embedding(image_keys), Embedding(text_keys), *queues)
            ctx = Context(step=jnp.int32(0), params={}, score=RetrievalModel.score, keys=keys)
            ids = jnp.arange(images.shape[0])
            return uto.loss(Embedding(images), Embedding(texts), ids, ctx, batch_weight=1.0, **options)[f"uto_{part}"]

        for part in ("batch", "queue"):
            found, grads = jax.value_and_grad(partial(value, part), argnums=(0, 1, 2, 3))(*given)
            name = f"{case}.{part}.out.loss"
            rows.append(compare(group, name, found, fixture[name], 1e-5, 1e-5))
            for argument, gradient in zip(names, grads, strict=True):
                name = f"{case}.{part}.grad.in.{argument}"
                if name in fixture:  # the in-batch part has no keys
                    rows.append(compare_gradient(group, name, gradient, fixture[name]))
    return rows


def _momentum(folder: Path) -> list[Row]:
    group, fixture = "user momentum", Fixture(folder / "user_momentum_queue.npz")
    before = queue_of(fixture["queue.v_before"])
    query, key = (
        {n: jnp.asarray(a) for n, a in fixture.section(f"momentum.{s}.").items()} for s in ("query", "key_before")
    )
    size, dim = before.vectors.shape
    options = momentum.Momentum(size, dim, float(fixture["meta.moco_r"]), False, "uniform", True, False)
    state = momentum.MomentumState(key, {}, before, queue_of(fixture["queue.t_before"]))
    moved = momentum.ema_update(options, state, query, {}, jnp.int32(0))
    rows = [
        compare(group, f"momentum.key_after.{name}", moved.params[name], recorded, 1e-6, 1e-6)
        for name, recorded in fixture.section("momentum.key_after.").items()
    ]
    step = 0
    while f"queue.step{step}.v_keys" in fixture:
        keys = [Embedding(jnp.asarray(fixture[f"queue.step{step}.{side}_keys"])) for side in ("v", "t")]
        ids = jnp.arange(len(keys[0].vector), dtype=jnp.int32)
        state = momentum.enqueue(state, (keys[0], keys[1]), ids, 1, None)
        for side, queue in (("v", state.images), ("t", state.texts)):
            name = f"queue.step{step}.{side}_after"
            rows.append(compare(group, name, queue.vectors.T, fixture[name], 0.0))
            name = f"queue.step{step}.ptr_after"
        rows.append(compare(group, name, state.texts.pointer[None], fixture[name], 0.0))
        step += 1
    return rows
