"""Memory growth of import, training, evaluation and embedding with the data set, in fresh processes of main.py.

Training reads as a stream (config.data.resident is off), so that the features of the set are nowhere whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.resident import Curve, watch
from benchmarks.rows import Row
from data_prep import scenes
from data_prep.builder import VERSION, write_dataset

ROOT = Path(__file__).parents[1]
CURVES = Path("runs/bench/memory.json")
"""Resident memory over time of every process, beside the results."""

DIFFERENT, WIDER = 64, 3
"""Scenes that are rendered, and shown again under other ids, as a large set would take long; times their features."""

SMALL = {
    "data.resident": False,
    "data.token_buckets": (48,),  # one program, whatever the captions of a set
    "model.dim": 64,
    "model.map_channels": 16,
    "text.width": 64,
    "train.eval_epochs": 0.0,
    "train.epochs": 1.0,
    "parallel.devices": 1,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """images: of the smaller set's training and test split. factor: how many times that the larger one has.

    val: images that training is evaluated on, in both.
    """

    images: int = 500
    factor: int = 10
    val: int = 64


FULL = Sizes()
QUICK = Sizes(images=64, factor=2)


def run(sizes: Sizes) -> list[Row]:
    """Peaks with the larger set against those with the smaller one; writes the curves to CURVES."""
    curves: dict[str, Curve] = {}
    peaks: dict[str, list[int]] = {}
    data: list[int] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for images in (sizes.images, sizes.images * sizes.factor):
            data_set = folder / f"scenes_{images}" / VERSION
            for stage, command in stages(data_set, folder / f"run_{images}", images, sizes.val).items():
                curve, peak = watch(command, ROOT)
                curves[f"{stage}, {images} images"] = curve
                peaks.setdefault(stage, []).append(peak)
            data.append(sum(path.stat().st_size for path in data_set.rglob("*") if path.is_file()))
    CURVES.parent.mkdir(parents=True, exist_ok=True)
    CURVES.write_text(json.dumps({"seconds, bytes": curves}) + "\n", encoding="utf-8")
    rise = (data[1] - data[0]) / 2**20
    return [
        Row(
            "memory",
            f"{stage}, {sizes.images * sizes.factor} images",
            f"the same, {sizes.images} images",
            memory_bytes=large,
            reference_memory_bytes=small,
            memory="peak of a fresh process",
            note=f"it rises by {(large - small) / 2**20:,.0f} MiB, the data set by {rise:,.0f} MiB; curves: {CURVES}",
        )
        for stage, (small, large) in peaks.items()
    ]


def write(folder: Path, name: str, splits: dict[str, int]) -> Path:
    """A data set of so many images in each split; returns its folder."""
    rendered = [scenes.scene(0, number) for number in range(DIFFERENT)]

    def records(split: str, images: int) -> Iterator[dict[str, Any]]:
        for number, record in enumerate(islice(cycle(rendered), images)):
            wide = np.tile(record["regions"], (1, WIDER))
            captions = number * len(record["captions"]) + np.arange(len(record["captions"]))
            yield record | {"image_id": f"{split}-{number}", "regions": wide, "caption_ids": captions}

    made = {split: records(split, images) for split, images in splits.items()}
    return write_dataset(folder, name, made, {"source": "benchmarks.memory"}, total=sum(splits.values()))


def stages(data_set: Path, workdir: Path, images: int, val: int) -> dict[str, Sequence[str]]:
    """Command lines for Python: one after another, in this order. The first one writes `data_set`."""
    folder, name = data_set.parents[1], data_set.parent.name
    changes = SMALL | {"data.dir": str(data_set)}
    common = ["main.py", "--config=configs/scenes.py", f"--workdir={workdir}"]
    common += [f"--config.{name}={value}" for name, value in changes.items()]
    return {
        "import": ["-m", "benchmarks.memory", str(folder), name, f"--images={images}", f"--val={val}"],
        "training": [*common, "--mode=train"],
        "evaluation": [*common, "--mode=eval"],
        "embedding": [*common, "--mode=embed"],
    }


def main() -> None:
    """Writes a data set, as an importer does: one record after another."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--val", type=int, required=True)
    given = parser.parse_args()
    write(given.folder, given.name, {"train": given.images, "val": given.val, "test": given.images})


if __name__ == "__main__":
    main()
