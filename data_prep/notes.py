"""Remarks on what an import changed or left aside in many records: each is said once, with how often."""

from __future__ import annotations

import sys

_FOUND: dict[str, tuple[int, str]] = {}  # remark -> how often, and where first


def note(remark: str, where: object) -> None:
    """Keep a remark on a record for `report`; where: it is, of which the first is said."""
    count, first = _FOUND.get(remark, (0, str(where)))
    _FOUND[remark] = count + 1, first


def report() -> None:
    """Print the remarks of the import on stderr and forget them."""
    for remark, (count, first) in _FOUND.items():
        print(f"note: {remark} ({count} times, first in {first})", file=sys.stderr)
    clear()


def clear() -> None:
    """Forget what an import noted that did not come to its end, before another one."""
    _FOUND.clear()
