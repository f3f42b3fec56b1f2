"""The 133 classes of COCO's panoptic task, and how COCO's and UPSNet's files write them.

Source of ids, names and order: panoptic_coco_categories.json of github.com/cocodataset/panopticapi (Kirillov et al.,
Panoptic Segmentation, CVPR 2019). Class numbers 0..132 are the places in that list: 80 things, then 53 kinds of stuff.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_prep.schema import MAP_VOID, DataError, refuse

_THINGS = """
1 person, 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat, 10 traffic light,
11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench, 16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow,
22 elephant, 23 bear, 24 zebra, 25 giraffe, 27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase, 34 frisbee,
35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard, 42 surfboard,
43 tennis racket, 44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl, 52 banana, 53 apple,
54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake, 62 chair, 63 couch,
64 potted plant, 65 bed, 67 dining table, 70 toilet, 72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard,
77 cell phone, 78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator, 84 book, 85 clock, 86 vase, 87 scissors,
88 teddy bear, 89 hair drier, 90 toothbrush"""
_STUFF = """
92 banner, 93 blanket, 95 bridge, 100 cardboard, 107 counter, 109 curtain, 112 door-stuff, 118 floor-wood, 119 flower,
122 fruit, 125 gravel, 128 house, 130 light, 133 mirror-stuff, 138 net, 141 pillow, 144 platform, 145 playingfield,
147 railroad, 148 river, 149 road, 151 roof, 154 sand, 155 sea, 156 shelf, 159 snow, 161 stairs, 166 tent, 168 towel,
171 wall-brick, 175 wall-stone, 176 wall-tile, 177 wall-wood, 178 water-other, 180 window-blind, 181 window-other,
184 tree-merged, 185 fence-merged, 186 ceiling-merged, 187 sky-other-merged, 188 cabinet-merged, 189 table-merged,
190 floor-other-merged, 191 pavement-merged, 192 mountain-merged, 193 grass-merged, 194 dirt-merged, 195 paper-merged,
196 food-other-merged, 197 building-other-merged, 198 rock-merged, 199 wall-other-merged, 200 rug-merged"""


def _parse(text: str) -> list[tuple[int, str]]:
    pairs = (entry.split(maxsplit=1) for entry in text.split(","))
    return [(int(number), name) for number, name in pairs]


THINGS = 80
CATEGORY_IDS = tuple(number for number, _ in _parse(_THINGS) + _parse(_STUFF))
NAMES = tuple(name for _, name in _parse(_THINGS) + _parse(_STUFF))
CLASSES = len(NAMES)
CLASS_OF_ID = {category: index for index, category in enumerate(CATEGORY_IDS)}

STUFF_FIRST = np.array([*range(THINGS, CLASSES), *range(THINGS)])
"""Class of each number that UPSNet uses on COCO: it puts the 53 kinds of stuff before the 80 things
(init_coco.py of github.com/uber-research/UPSNet)."""


def segment_ids(colors: np.ndarray) -> np.ndarray:
    """Segment numbers [H, W] int64 of a panoptic PNG's colours [H, W, 3] uint8: R + 256 G + 65536 B; 0 is void."""
    return colors.astype(np.int64) @ np.array([1, 256, 65536])


def label_map(segments: np.ndarray, categories: Mapping[int, int], where: str) -> np.ndarray:
    """Class of each pixel [H, W] uint8, 255 where there is none.

    Args:
      segments: segment numbers [H, W].
      categories: segment number -> COCO category id, the image's `segments_info`.
      where: names the files in an error.

    Raises:
      DataError: a segment of the map that is not listed, or an unknown category.
    """
    numbers, places = np.unique(segments, return_inverse=True)
    classes = np.full(len(numbers), MAP_VOID, np.uint8)
    for place, number in enumerate(numbers.tolist()):
        if number == 0:
            continue
        refuse(number not in categories, where, "every segment of the PNG in segments_info", f"{number} without")
        if categories[number] not in CLASS_OF_ID:
            raise DataError(
                f"{where}: segment {number}: expected a COCO panoptic category id, found {categories[number]}"
            )
        classes[place] = CLASS_OF_ID[categories[number]]
    return classes[places.reshape(segments.shape)]


def from_stuff_first(labels: np.ndarray, where: str) -> np.ndarray:
    """Label map [H, W] uint8 in this module's order from UPSNet's, which has 255 as void."""
    table = np.full(256, MAP_VOID, np.uint8)
    table[:CLASSES] = STUFF_FIRST
    unknown = labels[(labels >= CLASSES) & (labels != MAP_VOID)]
    if unknown.size:
        raise DataError(f"{where}: expected classes 0..{CLASSES - 1}, or {MAP_VOID} for void, found {unknown[0]}")
    return table[labels]
