"""Augmentation of pictures as in IRRA (CVPR 2023): flip, padded crop, random erasing.

The host draws a few numbers for each picture, a function of (seed, step) like all augmentation; the device alters the
pixels, so that pictures that are resident there need not travel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict

from shnet_jax.types import Array

FILL = (123, 117, 104)
"""Colour of erased pixels: the mean of CLIP's training pictures, which normalisation maps to zero (within rounding)."""

VIEW = 7
"""Length of the vector that `Views.draw` gives for a picture."""

_TRIES = 10  # at a rectangle that fits (torchvision's RandomErasing)
_ASPECT = 0.3  # least height / width of the rectangle, whose inverse is the largest


class Views(NamedTuple):
    """Augmentation rates of `config.data` (see configs/base.py), checked, for pictures of `height` x `width`."""

    flip: float
    pad: int
    erase: float
    erase_area: tuple[float, float]
    height: int
    width: int

    @classmethod
    def from_config(cls, data: ConfigDict, shape: tuple[int, ...]) -> Views:
        """Raises ValueError for a rate outside 0..1, a negative padding or areas that are no range."""
        for name in ("image_flip", "image_erase"):
            if not 0 <= data[name] <= 1:
                raise ValueError(f"data.{name} is {data[name]}; a probability between 0 and 1 was expected")
        if data.image_pad < 0:
            raise ValueError(f"data.image_pad is {data.image_pad}; 0 or more pixels were expected")
        least, most = data.image_erase_area
        if not 0 < least <= most < 1:
            raise ValueError(
                f"data.image_erase_area is {(least, most)}; two rising shares of the picture were expected"
            )
        return cls(data.image_flip, data.image_pad, data.image_erase, (least, most), *shape)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """View [7] int32: flip (0 or 1); top, left of the crop minus padding; erased top, left, height, width."""
        flip = rng.random() < self.flip
        top, left = rng.integers(-self.pad, self.pad + 1, 2)
        erased = self._rectangle(rng) if rng.random() < self.erase else (0, 0, 0, 0)
        return np.array([flip, top, left, *erased], np.int32)

    def _rectangle(self, rng: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(_TRIES):
            area = rng.uniform(*self.erase_area) * self.height * self.width
            aspect = math.exp(rng.uniform(math.log(_ASPECT), -math.log(_ASPECT)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < self.height and 0 < w < self.width:
                return int(rng.integers(self.height - h + 1)), int(rng.integers(self.width - w + 1)), h, w
        return 0, 0, 0, 0


def viewed(pictures: Array, views: Array) -> Array:
    """Pictures uint8 [n, H, W, 3] altered by `views` [n, 7] of `Views.draw`: black around, FILL where erased."""
    _, height, width, _ = pictures.shape
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]

    def one(picture: Array, view: Array) -> Array:
        flip, down, right, top, left, h, w = view
        y, x = rows + down, columns + right
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        x = jnp.where(flip == 1, width - 1 - x, x)
        moved = picture[jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)]
        moved = jnp.where(inside[..., None], moved, jnp.uint8(0))
        erased = (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w)
        return jnp.where(erased[..., None], jnp.asarray(FILL, jnp.uint8), moved)

    return lax.stop_gradient(jax.vmap(one)(pictures, views))
