"""Self-contained HTML page of a trained model: its metrics, hits, failures and highlighting.

Everything it shows is handed to it; it needs no network, no script and no other file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from shnet_jax.evaluation.metrics import CUTS, QueryRanks
from shnet_jax.evaluation.protocols import Results
from shnet_jax.evaluation.report import HEADINGS, PERSON
from shnet_jax.observe import html
from shnet_jax.observe.charts import chart, shares
from shnet_jax.observe.curves import plot_loss, plot_recall
from shnet_jax.observe.html import Child, Markup, tag
from shnet_jax.retrieve.embeddings import Ids
from shnet_jax.retrieve.highlight import Highlight
from shnet_jax.retrieve.highlight_view import panels, pooling_section
from shnet_jax.retrieve.scene import Album, Scene
from shnet_jax.types import DIRECTIONS

RANK_BANDS = ((0, 1, "first"), (1, 5, "2 to 5"), (5, 10, "6 to 10"), (10, 50, "11 to 50"), (50, np.inf, "beyond 50"))
LEGEND = 8  # classes in the legend of a query's pictures, at most


@dataclasses.dataclass(frozen=True)
class Example:
    """A query and the best results it finds.

    query: row of a caption or an image. rank: of its match, from 1.
    match: row of the other side, of images their best-ranked own caption. best: [(row, score)] of the other side.
    """

    query: int
    rank: int
    match: int
    best: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything that a page shows.

    title: name of the configuration. run: name of the run, "": not shown.
    results: by the first of config.eval.protocols. ranks: of the whole gallery.
    persons: [n] the person in each image, all of whose images are right; None: only a caption's own image is.
    captions, images: queries of each kind; failures of each kind: those ranked worst.
    highlights: (row of an image, what the model looked at).
    history: lines of metrics.jsonl.
    """

    title: str
    results: Results
    ranks: QueryRanks
    ids: Ids
    persons: np.ndarray | None
    captions: Sequence[Example]
    images: Sequence[Example]
    caption_failures: Sequence[Example]
    image_failures: Sequence[Example]
    highlights: Sequence[tuple[int, Highlight]]
    history: Sequence[Mapping[str, Any]] = ()
    run: str = ""

    def right(self, image: int, other: int) -> bool:
        """Whether an image, or a caption of it, answers a query that belongs to the image `other`."""
        return image == other or (self.persons is not None and self.persons[image] == self.persons[other])


def render_page(contents: Contents, album: Album) -> str:
    """The page as HTML."""
    card = contents.results.card
    sections = [
        ("numbers", "How well it retrieves", _numbers(contents)),
        ("curves", "How it learned", _curves(contents.history)),
        ("captions", "Text to image", _by_caption(contents, contents.captions, album)),
        ("images", "Image to text", _by_image(contents, contents.images, album)),
        ("failures", "Failures worth seeing", _failures(contents, album)),
        ("highlights", "What it looks at", _highlights(contents.highlights, contents.ids, album)),
    ]
    sections = [section for section in sections if section[2]]
    about = [
        ["Run ", tag("bdi", contents.run), ". "] if contents.run else None,
        f"{card['dataset']}, {card['split']} split: {card['images']} images, {card['captions']} captions. ",
        f"Checkpoint of step {card['checkpoint_step']}. ",
    ]
    if not album.photographs:
        about.append("There are no photographs here: a picture is the image's label map, its colours are classes.")
    run = f", {contents.run}" if contents.run else ""
    return html.document(
        f"{contents.title}{run}: {card['dataset']} {card['split']}",
        tag("h1", contents.title),
        tag("p", about, class_="muted"),
        tag("nav", [tag("a", title, href=f"#{name}") for name, title, _ in sections], aria_label="Sections"),
        [tag("section", tag("h2", title), parts, id=name) for name, title, parts in sections],
        style=album.style(),
    )


@dataclasses.dataclass(frozen=True)
class Likeness:
    """Contents of the page of a gallery of which not every image has a caption.

    title, run: see `Contents`. dataset, split: of the images. likes: (row of an image, [(row, score)] of those most
    like it). highlights: see `Contents`.
    """

    title: str
    run: str
    dataset: str
    split: str
    ids: Ids
    likes: Sequence[tuple[int, list[tuple[int, float]]]]
    highlights: Sequence[tuple[int, Highlight]]


def render_likeness(contents: Likeness, album: Album) -> str:
    """The page of a gallery without captions of every image, which has no recalls, as HTML."""

    def card(row: int, head: str) -> Markup:
        words = tag("div", tag("div", tag("span", head), class_="head"), tag("bdi", ids.image_ids[row]), class_="text")
        return tag("div", album.scene(row).picture(), words, class_="card")

    ids = contents.ids
    query_cards = [
        tag(
            "div",
            tag(
                "div",
                [card(row, "query"), *(card(r, f"{i}.  {s:.3f}") for i, (r, s) in enumerate(best, 1))],
                class_="cards",
            ),
            class_="query",
        )
        for row, best in contents.likes
    ]
    about = (
        f"{contents.dataset}, {contents.split} split: {len(ids.image_ids)} images, {len(ids.captions)} captions. "
        "Recalls need captions of every image; an image and those most like it are shown instead, with their scores."
    )
    sections = [
        ("likes", "Images like it", query_cards),
        ("highlights", "What it looks at", _highlights(contents.highlights, ids, album)),
    ]
    run = f", {contents.run}" if contents.run else ""
    return html.document(
        f"{contents.title}{run}: {contents.dataset} {contents.split}",
        tag("h1", contents.title),
        tag("p", about, class_="muted"),
        [tag("section", tag("h2", title), parts, id=name) for name, title, parts in sections if parts],
        style=album.style(),
    )


def _numbers(contents: Contents) -> Child:
    metrics, card, ranks = contents.results.metrics, contents.results.card, contents.ranks
    tiles = [
        ("rSum, of 600", metrics["rsum"]),
        ("image to text, R@1 in %", metrics["i2t_r1"]),
        ("text to image, R@1 in %", metrics["t2i_r1"]),
    ]
    if "person_map" in metrics:
        tiles += [
            ("text to person, R@1 in %", metrics["person_r1"]),
            ("text to person, mAP in %", metrics["person_map"]),
        ]
    bands = "Rank of the {} among all {}"
    return [
        tag("div", [tag("div", tag("b", f"{value:.1f}"), tag("span", name)) for name, value in tiles], class_="tiles"),
        _metrics_table(contents.results),
        tag(
            "div",
            shares(_bands(ranks.i2t), bands.format("best right caption", "captions, over all images")),
            shares(_bands(ranks.t2i), bands.format("right image", "images, over all captions")),
            class_="pair",
        ),
        tag(
            "details",
            tag("summary", "How this was measured"),
            html.table(["", ""], [[key.replace("_", " "), str(card[key])] for key in card], words=True),
        ),
    ]


def _metrics_table(results: Results) -> Child:
    """Metrics in a table of few columns, so that a phone shows all of them."""
    names = (*(f"r{cut}" for cut in CUTS), "medr", "meanr")

    def row(title: str, metrics: Mapping[str, float], columns: Sequence[str]) -> list[str]:
        return [title, *(f"{metrics[column]:.1f}" if column in metrics else "" for column in columns)]

    rows = []
    for key, direction in DIRECTIONS.items():
        columns = [f"{key}_{name}" for name in names]
        rows += [row(direction, results.metrics, columns), row("chance", results.chance, columns)]
    tables = [html.table(["", *(HEADINGS[name] for name in names)], rows)]
    if persons := [name for name in PERSON if name in results.metrics]:
        rows = [row("text to person", results.metrics, persons), row("chance", results.chance, persons)]
        tables.append(html.table(["", *(PERSON[name].removeprefix("person ") for name in persons)], rows))
    return tables


def _bands(ranks: np.ndarray) -> list[tuple[str, float]]:
    """Shares of the 0-based ranks by band."""
    return [(name, float(np.mean((ranks >= low) & (ranks < high)))) for low, high, name in RANK_BANDS]


def _curves(history: Sequence[Mapping[str, Any]]) -> Child:
    if not history:
        return None
    return tag(
        "div",
        chart("Validation recall in per cent", lambda axes: plot_recall(axes, history)),
        chart("Training loss", lambda axes: plot_loss(axes, history)),
        class_="pair",
    )


def _by_caption(contents: Contents, examples: Sequence[Example], album: Album) -> Child:
    right = "the image that it was written for." if contents.persons is None else "the images of its person."
    if not examples:
        return None
    return [
        tag("p", "A caption and the images that fit it best, with their scores. A green frame marks ", right),
        [_caption_query(contents, example, album) for example in examples],
    ]


def _caption_query(contents: Contents, example: Example, album: Album) -> Markup:
    ids, best_rows = contents.ids, [row for row, _ in example.best]
    cards = [
        _image_card(contents, example, album.scene(row), row, f"{rank}.  {score:.3f}")
        for rank, (row, score) in enumerate(example.best, start=1)
    ]
    if example.match not in best_rows:
        cards.append(_image_card(contents, example, album.scene(example.match), example.match, f"rank {example.rank}"))
        best_rows.append(example.match)
    say = tag("p", "“", tag("bdi", ids.captions[example.query]), "”", class_="say")
    return tag("div", say, tag("div", cards, class_="cards"), _legend(map(album.scene, best_rows)), class_="query")


def _image_card(contents: Contents, example: Example, scene: Scene, row: int, place: str) -> Markup:
    """An image that a caption finds, with its first caption."""
    right = contents.right(row, example.match)
    head = tag("div", tag("span", place), tag("span", "✓ right" if right else "✗", class_="mark"), class_="head")
    text = tag("div", head, tag("div", tag("bdi", contents.ids.captions_of(row)[0]), class_="sub"), class_="text")
    return tag("div", scene.picture(), text, class_="card good" if right else "card bad")


def _legend(scenes: Iterable[Scene]) -> Markup | None:
    """The colours of the largest classes of the label maps, taken together."""
    sums: dict[tuple[str, str], float] = {}
    for scene in scenes:
        for name, colour, share in scene.classes(LEGEND):
            sums[colour, name] = sums.get((colour, name), 0.0) + share
    largest = sorted(sums, key=lambda entry: -sums[entry])[:LEGEND]
    return html.keys(largest) if largest else None


def _by_image(contents: Contents, examples: Sequence[Example], album: Album) -> Child:
    right = "its own are green." if contents.persons is None else "those of its person are green."
    if not examples:
        return None
    return [
        tag("p", "An image and the captions that fit it best, with their scores; ", right),
        [_image_query(contents, example, album) for example in examples],
    ]


def _image_query(contents: Contents, example: Example, album: Album) -> Markup:
    lines = [_caption_line(contents, example, row, f"{score:.3f}") for row, score in example.best]
    if example.match not in [row for row, _ in example.best]:
        lines.append(_caption_line(contents, example, example.match, f"rank {example.rank}"))
    side = tag("div", album.scene(example.query).card(3), tag("ol", lines), class_="side")
    return tag("div", side, class_="query")


def _caption_line(contents: Contents, example: Example, row: int, place: str) -> Markup:
    """A caption that an image finds."""
    right = contents.right(contents.ids.caption_image[row], example.query)
    mark = tag("span", "✓" if right else "✗", class_="mark")
    words = tag("span", tag("bdi", contents.ids.captions[row]))
    return tag("li", mark, tag("span", place, class_="num"), words, class_="good" if right else "bad")


def _failures(contents: Contents, album: Album) -> Child:
    captions = [_caption_query(contents, example, album) for example in contents.caption_failures]
    images = [_image_query(contents, example, album) for example in contents.image_failures]
    if not captions and not images:
        return None
    return [
        tag("p", "The queries whose match comes last of all, with what came first instead."),
        [tag("h3", "Captions that miss their image"), captions] if captions else None,
        [tag("h3", "Images that miss their captions"), images] if images else None,
    ]


def _highlights(highlights: Sequence[tuple[int, Highlight]], ids: Ids, album: Album) -> Child:
    drawn = [panels(album.scene(row), look, ids.captions_of(row)) for row, look in highlights]
    images = [image for image in drawn if image]
    text = (
        "3SHNet lets the segmentation highlight the regions. The semantic gate passes each region by how well it "
        "fits the scene as a whole; the spatial attention of each looks up where, and among what, it lies."
    )
    pooling = pooling_section([look.weights for _, look in highlights])
    return [tag("p", text), images, pooling] if images else pooling
