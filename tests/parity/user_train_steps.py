"""Whole optimisation steps of USER as recorded: losses, parameters, key encoders, queues, statistics, embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import user as user_config
from shnet_jax.interop.torch_weights import to_variables, user_image_encoder_slots
from shnet_jax.losses import total
from shnet_jax.models.bert import BERT
from shnet_jax.models.text import TextEncoder
from shnet_jax.models.user import USER
from shnet_jax.training import momentum
from shnet_jax.training.optim import make_optimiser, schedule
from shnet_jax.training.state import TrainState, create_state
from shnet_jax.training.step import make_step
from tests.parity import adamw, bert, user
from tests.parity.compare import Fixture, Row, compare, skip

GROUP = "user training"


def published(fixture: Fixture) -> ConfigDict:
    """The published objective and optimiser with the recording's rates."""
    config = user_config.get_config()
    config.optim.lr = float(fixture["meta.learning_rate"])
    config.optim.text_lr_factor = float(fixture["meta.bert_lr_factor"])
    config.optim.weight_decay = float(fixture["meta.weight_decay"])
    config.optim.clip_norm = float(fixture["meta.grad_clip"])
    config.loss.uto.scale, config.loss.uto.offset = float(fixture["meta.mu"]), float(fixture["meta.gama"])
    config.loss.uto.batch_weight = float(fixture["meta.loss_lamda"])
    config.model.user.attention_scale = float(fixture["meta.attention_lamda"])
    config.momentum.decay = float(fixture["meta.moco_r"])
    config.momentum.queue = int(fixture["meta.queue_size"])
    config.train.batch_size = len(fixture["step0.in.images"])
    config.model.dim = fixture["out.final_eval_image_embedding"].shape[-1]
    return config


def _batch(fixture: Fixture, step: int) -> dict[str, jax.Array]:
    arrays = fixture.section(f"step{step}.in.")
    tokens, images = jnp.asarray(arrays["input_ids"]), jnp.asarray(arrays["images"])
    rows = jnp.arange(len(tokens), dtype=jnp.int32)
    mask = jnp.ones(images.shape[:2], bool)
    return {
        "regions": images,
        "region_mask": mask,
        "tokens": tokens,
        "token_mask": jnp.arange(tokens.shape[1]) < arrays["caption_lengths"][:, None],
        "image_index": rows,
    }


def check(folder: Path) -> list[Row]:
    """One row per recorded array of user_train_steps.npz."""
    fixture = Fixture(folder / "user_train_steps.npz")
    config, steps = published(fixture), len(fixture["out.losses_batch_queue_total"])
    text = fixture.section("param_before.txt.")
    shape = bert.sizes(text, int(fixture["meta.num_heads"]))
    dim = config.model.dim
    encoder = user.encoder(dim, config.model.user.attention_scale)
    model = USER(image=encoder, text=TextEncoder(BERT(**shape, dropout=0.0), dim=dim))
    image = fixture.section("param_before.img.") | fixture.section("buffer_before.img.")
    image_variables = to_variables(image, user_image_encoder_slots())
    variables = {
        "params": {"image": image_variables["params"], "text": bert.encoder_params(text, shape)},
        "batch_stats": {"image": image_variables["batch_stats"]},
    }
    options = momentum.options(config, model, 1.0)
    tx = make_optimiser(config, schedule(config, 10**6, 10**6))
    loss_params, total_loss = total.build(config.loss, steps_per_epoch=1, queues=True)
    step = jax.jit(make_step(model, total_loss, tx, prepare_batch=lambda _, batch: batch, key_options=options))
    state = create_state(variables, loss_params, tx, ema=False, seed=0, momentum=options)
    queues = {n: user.queue_of(fixture[f"queue_before.{s}"]) for n, s in (("images", "v"), ("texts", "t"))}
    state = state.replace(momentum=state.momentum.replace(**queues))

    rows, losses, norms, moved = [], [], [], None
    for number in range(steps):
        state, metrics = step(state, _batch(fixture, number))
        moved = adamw.slack(state.opt_state, number + 1, moved)
        losses.append([metrics["uto_batch"], metrics["uto_queue"], metrics["loss"]])
        norms.append(metrics["grad_norm"])
        for side, queue in (("v", state.momentum.images), ("t", state.momentum.texts)):
            name = f"step{number}.queue_after.{side}"
            rows.append(compare(GROUP, name, queue.vectors.T, fixture[name], 1e-5))
    recorded = fixture["out.losses_batch_queue_total"]
    rows.append(compare(GROUP, "out.losses_batch_queue_total", losses, recorded, 1e-4, 1e-4))
    recorded = fixture["out.grad_norms_before_clip"]
    rows.append(compare(GROUP, "out.grad_norms_before_clip", norms, recorded, 0.0, 1e-4))
    rows += _arrays(fixture, state, moved, shape, steps)
    images, texts = model.apply(state.variables, _batch(fixture, 0), train=False)
    for name, ours in (("image", images.vector), ("text", texts.vector)):
        name = f"out.final_eval_{name}_embedding"
        rows.append(compare(GROUP, name, ours, fixture[name], 1e-3))
    return rows


def _arrays(fixture: Fixture, state: TrainState, moved: Any, shape: dict[str, Any], steps: int) -> list[Row]:
    """Parameters and statistics of the model and of the key encoders."""
    rate = float(fixture["meta.learning_rate"])
    ill = {str(name) for name in fixture["meta.ill_conditioned"]}
    slots = {"img": (user_image_encoder_slots(), "image"), "txt": (bert.encoder_slots(shape["layers"]), "text")}
    trees = {
        "": (state.params["model"], state.batch_stats),
        "_key": (state.momentum.params, state.momentum.batch_stats),
    }
    rows = []
    for when in ("param_after", "buffer_after"):
        for name, recorded in fixture.section(f"{when}.").items():
            full, (encoder, name) = f"{when}.{name}", name.split(".", 1)
            (of_tower, tower), which = slots[encoder[:3]], trees[encoder[3:]]
            if name not in of_tower:
                rows.append(skip(GROUP, full, "what the published code never uses: BatchNorms, pooler, counters"))
                continue
            slot = of_tower[name]
            ours = user.at(which[0 if slot.collection == "params" else 1][tower], slot.path)
            if slot.collection == "batch_stats":
                rows.append(compare(GROUP, full, ours, recorded, 1e-3, 1e-4, fixture.rounding(full)))
                continue
            # An average of key parameters strays no farther than the parameters that it is of.
            slack = user.at(moved["model"][tower], slot.path)
            own_rate = rate * float(fixture["meta.bert_lr_factor"]) if name.startswith("bert.") else rate
            zero = full in ill or name.endswith("attention.self.key.bias")
            atol = adamw.tolerance(own_rate, steps, slack, fixture.rounding(full), zero_gradient=zero)
            rows.append(compare(GROUP, full, ours, slot.ours(recorded), atol))
    return rows
