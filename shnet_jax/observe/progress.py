"""Progress of a loop: one line that stays in place on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import datetime
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from shnet_jax.observe.clock import Clock

log = logging.getLogger(__name__)

LIVE_SECONDS = 0.2
PLAIN_SECONDS = 10.0


@contextmanager
def waiting(what: str, seconds: float = PLAIN_SECONDS) -> Iterator[None]:
    """Context that logs every `seconds` that the block is still running, and at its end how long it took.

    For compilations, which log nothing themselves. A block that ends sooner logs nothing. what: name of the block.
    """
    done, start = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(seconds):
            log.info("%s: %.0f s", what, time.monotonic() - start)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if (took := time.monotonic() - start) >= seconds:
            log.info("%s took %.0f s", what, took)


class Progress:
    """Shows how far a loop has come, its speed and, when the total is known, the time left.

    A loop with a `Clock` calls `update` after each step. A loop over records calls `count` for each record. It gets
    plain lines even on a terminal, as other messages would interrupt a progress line. `close` adds a line with totals.

    Args:
      total: steps of the loop, or records; None when not known.
      stream: where lines go; None: standard error.
      now: a clock in seconds.
      shown: False in all processes of a job but the first.
      what: name of a step, or title of a loop over records.
      unit: what the speed counts.
    """

    def __init__(
        self,
        total: int | None,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
        shown: bool = True,
        what: str = "step",
        unit: str = "pairs",
    ) -> None:
        self._total, self._shown, self._what, self._unit = total, shown, what, unit
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._now = now
        self._start = self._next = now()
        self._width = 0  # of the line in place
        self._counted = self._left_out = 0

    def update(self, step: int, clock: Clock, *, loss: float | None = None) -> None:
        """Shows the state after `step` unless the last line is too recent."""
        if not self._shown or self._now() < self._next:
            return
        self._next = self._now() + (LIVE_SECONDS if self._live else PLAIN_SECONDS)
        rate, seconds_per_step = clock.speed()
        note = "" if loss is None else f"loss {loss:.4g}"
        line = self._line(f"{self._what} {step}", step, rate, seconds_per_step, note)
        if self._live:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def count(self, left_out: bool = False) -> None:
        """Counts one record, stored or left out; shows the state every few seconds."""
        self._counted += 1
        self._left_out += left_out
        seconds = max(self._now() - self._start, 1e-9)
        if seconds < PLAIN_SECONDS or self._now() < self._next:
            return
        self._next = self._now() + PLAIN_SECONDS
        note = f"{self._left_out} left out" if self._left_out else ""
        rate = self._counted / seconds
        self.message(self._line(f"{self._what}: {self._counted}", self._counted, rate, 1 / rate, note))

    def _line(self, head: str, done: int, rate: float, seconds_per_step: float, note: str) -> str:
        parts = [head, f"{rate:,.0f} {self._unit}/s", note]
        if self._total is not None:
            left = datetime.timedelta(seconds=round(max(self._total - done, 0) * seconds_per_step))
            parts = [f"{head}/{self._total} ({100 * done // max(self._total, 1)}%)", *parts[1:], f"ETA {left}"]
        return "  ".join(part for part in parts if part)

    def message(self, text: str) -> None:
        """Writes a line that stays; the live line continues below it."""
        if not self._shown:
            return
        clear = "\r" + " " * self._width + "\r" if self._width else ""
        self._width = 0
        self._stream.write(clear + text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the live line; for a loop over records, writes the totals."""
        if self._width:
            self._width = 0
            self._stream.write("\n")
            self._stream.flush()
        if self._counted:
            seconds = max(self._now() - self._start, 1e-9)
            note = f", {self._left_out} of them left out" if self._left_out else ""
            took, rate = datetime.timedelta(seconds=round(seconds)), self._counted / seconds
            self.message(f"{self._what}: {self._counted} {self._unit}{note} in {took}, {rate:,.0f} {self._unit}/s")
