"""A trace of chosen training steps by JAX's profiler, for TensorBoard, XProf and Perfetto."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax

log = logging.getLogger(__name__)

FOLDER = "profile"
"""Folder of the traces in a work folder."""
STEP = "train"
"""Name of a step in the trace, where its number is step_num."""


def check(steps: Sequence[int], total_steps: int) -> None:
    """Raises ValueError unless config.train.profile_steps are () or a first and a last step of the training."""
    if not steps:
        return
    two_integers = len(steps) == 2 and all(isinstance(step, int) for step in steps)
    if not two_integers or not 1 <= steps[0] <= steps[1] <= total_steps:
        raise ValueError(
            f"config.train.profile_steps is {tuple(steps)}; expected the first and the last step of the trace, between "
            f"1 and the {total_steps} steps of the training, as (10, 13), or ()"
        )


class Profile:
    """Traces the steps of config.train.profile_steps into WORKDIR/profile.

    steps: (first, last), or () for none. resume_step: the step that the run goes on from: of a range that it is already
      in, the rest is traced; of one that is over, a log line says so. shown: False in all processes of a job but the
      first, whose devices alone are traced.
    """

    def __init__(self, steps: Sequence[int], workdir: str | Path, resume_step: int = 0, shown: bool = True):
        self._folder = Path(workdir) / FOLDER
        self._steps = range(steps[0], steps[1] + 1) if steps and shown else range(0)
        self._running = False
        if self._steps and resume_step >= self._steps[-1]:
            log.info(
                "config.train.profile_steps is %s, and the run goes on from step %d: no trace. Name later steps",
                tuple(steps),
                resume_step,
            )
            self._steps = range(0)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Marks the block, which fetches a batch and dispatches a step, in the trace; starts the trace when due."""
        if number in self._steps and not self._running:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python functions would slow the steps and fill the trace
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
            self._running = True
        with jax.profiler.StepTraceAnnotation(STEP, step_num=number):
            yield

    def ends_with(self, number: int) -> bool:
        """Whether the trace ends with this step: wait until the devices are done with it, then `close`."""
        return self._running and number == self._steps[-1]

    def close(self) -> None:
        """Ends the trace, if one is running, and writes it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info(
                "trace of steps up to %d: %s (docs/train-and-scale.md says how to read it)",
                self._steps[-1],
                self._folder,
            )
