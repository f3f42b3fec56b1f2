"""Durations of a configuration: one of the fields `*_steps`, `*_epochs` and `*_percent`, as a number of steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

UNITS = ("steps", "epochs", "percent")
"""Batches, passes over the training captions, hundredths of the training."""


class Given(NamedTuple):
    """The field that gives a duration: its dotted name, one of UNITS, its number or tuple of numbers."""

    field: str
    unit: str
    value: Any


def given(section: Mapping[str, Any], name: str, path: str) -> Given | None:
    """The field of a section that gives the duration `name`; None where all are 0 or ().

    A point in time has its unit in the singular, as `from_epoch`. path: dotted name of the section. Raises ValueError
    where two fields are set, and for a value that is negative or not finite.
    """
    fields = [
        Given(f"{path}.{field}", unit, section[field])
        for unit in UNITS
        for field in dict.fromkeys((f"{name}_{unit}", f"{name}_{unit.rstrip('s')}"))
        if section.get(field)
    ]
    for field, unit, value in fields:
        if not all(0 <= number < math.inf for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{field} is {value}; it must be a finite number of {unit} >= 0")
    if len(fields) > 1:
        values = " and ".join(f"{field} is {value}" for field, _, value in fields)
        raise ValueError(f"{values}: set one of them, and the others to {type(fields[0].value)()}")
    return fields[0] if fields else None


@dataclasses.dataclass(frozen=True)
class TrainingLength:
    """Length of a training, by which its durations become steps.

    total_steps: 0 where it is unknown; a duration in per cent then raises ValueError. batches: of one of these steps,
    which is more than 1 where they are updates (`config.optim.accumulate`).
    """

    steps_per_epoch: float
    total_steps: int
    batches: int = 1

    def steps(self, section: Mapping[str, Any], name: str, path: str) -> int:
        """The duration `name` of a section, 0 where none of its fields is set; arguments and errors as of `given`."""
        duration = given(section, name, path)
        return 0 if duration is None else self._steps(duration, duration.value)

    def moments(self, section: Mapping[str, Any], name: str, path: str) -> list[int]:
        """The points in time `name` of a section, whose fields are tuples; arguments and errors as of `given`."""
        duration = given(section, name, path)
        return [] if duration is None else [self._steps(duration, value) for value in duration.value]

    def _steps(self, duration: Given, value: float) -> int:
        if duration.unit == "epochs":
            return round(value * self.steps_per_epoch)
        if duration.unit == "steps":
            return round(value / self.batches)
        if not self.total_steps:
            raise ValueError(f"{duration.field} is {value}, and the length of the training is not known here")
        return round(value / 100 * self.total_steps)


def count_steps(train: Mapping[str, Any], steps_per_epoch: float) -> int:
    """Steps of a training: `config.train.steps`, or where that is 0 as many as `config.train.epochs` need."""
    steps: int = train["steps"]
    return steps or math.ceil(train["epochs"] * steps_per_epoch)
