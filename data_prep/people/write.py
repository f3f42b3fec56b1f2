"""Writes a data set of rendered figures: `shnet data people --out=DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep import command, people
from data_prep.scenes.write import add_arguments, write_once

PERSONS = {"train": 600, "val": 100, "test": 200}
# Persons of the splits lie far apart: those of a split do not depend on the sizes of the others, and none is in two.
FIRST = {"train": 0, "val": 100_000_000, "test": 200_000_000}


def write(out: Path, name: str, seed: int, persons: dict[str, int]) -> Path:
    """Write the set and return its version folder; one that was made with the same settings is left as it is.

    Args:
      out, name: as for `builder.write_dataset`.
      seed: world that the figures are drawn from.
      persons: of each split of FIRST; a split of none is left out.

    Raises:
      FileExistsError: the set exists and was made with other settings.
    """
    persons = {split: count for split, count in persons.items() if count}
    settings = {"generator": "data_prep.people", "version": people.VERSION, "seed": seed, **persons}
    images = {split: (FIRST[split] * people.IMAGES, count * people.IMAGES) for split, count in persons.items()}
    splits = {split: people.records(seed, first, first + count) for split, (first, count) in images.items()}
    return write_once(out, name, settings, splits, {}, sum(count for _, count in images.values()))


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("people", __doc__)
    add_arguments(parser, "people", PERSONS, f"persons ({people.IMAGES} images each)")
    args = parser.parse_args(argv)
    print(write(args.out, args.name, args.seed, {split: getattr(args, split) for split in PERSONS}))
    return 0
