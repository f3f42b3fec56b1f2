"""Progress of a run: one line that stays in place on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable
from typing import TextIO

from shnet_jax.observe.clock import Clock

LIVE_SECONDS = 0.2
PLAIN_SECONDS = 10.0


class Progress:
    """Shows step, speed, loss and remaining time of a run of `steps` steps on `stream` (standard error).

    shown: False in all processes of a job but the first. what: name of a step. unit: what is counted.
    """

    def __init__(
        self,
        steps: int,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
        shown: bool = True,
        what: str = "step",
        unit: str = "examples",
    ) -> None:
        self._what, self._unit = what, unit
        self._steps = steps
        self._shown = shown
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._now = now
        self._next = now()
        self._width = 0  # of the line in place

    def update(self, step: int, clock: Clock, *, loss: float | None = None) -> None:
        """Shows the state after `step` unless the last line is too recent."""
        if not self._shown or self._now() < self._next:
            return
        self._next = self._now() + (LIVE_SECONDS if self._live else PLAIN_SECONDS)
        rate, seconds_per_step = clock.speed()
        left = datetime.timedelta(seconds=round((self._steps - step) * seconds_per_step))
        share = 100 * step // self._steps
        shown = "" if loss is None else f"loss {loss:.4g}  "
        line = f"{self._what} {step}/{self._steps} ({share}%)  {rate:,.0f} {self._unit}/s  {shown}ETA {left}"
        if self._live:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def message(self, text: str) -> None:
        """A line that stays; the live line continues below it."""
        if not self._shown:
            return
        clear = "\r" + " " * self._width + "\r" if self._width else ""
        self._width = 0
        self._stream.write(clear + text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leaves the live line as it is and goes to the next."""
        if self._width:
            self._width = 0
            self._stream.write("\n")
            self._stream.flush()
