"""--mode=train: trains a model in a work folder, or continues there."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from shnet_jax.evaluation.report import table
from shnet_jax.parallel import hosts
from shnet_jax.training.loop import train_and_evaluate


def train(config: ConfigDict, workdir: str | Path) -> None:
    """Trains in `workdir` (or continues) and prints the last validation result."""
    results = train_and_evaluate(config, workdir)
    if hosts.is_first():
        print(table({f"{config.name}, {results.card['split']}": results}))
