"""Results as JSON for programs, and as tables (Markdown as text) for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from shnet_jax.evaluation.bootstrap import NAMES, Interval
from shnet_jax.evaluation.metrics import CUTS, Metrics, QueryRanks
from shnet_jax.evaluation.protocols import Results
from shnet_jax.observe.table import Table
from shnet_jax.types import DIRECTIONS

FORMAT = 1  # raised when a key of the JSON changes its name or meaning
HEADINGS = {"medr": "MedR", "meanr": "MeanR", **{f"r{k}": f"R@{k}" for k in CUTS}}
PERSON = {
    "person_r1": "person R@1",
    "person_r5": "R@5",
    "person_r10": "R@10",
    "person_map": "mAP",
    "person_minp": "mINP",
}
"""Headings of `metrics.PERSON_METRICS`."""
COLUMNS = [*(f"{d}_{m}" for d in DIRECTIONS for m in (*(f"r{k}" for k in CUTS), "medr", "meanr")), "rsum"]


def as_dict(results: Results) -> dict[str, Any]:
    """All numbers and the card; not the ranks of single queries, which `bootstrap.save_queries` keeps."""
    fields = dataclasses.asdict(dataclasses.replace(results, queries=None))
    return {name: value for name, value in fields.items() if name != "queries"}


def from_dict(fields: Mapping[str, Any], queries: QueryRanks | None = None) -> Results:
    """The results that `as_dict` gave, with the ranks of single queries. Raises TypeError or KeyError for others."""
    intervals = {name: Interval(**interval) for name, interval in fields["intervals"].items()}
    known = {name: fields[name] for name in ("metrics", "chance", "card", "extra")}
    return Results(**known, folds=tuple(fields["folds"]), queries=queries, intervals=intervals)


def to_json(arms: Mapping[str, Results], differences: Mapping[str, Mapping[str, Interval]] | None = None) -> str:
    """All numbers and cards: {"format": 1, "arms": {name: {"metrics", "folds", "chance", "card", ...}}}.

    differences: comparison -> recall -> its interval, under "differences".
    """
    document: dict[str, Any] = {"format": FORMAT, "arms": {name: as_dict(arm) for name, arm in arms.items()}}
    if differences:
        document["differences"] = intervals_as_dict(differences)
    return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def intervals_as_dict(differences: Mapping[str, Mapping[str, Interval]]) -> dict[str, dict[str, dict[str, float]]]:
    """Intervals by comparison and recall, as JSON has them."""
    return {
        name: {recall: dataclasses.asdict(interval) for recall, interval in intervals.items()}
        for name, intervals in differences.items()
    }


def table(arms: Mapping[str, Results]) -> Table:
    """A row for each arm, one for chance on each gallery; recalls are in percent."""
    chance_rows: list[tuple[str, Metrics]] = []
    for arm in arms.values():
        card = arm.card
        folds = f", {card['folds']} folds" if card["folds"] != 1 else ""
        name = f"chance ({card['images']} images, {card['captions']} captions{folds})"
        # Of one gallery not every arm has the numbers of a person search.
        rows_of_gallery = (row for title, row in chance_rows if title == name)
        if row := next((r for r in rows_of_gallery if all(r.get(m, v) == v for m, v in arm.chance.items())), None):
            row.update(arm.chance)
        else:
            chance_rows.append((name, dict(arm.chance)))
    rows = [*((name, arm.metrics) for name, arm in arms.items()), *chance_rows]
    columns = [*COLUMNS, *(name for name in PERSON if any(name in metrics for _, metrics in rows))]
    cells = [[name, *(f"{metrics[c]:.1f}" if c in metrics else "" for c in columns)] for name, metrics in rows]
    return Table("Recall in per cent, and ranks", ["", *map(heading, columns)], cells)


def comparison_table(arms: Mapping[str, Results]) -> Table:
    """Recalls of each ranking method, pairs scored, seconds; speed-up against the last one."""
    arms = {name: arm for name, arm in arms.items() if "pairs_scored" in arm.card}
    columns = [*NAMES]
    columns += [name for name in PERSON if all(name in arm.metrics for arm in arms.values())]
    last = [*arms.values()][-1].card
    rows = []
    for name, arm in arms.items():
        pairs, seconds = int(arm.card["pairs_scored"]), float(arm.card["ranking_seconds"])
        speed = f"{float(last['ranking_seconds']) / seconds:.1f}" if seconds else ""
        recalls = [f"{arm.metrics[c]:.1f}" for c in columns]
        rows.append([name, *recalls, f"{pairs:,}", f"{seconds:.1f}", speed])
    headings = ["ranking", *map(heading, columns), "pairs scored", "seconds", "speed-up"]
    return Table("Exact ranking and ranking in two stages", headings, rows)


def extra_table(arms: Mapping[str, Results]) -> Table | None:
    """The further numbers (`Results.extra`), a row for each; None when no arm has any."""
    shown = {name: arm.extra for name, arm in arms.items() if arm.extra}
    names = dict.fromkeys(metric for extra in shown.values() for metric in extra)
    rows = [[m, *(f"{extra[m]:.2f}" if m in extra else "" for extra in shown.values())] for m in names]
    return Table("Further numbers", ["", *shown], rows) if shown else None


def interval_table(arms: Mapping[str, Mapping[str, Interval]]) -> Table:
    """Recalls, or differences of recalls, with the bounds of their 95 % intervals."""
    columns = [*NAMES, *(name for name in PERSON if any(name in intervals for intervals in arms.values()))]

    def cell(interval: Interval | None) -> str:
        return "" if interval is None else f"{interval.estimate:.1f} [{interval.low:.1f}, {interval.high:.1f}]"

    rows = [[name, *(cell(intervals.get(column)) for column in columns)] for name, intervals in arms.items()]
    return Table("95 % confidence intervals", ["95 % intervals", *map(heading, columns)], rows)


def card_table(card: Mapping[str, str | int], name: str = "") -> Table:
    """The protocol card, with its name in the title, in two columns."""
    rows = [[key.replace("_", " "), str(card[key])] for key in card]
    return Table(f"Protocol card of {name}" if name else "Protocol card", ["protocol card", ""], rows, words=True)


def heading(column: str) -> str:
    """The heading of one of COLUMNS or PERSON; the first column of a direction names it."""
    if column in PERSON:
        return PERSON[column]
    if column == "rsum":
        return "rSum"
    direction, metric = column.split("_")
    return f"{DIRECTIONS[direction]} {HEADINGS[metric]}" if metric == "r1" else HEADINGS[metric]
