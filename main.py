"""Flags of shnet_jax: `python main.py --mode=train --config=configs/demo.py --workdir=runs/demo`."""

import logging as python_logging
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file; any field: --config.train.epochs=4."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, logs, results.")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "study"],
    "train (or continue) a model; eval a checkpoint; study: train and compare arms.",
)
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Runs the mode; faults that a user can mend are printed as one message, without a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # orbax and TFDS report every step at INFO
    python_logging.getLogger("shnet_jax").setLevel(python_logging.INFO)
    # Late, so that --help is quick.
    from shnet_jax import commands
    from shnet_jax.study import study
    from shnet_jax.train.checkpoint import CheckpointError
    from shnet_jax.train.loop import NonFiniteLoss

    run = {"train": commands.train, "eval": commands.evaluate, "study": study}[MODE.value]
    try:
        run(CONFIG.value, WORKDIR.value)
    except (ValueError, FileNotFoundError, CheckpointError, NonFiniteLoss) as error:
        if logging.get_verbosity() >= logging.DEBUG or "--debug" in sys.argv:
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
