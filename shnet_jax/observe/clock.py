"""Training clock: time and speed of training, summed over all restarts of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Elapsed:
    """Seconds of training between two log lines, those spent waiting for data, steps and examples."""

    seconds: float = 0.0
    waiting: float = 0.0
    steps: int = 0
    examples: int = 0

    def __add__(self, other: Elapsed) -> Elapsed:
        return Elapsed(
            self.seconds + other.seconds,
            self.waiting + other.waiting,
            self.steps + other.steps,
            self.examples + other.examples,
        )


class Clock:
    """Clock that runs inside `with clock:` except while `paused()`; call `tick` after every step.

    JAX returns from a step before the device is done, so single steps look too short; over a log interval, at
    whose end the metrics are read from the device, the figures are right.

    state: what `state()` gave when the run was interrupted; None for a new run.
    now: a monotonic clock in seconds.
    """

    def __init__(self, state: Mapping[str, float] | None = None, now: Callable[[], float] = time.perf_counter):
        state = state or {"seconds": 0.0, "examples": 0}
        self._before = Elapsed(seconds=float(state["seconds"]), examples=int(state["examples"]))
        self._current = Elapsed()
        self._now = now
        self._since: float | None = None  # None while not running
        self.last = Elapsed()  # the interval that ended last

    def __enter__(self) -> Clock:
        self._since = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self._advance()
        self._since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock in this block (evaluation, compilation), which is no training time."""
        self._advance()
        self._since = None
        try:
            yield
        finally:
            self._since = self._now()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time in this block as training time spent waiting for a batch."""
        start = self._now()
        try:
            yield
        finally:
            self._current.waiting += self._now() - start

    def tick(self, examples: int) -> None:
        """Counts one dispatched step with this many examples (image-caption pairs over all devices)."""
        self._current.steps += 1
        self._current.examples += examples

    def interval(self, steps_left: int) -> dict[str, float]:
        """Ends the interval and begins the next.

        Returns `totals()` and of this interval: examples_per_second, data_wait (share of the time, 0..1) and
        eta_seconds, the seconds that `steps_left` more steps will take at this speed (without evaluations).
        """
        self._advance()
        last, self._current = self._current, Elapsed()
        self.last = last
        self._before += Elapsed(seconds=last.seconds, examples=last.examples)
        return self.totals() | {
            "examples_per_second": _share(last.examples, last.seconds),
            "data_wait": _share(last.waiting, last.seconds),
            "eta_seconds": _share(last.seconds, last.steps) * steps_left,
        }

    def speed(self) -> tuple[float, float]:
        """Speed (examples per second, seconds per step) over the last and the current interval together; first 0."""
        self._advance()
        recent = self.last + self._current
        return _share(recent.examples, recent.seconds), _share(recent.seconds, recent.steps)

    def totals(self) -> dict[str, float]:
        """Totals since the run first began: seconds of training and examples seen."""
        self._advance()
        return {
            "seconds": self._before.seconds + self._current.seconds,
            "examples": self._before.examples + self._current.examples,
        }

    def state(self) -> dict[str, float]:
        """The state that a checkpoint keeps; plain numbers."""
        return self.totals()

    def _advance(self) -> None:
        if self._since is not None:
            now = self._now()
            self._current.seconds += now - self._since
            self._since = now


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
