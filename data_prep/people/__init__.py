"""Rendered figures with true captions: a person search that needs no download and shows nobody.

`person(seed, number)` says what a figure wears, `record(seed, index)` is one image of it, `draw(seed, index)` its
picture; `shnet data people --out=DIR` writes a set. Figures come in pairs that differ in one respect, so that
a caption has to be read as a whole, and every figure is seen IMAGES times, each in another view, light and place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from data_prep.people import captions, features, figure
from data_prep.people.wardrobe import Person, person

__all__ = ["IMAGES", "Person", "draw", "person", "record", "records"]

VERSION = 1  # raised when the same (seed, index) gives another record
IMAGES = 4  # of each person: images 4k to 4k + 3 are of person k
CAPTIONS = 2  # of each image
VIEW, WORDS = range(1, 3)  # streams of random numbers; wardrobe.py has 0


def draw(seed: int, index: int) -> np.ndarray:
    """The picture of image `index`, uint8 [figure.HEIGHT, figure.WIDTH, 3]."""
    return figure.render(person(seed, index // IMAGES), np.random.default_rng([seed, VIEW, index]))


def record(seed: int, index: int) -> dict[str, Any]:
    """The record of image `index` >= 0 of the world `seed` >= 0, whatever else is generated.

    Returns:
      image_id, captions (2), caption_ids int64 [2], identity int64 (index // IMAGES), image uint8 [128, 48, 3], and
      grid float16 [60, features.SIZE], descriptors of 12 x 5 overlapping cells of the picture.
    """
    picture = draw(seed, index)
    rng = np.random.default_rng([seed, WORDS, index])
    return {
        "image_id": f"figure-{seed}-{index:010d}",
        "captions": [captions.caption(person(seed, index // IMAGES), rng) for _ in range(CAPTIONS)],
        "caption_ids": index * CAPTIONS + np.arange(CAPTIONS, dtype=np.int64),
        "identity": np.int64(index // IMAGES),
        "image": picture,
        "grid": features.describe(picture),
    }


def records(seed: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
    """Records start..stop-1 in order."""
    return (record(seed, index) for index in range(start, stop))
