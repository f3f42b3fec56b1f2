"""Whole optimisation steps of 3SHNet against the recording: loss, gradient norm, parameters, statistics, embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import base
from shnet_jax.interop.torch_weights import image_encoder_slots, to_variables
from shnet_jax.losses import total
from shnet_jax.models.bert import BERT
from shnet_jax.models.shnet import SHNet
from shnet_jax.models.text import TextEncoder
from shnet_jax.training.optim import make_optimiser, schedule
from shnet_jax.training.state import create_state
from shnet_jax.training.step import make_step
from tests.parity import adamw, bert, shnet, user
from tests.parity.compare import Fixture, Row, compare, skip

GROUP = "shnet training"


def published(fixture: Fixture) -> ConfigDict:
    """The published objective and optimiser with the recording's rates."""
    config = base.get_config()
    config.loss.triplet.mask_same_image = False
    config.optim.lr = float(fixture["meta.learning_rate"])
    config.optim.text_lr_factor = float(fixture["meta.bert_lr_factor"])
    config.optim.weight_decay = float(fixture["meta.weight_decay"])
    config.optim.clip_norm = float(fixture["meta.grad_clip"])
    # One step an epoch makes the warm-up as long as the recording's sum-of-violations phase.
    config.loss.triplet.warmup_epochs = float(np.sum(~fixture["meta.max_violation"]))
    return config


def _batch(fixture: Fixture, step: int) -> dict[str, jax.Array]:
    arrays = fixture.section(f"step{step}.in.")
    tokens = jnp.asarray(arrays["input_ids"])
    rows = jnp.arange(len(tokens), dtype=jnp.int32)
    return shnet.inputs(arrays) | {"tokens": tokens, "token_mask": tokens != 0, "image_index": rows}


def check(folder: Path) -> list[Row]:
    """One row per recorded array of shnet_train_steps.npz."""
    fixture = Fixture(folder / "shnet_train_steps.npz")
    config, steps = published(fixture), len(fixture["out.losses"])
    text = fixture.section("param_before.txt.")
    shape = bert.sizes(text, int(fixture["meta.num_heads"]))
    dim = fixture["out.final_eval_image_embedding"].shape[-1]
    model = SHNet(image=shnet.encoder(dim), text=TextEncoder(BERT(**shape, dropout=0.0), dim=dim))
    image = fixture.section("param_before.img.") | fixture.section("buffer_before.img.")
    image_variables = to_variables(image, image_encoder_slots())
    variables = {
        "params": {"image": image_variables["params"], "text": bert.encoder_params(text, shape)},
        "batch_stats": {"image": image_variables["batch_stats"]},
    }
    tx = make_optimiser(config, schedule(config, 10**6, 10**6))
    loss_params, total_loss = total.build(config.loss, steps_per_epoch=1)
    step = jax.jit(make_step(model, total_loss, tx, prepare_batch=lambda _, batch: batch))
    state = create_state(variables, loss_params, tx, ema=False, seed=0)

    rows, losses, norms, moved = [], [], [], None
    for number in range(steps):
        state, metrics = step(state, _batch(fixture, number))
        moved = adamw.slack(state.opt_state, number + 1, moved)
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
        if number == 0:
            rows += _parameters(fixture, "step0.param_after", state, moved, shape, steps=1)
    rows.append(compare(GROUP, "out.losses", losses, fixture["out.losses"], 1e-4))
    recorded = fixture["out.grad_norms_before_clip"]
    rows.append(compare(GROUP, "out.grad_norms_before_clip", norms, recorded, 0.0, 1e-4))
    rows += _parameters(fixture, "param_after", state, moved, shape, steps)
    rows += _statistics(fixture, state)
    images, texts = model.apply(state.variables, _batch(fixture, 0), train=False)
    for name, ours in (("image", images.vector), ("text", texts.vector)):
        name = f"out.final_eval_{name}_embedding"
        rows.append(compare(GROUP, name, ours, fixture[name], 1e-3))
    return rows


def _parameters(fixture: Fixture, when: str, state: Any, moved: Any, shape: dict[str, Any], steps: int) -> list[Row]:
    rate = float(fixture["meta.learning_rate"])
    ill = {str(name) for name in fixture["meta.ill_conditioned"]}
    slots = {f"img.{n}": (s, "image") for n, s in image_encoder_slots().items()}
    slots |= {f"txt.{n}": (s, "text") for n, s in bert.encoder_slots(shape["layers"]).items()}
    rows = []
    for name, recorded in fixture.section(f"{when}.").items():
        full = f"{when}.{name}"
        if name not in slots:
            rows.append(skip(GROUP, full, "parameters that the published code never uses"))
            continue
        slot, tower = slots[name]
        ours, slack = (user.at(tree["model"][tower], slot.path) for tree in (state.params, moved))
        own_rate = rate * float(fixture["meta.bert_lr_factor"]) if name.startswith("txt.bert.") else rate
        zero = full in ill or name.endswith("attention.self.key.bias")
        atol = adamw.tolerance(own_rate, steps, slack, fixture.rounding(full), zero_gradient=zero)
        rows.append(compare(GROUP, full, ours, slot.ours(recorded), atol))
    return rows


def _statistics(fixture: Fixture, state: Any) -> list[Row]:
    slots, rows = image_encoder_slots(), []
    for name, recorded in fixture.section("buffer_after.").items():
        slot = slots.get(name.removeprefix("img."))
        full = f"buffer_after.{name}"
        if slot is None:
            rows.append(skip(GROUP, full, "counters and BatchNorms that the published code never applies"))
            continue
        ours = state.batch_stats["image"]
        for key in slot.path:
            ours = ours[key]
        # The running means follow the biases whose gradient is rounding noise (the recording's README).
        conv = "embedding_Seg" in name and name.endswith("running_var")
        rows.append(compare(GROUP, full, ours, recorded, 5e-3 if conv else 1e-3, 1e-4, fixture.rounding(full)))
    return rows
