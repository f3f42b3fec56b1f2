"""CLIP's towers (Radford et al., 2021): a vision transformer and a causal text transformer, both up to the joint space.

Weights of a local Hugging Face folder: `interop/clip_weights.py`. Every token is projected, not only the global one,
as in IRRA (Jiang and Ye, CVPR 2023): a set head reads the others. The projections belong to the towers, so that the
optimiser gives all that was pretrained one learning rate.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.layers import ACTIVATIONS, LayerNorm
from shnet_jax.models.transformer import Layer, TextTower, Tower, normal
from shnet_jax.ops.matmul import DType, matmul
from shnet_jax.types import Array

EPSILON = 1e-5  # of every LayerNorm
MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the red, green and blue of a picture in 0..1 that CLIP was trained with."""
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the red, green and blue of a picture in 0..1 that CLIP was trained with."""


class Text(TextTower, kw_only=True):
    """A text tower (see `models.text`) whose result is `projection` wide. Attributes are those of `config.text`.

    The last valid token is <|endoftext|>, CLIP's global vector of a caption.
    """

    width: int = 512
    heads: int = 8
    mlp_dim: int = 2048
    max_positions: int = 77
    projection: int = 512
    activation: str = "quick_gelu"

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, *, train: bool) -> Array:
        """tokens [t, L] int32, mask [t, L] bool -> projected states [t, L, projection] float32."""
        x = self.embed(tokens).astype(self.activation_dtype)
        return _project(self, self.run_layers(x, mask, train=train))

    @nn.nowrap
    def make_layer(self, name: str | None = None) -> Layer:
        """See `Tower.make_layer`."""
        return clip_layer(self, causal=True, name=name)


class Vision(Tower, kw_only=True):
    """CLIP's vision transformer on pictures of any size that divides into patches.

    The positions of another size than `grid` are interpolated, the class token's stays (as IRRA does for 384 x 128).

    Attributes:
      grid: patches down and across that the positions were learned for.
      patch: pixels of a side of a patch.
      layers, width, heads, mlp_dim, projection, activation: as in the weights' config.json.
    """

    grid: tuple[int, int]
    patch: int = 16
    width: int = 768
    heads: int = 12
    mlp_dim: int = 3072
    projection: int = 512
    activation: str = "quick_gelu"

    @nn.compact
    def __call__(self, pixels: Array, *, train: bool) -> Array:
        """pixels [n, H, W, 3] (any dtype), 0..255 -> projected states [n, 1 + patches, projection], global one first.

        Raises ValueError when H or W does not divide into patches.
        """
        n, height, width, _ = pixels.shape
        if height % self.patch or width % self.patch:
            raise ValueError(f"pictures of {height} x {width} pixels do not divide into patches of {self.patch}")
        rows, columns = height // self.patch, width // self.patch
        mean, deviation = (jnp.asarray(v, jnp.float32) for v in (MEAN, DEVIATION))
        x = ((pixels.astype(jnp.float32) / 255 - mean) / deviation).astype(self.activation_dtype)
        x = x.reshape(n, rows, self.patch, columns, self.patch, 3).swapaxes(2, 3)
        kernel = self.param("patches", normal, (self.patch, self.patch, 3, self.width))
        x = matmul(x.reshape(n, rows * columns, -1), kernel.reshape(-1, self.width), self.dtype)
        first = jnp.broadcast_to(self.param("class", normal, (self.width,)), (n, 1, self.width))
        x = (jnp.concatenate([first, x], axis=1) + self._positions(rows, columns)).astype(self.activation_dtype)
        x = LayerNorm(epsilon=EPSILON, name="norm_first")(x)
        return _project(self, self.run_layers(x, jnp.ones(x.shape[:2], bool), train=train))

    def _positions(self, rows: int, columns: int) -> Array:
        """Positions [1 + rows * columns, width], bilinear between the learned ones (align_corners, IRRA)."""
        learned = self.param("positions", normal, (1 + self.grid[0] * self.grid[1], self.width))
        if (rows, columns) == tuple(self.grid):
            return learned
        patches = learned[1:].reshape(*self.grid, self.width)
        for axis, size in ((0, rows), (1, columns)):
            at = jnp.linspace(0.0, self.grid[axis] - 1.0, size)
            low = jnp.clip(jnp.floor(at).astype(jnp.int32), 0, max(self.grid[axis] - 2, 0))
            high = jnp.minimum(low + 1, self.grid[axis] - 1)
            part = (at - low).reshape([-1 if i == axis else 1 for i in range(3)])
            patches = jnp.take(patches, low, axis) * (1 - part) + jnp.take(patches, high, axis) * part
        return jnp.concatenate([learned[:1], patches.reshape(rows * columns, self.width)])

    @nn.nowrap
    def make_layer(self, name: str | None = None) -> Layer:
        """See `Tower.make_layer`."""
        return clip_layer(self, causal=False, name=name)


def clip_layer(tower: Any, *, causal: bool, name: str | None, epsilon: float = EPSILON) -> Layer:
    """A layer with the sizes of a tower; epsilon: of its LayerNorms."""
    return Layer(
        tower.heads,
        tower.mlp_dim,
        0.0,
        tower.dtype,
        normal,
        epsilon,
        causal=causal,
        activation=tower.activation,
        flat_mlp=True,
        name=name,
    )


def _project(tower: Text | Vision, x: Array) -> Array:
    """Last states [n, L, width] in the joint space, [n, L, projection] float32."""
    x = LayerNorm(epsilon=EPSILON, name="norm")(x)
    return matmul(x, tower.param("projection_kernel", normal, (tower.width, tower.projection)), tower.dtype)


def build(text: ConfigDict) -> Text:
    """Builds the text tower of `config.text`."""
    check_activation(text.activation, "text")
    return Text.from_config(text)


def build_vision(clip: ConfigDict, dtype: DType, activation_dtype: DType = "float32") -> Vision:
    """Builds the vision tower of `config.model.clip`."""
    check_activation(clip.activation, "model.clip")
    return Vision.from_config(clip, grid=tuple(clip.grid), dtype=dtype, activation_dtype=activation_dtype)


def check_activation(activation: str, section: str) -> None:
    """Raises ValueError for the name of an activation that no tower has. section: of the configuration."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"config.{section}.activation is {activation!r}; choose from {', '.join(ACTIVATIONS)}")
