"""Training augmentation of words, regions and grid cells: pure functions of a NumPy generator."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict


class Augmentation(NamedTuple):
    """The rates of `config.data` (see configs/base.py), checked."""

    word_change: float
    word_mask: float
    word_random: float
    word_delete: float
    region_drop: float
    grid_drop_image: float
    grid_drop: float

    @classmethod
    def from_config(cls, data: ConfigDict) -> Augmentation:
        """Reads the rates. Raises ValueError for a rate outside 0..1 or shares of the altered words above 1 in all."""
        rates = cls(*(data[name] for name in cls._fields))
        for name, rate in rates._asdict().items():
            if not 0 <= rate <= 1:
                raise ValueError(f"data.{name} is {rate}; a probability between 0 and 1 was expected")
        shares = rates.word_mask + rates.word_random + rates.word_delete
        if shares > 1 + 1e-9:
            raise ValueError(
                f"data.word_mask + data.word_random + data.word_delete is {shares}; at most 1 was expected"
            )
        return rates


def alter_words(
    pieces: np.ndarray,
    word_lengths: np.ndarray,
    rates: Augmentation,
    mask_id: int,
    random_range: tuple[int, int],
    rng: np.random.Generator,
) -> np.ndarray:
    """Alter each word with probability `word_change` (3SHNet, text input of the released code).

    Of the altered words the share `word_mask` becomes one mask token per piece, `word_random` one random
    token per piece, `word_delete` disappears (the code's comment says "keep"), the rest stays.

    Args:
      pieces: [m] int32, pieces of a caption without special tokens.
      word_lengths: [w] int, pieces of each word.
      rates: see above.
      mask_id: the mask token.
      random_range: ids first..last-1 of the random tokens, drawn uniformly.
      rng: one uniform draw per word, then the random tokens.

    Returns:
      [m'] int32 with m' <= m; empty when every word is deleted.
    """
    # One draw decides whether a word is altered and how: the shares lie side by side in [0, word_change).
    edges = rates.word_change * np.cumsum([rates.word_mask, rates.word_random, rates.word_delete])
    action = np.repeat(np.searchsorted(edges, rng.random(len(word_lengths)), side="right"), word_lengths)
    masked, random, deleted = action == 0, action == 1, action == 2
    altered = np.where(masked, np.int32(mask_id), pieces)
    altered[random] = rng.integers(*random_range, size=np.count_nonzero(random), dtype=np.int32)
    return altered[~deleted]


def keep_regions(regions: int, rates: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Mask [regions] bool of kept regions: each stays with probability 1 - `region_drop` (3SHNet, released code).

    All may be dropped; `batches.gather`, which also knows the valid regions, then keeps all of them.
    """
    return rng.random(regions) >= rates.region_drop


def keep_grid(cells: int, rates: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Mask [cells] bool of kept grid cells (VSE-infinity, grid encoder of the released code).

    One uniform draw u per image: above 1 - `grid_drop_image` each cell is dropped with probability
    `grid_drop` * u, else all stay. One u for both is the code's choice: where it acts, u lies in 0.2..1.
    """
    u = rng.random()
    dropped = rng.random(cells) < rates.grid_drop * u
    return ~dropped if u > 1 - rates.grid_drop_image else np.ones(cells, bool)
