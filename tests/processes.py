"""Real processes of this repository's programs, for tests that kill and restart them.

They are forks of one process that has imported the libraries and nothing else, so a start takes a tenth of a second
instead of seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from tests.compiling import COLLECT_AFTER
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[1]
LIBRARIES = [
    "absl.app", "jax", "optax", "flax.linen", "grain", "orbax.checkpoint", "tensorflow_datasets", "sentencepiece",
    "safetensors.numpy", "matplotlib.pyplot", "ml_collections.config_flags",
]  # fmt: skip


class Program:
    """A started `python COMMAND`; all that it prints goes to the file `log`, behind what is there.

    As a context it is killed at the end.
    """

    def __init__(self, command: Sequence[str], log: Path, **environment: str):
        self.log = log
        multiprocessing.set_forkserver_preload(LIBRARIES)
        arguments = list(command), str(log), environment
        self._process = multiprocessing.get_context("forkserver").Process(target=_become, args=arguments)
        self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    @property
    def pid(self) -> int:
        """Number of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status, -N for a process that signal N ended; None while it runs."""
        return self._process.exitcode

    def output(self) -> str:
        """All that it has printed."""
        return self.log.read_text("utf-8", errors="replace") if self.log.exists() else ""

    def send(self, signal_number: int) -> None:
        """Sends a signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal_number)

    def wait(self) -> int | None:
        """Exit status once the process has ended. None for one that hangs, which is killed."""
        self._process.join(PATIENCE)
        status = self.status
        if status is None:
            self._process.kill()
        return status

    def until(self, ready: Callable[[], bool]) -> bool:
        """Waits until `ready()`; False where the process ended before, or PATIENCE did."""
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if self.status is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True


def _become(command: list[str], log: str, environment: dict[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environment
    gc.set_threshold(*COLLECT_AFTER)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    finally:
        threading._shutdown()  # as the interpreter does: threads are joined before the functions that end JAX
        atexit._run_exitfuncs()  # multiprocessing leaves them out
