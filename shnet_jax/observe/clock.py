"""Training clock: speed, and what the wall time of a run was spent on, summed over all restarts of the run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shnet_jax.observe.files import write_json

KINDS = ("startup", "compile", "input", "step", "evaluation", "checkpoint", "lost")
"""Kinds of work that wall time is spent on.

startup: from the start of the training function to the first step, in the run's first start; compile: tracing and
compiling the step; input: waiting for a batch; step: everything else in the loop, while the devices compute;
evaluation: with the compilation of its programs; checkpoint: the loop waits for a checkpoint; lost: start-ups after an
interruption, and work after the checkpoint that a restart goes on from, which is done again.
"""
WALL_TIME = "wall_time.json"
RECORD_SECONDS = 10.0
TRAINING = ("input", "step")
"""The kinds that are training time, by which speed and time left are computed."""


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
    """Clock that runs inside `with clock:` and knows at any time what it is spent on; call `tick` after every step.

    The time is that of "step" unless `spent_on` says otherwise. JAX returns from a step before the device is done, so
    single steps look too short; over a log interval, at whose end the metrics are read from the device, the figures are
    right.

    state: what `state()` gave for the checkpoint that the run goes on from; None for a new run.
    latest: what `state()` gave last before the run was interrupted, which may be later; None where it is not known.
    started: time by `now` at which the process began to prepare for training; None: when the clock is entered.
    now: a monotonic clock in seconds.
    """

    def __init__(
        self,
        state: Mapping[str, Any] | None = None,
        now: Callable[[], float] = time.perf_counter,
        *,
        latest: Mapping[str, Any] | None = None,
        started: float | None = None,
    ):
        self._spent = _spent(state, latest)
        self._before = Elapsed(seconds=float((state or {}).get("seconds", 0.0)))
        self._before.examples = int((state or {}).get("examples", 0))
        self._current = Elapsed()
        self._now = now
        self._started = started
        self._kind = "step"
        self._since: float | None = None  # None while not running
        self.last = Elapsed()  # the interval that ended last

    def __enter__(self) -> Clock:
        self._since = self._now()
        if self._started is not None:  # only the first start-up is necessary; later ones are due to interruptions
            self._spent["lost" if self._spent["startup"] else "startup"] += self._since - self._started
            self._started = None
        return self

    def __exit__(self, *_: object) -> None:
        self._advance()
        self._since = None

    @contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """Counts the time in this block, except blocks of their own inside it, as time of `kind`, one of KINDS."""
        self._advance()
        outer, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._advance()
            self._kind = outer

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

    def spent(self) -> dict[str, float]:
        """Seconds of wall time by KINDS since the run first began, while its command ran."""
        self._advance()
        return dict(self._spent)

    def shares(self) -> dict[str, float]:
        """Shares of the wall time, 0..1, as share_KIND; share_step is the goodput. Empty before any time has passed."""
        return {f"share_{kind}": share for kind, share in shares(self.spent()).items()}

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps: totals and the seconds by kind."""
        return self.totals() | {"spent": self.spent()}

    def _advance(self) -> None:
        if self._since is None:
            return
        now = self._now()
        passed, self._since = now - self._since, now
        self._spent[self._kind] += passed
        if self._kind in TRAINING:
            self._current.seconds += passed
            self._current.waiting += passed if self._kind == "input" else 0.0


class TimeRecord:
    """Keeps the state of a run's clock in WORKDIR/wall_time.json, so that a kill forgets RECORD_SECONDS of it at most.

    written: whether this process writes it; of several, the first.
    """

    def __init__(self, workdir: str | Path, written: bool = True, now: Callable[[], float] = time.perf_counter):
        self._path = Path(workdir) / WALL_TIME
        self._written, self._now = written, now
        self._next = -math.inf

    def resume(self, step: int, state: Mapping[str, Any] | None, started: float | None = None) -> Clock:
        """The clock of a run that goes on from the checkpoint of `step`, 0 for none; state: what that keeps of it."""
        latest = read_wall_time(self._path.parent)
        if latest is not None and latest["step"] == step:  # nothing is done again
            state, latest = latest, None
        return Clock(state, self._now, latest=latest, started=started)

    def update(self, step: int, clock: Clock) -> None:
        """Writes the state after `step`, unless the last one is recent."""
        if self._now() >= self._next:
            self.write(step, clock)

    def write(self, step: int, clock: Clock) -> None:
        """Writes the state after `step`."""
        self._next = self._now() + RECORD_SECONDS
        if self._written:
            write_json(self._path, {"step": step} | clock.state())


def read_wall_time(workdir: str | Path) -> dict[str, Any] | None:
    """Wall time that the last command in a work folder noted: {"step", "seconds", "examples", "spent"}; None without.

    None also for a file that is damaged or of something else: the times are only told, nothing is computed from them.
    """
    try:
        record = json.loads((Path(workdir) / WALL_TIME).read_text("utf-8"))
        spent = {kind: float(record["spent"][kind]) for kind in KINDS}
        return {"step": int(record["step"]), "spent": spent} | {k: float(record[k]) for k in ("seconds", "examples")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _spent(state: Mapping[str, Any] | None, latest: Mapping[str, Any] | None) -> dict[str, float]:
    """Seconds by kind with which a run goes on from the checkpoint of `state`; what came after it is lost."""
    if state is None:
        spent: Mapping[str, float] = {}
        kept = 0.0
    else:  # an old checkpoint has only the seconds of training, not the seconds by kind
        spent = state.get("spent", {"step": float(state.get("seconds", 0.0))})
        kept = sum(spent.values())
    resumed = {kind: float(spent.get(kind, 0.0)) for kind in KINDS}
    if latest is not None:
        resumed["lost"] += max(0.0, sum(latest.get("spent", {}).values()) - kept)
    return resumed


def shares(spent: Mapping[str, float]) -> dict[str, float]:
    """Shares, 0..1, of seconds by kind; empty where they add up to nothing."""
    total = sum(spent.values())
    return {kind: seconds / total for kind, seconds in spent.items()} if total else {}


def shares_line(spent: Mapping[str, float]) -> str:
    """One line about the wall time: what it was spent on, in per cent."""
    minutes = sum(spent.values()) / 60
    parts = ", ".join(f"{kind} {100 * share:.1f}" for kind, share in shares(spent).items())
    return f"wall time {minutes:.1f} min, in per cent: {parts}" if parts else "no wall time yet"


def _share(part: float, total: float) -> float:
    return part / total if total else 0.0
