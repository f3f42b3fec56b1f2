"""What the parity checks share: a recorded file, and the comparison of one array."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np

TIMES = 10
"""How many times its own rounding error a reference is missed by at least, before it counts as a miss."""


class Fixture:
    """Arrays of one recorded `.npz` by name; remembers which were read, so that none is passed over silently.

    opened: those read since a run began, for its account of what no check has read.
    """

    opened: ClassVar[list[Fixture]] = []

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.name = path.stem
        self.seen: set[str] = set()
        self.opened.append(self)

    def __getitem__(self, name: str) -> np.ndarray:
        self.seen.add(name)
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def section(self, prefix: str) -> dict[str, np.ndarray]:
        """All arrays whose name starts with `prefix`, by the rest of their name."""
        found = {name.removeprefix(prefix): self[name] for name in self.arrays if name.startswith(prefix)}
        if not found:
            raise KeyError(f"{self.name}: no array starts with {prefix!r}")
        return found

    def rounding(self, name: str) -> float:
        """Error that the reference itself is known to have in this array: its float32 run against its float64 run.

        It lies under the name with `ref_err` in front of it, or in front of its `out` or `grad`.
        """
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part in ("out", "grad")), 0)
        names = (f"ref_err.{name}", ".".join([*parts[:place], "ref_err", *parts[place:]]))
        return float(next((self[key] for key in names if key in self), 0.0))

    def expected(self) -> set[str]:
        """Names of the recorded results: what a check must compare or skip with a reason."""

        def is_result(name: str) -> bool:
            parts = name.split(".")
            return not {"meta", "ref_err"} & {*parts} and any(
                p in ("out", "grad") or p.endswith("after") for p in parts
            )

        return {name for name in self.arrays if is_result(name)}


@dataclasses.dataclass(frozen=True)
class Row:
    """One compared array: the largest error and the largest allowed, or the reason why it was skipped.

    `error` is the largest |ours - reference|, `worst` the largest share of what is allowed: above 1 is a miss.
    """

    group: str
    name: str
    error: float = 0.0
    tolerance: float = 0.0
    worst: float = 0.0
    skipped: str = ""

    @property
    def ok(self) -> bool:
        """Whether every element is within its tolerance."""
        return bool(self.skipped) or self.worst <= 1.0


def compare(group: str, name: str, ours, reference, atol, rtol: float = 0.0, rounding: float = 0.0) -> Row:
    """Compares one array; element tolerance `atol + rtol |reference|`, but at least `TIMES` times `rounding`.

    A wrong shape or a NaN is a miss.

    Args:
      atol: one for all elements, or an array with one for each.
      rounding: error of the reference itself (`Fixture.rounding`). CPUs of other makes sum in other orders, and their
        results differ by some times that.
    """
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.shape != reference.shape:
        return Row(group, f"{name}: shape {ours.shape}, recorded {reference.shape}", error=np.inf, worst=np.inf)
    if reference.size == 0:
        return Row(group, name, skipped="empty array")
    error = np.abs(ours - reference)
    allowed = np.broadcast_to(np.maximum(atol + rtol * np.abs(reference), TIMES * rounding), error.shape)
    share = np.where(error == 0, 0.0, error / np.maximum(allowed, 1e-300))
    worst = float(np.max(np.where(np.isnan(share), np.inf, share)))
    return Row(group, name, float(error.max()), float(allowed.max()), worst)


def compare_gradient(group: str, name: str, ours, reference, atol: float = 5e-6, rounding: float = 0.0) -> Row:
    """Gradients: 1e-3 of the array's own largest magnitude plus `atol`."""
    reference = np.asarray(reference)
    scale = float(np.abs(reference).max()) if reference.size else 0.0
    return compare(group, name, ours, reference, atol=atol + 1e-3 * scale, rounding=rounding)


def skip(group: str, name: str, reason: str) -> Row:
    """A recorded array that is not compared, and why."""
    return Row(group, name, skipped=reason)
