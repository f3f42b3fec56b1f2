"""The tables and protocol cards of an evaluation as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from shnet_jax.observe import html
from shnet_jax.observe.html import Markup, tag
from shnet_jax.observe.table import Table


def results_page(title: str, tables: Sequence[Table], cards: Sequence[Table], figures: Sequence[Markup] = ()) -> str:
    """HTML page with the figures, each table under its title, and the protocol cards, of which the first is open."""
    return html.document(
        title,
        tag("h1", title),
        tag("div", figures, class_="pair") if figures else None,
        [tag("section", tag("h2", tag("bdi", table.title)), _cells(table)) for table in tables],
        tag("h2", "How this was measured"),
        [
            tag("details", tag("summary", tag("bdi", card.title)), _cells(card), open=not place)
            for place, card in enumerate(cards)
        ],
    )


def _cells(table: Table) -> Markup:
    """Table cells, transposed where there are more columns than rows, so that a phone shows them side by side."""
    lines = [table.heading, *table.rows]
    if not table.words and len(table.heading) > len(lines):
        lines = [list(column) for column in zip(*lines, strict=True)]
    # A name's marks of direction end with its cell.
    heading, *rows = ([tag("bdi", cell) for cell in line] for line in lines)
    return html.table(heading, rows, words=table.words)
