"""USER: units enhanced by a guide, a global vector of their own image (Zhang et al., IEEE TIP 2024, arXiv 2301.06844).

The guide is found in the units themselves (SGE, as in the released code) or comes from a pretrained model (CGE, which
was not released: ours). Without any guide this is VSE-infinity. Momentum encoders and queues are no part of the model:
`training/momentum.py`; the objective is `losses/uto.py`.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.contract import TwoTowers, check_choices
from shnet_jax.models.layers import Dense, LayerNorm, from_config, in_float32, xavier_uniform
from shnet_jax.models.mlp import BatchNorm
from shnet_jax.models.pooling import GPO
from shnet_jax.models.text import build_encoder
from shnet_jax.models.units import UNIT_MASKS, UnitEncoder, build_mlp
from shnet_jax.ops.matmul import DTYPES, einsum
from shnet_jax.ops.norms import l2norm, masked_softmax
from shnet_jax.types import DATA, Array, Batch

SLOTS = 36
"""Regions of an image, ordered by the detector's confidence, that the published norm is made for."""

GUIDES = ("sge", "cge")
NORMS = ("slots", "layer")


class SelfGuide(nn.Module):
    """SGE's guide: a mean of the units, weighted by how each agrees with their plain mean.

    Attributes:
      dropout: behind both tanh (published 0.4).
      norm: of the units. "slots": BatchNorm with one channel for each place in the list, over batch and features, so
        that every image needs the same number of units (published). "layer": LayerNorm of each unit, for any number.
      axis: name of the device axis over which the BatchNorms take their statistics; None: each device its own.
      dtype: of the operands of the large products.
    """

    dropout: float
    norm: str
    axis: str | None
    dtype: str

    @nn.compact
    def __call__(self, units: Array, mean: Array, mask: Array, *, train: bool) -> Array:
        """units [n, N, d], mean [n, d] (any global vector), mask [n, N] -> guide [n, d] of unit length."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        dense = partial(Dense, dtype=self.dtype, kernel_init=xavier_uniform)
        local = self._normalised(dense(units.shape[-1], name="local")(units), train)
        global_vector = dense(units.shape[-1], name="global")(mean)
        global_vector = BatchNorm(axis=self.axis, name="global_norm")(global_vector, None, train=train)
        local, global_vector = drop(jnp.tanh(local)), drop(jnp.tanh(global_vector))
        self.sow("intermediates", "locals", local)
        self.sow("intermediates", "globals", global_vector)
        agreement = local * global_vector[:, None, :].astype(local.dtype)
        logits = Dense(1, kernel_init=xavier_uniform, result="float32", name="weight")(agreement)[..., 0]
        weights = _attention(logits, mask)
        self.sow("intermediates", "weights", weights)
        return l2norm(einsum("nk,nkd->nd", weights, units, "float32"))

    def _normalised(self, local: Array, train: bool) -> Array:
        if self.norm == "layer":
            return LayerNorm(epsilon=1e-5, name="local_norm")(local)
        norm = BatchNorm(axis=self.axis, name="local_norm")
        return norm(local.swapaxes(1, 2), None, train=train).swapaxes(1, 2)


def _attention(logits: Array, mask: Array) -> Array:
    """Softmax over the valid of [n, N]; 0 where masked, everywhere for a set without valid members."""
    return jnp.where(mask, masked_softmax(logits, mask), 0.0)


def write_back(units: Array, guide: Array, mask: Array, scale: float) -> Array:
    """Update of units [n, N, d] by a guide [n, d]: b_i guide, b = l2norm(softmax(scale <guide, unit_i>)), float32."""
    share = l2norm(_attention(scale * einsum("nkd,nd->nk", units, guide, "float32"), mask))
    return share[..., None] * guide[:, None, :]


class ImageEncoder(UnitEncoder, kw_only=True):
    """The visual tower. Attributes are those of `config.model` and `config.model.user`."""

    guides: tuple[str, ...]
    attention_scale: float
    dropout: float
    norm: str
    axis: str | None

    @nn.compact
    def __call__(self, batch: Batch, *, train: bool) -> Array:
        """Image fields of `batch` -> unit vectors [n, dim].

        Raises ValueError when `norm` is "slots" and an image has another number of regions than SLOTS.
        """
        units = self.project(batch, train=train)
        self.sow("intermediates", "pooled_set", units.projected)
        pooled = GPO(name="pool")(units.projected, units.mask)
        self.sow("intermediates", "pooled", pooled)
        return l2norm(pooled)

    def enhance(self, unit: str, x: Array, mask: Array, batch: Batch, *, train: bool) -> Array:
        """Units [n, N, d] of one kind plus the update by each guide."""
        updates = []
        if "sge" in self.guides:
            if self.norm == "slots" and x.shape[1] != SLOTS:
                raise ValueError(
                    f"config.model.user.norm is 'slots', one BatchNorm channel for each of {SLOTS} regions, and the "
                    f"data set has {x.shape[1]} {unit}: set config.model.user.norm to 'layer'"
                )
            weight = mask[..., None].astype(jnp.float32)
            mean = in_float32(lambda x: jnp.sum(x * weight, axis=1), x) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)
            guide = SelfGuide(self.dropout, self.norm, self.axis, self.dtype, name=f"{unit}_sge")
            guide_vector = guide(x, mean, mask, train=train)
            self.sow("intermediates", "guide", guide_vector)
            updates.append(write_back(x, guide_vector, mask, self.attention_scale))
        if "cge" in self.guides:
            given = batch["image_embedding"].astype(jnp.float32)
            guide_vector = l2norm(Dense(x.shape[-1], self.dtype, xavier_uniform, name=f"{unit}_cge")(given))
            updates.append(write_back(x, guide_vector, mask, self.attention_scale))
        enhanced = sum(updates, x).astype(x.dtype)
        self.sow("intermediates", "enhanced", enhanced)
        return enhanced


class USER(TwoTowers):
    """USER's towers with any text tower; the score is the dot product of unit vectors."""

    image: ImageEncoder

    @property
    def norm_depth(self) -> int:
        """See `RetrievalModel.norm_depth`: those of the self-guide, then that of the units' MLP."""
        return max(2 if "sge" in self.image.guides else 1, super().norm_depth)


def image_fields(config: ConfigDict) -> tuple[str, ...]:
    """Fields of the record that the model of this configuration reads."""
    clip = ("image_embedding",) if "cge" in config.model.user.guides else ()
    return (*config.model.units, *clip)


def build(config: ConfigDict) -> USER:
    """Builds the model of a configuration whose `text.vocab_size` is known.

    Raises ValueError for a field of `config.model` or `config.text` that is none of its choices, and for the published
    norm where images may have other units than its SLOTS regions.
    """
    m, options = config.model, config.model.user
    check_choices(config, {"units": UNIT_MASKS, "user.guides": GUIDES, "user.norm": NORMS})
    check_choices(config, {"dtype": DTYPES, "activation_dtype": DTYPES})
    if (
        options.norm == "slots"
        and "sge" in options.guides
        and (tuple(m.units) != ("regions",) or config.data.region_drop)
    ):
        raise ValueError(
            f"config.model.user.norm is 'slots', one BatchNorm channel for each of {SLOTS} regions; with "
            f"config.model.units = {tuple(m.units)} and config.data.region_drop = {config.data.region_drop} images "
            "differ in their units: drop no regions and use no other units, or set config.model.user.norm to 'layer'"
        )
    image = from_config(
        ImageEncoder,
        options,
        dim=m.dim,
        units=tuple(m.units),
        guides=tuple(options.guides),
        feature_dropout=m.feature_dropout,
        mlp=build_mlp(m),
        axis=DATA if m.bn_sync else None,
        dtype=m.dtype,
        activation_dtype=m.activation_dtype,
    )
    return USER(image=image, text=build_encoder(config))
