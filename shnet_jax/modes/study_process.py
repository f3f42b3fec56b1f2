"""One run of a study in its own process, which `study_jobs` starts.

`python -m shnet_jax.modes.study_process CONFIG.json ARM SEED FOLDER CORES`
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from shnet_jax.observe.terminal import make_output_safe


def main(arguments: Sequence[str]) -> int:
    """Trains and evaluates the run, or continues it; returns the exit status. CORES: as "0,1"; "" for all."""
    make_output_safe()
    config_file, arm, seed, folder, cores = arguments
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))  # before JAX counts the cores
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("shnet_jax").setLevel(logging.INFO)

    from shnet_jax.modes.study import run_one
    from shnet_jax.observe.files import FolderInUse
    from shnet_jax.training.checkpoint import CheckpointError
    from shnet_jax.training.loop import NonFiniteLoss
    from shnet_jax.training.workdir import WorkdirError, load_config

    try:
        run_one(load_config(Path(config_file)), arm, int(seed), Path(folder))
    except (ValueError, OSError, CheckpointError, FolderInUse, NonFiniteLoss, WorkdirError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _end_with_parent() -> None:
    """Asks this process to save its state and end when the study that started it is gone."""
    os.read(sys.stdin.fileno(), 1)  # not sys.stdin.read, whose lock would be held when this process ends
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
