"""Signals that ask a run to stop, and the agreement of several processes to do so after the same step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from shnet_jax.parallel import hosts

ASK_SECONDS, ASK_STEPS = 5.0, 10
"""Several processes ask each other for signals every few seconds, but not more than every step, and after this many
steps at most: what a signal waits for is one step, or ASK_SECONDS, and then the writing of the state."""


class Interrupted(SystemExit):
    """Asked to stop by a signal; the state is saved. The exit status is 128 + the signal's number."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in the list instead of dying of them; a second SIGINT ends at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopVote:
    """The signal that asks a job to stop, the same answer in all its processes after the same step.

    A scheduler, or a machine that is preempted, may send the signal to one of the processes or to all.
    """

    def __init__(self) -> None:
        self._next = 0  # step after which they ask

    def after(self, step: int, signals: list[int], seconds: float) -> int | None:
        """The signal to obey after `step`, None for none; signals: those that this process got.

        seconds: of a step, as this process measured it; that of the slowest one decides when they ask again.
        """
        if jax.process_count() == 1:
            return signals[0] if signals else None
        if step < self._next:
            return None
        told, slowest = hosts.largest(float(bool(signals)), seconds)
        self._next = step + steps_until(slowest)
        if not told:
            return None
        return signals[0] if signals else signal.SIGTERM  # another process was told


def steps_until(seconds: float) -> int:
    """Steps between two questions, for steps of this many seconds; 0 where it is not known yet."""
    return max(1, min(ASK_STEPS, int(ASK_SECONDS / seconds))) if seconds > 0 else 1
