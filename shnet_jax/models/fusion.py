"""Visual self-highlighting of 3SHNet: what is in the scene (semantic) and where it lies (spatial).

Source: the released code of Ge et al., "3SHNet: Boosting Image-Sentence Retrieval via Visual Semantic-Spatial
Self-Highlighting", IPM 61(4), 2024. Intermediate results of interest (gates, attention) are sown under their names.
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.models.layers import Dense, LayerNorm, rounded, torch_uniform
from shnet_jax.models.mlp import BatchNorm, Moments
from shnet_jax.ops.map_attention import attention_weights, map_attention
from shnet_jax.ops.matmul import einsum
from shnet_jax.ops.positions import map_code_1d, map_code_2d
from shnet_jax.types import Array

POSITION_CODE = 8  # channels of the position code of the label map
CLASS_EMBEDDING = 16  # channels of a learned class embedding (map_input = "embedding")
MAP_INPUTS = ("raw_id", "embedding")
MAP_CODES = {"1d": map_code_1d, "2d": map_code_2d}  # by map_position


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
        return LayerNorm(epsilon=1e-5, name="norm")(x)


class SemanticHighlight(nn.Module):
    """VSeM: each unit is gated by its agreement with the scene's classes, then modulated by itself and the scene."""

    dim: int
    dropout: float
    mlp: partial
    dtype: str

    @nn.compact
    def __call__(self, units: Array, mask: Array, seg_semantic: Array, *, train: bool) -> Array:
        """units [n, N, d] (linear features), mask [n, N], seg_semantic [n, C, h, w] float32 -> [n, N, d]."""
        scene = SegEmbed(self.dim, self.dropout, self.dtype, name="scene")(
            jnp.mean(seg_semantic, axis=(2, 3)), train=train
        )
        scene = self.mlp(self.dim // 2, self.dim, name="scene_mlp")(scene, train=train) + scene
        units = self.mlp(self.dim // 2, self.dim, name="unit_mlp")(units, mask, train=train) + units
        gate = jax.nn.sigmoid(einsum("nkd,nd->nk", units, scene, "float32") / math.sqrt(self.dim))
        gate = jnp.where(mask, gate, 0.0)
        self.sow("intermediates", "gate", gate)
        gated = rounded(lambda units, gate: gate[..., None] * units, units, gate)
        modulated = gated * jnp.tanh(Dense(self.dim, dtype=self.dtype, name="scale")(gated))
        query = jnp.where(mask[..., None], scene[:, None, :], 0.0).astype(units.dtype)
        return jax.nn.relu(Dense(self.dim, dtype=self.dtype, name="out")(modulated + query))


class MapEncoder(nn.Module):
    """Label map to keys: 3x3 convolution of class and position channels, BatchNorm, ReLU.

    The convolution is linear and BatchNorm affine, so the keys are relu(patches @ kernel + position), where the
    position part is equal for all images and the batch statistics follow from moments of the (small) patches. The keys
    themselves are left to `ops.map_attention`.
    """

    channels: int
    num_classes: int
    inputs: str
    position: str
    axis: str | None

    @nn.compact
    def __call__(self, seg_map: Array, *, train: bool) -> tuple[Array, Array, Array]:
        """seg_map [n, H, W] uint8 -> patches [n, H*W, i], kernel [i, channels], position [H*W, channels]."""
        _, height, width = seg_map.shape
        if self.inputs == "raw_id":
            classes = seg_map[..., None].astype(jnp.float32)
        else:
            ids = jnp.minimum(seg_map.astype(jnp.int32), self.num_classes)  # void and unknown share the last row
            classes = nn.Embed(self.num_classes + 1, CLASS_EMBEDDING, name="classes")(ids)
        inputs = classes.shape[-1]
        fan_in = 9 * (inputs + POSITION_CODE)
        kernel = self.param("kernel", torch_uniform(fan_in), (3, 3, inputs + POSITION_CODE, self.channels))
        bias = self.param("bias", torch_uniform(fan_in), (self.channels,))
        code = MAP_CODES[self.position](height, width, POSITION_CODE)
        code = _neighbourhoods(code.reshape(1, height, width, POSITION_CODE))[0]
        patches = _neighbourhoods(classes)
        by_class = kernel[:, :, :inputs].reshape(-1, self.channels)
        position = einsum("pi,ic->pc", code, kernel[:, :, inputs:].reshape(-1, self.channels), "float32") + bias

        moments = partial(_moments, patches, by_class, position, self.axis)
        mean, factor, shift = BatchNorm(axis=self.axis, name="norm").coefficients(self.channels, moments, train=train)
        return patches, by_class * factor, (position - mean) * factor + shift


def _neighbourhoods(x: Array) -> Array:
    """The 3x3 neighbourhood of each position, zero beyond the border: [n, H, W, c] -> [n, H*W, 9*c]."""
    n, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(taps, axis=-1).reshape(n, height * width, -1)


def _moments(patches: Array, kernel: Array, position: Array, axis: str | None) -> Moments:
    """Moments of all values patches @ kernel + position, without making them."""

    def over_devices(x: Array) -> Array:
        return x if axis is None else lax.pmean(x, axis)

    n, positions, _ = patches.shape
    count = n * positions * (1 if axis is None else lax.axis_size(axis))
    by_position = over_devices(jnp.mean(patches, axis=0))
    centre = jnp.mean(by_position, axis=0)
    position_mean = jnp.mean(position, axis=0)
    # About their means: raw class ids are far from zero, and float32 would lose the variance in the square of the mean.
    patches, by_position, position = patches - centre, by_position - centre, position - position_mean
    # Summed image by image: one running sum of n * positions terms, as CPUs make it, has 10 to 30 times the error.
    by_image = einsum("npi,npj->nij", patches, patches, "float32")
    covariance = over_devices(jnp.mean(by_image, axis=0) / positions)
    variance = (
        jnp.sum(einsum("ij,jc->ic", covariance, kernel, "float32") * kernel, axis=0)
        + 2.0 * jnp.mean(einsum("pi,ic->pc", by_position, kernel, "float32") * position, axis=0)
        + jnp.mean(jnp.square(position), axis=0)
    )
    mean = einsum("oi,ic->oc", centre[None], kernel, "float32")[0] + position_mean
    return Moments(mean, jnp.maximum(variance, 0.0), jnp.asarray(count, jnp.float32))


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
        keys = MapEncoder(self.channels, self.num_classes, self.map_input, self.map_position, self.axis, name="map")(
            seg_map, train=train
        )
        query = self.mlp(self.dim // 2, self.channels, name="query_mlp")(units, mask, train=train)
        scaled = query.astype(jnp.float32) * (self.scale / math.sqrt(self.channels))
        if self.is_mutable_collection("intermediates"):  # large: made only where somebody asks to see it
            self.sow("intermediates", "keys", keys)
            self.sow("intermediates", "attention", attention_weights(scaled, *keys, self.dtype))
        context = map_attention(scaled, *keys, self.dtype)
        self.sow("intermediates", "context", context)
        context = jnp.where(mask[..., None], context, 0.0).astype(query.dtype)
        return self.mlp(self.dim // 2, self.dim, name="out_mlp")(context + query, mask, train=train)
