"""Where the metrics of a run go: the interface, and the two that every run has, JSON lines and TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Line(NamedTuple):
    """Metrics of one step. values, timing: scalars by name; kind, as in `MetricWriter.write`."""

    step: int
    kind: str
    values: Mapping[str, Any]
    timing: Mapping[str, Any]

    def scalars(self) -> dict[str, float]:
        """All numbers of the line as KIND/NAME and timing/NAME."""
        groups = ((self.kind, self.values), ("timing", self.timing))
        return {f"{group}/{name}": float(value) for group, named in groups for name, value in named.items()}


class Sink(Protocol):
    """A place that keeps lines of metrics."""

    def write(self, line: Line) -> None:
        """Takes a line, whole, before it returns."""

    def close(self) -> None:
        """Gives up the place; no line comes after it."""


class JsonLines:
    """Sink that appends each line as JSON to a file and flushes it."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Line) -> None:
        """Appends the line; a value that is not finite becomes a string, since JSON has no such number."""
        document: dict[str, Any] = {"step": line.step, "kind": line.kind, **_json(line.values)}
        if line.timing:
            document["timing"] = _json(line.timing)
        self._file.write(json.dumps(document, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Sink that writes TensorBoard's events in the calling thread.

    tensorboardX's own SummaryWriter has a thread of its own: that dies of a full disk, and the queue to it then fills
    until training waits forever.
    purge_step: TensorBoard forgets what it knows of this step and later ones.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        if purge_step is not None:
            self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, line: Line) -> None:
        """Writes an event for each number and flushes them."""
        for name, value in line.scalars().items():
            self._add(Event(step=line.step, summary=scalar(name, value)))
        self._events.flush()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def close(self) -> None:
        """Closes the file."""
        self._events.close()


def _json(values: Mapping[str, Any]) -> dict[str, float | int | str]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: Any) -> float | int | str:
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)
