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
        self._done, self._left_out, self._start = 0, 0, now()
        self._next = self._start + SECONDS

    def step(self, left_out: bool = False) -> None:
        """Count one record, perhaps as left out."""
        self._done += 1
        self._left_out += left_out
        if self._now() < self._next:
            return
        self._next = self._now() + SECONDS
        rate, also = self._rate(), self._note()
        if self._total is None:
            self._print(f"{self._done} records{also}, {rate:,.0f} records/s")
        else:
            left = datetime.timedelta(seconds=round(max(self._total - self._done, 0) / rate))
            share = 100 * self._done // self._total
            self._print(f"{self._done}/{self._total} records ({share}%){also}, {rate:,.0f} records/s, ETA {left}")

    def close(self) -> None:
        """The last line."""
        took = datetime.timedelta(seconds=round(self._now() - self._start))
        self._print(f"{self._done} records{self._note()} in {took}, {self._rate():,.0f} records/s")

    def _note(self) -> str:
        return f", {self._left_out} of them left out" if self._left_out else ""

    def _rate(self) -> float:
        return self._done / max(self._now() - self._start, 1e-9)

    def _print(self, text: str) -> None:
        print(f"{self._title}: {text}", file=self._stream, flush=True)
