"""Does reading leak? The training stream of scenes.py at full speed, for as many batches as two hours of training take.

Alone, with any number of batches: `python -m benchmarks.soak --batches=1000`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

from benchmarks import resident
from benchmarks.input import Sizes as InputSizes
from benchmarks.input import configuration
from benchmarks.memory import ROOT, write
from benchmarks.rows import Row
from shnet_jax.experiment import assemble
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.training.setup import training_data

CURVE = Path("runs/bench/soak.json")
"""Resident memory over the batches."""

WARM = 0.1
"""Share of the batches after which memory is first looked at: buffers have filled, the set has been met once."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """batches: 14,400 are two hours of scenes.py on 2 cores, at 0.5 s a step. images: of the data set."""

    batches: int = 14400
    images: int = 1280


FULL = Sizes()
QUICK = Sizes(batches=200, images=128)


def run(sizes: Sizes) -> list[Row]:
    """Memory at the end against that after a tenth of the batches, in a process of its own."""
    command = ["-m", "benchmarks.soak", f"--batches={sizes.batches}", f"--images={sizes.images}"]
    resident.watch(command, ROOT)
    curve = json.loads(CURVE.read_text(encoding="utf-8"))["batches, bytes"]
    start, middle, end = (curve[i][1] for i in (0, len(curve) // 2, -1))
    note = f"{start / 2**20:,.0f}, {middle / 2**20:,.0f} and {end / 2**20:,.0f} MiB at start, middle and end"
    return [
        Row(
            "soak",
            f"the training stream of scenes.py after {sizes.batches} batches",
            f"after {curve[0][0]} batches",
            memory_bytes=end,
            reference_memory_bytes=start,
            memory="the process's own, files that it has mapped left out",
            note=f"{note}; curve: {CURVE}",
        )
    ]


def main() -> None:
    """Reads the batches; prints the memory held and writes CURVE as it goes on."""
    parser = argparse.ArgumentParser("benchmarks.soak", description=__doc__)
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    options = parser.parse_args()
    first = max(1, round(WARM * options.batches))
    every = max(1, (options.batches - first) // 20)
    curve: list[tuple[int, int]] = []
    CURVE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data_set = write(Path(folder), "scenes", {"train": options.images})
        config = configuration(data_set, InputSizes(batch_size=min(320, 5 * options.images)), resident=False)
        iterator, _ = training_data(assemble(config), make_mesh(1))
        begin = time.perf_counter()
        for number in range(1, options.batches + 1):
            next(iterator)
            if number == options.batches or (number >= first and (number - first) % every == 0):
                curve.append((number, resident.bytes_of(entry="RssAnon")))
                CURVE.write_text(json.dumps({"batches, bytes": curve}) + "\n", encoding="utf-8")
                speed = number / (time.perf_counter() - begin)
                print(f"{number} batches, {speed:.1f}/s: {curve[-1][1] / 2**20:,.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
