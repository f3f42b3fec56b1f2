"""The triplet loss and its gradients against the recorded hinge loss of 3SHNet and VSE-infinity."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from shnet_jax.losses import triplet
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Context, Embedding
from tests.parity.compare import Fixture, Row, compare, compare_gradient


def check(folder: Path) -> list[Row]:
    """Compares every recorded value and gradient of `losses.npz`."""
    fixture = Fixture(Path(folder) / "losses.npz")
    rows = []
    for case in ("random", "aligned"):
        for kind in ("sum", "max"):
            rows += _case(fixture, case, kind)
    if unread := fixture.expected() - fixture.seen:
        raise ValueError(f"losses.npz holds results that are not compared: {sorted(unread)}")
    return rows


def _case(fixture: Fixture, case: str, kind: str) -> list[Row]:
    images, texts = (jnp.asarray(fixture[f"{case}.in.{name}"]) for name in ("im", "s"))
    ctx = Context(step=jnp.int32(0), params={}, score=RetrievalModel.score)

    def value(images, texts):
        return triplet.loss(
            Embedding(images),
            Embedding(texts),
            jnp.arange(images.shape[0]),
            ctx,
            margin=float(fixture["meta.margin"]),
            warmup_steps=1 if kind == "sum" else 0,
            reduction="sum",
            mask_same_image=False,
        )["triplet_loss"]

    loss, grads = jax.value_and_grad(value, argnums=(0, 1))(images, texts)
    prefix = f"{case}.{kind}"
    rows = [compare("losses", f"{prefix}.out.loss", loss, fixture[f"{prefix}.out.loss"], atol=1e-5, rtol=1e-5)]
    for name, grad in zip(("im", "s"), grads, strict=True):
        key = f"{prefix}.grad.in.{name}"
        rows.append(compare_gradient("losses", key, grad, fixture[key]))
    return rows
