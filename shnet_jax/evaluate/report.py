"""Results as JSON for programs and as an aligned Markdown table for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from shnet_jax.evaluate.protocols import Results
from shnet_jax.evaluate.recall import CUTS, DIRECTIONS

FORMAT = 1  # raised when a key of the JSON changes its name or meaning
ARROWS = {"i2t": "i→t", "t2i": "t→i"}
HEADINGS = {"medr": "MedR", "meanr": "MeanR", **{f"r{k}": f"R@{k}" for k in CUTS}}
COLUMNS = [*(f"{d}_{m}" for d in DIRECTIONS for m in (*(f"r{k}" for k in CUTS), "medr", "meanr")), "rsum"]


def to_json(arms: Mapping[str, Results]) -> str:
    """All numbers and cards: {"format": 1, "arms": {name: {"metrics", "folds", "chance", "card"}}}."""
    document = {"format": FORMAT, "arms": {name: dataclasses.asdict(arm) for name, arm in arms.items()}}
    return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: Path, arms: Mapping[str, Results]) -> None:
    """Writes `to_json` to a file, whose folder must exist."""
    path.write_text(to_json(arms), encoding="utf-8")


def table(arms: Mapping[str, Results]) -> str:
    """Markdown table: a row for each arm, one for guessing on each gallery; recalls are in percent."""
    rows = [(name, arm.metrics) for name, arm in arms.items()]
    for arm in arms.values():
        card = arm.card
        folds = f", {card['folds']} folds" if card["folds"] != 1 else ""
        guess = (f"chance ({card['images']} images, {card['captions']} captions{folds})", arm.chance)
        if guess not in rows:
            rows.append(guess)
    cells = [[name, *(f"{metrics[column]:.1f}" for column in COLUMNS)] for name, metrics in rows]
    return markdown(["", *map(heading, COLUMNS)], cells)


def one_line(results: Results) -> str:
    """The recalls of both directions and rSum, for a log."""
    m = results.metrics
    recalls = "  ".join(
        f"{d} R@1/5/10 {m[f'{d}_r1']:.1f} {m[f'{d}_r5']:.1f} {m[f'{d}_r10']:.1f}" for d in ("i2t", "t2i")
    )
    return f"{recalls}  rSum {m['rsum']:.1f}"


def card_table(card: Mapping[str, str | int]) -> str:
    """The protocol card as a Markdown table of two columns."""
    return markdown(["protocol card", ""], [[key.replace("_", " "), str(card[key])] for key in card], ":-")


def heading(column: str) -> str:
    """The heading of one of COLUMNS."""
    if column == "rsum":
        return "rSum"
    direction, metric = column.split("_")
    return f"{ARROWS[direction]} {HEADINGS[metric]}"


def markdown(heading: list[str], rows: Iterable[list[str]], align: str = "-:") -> str:
    """A Markdown table with columns of equal width; the first is aligned to the left, the others as `align` says."""
    lines = [heading, *rows]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(heading))]
    left = [True] + [align == ":-"] * (len(heading) - 1)

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(cells, widths, left, strict=True)]
        return "| " + " | ".join(padded) + " |\n"

    rule = ["-" * w if to_left else "-" * (w - 1) + ":" for w, to_left in zip(widths, left, strict=True)]
    return line(heading) + line(rule) + "".join(map(line, rows))
