"""The text encoder with BERT against the recording: every layer output recorded, every gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shnet_jax.interop.bert_weights import bert_params
from shnet_jax.interop.published import bert_sizes, text_encoder_slots
from shnet_jax.interop.torch_weights import Slots, text_head_slots, to_variables
from shnet_jax.models.bert import BERT
from shnet_jax.models.text import TextEncoder
from tests.parity.compare import Fixture, Row, compare, compare_gradient

GROUP = "text encoder (BERT)"


def sizes(arrays: dict[str, np.ndarray], heads: int) -> dict[str, Any]:
    """Sizes of the recorded BERT; the number of heads cannot be seen from the arrays."""
    return {"heads": heads} | bert_sizes({name: array.shape for name, array in arrays.items()})


def encoder_params(arrays: dict[str, np.ndarray], shape: dict[str, Any]) -> dict:
    """Parameters of `TextEncoder` from the published `EncoderText`."""
    head = {name: a for name, a in arrays.items() if not name.startswith("bert.")}
    tower = bert_params({name: a for name, a in arrays.items() if name not in head}, shape)
    return {"tower": tower} | to_variables(head, text_head_slots())["params"]


def encoder_slots(layers: int) -> Slots:
    """Where each array of the published `EncoderText` lives with us."""
    return text_encoder_slots(layers)


def check(folder: Path) -> list[Row]:
    """One row per recorded array of bert.npz."""
    fixture = Fixture(folder / "bert.npz")
    arrays = fixture.section("param.")
    shape = sizes(arrays, int(fixture["meta.num_heads"]))
    params = encoder_params(arrays, shape)
    tokens, mask = jnp.asarray(fixture["in.input_ids"]), jnp.asarray(fixture["in.attention_mask"] > 0)
    model = TextEncoder(BERT(**shape, dropout=0.0), dim=fixture["out.embedding"].shape[-1])

    def run(params):
        out, sown = model.apply({"params": params}, tokens, mask, train=True, mutable=["intermediates"])
        return jnp.sum(out.vector * fixture["in.cotangent"]), (out.vector, sown["intermediates"])

    gradients, (vector, sown) = jax.grad(run, has_aux=True)(params)
    ours = {
        "embedding_output": sown["tower"]["embedded"][0],
        "last_hidden_state": sown["hidden"][0],
        "linear": sown["words"][0],
        "gpo_pooled": sown["pooled"][0],
        "gpo_pool_weights": sown["pool"]["weights"][0][..., None],
        "embedding": vector,
    }
    rows = []
    for name, recorded in fixture.section("out.").items():
        atol, rtol = (1e-5, 0.0) if name == "embedding" else (2e-5, 1e-4)
        rows.append(compare(GROUP, f"out.{name}", ours[name], recorded, atol, rtol))
    slots = encoder_slots(shape["layers"])
    for name, recorded in fixture.section("grad.param.").items():
        slot, gradient = slots[name], gradients
        for key in slot.path:
            gradient = gradient[key]
        rows.append(compare_gradient(GROUP, f"grad.param.{name}", gradient, slot.ours(recorded)))
    return rows
