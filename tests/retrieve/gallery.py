"""A run and a model of sets, shared by the tests of this folder."""

from __future__ import annotations

import functools
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.contract import RetrievalModel
from shnet_jax.modes.train import train
from shnet_jax.types import Array, Batch, Embedding
from tests.train import tiny


def toy(**changes) -> ConfigDict:
    return tiny.config(model__name="tests.train.toy", train__steps=2, train__eval_epochs=0.0, **changes)


@functools.cache
def toy_run() -> Path:
    """A run of 2 steps of the toy model."""
    path = tiny.folder() / "retrieve"
    with tiny.quick():
        train(toy(), path)
    return path


class Sets(RetrievalModel):
    """Elements as well as vectors, as many of a caption as its batch has tokens, and a score that is no dot product."""

    vocab_size: int
    dim: int

    def setup(self) -> None:
        self.linear = nn.Dense(self.dim)
        self.words = nn.Embed(self.vocab_size, self.dim)

    def encode_image(self, batch: Batch, *, train: bool) -> Embedding:
        elements = self.linear(batch["regions"])
        return Embedding(elements.mean(1), elements, batch["region_mask"])

    def encode_text(self, batch: Batch, *, train: bool) -> Embedding:
        elements = self.words(batch["tokens"])
        return Embedding(elements.mean(1), elements, batch["token_mask"])

    @staticmethod
    def score(images: Embedding, texts: Embedding) -> Array:
        pairs = jnp.einsum("nid,tjd->ntij", images.elements, texts.elements)
        valid = images.mask[:, None, :, None] & texts.mask[None, :, None, :]
        return jnp.where(valid, pairs, -1e9).max((2, 3))


def image_fields(config: ConfigDict) -> tuple[str, ...]:
    return ("regions", "region_mask")


def build(config: ConfigDict) -> Sets:
    return Sets(config.text.vocab_size, config.model.dim)
