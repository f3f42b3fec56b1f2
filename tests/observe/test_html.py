"""What pages are made of: escaped elements, tables, legends, charts for light and dark."""

from __future__ import annotations

import base64
import re

from shnet_jax.observe import charts, html


def test_html_escapes_text_and_attributes():
    found = html.tag("p", "<b>&", html.tag("i", "x"), None, title='"><', class_="a", data_n=0.5, hidden=True, lang=None)
    assert found == '<p title="&quot;&gt;&lt;" class="a" data-n="0.5" hidden>&lt;b&gt;&amp;<i>x</i></p>'
    assert html.render(["a", ["<", None]]) == "a&lt;"


def test_charts():
    drawn = []

    def plot(axes, dark):
        axes.plot([0, 1], label="a")
        drawn.append((dark, axes.get_facecolor()))

    figure = charts.chart("<caption>", plot)
    light, dark = re.findall(r"data:image/png;base64,([^\"]+)", figure)
    assert all(base64.b64decode(code).startswith(b"\x89PNG") for code in (light, dark)) and light != dark
    assert [d for d, _ in drawn] == [False, True] and drawn[0][1] != drawn[1][1]
    assert "<figcaption>&lt;caption&gt;</figcaption>" in figure and charts.chart("<caption>", plot) == figure
    bar = charts.shares([("x", 0.95), ("y", 0.05), ("z", 0.0)], "t")
    assert "95%" in bar and "y 5.0%" in bar and bar.count("flex-grow") == 2


def test_a_table_has_no_empty_heading():
    assert "<thead>" in html.table(["", "n"], [["a", "1"]])
    assert html.table(["", ""], [["a", "<b>"]], words=True).count("<th") == 1
