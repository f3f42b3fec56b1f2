"""HTML and SVG in which nothing but tags comes from this program: text and attributes are always escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is HTML already."""


Child = str | Markup | Iterable["Child"] | None
VOID_TAGS = frozenset({"img", "meta", "rect", "line", "polyline", "circle", "path"})


def render(children: Child) -> Markup:
    """HTML of children: strings are escaped, Markup is taken as it is, None is nothing."""
    if children is None:
        return Markup()
    if isinstance(children, Markup):
        return children
    if isinstance(children, str):
        return Markup(_escaped(children))
    return Markup("".join(render(child) for child in children))


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """An element. Attributes: class_ for class, _ for -; None and False are left out, True has no value."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_escaped(_plain(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID_TAGS and not children:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{render(children)}</{name}>")


def _escaped(text: str) -> str:
    """Text as HTML; halves of surrogate pairs, which a JSON file may hold, and NUL have no form in it."""
    return html.escape(text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8"))


def _plain(value: str | float) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def table(heading: Sequence[str], rows: Iterable[Sequence[str]], **attributes: str) -> Markup:
    """A table whose first column names its rows; wide ones scroll by themselves."""
    head = tag("thead", tag("tr", (tag("th", cell, scope="col") for cell in heading)))
    body = (tag("tr", tag("th", row[0], scope="row"), (tag("td", cell) for cell in row[1:])) for row in rows)
    return tag("div", tag("table", head, tag("tbody", body), **attributes), class_="scroll")
