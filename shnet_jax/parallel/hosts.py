"""Several processes that train one model: jax.distributed and what the processes must agree on.

Each process reads its own part of every batch (`data.batches`), computes on its own devices, and sees the same metrics
as all others. The first one alone writes logs and tables; all of them write checkpoints. In one process everything here
is the identity.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Tree = TypeVar("Tree")


def connect(coordinator: str, count: int, index: int) -> None:
    """Joins the job; must come before anything else asks JAX for devices.

    coordinator: host:port of process 0, the same in all. count: processes. index: this one, 0..count-1. On a TPU pod,
    under Slurm, Open MPI and on Kubernetes JAX finds all three by itself: give "", 0 and -1.
    Raises ValueError when only some of them are given.
    """
    given = (bool(coordinator), count > 0, index >= 0)
    if any(given) and not all(given):
        raise ValueError(
            f"--coordinator_address is {coordinator!r}, --process_count {count}, --process_id {index}; give all three, "
            "or none on a TPU pod, under Slurm or on Kubernetes, where they are found"
        )
    if all(given) and index >= count:
        raise ValueError(f"--process_id is {index}; with {count} processes it is at most {count - 1}")
    if all(given):
        jax.distributed.initialize(coordinator, count, index)
    else:
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this process writes logs and tables."""
    return jax.process_index() == 0


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process. All must ask at the same step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def own_rows(batch: Tree) -> Tree:
    """This process's part of a batch of NumPy arrays [b, ...] that every process has whole, for `mapping.put_batch`."""
    count, index = jax.process_count(), jax.process_index()
    return jax.tree.map(lambda x: x[index * len(x) // count : (index + 1) * len(x) // count], batch)
