"""HTML pages that need no other file: escaped elements, tables, one template and one style sheet for all of them.

Only tags come from this program: text and attributes are always escaped. `document` makes a page of its parts.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from shnet_jax.observe.html_style import CSS


class Markup(str):
    """Text that is already HTML."""


Child = str | Markup | Iterable["Child"] | None
VOID_TAGS = frozenset({"img", "meta", "rect"})


def document(title: str, *body: Child, style: str = "") -> str:
    """Complete HTML page, light and dark, from a phone to a wide screen; its own heading is part of `body`.

    style: further rules of the style sheet, made by this program alone: they are not escaped.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(CSS + style)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', body)), lang='en')}\n"


def render(children: Child) -> Markup:
    """Renders children as HTML: strings are escaped, Markup is kept as it is, None is empty."""
    if children is None:
        return Markup()
    if isinstance(children, Markup):
        return children
    if isinstance(children, str):
        return Markup(_escaped(children))
    return Markup("".join(render(child) for child in children))


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """HTML element. Attributes: class_ for class, _ for -; None and False are left out, True has no value."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_escaped(_plain(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID_TAGS and not children:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{render(children)}</{name}>")


def table(heading: Sequence[Child], rows: Iterable[Sequence[Child]], words: bool = False) -> Markup:
    """HTML table whose first column names its rows and stays in sight while the others scroll.

    words: whether the cells hold words, which wrap, and not numbers.
    """
    head = tag("thead", tag("tr", (tag("th", cell, scope="col") for cell in heading)))
    body = (tag("tr", tag("th", row[0], scope="row"), (tag("td", cell) for cell in row[1:])) for row in rows)
    cells = tag("table", head if any(heading) else None, tag("tbody", body), class_="words" if words else None)
    return tag("div", cells, class_="scroll", tabindex="0")


def keys(entries: Iterable[tuple[str, str]]) -> Markup:
    """Legend of entries (CSS colour, text)."""
    spans = [tag("span", tag("i", style=f"background:{colour}"), tag("bdi", text)) for colour, text in entries]
    return tag("div", spans, class_="keys")


def _escaped(text: str) -> str:
    """Escapes text for HTML; replaces NUL and lone surrogates, which a JSON file may hold."""
    return html.escape(text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8"))


def _plain(value: str | float) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
