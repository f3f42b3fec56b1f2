"""Multi-process training: jax.distributed, and the collectives and splits of work between processes.

Each process reads its own part of every batch (`data.batches`), computes on its own devices, and sees the same metrics
as all others. The first one alone writes logs and tables; all of them write checkpoints. In one process everything here
is the identity.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np
from jax._src import distributed  # nothing public waits for processes without using their devices
from jax.experimental import multihost_utils

Tree = TypeVar("Tree")


HEARTBEAT = 60
"""Seconds without a sign of life after which a process counts as dead (JAX itself: 100). A thread outside of Python
gives the signs, so a process that compiles for minutes, or is otherwise busy, does not miss one."""
START = 900
"""Seconds that a process waits for all others to join (JAX itself: 300): machines of a job do not start together."""
COMPILE = 3600
"""Seconds that a process which has compiled a program waits for the others."""
CHUNK = 64 * 2**20
"""Bytes of all processes together that a sum over them holds at once."""
SHUTDOWN = 900
"""Seconds that a process which is done waits for the others (JAX itself: 300): the first has results to write."""


def connect(coordinator: str, count: int, index: int, heartbeat: int = HEARTBEAT, start: int = START) -> None:
    """Joins the job; must come before anything else asks JAX for devices.

    coordinator: host:port of process 0, the same in all. count: processes. index: this one, 0..count-1. On a TPU pod,
    under Slurm, Open MPI and on Kubernetes JAX finds all three by itself: give "", 0 and -1.
    heartbeat: seconds after which all others end when a process, or its machine, is gone without a word. Where it can
    be seen at once, as from a closed connection, they end at once.
    start: seconds that this process waits until all have joined.
    Raises ValueError when only some of the three are given, or for a heartbeat or start below 1.
    """
    for name, seconds in (("heartbeat", heartbeat), ("start", start)):
        if seconds < 1:
            raise ValueError(f"--{name}_seconds is {seconds}; it must be at least 1")
    given = (bool(coordinator), count > 0, index >= 0)
    if any(given) and not all(given):
        raise ValueError(
            f"--coordinator_address is {coordinator!r}, --process_count {count}, --process_id {index}; give all three, "
            "or none on a TPU pod, under Slurm or on Kubernetes, where they are found"
        )
    if all(given) and index >= count:
        raise ValueError(f"--process_id is {index}; with {count} processes it is at most {count - 1}")
    jax.distributed.initialize(
        coordinator or None,
        count if all(given) else None,
        index if all(given) else None,
        initialization_timeout=start,
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=SHUTDOWN,
    )
    # Where the coordinator dies JAX says so and aborts; the stacks of some twenty threads would bury its words.
    faulthandler.enable(all_threads=False)


@contextmanager
def ending_together(*common: type[Exception]) -> Iterator[None]:
    """Ends this process of several at once, with status 1, for an error that it raises alone.

    Such errors are an unreadable record, lack of memory, a lost connection. An orderly end would wait for the others at
    a barrier (of JAX, or of a checkpoint), while they wait for this one's part of a step: for minutes.
    common: errors that all processes raise in the same step. They, and SystemExit, end in order.
    """
    try:
        yield
    except common:
        raise
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} ends, and the others with it. Where the "
            "error above is one of a connection (Gloo, NCCL, coordination service), another process died before; its "
            "own output says why. All of them, started again with the same command, go on from the last checkpoint",
            file=sys.stderr,
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def is_first() -> bool:
    """Whether this process writes logs and tables."""
    return jax.process_index() == 0


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process. All must ask at the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def largest(*values: float) -> list[float]:
    """The largest of each value over the processes. All must ask at the same step."""
    if jax.process_count() == 1:
        return [*values]
    return multihost_utils.process_allgather(np.asarray(values, np.float32)).max(0).tolist()


def meet(name: str, seconds: int = COMPILE) -> None:
    """Waits until all processes are here; each meeting of a job has a name of its own.

    Before the first collective of a new program: one process may compile for minutes longer than another, and
    collectives wait less for each other (Gloo for 30 s). A process that is dead ends the wait.
    """
    if jax.process_count() > 1:
        client = distributed.global_state.client
        assert client is not None  # in a job of several processes
        client.wait_at_barrier(name, timeout_in_ms=1000 * seconds)


_meetings = itertools.count()


def meet_all() -> None:
    """Waits until all processes are here; all must ask in the same order."""
    meet(f"meeting {next(_meetings)}")


def by_first(action: Callable[[], object]) -> None:
    """Runs `action` in process 0 once all processes are here, while the others wait. All must ask together.

    Raises what `action` raises, ValueError in the other processes.
    """
    error: Exception | None = None
    meet_all()
    try:
        if is_first():
            action()
    except Exception as raised:
        error = raised
    meet_all()
    if anywhere(error is not None):
        raise error or ValueError("process 0 ended with an error, which its own output says")


def of_first(flags: list[bool]) -> list[bool]:
    """The flags of process 0, in all processes. All must ask together."""
    return add_up(np.array(flags, np.int32) * is_first()).astype(bool).tolist()


def own_rows(batch: Tree) -> Tree:
    """This process's part of a batch of NumPy arrays [b, ...] that every process has whole, for `mapping.put_batch`."""
    count, index = jax.process_count(), jax.process_index()
    return jax.tree.map(lambda x: x[index * len(x) // count : (index + 1) * len(x) // count], batch)


def own_part(count: int) -> range:
    """Indices of the pieces, of `count` in all, that this process does; each piece is done by one process."""
    return range(jax.process_index(), count, jax.process_count())


def own_range(count: int) -> range:
    """Indices of the pieces, of `count` in all, that this process does where its pieces follow one another."""
    processes, index = jax.process_count(), jax.process_index()
    return range(index * count // processes, (index + 1) * count // processes)


def from_all(x: np.ndarray) -> np.ndarray:
    """The NumPy array of each process, of one shape and dtype, as [processes, ...]. All must ask together."""
    if jax.process_count() == 1:
        return x[None]
    # As bytes: JAX would make 32 bits of 64.
    parts = multihost_utils.process_allgather(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
    return np.ascontiguousarray(parts).view(x.dtype).reshape(jax.process_count(), *x.shape)


def add_up(tree: Tree) -> Tree:
    """The sum of each NumPy array over the processes, in its dtype. All must ask together.

    The processes may come minutes apart. Holds the result and CHUNK bytes.
    """
    if jax.process_count() == 1:
        return tree
    meet_all()

    def added(x: np.ndarray) -> np.ndarray:
        flat, total = np.ascontiguousarray(x).reshape(-1), np.empty(x.size, x.dtype)
        length = max(1, CHUNK // (x.itemsize * jax.process_count()))
        for start in range(0, x.size, length):
            total[start : start + length] = from_all(flat[start : start + length]).sum(axis=0)
        return total.reshape(x.shape)

    return jax.tree.map(added, tree)
