"""Tables as text: one layout, with the borders of Markdown or with none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
"""Units of memory for `amount`."""


def amount(value: float, units: Mapping[str, float]) -> str:
    """The value in the largest of the units (name: size, descending) that it reaches, else in the smallest."""
    unit = next((unit for unit, size in units.items() if value >= size), list(units)[-1])
    return f"{value / units[unit]:,.2f} {unit}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells under a heading; the first column names the rows. `str(table)` is Markdown.

    title: what the table shows, for places with several tables. words: whether the columns behind the first hold words,
      flush left, and not numbers, flush right.
    """

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False

    def __str__(self) -> str:
        """Markdown with columns of equal width; ends with a newline."""
        cells = [[cell.replace("|", "\\|") for cell in line] for line in (self.heading, *self.rows)]
        lines = self._aligned(cells, least=3)
        ends = ["-" if left else ":" for left in self._left]
        rule = ["-" * (len(cell) - 1) + end for cell, end in zip(lines[0], ends, strict=True)]
        return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], rule, *lines[1:]))

    def plain(self) -> str:
        """Columns of equal width and nothing else; no newline at the end."""
        lines = self._aligned([list(line) for line in (self.heading, *self.rows)])
        return "\n".join("  ".join(line).rstrip() for line in lines)

    @property
    def _left(self) -> list[bool]:
        return [True] + [self.words] * (len(self.heading) - 1)

    def _aligned(self, lines: list[list[str]], least: int = 0) -> list[list[str]]:
        widths = [max(least, *map(len, column)) for column in zip(*lines, strict=True)]
        sides = list(zip(widths, self._left, strict=True))
        return [
            [cell.ljust(width) if left else cell.rjust(width) for cell, (width, left) in zip(line, sides, strict=True)]
            for line in lines
        ]
