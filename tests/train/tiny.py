"""The smallest real run: 3SHNet with a BiGRU of a few units on 60 rendered scenes."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from configs import scenes as recipe
from data_prep import scenes
from data_prep.builder import write_dataset
from shnet_jax.observe import curves
from shnet_jax.observe.writer import read_metrics
from shnet_jax.training import loop

SPLITS = {"train": 40, "val": 10, "test": 10}


@functools.cache
def folder() -> Path:
    """A place for files that several test modules share; removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="shnet_jax_tests_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def records(split: str) -> list[dict[str, Any]]:
    first = sum(size for name, size in SPLITS.items() if name < split)
    return [scenes.scene(7, first + i, regions=8) for i in range(SPLITS[split])]


def write(name: str, change: Any = lambda record: record) -> Path:
    """A data set of scenes whose records went through `change`."""
    splits = {split: [change(record) for record in records(split)] for split in SPLITS}
    return write_dataset(folder(), name, splits, {"source": "made by the tests"})


@functools.cache
def dataset() -> Path:
    return write("tiny")


# 8 steps an epoch, an evaluation after each, so that checkpoints with and without a validation result alternate.
CHANGES: Mapping[str, Any] = {
    "data.resident": False,
    "data.max_tokens": 32,
    "data.token_buckets": (32,),
    "data.read_threads": 1,
    "data.prefetch": 2,
    "model.dim": 16,
    "model.map_channels": 4,
    "model.dtype": "float32",
    "text.dtype": "float32",
    "text.width": 16,
    "loss.weights.triplet": 1.0,
    "loss.weights.infonce": 0.0,
    "optim.lr": 5e-4,
    "optim.ema": 0.9,
    "train.batch_size": 20,
    "train.steps": 11,
    "train.log_steps": 4,
    "train.eval_epochs": 0.5,
    "train.checkpoint_steps": 3,
    "parallel.devices": 1,
    "eval.batch_size": 16,
}


@contextmanager
def quick() -> Iterator[None]:
    """Training without what costs time and is not looked at: no picture is drawn, no product is timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "write_curves", lambda workdir: None)
        patch.setattr(loop.cost, "measured_flops", lambda device, dtype: 1e9)
        yield


def config(**changes: Any) -> ConfigDict:
    """configs/scenes.py made tiny; `changes` by dotted name with "__" for the dot."""
    c = recipe.get_config()
    c.data.dir = str(dataset())
    c.update_from_flattened_dict(dict(CHANGES) | {name.replace("__", "."): v for name, v in changes.items()})
    return c


def flags(c: ConfigDict) -> list[str]:
    """The flags that turn configs/scenes.py into `c`."""
    return [f"--config.{name}={value}" for name, value in (CHANGES | {"data.dir": c.data.dir}).items()]


def lines(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the machine's speed."""
    return [{k: v for k, v in line.items() if k != "timing"} for line in read_metrics(workdir / "metrics.jsonl")]


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""

    def here(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(jax.devices()[0]))

    found = {}
    for item in sorted((workdir / "checkpoints" / str(step)).iterdir()):
        if (item / "_METADATA").exists():
            checkpointer = ocp.StandardCheckpointer()
            like = jax.tree.map(
                here, dict(checkpointer.metadata(item).item_metadata.tree)
            )  # from any number of devices
            for path, leaf in jax.tree_util.tree_leaves_with_path(checkpointer.restore(item, like)):
                found[item.name + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found
