"""Where the metrics of a run go: the interface, and JSON lines, which every run has beside TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol


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


def _json(values: Mapping[str, Any]) -> dict[str, float | int | str]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: Any) -> float | int | str:
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)
