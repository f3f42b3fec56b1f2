"""CLIP's towers (Radford et al., 2021): a vision transformer and a causal text transformer, both up to the joint space.

Weights of a local Hugging Face folder: `interop/clip_weights.py`. Every token is projected, not only the global one,
as in IRRA (Jiang and Ye, CVPR 2023): a set head reads the others. The projections belong to the towers, so that the
optimiser gives all that was pretrained one learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from shnet_jax.models.layers import Dense, LayerNorm, SelfAttention, run_layer
from shnet_jax.ops.matmul import DType, matmul
from shnet_jax.types import Array

EPSILON = 1e-5  # of every LayerNorm
MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the red, green and blue of a picture in 0..1 that CLIP was trained with."""
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the red, green and blue of a picture in 0..1 that CLIP was trained with."""

_init = nn.initializers.normal(0.02)


def quick_gelu(x: Array) -> Array:
    """Activation of the first CLIP models, x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": partial(jax.nn.gelu, approximate=False),
}


class Layer(nn.Module):
    """One pre-norm layer: x + attention(LayerNorm(x)), then x + mlp(LayerNorm(x))."""

    heads: int
    mlp_dim: int
    activation: str
    causal: bool
    dtype: DType

    @nn.compact
    def __call__(self, x: Array, mask: Array, *, train: bool) -> Array:
        """x [n, L, width], mask [n, L] bool -> [n, L, width]; causal: a member attends to those before it only."""
        attention = SelfAttention(self.heads, 0.0, self.dtype, _init, causal=self.causal, name="attention")
        x = x + attention(LayerNorm(epsilon=EPSILON, name="attention_norm")(x), mask, train=train)
        dense = partial(Dense, dtype=self.dtype, kernel_init=_init)
        hidden = dense(self.mlp_dim, name="in")(LayerNorm(epsilon=EPSILON, name="mlp_norm")(x))
        return x + dense(x.shape[-1], name="out")(ACTIVATIONS[self.activation](hidden))


class Text(nn.Module):
    """A text tower (see `models.text`) whose result is `projection` wide. Attributes are those of `config.text`.

    The last valid token is <|endoftext|>, CLIP's global vector of a caption.
    """

    vocab_size: int
    layers: int = 12
    width: int = 512
    heads: int = 8
    mlp_dim: int = 2048
    max_positions: int = 77
    projection: int = 512
    activation: str = "quick_gelu"
    frozen_layers: int = 0
    dtype: DType = "float32"
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: Array, mask: Array, *, train: bool) -> Array:
        """tokens [t, L] int32, mask [t, L] bool -> projected states [t, L, projection] float32."""
        length = tokens.shape[1]
        if length > self.max_positions:
            raise ValueError(f"captions of {length} tokens, but this CLIP has {self.max_positions} positions")
        words = self.param("words", _init, (self.vocab_size, self.width))
        positions = self.param("positions", _init, (self.max_positions, self.width))
        # take, not words[tokens]: a token id outside the vocabulary gives NaN instead of the last row.
        x = jnp.take(words, tokens, axis=0) + positions[:length]
        x = self.run_layers(x, mask, train=train)
        x = LayerNorm(epsilon=EPSILON, name="norm")(x)
        return matmul(x, self.param("projection_kernel", _init, (self.width, self.projection)), self.dtype)

    @nn.nowrap
    def make_layer(self, name: str | None = None) -> Layer:
        """One of the layers; outside of this module's own methods it is unbound."""
        return Layer(self.heads, self.mlp_dim, self.activation, True, self.dtype, name=name)

    def run_layers(self, x: Array, mask: Array, *, train: bool) -> Array:
        """All layers on x [t, L, width], mask [t, L]; apart from `__call__` so that a pipeline can take its place."""
        return _run_layers(self, x, mask, self.frozen_layers, train=train)


class Vision(nn.Module):
    """CLIP's vision transformer on pictures of any size that divides into patches.

    The positions of another size than `grid` are interpolated, the class token's stays (as IRRA does for 384 x 128).

    Attributes:
      grid: patches down and across that the positions were learned for.
      patch: pixels of a side of a patch.
      layers, width, heads, mlp_dim, projection, activation: as in the weights' config.json.
    """

    grid: tuple[int, int]
    patch: int = 16
    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp_dim: int = 3072
    projection: int = 512
    activation: str = "quick_gelu"
    dtype: DType = "float32"
    remat: bool = False

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
        x = (pixels.astype(jnp.float32) / 255 - mean) / deviation
        x = x.reshape(n, rows, self.patch, columns, self.patch, 3).swapaxes(2, 3)
        kernel = self.param("patches", _init, (self.patch, self.patch, 3, self.width))
        x = matmul(x.reshape(n, rows * columns, -1), kernel.reshape(-1, self.width), self.dtype)
        first = jnp.broadcast_to(self.param("class", _init, (self.width,)), (n, 1, self.width))
        x = jnp.concatenate([first, x], axis=1) + self._positions(rows, columns)
        x = LayerNorm(epsilon=EPSILON, name="norm_first")(x)
        x = _run_layers(self, x, jnp.ones(x.shape[:2], bool), 0, train=train)
        x = LayerNorm(epsilon=EPSILON, name="norm")(x)
        return matmul(x, self.param("projection_kernel", _init, (self.width, self.projection)), self.dtype)

    def _positions(self, rows: int, columns: int) -> Array:
        """Positions [1 + rows * columns, width], bilinear between the learned ones (align_corners, IRRA)."""
        learned = self.param("positions", _init, (1 + self.grid[0] * self.grid[1], self.width))
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
        """One of the layers; outside of this module's own methods it is unbound."""
        return Layer(self.heads, self.mlp_dim, self.activation, False, self.dtype, name=name)


def _run_layers(tower: Text | Vision, x: Array, mask: Array, frozen: int, *, train: bool) -> Array:
    for i in range(tower.layers):
        learns = train and i >= frozen
        x = run_layer(tower.make_layer(f"layer_{i}"), x, mask, train=learns, remat=tower.remat and learns)
        if i + 1 == frozen:
            x = jax.lax.stop_gradient(x)
    return x


def build(text: ConfigDict) -> Text:
    """Builds the text tower of `config.text`."""
    _check_activation(text.activation, "text")
    if not 0 <= text.frozen_layers <= text.layers:
        raise ValueError(f"config.text.frozen_layers is {text.frozen_layers}, the tower has {text.layers} layers")
    return Text(
        vocab_size=text.vocab_size,
        layers=text.layers,
        width=text.width,
        heads=text.heads,
        mlp_dim=text.mlp_dim,
        max_positions=text.max_positions,
        projection=text.projection,
        activation=text.activation,
        frozen_layers=text.frozen_layers,
        dtype=text.dtype,
        remat=text.remat,
    )


def build_vision(clip: ConfigDict, dtype: DType) -> Vision:
    """Builds the vision tower of `config.model.clip`."""
    _check_activation(clip.activation, "model.clip")
    return Vision(
        grid=tuple(clip.grid),
        patch=clip.patch,
        layers=clip.layers,
        width=clip.width,
        heads=clip.heads,
        mlp_dim=clip.mlp_dim,
        projection=clip.projection,
        activation=clip.activation,
        dtype=dtype,
        remat=clip.remat,
    )


def _check_activation(activation: str, section: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"config.{section}.activation is {activation!r}; choose from {', '.join(ACTIVATIONS)}")
