"""A model that compiles in a second and has what a real one has: statistics, dropout, a tower and a head.

It is named by its dotted path, `config.model.name = "tests.train.toy"`, as a user's own model would be.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.contract import RetrievalModel
from shnet_jax.ops.norms import l2norm
from shnet_jax.types import Array, Batch, Embedding


class Image(nn.Module):
    dim: int
    dropout: float

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool) -> Array:
        mask = batch["region_mask"][..., None]
        mean = (batch["regions"] * mask).sum(1) / jnp.maximum(mask.sum(1), 1)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(self.dim, name="linear")(mean))
        return l2norm(nn.Dropout(self.dropout, deterministic=not train)(x))


class Words(nn.Module):
    vocab_size: int
    width: int

    @nn.compact
    def __call__(self, batch: Batch) -> Array:
        mask = batch["token_mask"][..., None]
        return (nn.Embed(self.vocab_size, self.width, name="words")(batch["tokens"]) * mask).sum(1) / jnp.maximum(
            mask.sum(1), 1
        )


class Text(nn.Module):
    tower: nn.Module
    dim: int

    @nn.compact
    def __call__(self, batch: Batch) -> Array:
        return l2norm(nn.Dense(self.dim, name="head")(jnp.tanh(self.tower(batch))))


class Toy(RetrievalModel):
    image: nn.Module
    text: nn.Module

    def encode_image(self, batch: Batch, *, train: bool) -> Embedding:
        return Embedding(self.image(batch, train=train))

    def encode_text(self, batch: Batch, *, train: bool) -> Embedding:
        return Embedding(self.text(batch))


def image_fields(config: ConfigDict) -> tuple[str, ...]:
    return ("regions", "region_mask")


def build(config: ConfigDict) -> Toy:
    tower = Words(config.text.vocab_size, config.text.width)
    return Toy(Image(config.model.dim, config.model.dropout), Text(tower, config.model.dim))
