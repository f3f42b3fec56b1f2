"""Writes a data set of rendered figures: `python -m data_prep.people --out=DIR`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from data_prep import builder, command, people, vocabulary
from shnet_jax.paths import to_path

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
    source = json.dumps(
        {
            "generator": "data_prep.people",
            "version": people.VERSION,
            "vocabulary": vocabulary.VERSION,
            "seed": seed,
            **persons,
        },
        sort_keys=True,
    )
    target = out / name / builder.VERSION
    if builder.made_before(target, source):
        return target
    images = {split: (FIRST[split] * people.IMAGES, count * people.IMAGES) for split, count in persons.items()}
    splits = {split: people.records(seed, first, first + count) for split, (first, count) in images.items()}
    total = sum(count for _, count in images.values())
    return builder.write_dataset(out, name, splits, {"source": source}, total=total)


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("people", __doc__)
    parser.add_argument("--out", type=to_path, required=True, help="folder that holds data sets")
    parser.add_argument("--name", default="people", help="name of the data set")
    for split, count in PERSONS.items():
        text = f"persons of the split {split}, {count} unless told, with {people.IMAGES} images each"
        parser.add_argument(f"--{split}", type=command.at_least(0), default=count, help=text)
    parser.add_argument("--seed", type=command.at_least(0), default=0, help="world that the figures are drawn from")
    args = parser.parse_args(argv)
    print(write(args.out, args.name, args.seed, {split: getattr(args, split) for split in PERSONS}))
    return 0
