"""Contents and layout of a scene: things (shapes with attributes) on regions of stuff, and their relations.

Everything is a function of (seed, index). Indices 2i and 2i+1 form a pair, and many pairs are twins,
so that no single source of information tells the images of a set apart:

* "moved" twins hold the same things and stuff in another layout: only the maps (or the boxes) separate them;
* "recoloured" twins have the same label map with the colours exchanged: only the regions separate them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from data_prep.scenes.shapes import PIXEL_CENTRES, SHAPES, SIDE, Cover, Spot, cover

UPPER_STUFF = ("sky", "hills", "forest", "wall")  # the top of a picture
LOWER_STUFF = ("sea", "grass", "sand", "snow", "road", "floor")  # what lies below it
STUFF = UPPER_STUFF + LOWER_STUFF
CLASS_NAMES = SHAPES + STUFF  # ids of the label map; no colour, so a label map alone does not answer a caption
COLOURS = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "white", "black")
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "large")
PREDICATES = ("on", "behind", "left of", "above")
ON, BEHIND, LEFT_OF, ABOVE = range(4)

RADIUS = {"small": (0.07, 0.09), "large": (0.13, 0.16)}  # of the picture's side
PAIR_KINDS = ("independent", "moved", "recoloured")
PAIR_SHARES = (0.4, 0.3, 0.3)

MARGIN = 0.12  # centres closer than this share of the side are neither beside nor above each other
HIDDEN = 0.15  # share of a thing that must be covered before it is called "behind"
TOUCHING = 0.06  # a smaller covered share is mere contact; layouts with shares between the two are drawn again
VISIBLE = 0.45  # share of every thing that stays visible

CONTENT, LAYOUT, PAIR = range(3)  # streams of random numbers


@dataclass(frozen=True)
class Look:
    """The attributes of a thing, indices into SHAPES, COLOURS, SIZES and TEXTURES."""

    shape: int
    colour: int
    size: int
    texture: int


@dataclass(frozen=True)
class Ground:
    """The regions of stuff (class ids): `upper` over `lower`; two lower ones lie stacked or side by side.

    `cuts` and `waves` give the borders: upper/lower at y = cuts[0], between the lower ones at y (stacked) or
    x = cuts[1], each with a sine wave of (amplitude, frequency, phase).
    """

    upper: int
    lower: tuple[int, ...]
    stacked: bool
    cuts: tuple[float, float]
    waves: tuple[tuple[float, float, float], tuple[float, float, float]]

    def at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Class id of the stuff at the points x, y (shapes that broadcast, units of the side) -> uint8."""
        under = y >= _border(self.cuts[0], self.waves[0], x)
        if len(self.lower) == 1:
            return np.where(under, self.lower[0], self.upper).astype(np.uint8)
        second = (
            y >= _border(self.cuts[1], self.waves[1], x)
            if self.stacked
            else x >= _border(self.cuts[1], self.waves[1], y)
        )
        return np.where(under, np.where(second, *self.lower[::-1]), self.upper).astype(np.uint8)

    def relations(self) -> frozenset[tuple[int, int, int]]:
        """All (class, predicate, class) that hold between the regions of stuff."""
        holding = {(self.upper, ABOVE, s) for s in self.lower}
        if len(self.lower) == 2:
            holding.add((self.lower[0], ABOVE if self.stacked else LEFT_OF, self.lower[1]))
        return frozenset(holding)


@dataclass(frozen=True)
class Scene:
    """A scene of n things, in the order in which they are painted (the last one is in front).

    covers: for each thing (top, left, alpha float32 [h, w]): the pixels it covers before others hide it.
    boxes: [n, 4] float32, x1 y1 x2 y2 in 0..1 of the whole thing, hidden parts included.
    label_map: [SIDE, SIDE] uint8, class ids.   relations: all (thing, predicate, thing) that hold.
    standing: for each thing the class id of the stuff it stands on, -1 on a border or on another thing.
    """

    looks: tuple[Look, ...]
    spots: tuple[Spot, ...]
    ground: Ground
    covers: tuple[Cover, ...]
    boxes: np.ndarray
    label_map: np.ndarray
    relations: frozenset[tuple[int, int, int]]
    standing: tuple[int, ...]


def _border(cut: float, wave: tuple[float, float, float], t: np.ndarray) -> np.ndarray:
    amplitude, frequency, phase = wave
    return cut + amplitude * np.sin(frequency * t + phase)


def _content(rng: np.random.Generator) -> tuple[list[Look], int, list[int]]:
    """Looks (a repeated one is a group), upper and lower stuff. Shapes and colours differ between groups."""
    groups = int(rng.integers(3, 6))
    shapes, colours = rng.permutation(len(SHAPES))[:groups], rng.permutation(len(COLOURS))[:groups]
    sizes = rng.integers(0, len(SIZES), groups)
    textures = rng.choice(len(TEXTURES), groups, p=(0.4, 0.2, 0.2, 0.2))
    looks = [Look(*map(int, row)) for row in zip(shapes, colours, sizes, textures, strict=True)]
    if rng.random() < 0.5:
        looks += [looks[0]] * int(rng.integers(1, 3 if groups > 3 else 4))
    upper = len(SHAPES) + int(rng.integers(len(UPPER_STUFF)))
    first_lower = len(SHAPES) + len(UPPER_STUFF)
    lower = first_lower + rng.permutation(len(LOWER_STUFF))[: 1 if rng.random() < 0.3 else 2]
    return looks, upper, [int(s) for s in lower]


def _ground(rng: np.random.Generator, upper: int, lower: list[int]) -> Ground:
    stacked = bool(rng.random() < 0.5)
    top = float(rng.uniform(0.25, 0.42))
    second = float(rng.uniform(0.62, 0.75) if stacked else rng.uniform(0.35, 0.65))
    waves = [(float(rng.uniform(0, 0.03)), float(rng.uniform(3, 12)), float(rng.uniform(0, 6.3))) for _ in range(2)]
    order = tuple(lower[i] for i in rng.permutation(len(lower)))
    return Ground(upper, order, stacked, (top, second), (waves[0], waves[1]))


def _clear(spot: Spot, others: list[Spot]) -> bool:
    return all(max(abs(spot.x - o.x), abs(spot.y - o.y)) > spot.radius + o.radius + 0.02 for o in others)


def _place(rng: np.random.Generator, radius: float, angle: float, placed: list[Spot]) -> Spot | None:
    """A spot in front of a placed thing, on top of one, or clear of all; None after twelve draws in vain."""
    way = rng.random()
    for x, y, side in rng.uniform(size=(12, 3)):
        spot = Spot(radius + x * (1 - 2 * radius), radius + y * (1 - 2 * radius), radius, angle)
        others = placed
        if placed and way < 0.45:
            other = placed[int(side * len(placed))]
            others = [o for o in placed if o is not other]
            span = other.radius + radius
            if way < 0.25:  # in front: shifted to one side so that a part stays visible
                shift = span * (0.62 if x < 0.5 else -0.62)
                spot = Spot(other.x + shift, other.y + (y - 0.3) * radius, radius, angle)
            else:
                spot = Spot(other.x + (x - 0.5) * other.radius * 0.5, other.y - span * 0.96, radius, angle)
        if radius <= spot.x <= 1 - radius and radius <= spot.y <= 1 - radius and _clear(spot, others):
            return spot
    return None


def _hidden(covers: list[Cover]) -> tuple[np.ndarray, np.ndarray]:
    """Occlusion ([n, n] share of thing i that thing j > i covers, owner map [SIDE, SIDE] int8 with -1 for none)."""
    n = len(covers)
    masks = np.zeros((n, SIDE, SIDE), bool)
    owner = np.full((SIDE, SIDE), -1, np.int8)
    share = np.zeros((n, n))
    for j, (top, left, alpha) in enumerate(covers):
        part = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        solid = alpha >= 0.5
        masks[j][part] = solid
        owner[part][solid] = j
        for i in range(j):
            share[i, j] = np.count_nonzero(masks[i][part] & solid)
    return share / np.maximum(masks.sum((1, 2)), 1)[:, None], owner


def _acceptable(hidden: np.ndarray, owner: np.ndarray, covers: list[Cover]) -> bool:
    visible = np.bincount(owner[owner >= 0], minlength=len(covers))
    full = [np.count_nonzero(alpha >= 0.5) for _, _, alpha in covers]
    return bool((visible >= VISIBLE * np.array(full)).all()) and not ((hidden > TOUCHING) & (hidden < HIDDEN)).any()


def _extent(cover: Cover) -> list[float]:
    top, left, alpha = cover
    rows, columns = (np.flatnonzero((alpha >= 0.5).any(axis)) for axis in (1, 0))
    return [
        (left + columns[0]) / SIDE,
        (top + rows[0]) / SIDE,
        (left + columns[-1] + 1) / SIDE,
        (top + rows[-1] + 1) / SIDE,
    ]


def _relations(boxes: np.ndarray, hidden: np.ndarray) -> frozenset[tuple[int, int, int]]:
    """All (i, predicate, j) that hold of the boxes [n, 4] and the hidden shares [n, n]."""
    holding = set()
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    n = len(boxes)
    for i, j in ((i, j) for i in range(n) for j in range(n) if i != j):
        dx, dy = centre[j] - centre[i]
        if hidden[i, j] >= HIDDEN:
            holding.add((i, BEHIND, j))
        if abs(boxes[i, 3] - boxes[j, 1]) < 0.03 and abs(dx) < 0.45 * (boxes[j, 2] - boxes[j, 0]):
            holding.add((i, ON, j))
        if dx > MARGIN and dx >= abs(dy):
            holding.add((i, LEFT_OF, j))
        if dy > MARGIN and dy > abs(dx):
            holding.add((i, ABOVE, j))
    return frozenset(holding)


def compose(looks: tuple[Look, ...], spots: tuple[Spot, ...], ground: Ground) -> Scene | None:
    """The scene of these things, back to front; None when one is hidden too much or too little to tell."""
    covers = [cover(look.shape, spot) for look, spot in zip(looks, spots, strict=True)]
    hidden, owner = _hidden(covers)
    if not _acceptable(hidden, owner, covers):
        return None
    boxes = np.array([_extent(c) for c in covers], np.float32)
    relations = _relations(boxes, hidden)
    y, x = PIXEL_CENTRES
    shape_of = np.array([look.shape for look in looks], np.uint8)
    label_map = np.where(owner >= 0, shape_of[owner], ground.at(x, y)).astype(np.uint8)
    stacked = {i for i, predicate, _ in relations if predicate == ON}
    standing = tuple(-1 if i in stacked else _stands_on(ground, box) for i, box in enumerate(boxes))
    return Scene(looks, spots, ground, tuple(covers), boxes, label_map, relations, standing)


def _stands_on(ground: Ground, box: np.ndarray) -> int:
    """The stuff at three points of a box's foot (for "in the sea" its centre, too); -1 if they differ."""
    x = box[0] + (box[2] - box[0]) * np.array([0.25, 0.5, 0.75, 0.5])
    stuff = ground.at(x, np.array([box[3]] * 3 + [(box[1] + box[3]) / 2]) - 0.01)
    foot = int(stuff[0])
    same = stuff if CLASS_NAMES[foot] == "sea" else stuff[:3]
    return foot if (same == foot).all() else -1


def _arrange(rng: np.random.Generator, looks: list[Look], upper: int, lower: list[int]) -> Scene:
    """A layout of the things; drawn again, a little smaller each time, until all of them can be seen."""
    shrink = 1.0
    while True:
        ground = _ground(rng, upper, lower)
        order = [looks[i] for i in rng.permutation(len(looks))]
        spots: list[Spot] = []
        for look in order:
            radius = float(rng.uniform(*RADIUS[SIZES[look.size]])) * shrink
            spot = _place(rng, radius, float(rng.uniform(-0.2, 0.2)), spots)
            if spot is None:
                break
            spots.append(spot)
        if len(spots) == len(order) and (scene := compose(tuple(order), tuple(spots), ground)):
            return scene
        shrink *= 0.99


def pair_kind(seed: int, index: int) -> str:
    """Relation of an index to its neighbour index ^ 1: one of PAIR_KINDS."""
    return PAIR_KINDS[int(np.random.default_rng([seed, PAIR, index // 2]).choice(3, p=PAIR_SHARES))]


@functools.lru_cache(maxsize=4)  # a caption is checked against the twin, which is the next scene to be made
def sample(seed: int, index: int) -> Scene:
    """The scene of (seed, index), both >= 0, whatever else was made before."""
    kind, first = pair_kind(seed, index), index - index % 2
    content = np.random.default_rng([seed, CONTENT, index if kind == "independent" else first])
    layout = np.random.default_rng([seed, LAYOUT, first if kind == "recoloured" else index])
    looks, upper, lower = _content(content)
    if kind != "recoloured" or index == first:
        return _arrange(layout, looks, upper, lower)
    twin = sample(seed, first)
    colours = list(dict.fromkeys(look.colour for look in twin.looks))
    following = dict(zip(colours, colours[1:] + colours[:1], strict=True))
    recoloured = tuple(Look(k.shape, following[k.colour], k.size, k.texture) for k in twin.looks)
    scene = compose(recoloured, twin.spots, twin.ground)
    assert scene is not None  # the same spots were acceptable for the twin
    return scene
