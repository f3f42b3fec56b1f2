"""Visual self-highlighting of 3SHNet: what is in the scene (semantic) and where it lies (spatial).

Source: the released code of Ge et al., "3SHNet: Boosting Image-Sentence Retrieval via Visual Semantic-Spatial
Self-Highlighting", IPM 61(4), 2024. Intermediate results of interest (gates, attention) are sown under their names.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.models.layers import Dense, torch_uniform
from shnet_jax.models.mlp import MLP, BatchNorm
from shnet_jax.ops.matmul import einsum
from shnet_jax.ops.positions import map_code_1d, map_code_2d
from shnet_jax.types import Array

POSITION_CODE = 8  # channels of the position code of the label map
CLASS_EMBEDDING = 16  # channels of a learned class embedding (map_input = "embedding")


class SegEmbed(nn.Module):
    """Class shares to the joint space: Linear -> ReLU -> Dropout -> LayerNorm."""

    features: int
    dropout: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """x [..., C] -> [..., features]."""
        x = jax.nn.relu(Dense(self.features, dtype=self.dtype, name="linear")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.LayerNorm(epsilon=1e-5, name="norm")(x)


class SemanticHighlight(nn.Module):
    """VSeM: each unit is gated by its agreement with the scene's classes, then modulated by itself and the scene."""

    dim: int
    dropout: float
    mlp: partial
    dtype: str

    @nn.compact
    def __call__(self, units: Array, mask: Array, seg_semantic: Array, *, train: bool) -> Array:
        """units [n, N, d] (linear features), mask [n, N], seg_semantic [n, C, h, w] -> [n, N, d]."""
        scene = SegEmbed(self.dim, self.dropout, self.dtype, name="scene")(
            jnp.mean(seg_semantic, axis=(2, 3)), train=train
        )
        scene = self.mlp(self.dim // 2, self.dim, name="scene_mlp")(scene, train=train) + scene
        units = self.mlp(self.dim // 2, self.dim, name="unit_mlp")(units, mask, train=train) + units
        gate = jax.nn.sigmoid(jnp.einsum("nkd,nd->nk", units, scene) / jnp.sqrt(float(self.dim)))
        gate = jnp.where(mask, gate, 0.0)
        self.sow("intermediates", "gate", gate)
        gated = gate[..., None] * units
        modulated = gated * jnp.tanh(Dense(self.dim, dtype=self.dtype, name="scale")(gated))
        query = jnp.where(mask[..., None], scene[:, None, :], 0.0)
        return jax.nn.relu(Dense(self.dim, dtype=self.dtype, name="out")(modulated + query))


class MapEncoder(nn.Module):
    """Label map to keys: 3x3 convolution of class and position channels, BatchNorm, ReLU.

    The convolution is linear, so its position part, equal for all images, is computed once per step.
    """

    channels: int
    num_classes: int
    inputs: str
    position: str
    axis: str | None
    dtype: str

    @nn.compact
    def __call__(self, seg_map: Array, *, train: bool) -> Array:
        """seg_map [n, H, W] uint8 -> [n, H*W, channels]."""
        n, height, width = seg_map.shape
        class_channels = {"raw_id": 1, "one_hot": self.num_classes + 1, "embedding": CLASS_EMBEDDING}[self.inputs]
        init = torch_uniform(9 * (class_channels + POSITION_CODE))
        kernel = self.param("kernel", init, (3, 3, class_channels + POSITION_CODE, self.channels))
        bias = self.param("bias", init, (self.channels,))
        if self.inputs == "raw_id":
            classes = seg_map[..., None].astype(jnp.float32)
        else:
            ids = jnp.minimum(seg_map.astype(jnp.int32), self.num_classes)  # void and unknown share the last one
            if self.inputs == "one_hot":
                classes = jax.nn.one_hot(ids, self.num_classes + 1)
            else:
                classes = nn.Embed(self.num_classes + 1, CLASS_EMBEDDING, name="classes")(ids)
        taps = [
            jnp.pad(classes, ((0, 0), (1, 1), (1, 1), (0, 0)))[:, i : i + height, j : j + width]
            for i in range(3)
            for j in range(3)
        ]
        patches = jnp.concatenate(taps, axis=-1).reshape(n * height * width, 9 * class_channels)
        class_kernel = kernel[:, :, :class_channels].reshape(9 * class_channels, self.channels)
        features = einsum("pi,ic->pc", patches, class_kernel, self.dtype).reshape(n, -1, self.channels)

        code = {"1d": map_code_1d, "2d": map_code_2d}[self.position](height, width, POSITION_CODE)
        position = lax.conv_general_dilated(
            code.reshape(1, height, width, POSITION_CODE),
            kernel[:, :, class_channels:],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )
        features = features + position.reshape(1, -1, self.channels) + bias
        return jax.nn.relu(BatchNorm(axis=self.axis, name="norm")(features, None, train=train))


class SpatialHighlight(nn.Module):
    """VSpM: each unit attends to the label map and so learns where, and among what, it lies."""

    dim: int
    channels: int
    scale: float
    num_classes: int
    map_input: str
    map_position: str
    mlp: partial
    axis: str | None
    dtype: str

    @nn.compact
    def __call__(self, units: Array, mask: Array, seg_map: Array, *, train: bool) -> Array:
        """units [n, N, d] (linear features), mask [n, N], seg_map [n, H, W] -> [n, N, d]."""
        keys = MapEncoder(
            self.channels, self.num_classes, self.map_input, self.map_position, self.axis, self.dtype, name="map"
        )(seg_map, train=train)
        self.sow("intermediates", "keys", keys)
        query = self.mlp(self.dim // 2, self.channels, name="query_mlp")(units, mask, train=train)
        logits = einsum("nkc,npc->nkp", query * (self.scale / jnp.sqrt(float(self.channels))), keys, self.dtype)
        attention = jax.nn.softmax(logits, axis=-1)
        self.sow("intermediates", "attention", attention)
        context = einsum("nkp,npc->nkc", attention, keys, self.dtype)
        self.sow("intermediates", "context", context)
        context = jnp.where(mask[..., None], context, 0.0)
        return self.mlp(self.dim // 2, self.dim, name="out_mlp")(context + query, mask, train=train)
