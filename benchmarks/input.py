"""Reading records and training on them: does the input keep up with the step of configs/scenes.py?"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks.rows import Row, compare
from benchmarks.timing import interleave
from configs import scenes
from data_prep.scenes.write import write
from shnet_jax.experiment import Experiment, assemble, init_variables
from shnet_jax.parallel.mapping import put_batch
from shnet_jax.training.setup import setup_training, training_data

AIM = 0.95  # at most 5 % of a step is spent waiting


@dataclasses.dataclass(frozen=True)
class Sizes:
    """images: of the data set. batch_size: pairs of a step, 5 of each image. steps: of one measurement."""

    images: int = 1280
    batch_size: int = 320
    steps: int = 24
    rounds: int = 5


FULL = Sizes()
QUICK = Sizes(images=64, batch_size=40, steps=8, rounds=2)


def configuration(data_set: Path, sizes: Sizes, *, resident: bool) -> ConfigDict:
    """configs/scenes.py; its captions padded to one length, so that every step costs the same."""
    c = scenes.get_config()
    c.data.dir = str(data_set)
    c.data.resident = resident
    c.data.token_buckets = (c.data.max_tokens,)
    c.train.batch_size = sizes.batch_size
    c.parallel.devices = 1
    return c


class Training:
    """The steps of configs/scenes.py, fed by its stream or by one batch that is on the device already."""

    def __init__(self, experiment: Experiment):
        self._setup, self._prefetch = setup_training(experiment), experiment.config.data.prefetch
        self._iterator, self._table = training_data(experiment, self._setup.mesh)
        self._state = self._setup.first_state(init_variables(experiment, experiment.config.seed))
        self._batch = put_batch(next(self._iterator), self._setup.mesh)
        self.waited = self.seconds = 0.0

    def drain(self) -> None:
        """Takes the batches that were read ahead while something else was measured."""
        self.read(self._prefetch)

    def read(self, count: int) -> None:
        """The stream alone."""
        for _ in range(count):
            next(self._iterator)

    def step(self, count: int) -> Any:
        """Steps on the same batch."""
        for _ in range(count):
            metrics = self._step(self._batch)
        return metrics

    def fed(self, count: int) -> Any:
        """Steps on the stream, as in the training loop; adds to `waited` and `seconds`."""
        begin, behind = time.perf_counter(), None
        for _ in range(count):
            start = time.perf_counter()
            batch = next(self._iterator)
            self.waited += time.perf_counter() - start
            metrics = self._step(put_batch(batch, self._setup.mesh))
            if behind is not None:
                behind["loss"].block_until_ready()
            behind = metrics
        metrics["loss"].block_until_ready()
        self.seconds += time.perf_counter() - begin
        return metrics

    def _step(self, batch: Any) -> Any:
        self._state, metrics = self._setup.step(self._state, batch, self._table)
        return metrics


def run(sizes: Sizes) -> list[Row]:
    """Reading from disk and from the device, each alone and in a loop, against the step alone."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"label_noise": 0.05, "regions": 16}
        data_set = write(Path(folder), "scenes", 0, {"train": sizes.images}, options)
        return [
            row
            for resident, name in ((False, "array_record"), (True, "features on the device"))
            for row in _measure(configuration(data_set, sizes, resident=resident), sizes, name)
        ]


def _measure(config: ConfigDict, sizes: Sizes, name: str) -> list[Row]:
    training = Training(assemble(config))
    calls: dict[str, Callable[[], Any]] = {
        "fed": lambda: training.fed(sizes.steps),
        "step": lambda: training.step(sizes.steps),
        "read": lambda: training.read(sizes.steps),
    }
    training.step(1)  # compiles
    times = interleave(calls, sizes.rounds, before={"fed": training.drain, "read": training.drain})
    images = sizes.batch_size // config.data.captions_per_image
    supply, appetite = (sizes.steps * images / times[call].median for call in ("read", "step"))
    return [
        compare(
            "input",
            f"{name}: reading alone",
            times["read"],
            "the step alone",
            times["step"],
            work=sizes.steps * images,
            unit="images",
            aim=1.0,
            note=f"{supply:.4g} images/s read, {appetite:.4g} used; all that is read ahead thrown away before",
        ),
        compare(
            "input",
            f"{name}: steps on the stream",
            times["fed"],
            "the step alone",
            times["step"],
            work=sizes.steps * images,
            unit="images",
            aim=AIM,
            note=f"{100 * training.waited / training.seconds:.1f} % of the time waiting for the next batch",
        ),
    ]
