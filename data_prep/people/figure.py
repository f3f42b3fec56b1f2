"""The picture of a figure: painted from simple shapes, seen a little differently every time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_prep.people.wardrobe import Person

HEIGHT, WIDTH = 128, 48
RGB = {
    "red": (205, 35, 35),
    "orange": (240, 135, 25),
    "yellow": (240, 215, 45),
    "green": (40, 145, 60),
    "blue": (40, 70, 195),
    "purple": (125, 45, 165),
    "pink": (245, 140, 185),
    "white": (238, 238, 238),
    "grey": (135, 135, 135),
    "black": (28, 28, 30),
    "brown": (115, 72, 40),
    "blond": (225, 190, 110),
}
SKIN = {"1": (240, 205, 180), "2": (215, 165, 130), "3": (165, 110, 75), "4": (105, 70, 50)}
BRIM, OUTLINE = 1.5, 0.55  # how far a cap reaches beyond the head; brightness of an edge

Mask = np.ndarray
Tone = Callable[[str], np.ndarray]
"""Name of a colour -> its red, green, blue [3] in this picture."""


class Canvas:
    """A picture in coordinates of the figure: x to the right from its middle, y down from 0 (top) to 1 (soles)."""

    def __init__(self, background: np.ndarray, centre: float, top: float, height: float, flip: bool):
        self.pixels = background
        y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32) + 0.5
        self.x = (x - centre) / height * (-1 if flip else 1)
        self.y = (y - top) / height

    def box(self, left: float, top: float, right: float, bottom: float, slant: float = 0.0) -> Mask:
        """A trapezium; slant: how much each side leans out from top to bottom."""
        lean = slant * np.clip((self.y - top) / (bottom - top), 0, 1)
        return (self.x > left - lean) & (self.x < right + lean) & (self.y > top) & (self.y < bottom)

    def oval(self, x: float, y: float, rx: float, ry: float) -> Mask:
        """An ellipse."""
        return ((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2 < 1

    def paint(self, mask: Mask, colour: np.ndarray, second: Mask | None = None) -> None:
        """Fills `mask`; where `second` holds, with a tone that stands out; edges are darker."""
        inner = mask & np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1)
        self.pixels[mask] = colour * OUTLINE
        self.pixels[inner] = colour
        if second is not None:
            self.pixels[inner & second] = 0.4 * colour + 0.6 * (255.0 if colour.mean() < 140 else 30.0)

    def pattern(self, name: str) -> Mask | None:
        """Mask of the second tone of a pattern."""
        u, v = self.x * 22, self.y * 22
        match name:
            case "striped":
                return v % 1 < 0.45
            case "checked":
                return (u % 1 < 0.5) ^ (v % 1 < 0.5)
            case "dotted":
                return (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.09
        return None


def render(person: Person, rng: np.random.Generator) -> np.ndarray:
    """Picture uint8 [HEIGHT, WIDTH, 3]; `rng` gives the view, the light, the background and the noise."""
    canvas = Canvas(
        _background(rng),
        centre=WIDTH / 2 + rng.uniform(-4, 4),
        top=rng.uniform(4, 12),
        height=rng.uniform(104, 114),
        flip=bool(rng.random() < 0.5),
    )
    skin = np.array(SKIN[person.skin], np.float32)

    def tone(name: str) -> np.ndarray:
        return np.clip(np.array(RGB[name], np.float32) + rng.normal(scale=7, size=3), 0, 255)

    stride, swing = rng.uniform(0.0, 0.05), rng.uniform(0.0, 0.03)
    if person.bag == "backpack":
        canvas.paint(canvas.box(-0.17, 0.2, 0.17, 0.42), tone(person.bag_colour))
    _legs(canvas, person, skin, tone, stride)
    _top(canvas, person, skin, tone, swing)
    _head(canvas, person, skin, tone)
    _bag(canvas, person, tone, swing)
    light = np.float32(rng.uniform(0.8, 1.12)) * (1 + np.float32(rng.uniform(-0.1, 0.1)) * canvas.x[..., None])
    picture = canvas.pixels * light + rng.standard_normal(canvas.pixels.shape, np.float32) * 5
    return np.clip(picture, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A wall over a floor, both dull, with a few blurred upright things."""
    horizon = int(rng.uniform(0.55, 0.85) * HEIGHT)
    wall, floor = (rng.uniform(90, 190) + rng.normal(scale=9, size=3) for _ in range(2))
    picture = np.empty((HEIGHT, WIDTH, 3), np.float32)
    picture[:horizon], picture[horizon:] = wall, floor
    for _ in range(rng.integers(0, 4)):
        left, width = int(rng.integers(0, WIDTH)), int(rng.integers(2, 12))
        picture[: int(horizon * rng.uniform(0.9, 1.1)), left : left + width] += rng.uniform(-40, 40)
    return picture


def _legs(canvas: Canvas, person: Person, skin: np.ndarray, tone: Tone, stride: float) -> None:
    cloth = tone(person.bottom_colour)
    hem = {"trousers": 0.95, "shorts": 0.68, "skirt": 0.72}[person.bottom]
    for left, right in ((-0.105 - stride, -0.012 - stride / 2), (0.012 + stride / 2, 0.105 + stride)):
        canvas.paint(canvas.box(left, 0.5, right, 0.95), skin)
        if person.bottom != "skirt":
            canvas.paint(canvas.box(left - 0.012, 0.5, right + 0.012, hem), cloth)
        canvas.paint(canvas.box(left - 0.02, 0.93, right + 0.03, 1.0), tone(person.shoes_colour))
    if person.bottom == "skirt":
        canvas.paint(canvas.box(-0.11, 0.48, 0.11, hem, slant=0.07), cloth)


def _top(canvas: Canvas, person: Person, skin: np.ndarray, tone: Tone, swing: float) -> None:
    colour, pattern = tone(person.top_colour), canvas.pattern(person.pattern)
    hem = {"t-shirt": 0.5, "shirt": 0.53, "jacket": 0.52, "coat": 0.72, "sweater": 0.51}[person.top]
    sleeve = {"t-shirt": 0.3}.get(person.top, 0.49)
    for side in (-1, 1):
        inner, outer = sorted((side * (0.125 + swing), side * (0.19 + swing)))
        canvas.paint(canvas.box(inner, 0.2, outer, 0.53), skin)
        canvas.paint(canvas.box(inner - 0.006, 0.18, outer + 0.006, sleeve), colour, pattern)
    canvas.paint(canvas.box(-0.135, 0.17, 0.135, hem, slant=0.03 if person.top == "coat" else 0.0), colour, pattern)
    dark, pale = colour * 0.45, np.minimum(colour * 0.5 + 120, 255)
    match person.top:
        case "jacket" | "coat":  # open over something pale
            canvas.paint(canvas.box(-0.028, 0.17, 0.028, hem), pale)
        case "shirt":  # a row of buttons and a collar
            canvas.paint(canvas.box(-0.012, 0.2, 0.012, hem), dark)
            canvas.paint(canvas.box(-0.07, 0.165, 0.07, 0.19), pale)
        case "sweater":  # a high collar and cuffs
            canvas.paint(canvas.box(-0.06, 0.145, 0.06, 0.185), dark)
            canvas.paint(canvas.box(-0.135, hem - 0.03, 0.135, hem), dark)


def _head(canvas: Canvas, person: Person, skin: np.ndarray, tone: Tone) -> None:
    hair = tone(person.hair)
    if person.hair_style == "long":
        canvas.paint(canvas.box(-0.085, 0.06, 0.085, 0.235), hair)
    if person.hair_style == "tied-back":
        canvas.paint(canvas.oval(0.1, 0.1, 0.035, 0.055), hair)
    canvas.paint(canvas.box(-0.03, 0.12, 0.03, 0.175), skin)
    canvas.paint(canvas.oval(0, 0.08, 0.068, 0.075), hair)
    canvas.paint(canvas.oval(0, 0.098, 0.056, 0.058), skin)
    if person.hat != "none":
        colour = tone(person.hat_colour)
        canvas.paint(canvas.oval(0, 0.05, 0.078, 0.06) & (canvas.y < 0.068), colour)
        if person.hat == "cap":
            canvas.paint(canvas.box(-0.078, 0.055, 0.078 * BRIM, 0.075), colour)
        else:
            canvas.paint(canvas.oval(0, -0.012, 0.025, 0.022), colour)


def _bag(canvas: Canvas, person: Person, tone: Tone, swing: float) -> None:
    if person.bag == "none":
        return
    colour = tone(person.bag_colour)
    match person.bag:
        case "backpack":  # its straps; the rest is behind
            for side in (-1, 1):
                middle = side * 0.085
                canvas.paint(canvas.box(middle - 0.02, 0.17, middle + 0.02, 0.36), colour)
        case "handbag":
            x = 0.14 + swing
            canvas.paint(canvas.box(x - 0.015, 0.5, x + 0.015, 0.56), colour)
            canvas.paint(canvas.box(x - 0.065, 0.55, x + 0.065, 0.66), colour)
        case "shoulder bag":
            strap = np.abs(canvas.x - (canvas.y - 0.17) * 0.65 + 0.08) < 0.016
            canvas.paint(strap & (canvas.y > 0.17) & (canvas.y < 0.47), colour)
            canvas.paint(canvas.box(0.05, 0.45, 0.2, 0.58), colour)
