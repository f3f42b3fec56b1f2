"""A scaling study as a table (CSV), as plots (PNG) and as one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shnet_jax.observe.files import write_text
from shnet_jax.observe.scale_page import page, picture
from shnet_jax.observe.scale_plots import plots, render
from shnet_jax.observe.scale_rows import Row, Study, write_csv

TABLE = "scaling.csv"
PAGE = "report.html"
PLOTS = "plots"


def write_report(workdir: Path, study: Study, rows: Sequence[Row]) -> Path:
    """Writes scaling.csv, plots/*.png and report.html into `workdir`; returns the page's path."""
    write_csv(workdir / TABLE, rows)
    figures, folder = [], workdir / PLOTS
    folder.mkdir(exist_ok=True)
    old = {*folder.glob("*.png")}
    for name, caption, draw in plots(rows):
        light, dark = (render(draw, dark) for dark in (False, True))
        drawn = folder / f"{name}.png"
        drawn.write_bytes(light)
        old.discard(drawn)
        figures.append(picture(caption, light, dark))
    for of_points_that_are_gone in old:
        of_points_that_are_gone.unlink()
    path = workdir / PAGE
    write_text(path, page(study, rows, figures))
    return path
