"""Records that cannot be imported: they end the import, or are left out and listed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

from data_prep.schema import DataError

Policy = Literal["fail", "skip"]
POLICIES: tuple[Policy, ...] = ("fail", "skip")
SKIPPED = "skipped.json"
MOST = 0.5  # of a split: more bad records than this say that the import is wrong, not its records
FIRST = 100  # records of a split, of which at least one has to be good for the others to be tried

P = ParamSpec("P")
T = TypeVar("T")


class Bad(NamedTuple):
    """Stand-in that an importer yields for a record that it could not make; no fault if `asked`, as by --absent."""

    image_id: str
    error: DataError
    asked: bool = False


def record_or_bad(image_id: str, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Bad:
    """Calls `make` and returns its result, or a `Bad` for its DataError: a generator that raises could not go on."""
    try:
        return make(*args, **kwargs)
    except DataError as error:
        return Bad(image_id, error)


class BadRecords:
    """The bad records of one import, in the order they were met.

    policy: "fail" raises the error of the first; "skip" keeps them for `write`.
    """

    def __init__(self, policy: Policy = "fail"):
        if policy not in POLICIES:
            raise ValueError(f"on_bad_record is {policy!r}; choose from {', '.join(POLICIES)}")
        self._policy = policy
        self._found: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, error: DataError, split: str, row: int, image_id: str | None) -> None:
        """Adds a bad record of the import. Raises DataError unless it may be left out."""
        if self._policy == "fail":
            hint = "--on_bad_record=skip leaves such records out"
            raise DataError(f"{error}; {hint}", file=error.file, field=error.field) from error
        self._found.append(
            {
                "split": split,
                "row": row,
                "image_id": image_id if image_id is None else str(image_id),
                "file": error.file,
                "field": error.field,
                "reason": str(error),
            }
        )

    def check_split(self, split: str, rows: int) -> None:
        """Raises DataError when more than MOST of the `rows` of a finished split are bad."""
        reasons = [bad["reason"] for bad in self._found if bad["split"] == split]
        if len(reasons) > MOST * rows:
            raise DataError(
                f"split {split!r}: expected at most {MOST:.0%} bad records, found {len(reasons)} of {rows}; the first: "
                f"{reasons[0]}"
            )

    def write(self, folder: Path) -> None:
        """Write the list of those left out into the data set, if there are any."""
        if self._found:
            text = json.dumps(self._found, indent=1, ensure_ascii=True)
            (folder / SKIPPED).write_text(text + "\n", encoding="ascii")
