"""The recorded weights through a checkpoint file: written as torch.save does, converted, and applied."""

from __future__ import annotations

import argparse
import tempfile
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import base
from configs import user as user_config
from shnet_jax import registry
from shnet_jax.data.tokenise import SPECIAL
from shnet_jax.modes.convert import load_published
from tests.interop.torch_writer import save
from tests.parity import shnet
from tests.parity.compare import Fixture, Row, compare

GROUP = "converted checkpoint"
# Recordings that end with weights and the embeddings of their first batch, and the configurations of their models.
CASES = {"shnet_train_steps": base, "user_train_steps": user_config}


def check(folder: Path) -> list[Row]:
    """Embeddings after the recorded steps, from a file of the weights after them."""
    return [
        row for name, config in CASES.items() for row in _check(Fixture(folder / f"{name}.npz"), config.get_config())
    ]


def _check(fixture: Fixture, config: ConfigDict) -> list[Row]:
    states = []
    for side in ("img", "txt"):
        state = fixture.section(f"param_after.{side}.")
        if any(name.startswith(f"buffer_after.{side}.") for name in fixture.arrays):
            state |= fixture.section(f"buffer_after.{side}.")
        states.append(OrderedDict((f"module.{name}", array) for name, array in state.items()))
    arrays = fixture.section("step0.in.")
    tokens = jnp.asarray(arrays["input_ids"])
    with tempfile.TemporaryDirectory() as name:
        vocabulary = Path(name) / "vocab.txt"
        pieces = len(states[1]["module.bert.embeddings.word_embeddings.weight"])
        vocabulary.write_text("\n".join([*SPECIAL, *(f"w{i}" for i in range(pieces - len(SPECIAL)))]) + "\n")
        options = argparse.Namespace(embed_size=fixture["out.final_eval_image_embedding"].shape[-1])
        if "meta.attention_lamda" in fixture:
            options.attention_lamda = float(fixture["meta.attention_lamda"])
        checkpoint = {"epoch": 1, "model": states, "best_rsum": 0.0, "opt": options, "Eiters": 4}
        config.tokenizer.path, config.text.heads = str(vocabulary), int(fixture["meta.num_heads"])
        converted = load_published(config, save(Path(name) / "model_best.pth", checkpoint))
    model_name = converted.config.model.name
    model = registry.model(model_name).build(converted.config)
    images = {"regions": jnp.asarray(arrays["images"])} if model_name == "user" else shnet.inputs(arrays)
    batch = images | {"tokens": tokens, "token_mask": tokens != 0}
    images, texts = jax.jit(lambda variables: model.apply(variables, batch, train=False))(converted.variables)
    rows = []
    for side, ours in (("image", images), ("text", texts)):
        name = f"out.final_eval_{side}_embedding"
        # The weights are the recorded ones, not those that our own steps arrive at: only rounding may differ.
        rows.append(compare(GROUP, name, ours.vector, fixture[name], 1e-5))
    return rows
