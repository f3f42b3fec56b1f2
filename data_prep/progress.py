"""How far a pass over many records has come."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable
from typing import TextIO

SECONDS = 5.0  # between two lines


class Progress:
    """A line every few seconds: records so far, records/s and, when the total is known, the time left."""

    def __init__(
        self,
        title: str,
        total: int | None = None,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self._title, self._total, self._stream, self._now = title, total, stream or sys.stderr, now
        self._done, self._start = 0, now()
        self._next = self._start + SECONDS

    def step(self) -> None:
        """Count one record."""
        self._done += 1
        if self._now() < self._next:
            return
        self._next = self._now() + SECONDS
        rate = self._rate()
        if self._total is None:
            self._print(f"{self._done} records, {rate:,.0f} records/s")
        else:
            left = datetime.timedelta(seconds=round(max(self._total - self._done, 0) / rate))
            share = 100 * self._done // self._total
            self._print(f"{self._done}/{self._total} records ({share}%), {rate:,.0f} records/s, ETA {left}")

    def close(self) -> None:
        """The last line."""
        took = datetime.timedelta(seconds=round(self._now() - self._start))
        self._print(f"{self._done} records in {took}, {self._rate():,.0f} records/s")

    def _rate(self) -> float:
        return self._done / max(self._now() - self._start, 1e-9)

    def _print(self, text: str) -> None:
        print(f"{self._title}: {text}", file=self._stream, flush=True)
