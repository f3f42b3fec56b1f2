"""The tables and protocol cards of an evaluation as one HTML file that needs no other."""

from __future__ import annotations

from collections.abc import Sequence

from shnet_jax.evaluate.report import Table
from shnet_jax.retrieve.html import Markup, table, tag
from shnet_jax.retrieve.page_style import document

# The names of the rows stay where they are while the numbers scroll beside them.
STYLE = """
.scroll th:first-child{position:sticky;left:0;background:var(--bg);white-space:normal;min-width:9.5rem;max-width:16rem;
overflow-wrap:anywhere;padding-right:14px;vertical-align:top}
table{border-collapse:separate;border-spacing:0}
td{vertical-align:top}
@media(max-width:520px){.scroll th:first-child{min-width:7rem;max-width:8.5rem}}
"""


def results_page(title: str, tables: Sequence[Table], cards: Sequence[Table]) -> str:
    """The page: each table under its title, then the protocol cards, of which the first is open."""
    return document(
        title,
        Markup(STYLE),
        tag("h1", title),
        [tag("section", tag("h2", tag("bdi", one.title)), _cells(one)) for one in tables],
        tag("h2", "How this was measured"),
        [
            tag("details", tag("summary", tag("bdi", one.title)), _cells(one), open=not place)
            for place, one in enumerate(cards)
        ],
    )


def _cells(one: Table) -> Markup:
    words = {"class_": "words"} if one.words else {}
    # A name's marks of direction end with it.
    heading, *rows = ([tag("bdi", cell) for cell in row] for row in (one.heading, *one.rows))
    return table(heading, rows, **words)
