"""A self-contained HTML page of a trained model: how good it is, what it finds, where it fails, what it looks at.

Everything it shows is handed to it; it needs no network, no script and no other file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shnet_jax.evaluate.protocols import Results
from shnet_jax.evaluate.recall import QueryRanks
from shnet_jax.evaluate.report import COLUMNS, PERSON, heading
from shnet_jax.retrieve import charts
from shnet_jax.retrieve.folder import Ids
from shnet_jax.retrieve.highlight import Highlight
from shnet_jax.retrieve.highlight_view import pooling_section, view
from shnet_jax.retrieve.html import Child, Markup, table, tag
from shnet_jax.retrieve.page_style import document
from shnet_jax.retrieve.scene import Album

BANDS = ((1, "first"), (5, "2 to 5"), (10, "6 to 10"), (50, "11 to 50"))


@dataclasses.dataclass(frozen=True)
class Shown:
    """A query and the best it finds. query: row of a caption or an image. rank: of its match, from 1.

    match: row of the other side, of images their best-ranked own caption. best: [(row, score)] of the other side.
    """

    query: int
    rank: int
    match: int
    best: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a page shows.

    results: by the first of config.eval.protocols. ranks: of the whole gallery.
    persons: [n] the person in each image, all of whose images are right; None: none but a caption's own is.
    captions, images: queries of each kind; failures of each kind: those ranked worst.
    highlights: (row of an image, what the model looked at).
    history: lines of metrics.jsonl.
    """

    title: str
    results: Results
    ranks: QueryRanks
    ids: Ids
    persons: np.ndarray | None
    captions: Sequence[Shown]
    images: Sequence[Shown]
    caption_failures: Sequence[Shown]
    image_failures: Sequence[Shown]
    highlights: Sequence[tuple[int, Highlight]]
    history: Sequence[Mapping[str, Any]]

    def right(self, image: int, other: int) -> bool:
        """Whether what belongs to one image answers a query of the other."""
        return image == other or (self.persons is not None and self.persons[image] == self.persons[other])


def page(contents: Contents, album: Album) -> str:
    """The page as HTML."""
    card = contents.results.card
    sections = [
        ("numbers", "How well it retrieves", _numbers(contents)),
        ("curves", "How it learned", _curves(contents.history)),
        ("captions", "Words to images", _by_caption(contents, contents.captions, album)),
        ("images", "An image to words", _by_image(contents, contents.images, album)),
        ("failures", "Failures worth seeing", _failures(contents, album)),
        ("highlights", "What it looks at", _highlights(contents, album)),
    ]
    sections = [section for section in sections if section[2]]
    about = [
        f"{card['dataset']}, {card['split']} split: {card['images']} images, {card['captions']} captions. ",
        f"Checkpoint of step {card['checkpoint_step']}. ",
    ]
    if not album.photographs:
        about.append(
            "There are no photographs here: a picture is the image's label map, its colours are classes, and the "
            "frames are regions of the detector."
        )
    return document(
        f"{contents.title}: {card['dataset']} {card['split']}",
        album.style(),
        tag("h1", contents.title),
        tag("p", about, class_="muted"),
        tag("nav", [tag("a", title, href=f"#{name}") for name, title, _ in sections], aria_label="Sections"),
        [tag("section", tag("h2", title), parts, id=name) for name, title, parts in sections],
    )


def _numbers(contents: Contents) -> Child:
    found, card = contents.results, contents.results.card
    m = found.metrics
    tiles = [
        ("rSum, of 600", m["rsum"]),
        ("words → image, R@1 in %", m["t2i_r1"]),
        ("image → words, R@1 in %", m["i2t_r1"]),
    ]
    if "person_map" in m:
        tiles += [("words → person, R@1 in %", m["person_r1"]), ("words → person, mAP in %", m["person_map"])]
    columns = [*COLUMNS, *(name for name in PERSON if name in m)]
    rows = [("this model", m), ("guessing", found.chance)]
    ranks = contents.ranks
    return [
        tag("div", [tag("div", tag("b", f"{value:.1f}"), tag("span", name)) for name, value in tiles], class_="tiles"),
        table(
            ["", *map(heading, columns)],
            [[name, *(f"{metrics[column]:.1f}" for column in columns)] for name, metrics in rows],
        ),
        tag(
            "div",
            charts.shares(_bands(ranks.t2i), "Rank of the right image among all images, over all captions"),
            charts.shares(_bands(ranks.i2t), "Rank of the best right caption among all captions, over all images"),
            class_="pair",
        ),
        tag(
            "details",
            tag("summary", "How this was measured"),
            table(["", ""], [[key.replace("_", " "), str(card[key])] for key in card], class_="words"),
        ),
    ]


def _bands(ranks: np.ndarray) -> list[tuple[str, float]]:
    """Shares of the 0-based ranks by band."""
    edges = [0, *(edge for edge, _ in BANDS), np.inf]
    names = [*(name for _, name in BANDS), "beyond 50"]
    return [
        (name, float(np.mean((ranks >= low) & (ranks < high))))
        for name, low, high in zip(names, edges[:-1], edges[1:], strict=True)
    ]


def _curves(history: Sequence[Mapping[str, Any]]) -> Child:
    if not history:
        return None

    def points(kind: str, key: str) -> list[tuple[float, float]]:
        return [(line["step"], float(line[key])) for line in history if line.get("kind") == kind and key in line]

    names = {"t2i": "words → image", "i2t": "image → words"}
    recalls = {f"{names[d]}, R@{k}": points("eval", f"{d}_r{k}") for d in names for k in (1, 5, 10)}
    return tag(
        "div",
        charts.lines(recalls, "step", "Validation recall in per cent"),
        charts.lines({"loss": points("train", "loss")}, "step", "Training loss"),
        class_="pair",
    )


def _by_caption(contents: Contents, shown: Sequence[Shown], album: Album) -> Child:
    if not shown:
        return None
    return [
        tag(
            "p",
            "A caption and the images that fit it best. A green frame marks ",
            "the image that it was written for." if contents.persons is None else "the images of its person.",
        ),
        [_caption_query(contents, one, album) for one in shown],
    ]


def _caption_query(contents: Contents, shown: Shown, album: Album) -> Markup:
    ids = contents.ids

    def card(place: str, row: int) -> Markup:
        good = contents.right(row, shown.match)
        mark = tag("span", "✓ right" if good else "✗", class_="mark")
        words = None if good else tag("div", tag("bdi", ids.captions_of(row)[0]), class_="sub")
        text = tag("div", tag("div", tag("span", place), mark, class_="head"), words, class_="text")
        return tag("div", album.scene(row).picture(), text, class_="card good" if good else "card bad")

    found = [card(f"{rank}.  {score:.3f}", row) for rank, (row, score) in enumerate(shown.best, start=1)]
    if shown.match not in [row for row, _ in shown.best]:
        found.append(card(f"rank {shown.rank}", shown.match))
    say = tag("p", "“", tag("bdi", ids.captions[shown.query]), "”", class_="say")
    return tag("div", say, tag("div", found, class_="cards"), class_="query")


def _by_image(contents: Contents, shown: Sequence[Shown], album: Album) -> Child:
    if not shown:
        return None
    return [
        tag(
            "p",
            "An image and the captions that fit it best; ",
            "its own are green." if contents.persons is None else "those of its person are green.",
        ),
        [_image_query(contents, one, album) for one in shown],
    ]


def _image_query(contents: Contents, shown: Shown, album: Album) -> Markup:
    ids = contents.ids

    def line(row: int, number: str) -> Markup:
        good = contents.right(ids.caption_image[row], shown.query)
        mark = tag("span", "✓" if good else "✗", class_="mark")
        return tag(
            "li", mark, tag("span", number, class_="num"), tag("span", tag("bdi", ids.captions[row])),
            class_="good" if good else "bad",
        )  # fmt: skip

    lines = [line(row, f"{score:.3f}") for row, score in shown.best]
    if shown.match not in [row for row, _ in shown.best]:
        lines.append(line(shown.match, f"rank {shown.rank}"))
    scene = album.scene(shown.query)
    picture = tag("div", scene.picture(), tag("div", _keys(scene.classes()), class_="text"), class_="card")
    return tag("div", tag("div", picture, tag("ol", lines), class_="side"), class_="query")


def _keys(classes: Sequence[tuple[str, str, float]]) -> Markup:
    spans = [
        tag("span", tag("i", style=f"background:{colour}"), tag("bdi", name), f" {share:.0%}")
        for name, colour, share in classes
    ]
    return tag("div", spans, class_="keys sub")


def _failures(contents: Contents, album: Album) -> Child:
    captions = [_caption_query(contents, one, album) for one in contents.caption_failures]
    images = [_image_query(contents, one, album) for one in contents.image_failures]
    if not captions and not images:
        return None
    return [
        tag("p", "The queries whose match comes last of all, with what came first instead."),
        [tag("h3", "Captions that miss their image"), captions] if captions else None,
        [tag("h3", "Images that miss their captions"), images] if images else None,
    ]


def _highlights(contents: Contents, album: Album) -> Child:
    views = [view(album.scene(row), found, contents.ids.captions_of(row)) for row, found in contents.highlights]
    shown = [one for one in views if one]
    pooling = pooling_section([found.weights for _, found in contents.highlights])
    if not shown:
        return pooling
    return [
        tag(
            "p",
            "3SHNet lets the segmentation highlight the regions: the semantic gate passes each of them by how well it "
            "fits the scene as a whole, and the spatial attention of each looks up where, and among what, it lies.",
        ),
        shown,
        pooling,
    ]
