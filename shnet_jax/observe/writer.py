"""Metrics of a run: `workdir/metrics.jsonl`, TensorBoard events, and the trackers that the configuration names.

    {"step": 50, "kind": "train", "loss": 12.3, "lr": 0.0005, "timing": {"examples_per_second": 812.0}}

Everything that depends on the machine's speed is under "timing": without it, an interrupted and resumed run
has the same lines as an undisturbed one. For that, write a step's lines before its checkpoint is saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from shnet_jax.observe.files import atomic_path
from shnet_jax.observe.sinks import JsonLines, Line, Sink

FILE = "metrics.jsonl"
KINDS = ("train", "eval")
RESERVED = ("step", "kind", "timing")


class MetricWriter:
    """Hands the metrics of one run to its sinks; in a job of several processes only the first should have one.

    resume_step: the step that the run continues from, 0 for a new one. Lines of later steps, which a run
      killed after its last checkpoint has left, are dropped, since they will be written again; TensorBoard is
      told to forget them too.
    more: sinks beside metrics.jsonl and TensorBoard, as `trackers.open_trackers` gives them; closed with them.
    Raises ValueError when the file holds something else than metrics.
    """

    def __init__(self, workdir: str | Path, resume_step: int = 0, more: Sequence[Sink] = ()):
        from shnet_jax.observe.tensorboard import TensorBoard  # slow to import, and readers of metrics do without

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / FILE
        resumed = path.exists()
        if resumed:
            _drop_after(path, resume_step)
        board = TensorBoard(workdir / "tensorboard", purge_step=resume_step + 1 if resumed else None)
        self._sinks: list[Sink] = [JsonLines(path), board, *more]

    def write(
        self,
        step: int,
        kind: str,
        values: Mapping[str, Any],
        timing: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes scalars of a step and flushes them.

        kind: "train" | "eval". values: anything that float() takes. timing: what depends on the machine's
        speed. A value that is not finite is written as the string "nan", "inf" or "-inf", since JSON has no
        such number.
        """
        if kind not in KINDS:
            raise ValueError(f"kind of metrics is {' or '.join(KINDS)}, not {kind!r}")
        if clash := sorted(set(values) & set(RESERVED)):
            raise ValueError(f"metrics of step {step} may not be called {', '.join(clash)}")
        line = Line(step, kind, values, timing or {})
        for sink in self._sinks:
            sink.write(line)

    def close(self) -> None:
        """Closes all sinks."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.enter_context(closing(sink))


class NoWriter:
    """Substitute for a MetricWriter in all processes of a job but the first; it writes nothing."""

    def write(self, *_: Any) -> None:
        """Discards the metrics."""

    def close(self) -> None:
        """Does nothing, as no file is open."""


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last one that a killed run has left torn.

    Raises ValueError naming the line when it is anything else than metrics.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(lines) and not text.endswith("\n"):
                return
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path}, line {number}: expected an object with an integer 'step', got {text[:80]!r}")
        yield line


def _drop_after(path: Path, step: int) -> None:
    """Rewrites the file without later steps and a torn end; at any moment one version is complete."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
