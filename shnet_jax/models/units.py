"""Visual units, regions and grid cells: as a batch has them, and projected to the joint space as in VSE-infinity."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from shnet_jax.models.layers import Dense, xavier_uniform
from shnet_jax.models.mlp import MLP
from shnet_jax.ops.matmul import DType
from shnet_jax.types import DATA, Array, Batch

UNIT_MASKS = {"regions": "region_mask", "grid": "grid_mask"}
"""Kinds of units and the fields of their masks."""


def given_unit(batch: Batch, unit: str, dtype: DType = "float32") -> tuple[Array, Array]:
    """Features [n, K, D] of one kind of visual unit and their mask [n, K]; without a mask, all are valid.

    dtype: of the features in the model, `config.model.activation_dtype`, whatever they are stored as.
    """
    x, mask = batch[unit].astype(dtype), batch.get(UNIT_MASKS[unit])
    return x, jnp.ones(x.shape[:2], bool) if mask is None else mask


def build_mlp(model: ConfigDict) -> partial[MLP]:
    """MLP(hidden, features, name=...) with the options of `config.model`."""
    axis = DATA if model.bn_sync else None
    return partial(MLP, dtype=model.dtype, include_padding=model.bn_include_padding, axis=axis)


@struct.dataclass
class Units:
    """Units of all kinds: linear features, those plus their MLP ([n, N, dim] both) and the mask [n, N]."""

    linear: Array
    projected: Array
    mask: Array


class UnitEncoder(nn.Module, kw_only=True):
    """Base of the encoders of visual units; attributes are those of `config.model` (configs/base.py)."""

    dim: int
    units: tuple[str, ...]
    feature_dropout: float
    mlp: partial[MLP]
    dtype: str
    activation_dtype: str = "float32"

    def project(self, batch: Batch, *, train: bool) -> Units:
        """Linear layer plus MLP on each kind of unit; to be called in the `__call__` of the encoder."""
        linears, projecteds, masks = [], [], []
        for unit in self.units:
            x, mask = given_unit(batch, unit, self.activation_dtype)
            x = nn.Dropout(self.feature_dropout, deterministic=not train)(x)
            x = self.enhance(unit, x, mask, batch, train=train)
            linear = Dense(self.dim, dtype=self.dtype, kernel_init=xavier_uniform, name=f"{unit}_linear")(x)
            linears.append(linear)
            projecteds.append(linear + self.unit_mlp(f"{unit}_mlp")(x, mask, train=train))
            masks.append(mask)
        return Units(*(jnp.concatenate(parts, axis=1) for parts in (linears, projecteds, masks)))

    def enhance(self, unit: str, x: Array, mask: Array, batch: Batch, *, train: bool) -> Array:
        """Changes the features [n, N, D] of one kind of unit before they are projected; here not at all."""
        return x

    def unit_mlp(self, name: str) -> MLP:
        """MLP to the joint space whose hidden layer is half as wide."""
        return self.mlp(self.dim // 2, self.dim, name=name)
