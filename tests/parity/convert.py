"""The recorded weights through a checkpoint file: written as torch.save does, converted, and applied."""

from __future__ import annotations

import argparse
import tempfile
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp

from configs import base
from shnet_jax import registry
from shnet_jax.convert import load_published
from shnet_jax.data.tokenise import SPECIAL
from tests.interop.torch_writer import save
from tests.parity import shnet
from tests.parity.compare import Fixture, Row, compare

GROUP = "converted checkpoint"


def check(folder: Path) -> list[Row]:
    """Embeddings of 3SHNet after the recorded steps, from a file of the weights after them."""
    fixture = Fixture(folder / "shnet_train_steps.npz")
    states = []
    for side in ("img", "txt"):
        state = fixture.section(f"param_after.{side}.") | fixture.section(f"buffer_after.{side}.")
        states.append(OrderedDict((f"module.{name}", array) for name, array in state.items()))
    arrays = fixture.section("step0.in.")
    tokens = jnp.asarray(arrays["input_ids"])
    with tempfile.TemporaryDirectory() as name:
        vocabulary = Path(name) / "vocab.txt"
        rows = states[1]["module.bert.embeddings.word_embeddings.weight"].shape[0]
        vocabulary.write_text("\n".join([*SPECIAL, *(f"w{i}" for i in range(rows - len(SPECIAL)))]) + "\n")
        options = argparse.Namespace(embed_size=fixture["out.final_eval_image_embedding"].shape[-1])
        checkpoint = {"epoch": 1, "model": states, "best_rsum": 0.0, "opt": options, "Eiters": 4}
        config = base.get_config()
        config.tokenizer.path, config.text.heads = str(vocabulary), int(fixture["meta.num_heads"])
        converted = load_published(config, save(Path(name) / "model_best.pth", checkpoint))
    model = registry.model(converted.config.model.name).build(converted.config)
    batch = shnet.inputs(arrays) | {"tokens": tokens, "token_mask": tokens != 0}
    images, texts = jax.jit(lambda variables: model.apply(variables, batch, train=False))(converted.variables)
    # The recorded weights are not those that our own steps arrive at, so nothing but rounding may differ.
    return [
        compare(
            GROUP, f"out.final_eval_{name}_embedding", ours.vector, fixture[f"out.final_eval_{name}_embedding"], 1e-5
        )
        for name, ours in (("image", images), ("text", texts))
    ]
