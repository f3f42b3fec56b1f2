"""Runs of a study at the same time, each in its own process: config.study.jobs."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import FrameType

import jax
from ml_collections import ConfigDict

from shnet_jax.mirror import is_copy
from shnet_jax.training.signals import Interrupted
from shnet_jax.training.workdir import save_config

log = logging.getLogger(__name__)

PROGRAM = "shnet_jax.modes.study_process"


def usable_jobs(config: ConfigDict, workdir: Path) -> int:
    """config.study.jobs, or 1 where runs cannot share the devices or the work folder; raises ValueError below 1."""
    jobs = config.study.jobs
    if jobs < 1:
        raise ValueError(f"config.study.jobs is {jobs}; expected at least 1")
    if jobs > 1 and (backend := jax.default_backend()) != "cpu":
        log.info("one run after the other, not config.study.jobs = %d: each takes the whole %s", jobs, backend)
        return 1
    if jobs > 1 and jax.process_count() > 1:
        log.info("one run after the other, not config.study.jobs = %d: the processes train each together", jobs)
        return 1
    if jobs > 1 and is_copy(workdir):
        log.info("one run after the other, not config.study.jobs = %d: the work folder is a URL", jobs)
        return 1
    return jobs


def split_cores(cores: Sequence[int], jobs: int) -> list[tuple[int, ...]]:
    """The cores of each of `jobs` processes: shares without overlap; all for each where there are fewer than jobs."""
    if len(cores) < jobs:
        return [tuple(cores)] * jobs
    return [tuple(cores[job::jobs]) for job in range(jobs)]


class Processes:
    """The processes of a study that are running, and the signals that ended them.

    shares: the cores of each process, from `split_cores`.
    """

    def __init__(self, config_file: Path, shares: Sequence[tuple[int, ...]]) -> None:
        self._config_file = config_file
        self._shares: SimpleQueue[tuple[int, ...]] = SimpleQueue()
        for share in shares:
            self._shares.put(share)
        self._running: set[subprocess.Popen[str]] = set()
        self.ended_by: int | None = None  # the signal that ends all processes; no other one starts

    def run(self, arm: str, seed: int, folder: Path) -> int | None:
        """Trains and evaluates one run and returns the exit status; None if it was not started.

        Its output goes to standard error, each line with the name of the run in front.
        """
        share = self._shares.get()
        try:
            if self.ended_by is not None:
                return None
            arguments = [str(self._config_file), arm, str(seed), str(folder), ",".join(map(str, share))]
            with subprocess.Popen(
                [sys.executable, "-m", PROGRAM, *arguments],
                stdin=subprocess.PIPE,  # closes with this process, however it ends, and the run stops
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, "PYTHONPATH": _search_path(), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            ) as process:
                self._running.add(process)
                if self.ended_by is not None:  # meanwhile
                    process.terminate()
                assert process.stdout is not None
                for line in process.stdout:
                    sys.stderr.write(f"{arm}, seed {seed}: {line}" if line.strip() else "")
                    sys.stderr.flush()
            self._running.discard(process)
            return process.returncode
        finally:
            self._shares.put(share)

    def end(self, number: int) -> None:
        """Asks all processes to save their state and end."""
        self.ended_by = number
        for process in [*self._running]:
            process.terminate()

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Handler of SIGTERM and SIGINT; a second SIGINT does not wait for the states."""
        if self.ended_by is not None and number == signal.SIGINT:
            for process in [*self._running]:
                process.kill()
        self.end(number)


def _search_path() -> str:
    """PYTHONPATH of a process that finds this package where this process has found it."""
    root = str(Path(__file__).parents[2])
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))


@contextmanager
def started(
    config: ConfigDict, runs: Sequence[tuple[str, int, Path]], jobs: int
) -> Iterator[Callable[[str, int], None]]:
    """Starts (arm, seed, folder) of a study in this order, `jobs` at a time; yields a function that waits for one.

    It raises Interrupted after SIGTERM or SIGINT and ValueError for a run that failed, when the others have saved their
    states. With one job, or one run, nothing is started and it returns at once.
    """
    jobs = min(jobs, len(runs))
    if jobs < 2:
        yield lambda arm, seed: None
        return
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        save_config(config, Path(folder) / "config.json")
        processes = Processes(Path(folder) / "config.json", split_cores(cores, jobs))
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.signal(number, processes.on_signal) for number in numbers}
        futures = {(arm, seed): pool.submit(processes.run, arm, seed, place) for arm, seed, place in runs}

        def wait(arm: str, seed: int) -> None:
            future: Future[int | None] | None = futures.get((arm, seed))
            status = 0 if future is None else future.result()
            if processes.ended_by is not None:
                raise Interrupted(128 + processes.ended_by)
            if status != 0:
                raise ValueError(f"{arm}, seed {seed}: ended with status {status}, as told above; the study stops here")

        try:
            yield wait
        finally:
            if any(not future.done() for future in futures.values()):
                processes.end(processes.ended_by or signal.SIGTERM)
            pool.shutdown()
            for number, handler in previous.items():
                signal.signal(number, handler)
