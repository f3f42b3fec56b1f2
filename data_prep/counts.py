"""Counts of an import: images and captions read, stored and left out, in one line that adds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Found:
    """Totals of the files that an import reads.

    rows: lines of a table or entries of a list. left_out: reason -> images that no record was made for.
    """

    rows: int
    images: int
    captions: int
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def records(self) -> int:
        """Images that a record is to be made for."""
        return self.images - sum(map(len, self.left_out.values()))


class Stored(NamedTuple):
    """Images and captions written to a split, and images left out: bad records, and those absent from a source."""

    images: int
    captions: int
    bad: int
    absent: int


def summary(found: Found | None, stored: Mapping[str, Stored]) -> str:
    """One line: rows read, images and captions stored in each split and together, images left out and why."""
    images, captions, bad, absent = (sum(counts) for counts in zip(*stored.values(), strict=True))
    each = ", ".join(f"{split} {part.images} with {part.captions}" for split, part in stored.items())
    read = f"read {found.rows} rows, {found.captions} captions of {found.images} images; " if found else ""
    reasons = [(bad, "bad records"), (absent, "absent from a joined file")]
    reasons += (
        [(len(names), f"{reason}, such as {names[0]!r}") for reason, names in found.left_out.items()] if found else []
    )
    why = "; ".join(f"{count} {reason}" for count, reason in reasons if count)
    left_out = f"left out {sum(count for count, _ in reasons)}: {why}" if why else "none left out"
    return f"{read}stored {images} images with {captions} captions ({each}); {left_out}"
