"""Times of functions that are measured in turn, so that what slows the machine down meets all of them alike."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

SHORTEST = 0.02
"""Seconds that one measurement lasts at least: a faster function is called several times."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call, one number for each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of all rounds."""
        return statistics.median(self.rounds)

    @property
    def best(self) -> float:
        """The fastest round."""
        return min(self.rounds)


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int = 5,
    *,
    before: Mapping[str, Callable[[], Any]] | None = None,
    budget: float = math.inf,
) -> dict[str, Timing]:
    """Seconds of each call, its result computed: a warm-up of all, then `rounds` times all in turn.

    before: what is called, outside the time, before each measurement of the call of that name.
    budget: seconds; once they are spent, no further round begins. When the warm-up alone took longer it is the one
      round: pass functions that are compiled already.
    """
    before = before or {}
    start = time.perf_counter()

    def measure(name: str, count: int) -> float:
        before.get(name, lambda: None)()
        return _seconds(calls[name], count)

    first = {name: measure(name, 1) for name in calls}
    if time.perf_counter() - start > budget:
        return {name: Timing((seconds,)) for name, seconds in first.items()}
    # Not from the warm-up, which may include a compilation.
    counts = {name: math.ceil(SHORTEST / max(measure(name, 1), 1e-6)) for name in calls}
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for at in range(rounds):
        if at and time.perf_counter() - start > budget:
            break
        for name in calls:
            measured[name].append(measure(name, counts[name]))
    return {name: Timing(tuple(seconds)) for name, seconds in measured.items()}


def _seconds(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        # One call at a time: several on the way would compete for the cores of a CPU.
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / count
