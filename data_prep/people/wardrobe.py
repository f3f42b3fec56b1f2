"""Appearance of a figure: hair, garments, their colours and patterns, a bag, a hat."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "grey", "black", "brown")
HAIR = ("black", "brown", "blond", "grey")
HAIR_STYLES = ("short", "long", "tied-back")
TOPS = ("t-shirt", "shirt", "jacket", "coat", "sweater")
PATTERNS = ("plain", "striped", "checked", "dotted")
BOTTOMS = ("trousers", "shorts", "skirt")
BAGS = ("none", "backpack", "handbag", "shoulder bag")
HATS = ("none", "cap", "woollen hat")
SKIN = ("1", "2", "3", "4")  # tones from pale to dark; no caption tells them

CHOICES: dict[str, tuple[str, ...]] = {
    "hair": HAIR,
    "hair_style": HAIR_STYLES,
    "top": TOPS,
    "top_colour": COLOURS,
    "pattern": PATTERNS,
    "bottom": BOTTOMS,
    "bottom_colour": COLOURS,
    "shoes_colour": COLOURS,
    "bag": BAGS,
    "bag_colour": COLOURS,
    "hat": HATS,
    "hat_colour": COLOURS,
    "skin": SKIN,
}
# What a twin may differ in: seen in every view, and named by most captions.
DIFFERENCES = ("top", "top_colour", "pattern", "bottom", "bottom_colour", "shoes_colour", "bag", "bag_colour")


@dataclass(frozen=True)
class Person:
    """One value of each of CHOICES."""

    hair: str
    hair_style: str
    top: str
    top_colour: str
    pattern: str
    bottom: str
    bottom_colour: str
    shoes_colour: str
    bag: str
    bag_colour: str
    hat: str
    hat_colour: str
    skin: str


def person(seed: int, number: int) -> Person:
    """Person `number` >= 0 of the world `seed` >= 0; 2k + 1 is the twin of 2k: in one respect it looks otherwise."""
    rng = np.random.default_rng([seed, 0, number // 2])
    first = Person(**{name: str(rng.choice(values)) for name, values in CHOICES.items()})
    if number % 2 == 0:
        return first
    names = [name for name in DIFFERENCES if not (name == "bag_colour" and first.bag == "none")]
    name = str(rng.choice(names))
    others = [value for value in CHOICES[name] if value != getattr(first, name)]
    return replace(first, **{name: str(rng.choice(others))})
