"""What pages are made of: escaped elements, tables, legends, charts for light and dark."""

from __future__ import annotations

from shnet_jax.observe import charts, html


def test_html_escapes_text_and_attributes():
    actual = html.tag(
        "p", "<b>&", html.tag("i", "x"), None, title='"><', class_="a", data_n=0.5, hidden=True, lang=None
    )
    assert actual == '<p title="&quot;&gt;&lt;" class="a" data-n="0.5" hidden>&lt;b&gt;&amp;<i>x</i></p>'
    assert html.render(["a", ["<", None]]) == "a&lt;"


def test_a_chart_is_part_of_the_page():
    def plot(axes):
        axes.plot([0, 1], label="a", color=charts.RECALLS["i2t"][0])

    figure = charts.chart("<caption>", plot)
    assert "<figcaption>&lt;caption&gt;</figcaption><svg" in figure and charts.chart("<caption>", plot) == figure
    # Light and dark; for browsers without light-dark() the light colour stands before it.
    assert "currentColor" in figure and charts.INK not in figure
    assert "stroke: #08519c; stroke: light-dark(#08519c, #c6e0f7)" in figure
    assert "</b>" not in figure

    def with_legend(axes):
        plot(axes)
        axes.plot([1, 0], label="<b>", color=charts.SERIES[0], marker="s")
        axes.legend()

    figure = charts.chart("", with_legend)
    legend = figure[figure.index("</svg>") :]
    assert '<b style="color:#08519c;color:light-dark(#08519c,#c6e0f7)">━</b>a</span>' in legend
    assert '<b style="color:#0072b2">■</b>&lt;b&gt;</span>' in legend and "legend_1" not in figure
    assert "http" not in figure and figure.count("url(") == figure.count("url(#")
    bar = charts.shares([("x", 0.95), ("y", 0.05), ("z", 0.0)], "t")
    assert "95%" in bar and "y 5.0%" in bar and bar.count("flex-grow") == 2


def test_a_table_has_no_empty_heading():
    assert "<thead>" in html.table(["", "n"], [["a", "1"]])
    assert html.table(["", ""], [["a", "<b>"]], words=True).count("<th") == 1
