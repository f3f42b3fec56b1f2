"""Writes a data set of rendered scenes: `python -m data_prep.scenes --out=DIR`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags

from data_prep import scenes

OUT = flags.DEFINE_string("out", None, "folder that holds data sets", required=True)
NAME = flags.DEFINE_string("name", "scenes", "name of the data set")
SPLITS = {
    "train": flags.DEFINE_integer("train", 4000, "images of the split train", lower_bound=0),
    "val": flags.DEFINE_integer("val", 500, "images of the split val", lower_bound=0),
    "test": flags.DEFINE_integer("test", 500, "images of the split test", lower_bound=0),
}
SEED = flags.DEFINE_integer("seed", 0, "world that the scenes are drawn from", lower_bound=0)
LABEL_NOISE = flags.DEFINE_float(
    "label_noise",
    0.05,
    "share of wrong blocks in the label maps and of wrong box labels",
    lower_bound=0,
    upper_bound=0.99,
)
REGIONS = flags.DEFINE_integer(
    "regions", 16, "regions of an image: things, distractors and padding", lower_bound=8
)

# Indices of the splits lie far apart: the images of a split do not depend on the sizes of the others.
FIRST = {"train": 0, "val": 1_000_000_000, "test": 2_000_000_000}
LOG_SECONDS = 5.0


class Progress:
    """Images done, images/s and time left over all splits, on one line every few seconds."""

    def __init__(self, total: int):
        self._total, self._done, self._start = total, 0, time.monotonic()
        self._next = self._start + LOG_SECONDS

    def count(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same records, counted."""
        for record in records:
            yield record
            self._done += 1
            now = time.monotonic()
            if now >= self._next or self._done == self._total:
                self._next = now + LOG_SECONDS
                rate = self._done / (now - self._start)
                left = (self._total - self._done) / rate
                print(
                    f"scenes: {self._done}/{self._total} images, {rate:.0f} images/s, {left:.0f} s left",
                    file=sys.stderr,
                )


def main(argv: list[str]) -> None:
    """Write the data set that the flags describe, unless it is there."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    # imported here because a worker process imports this file, too, and needs neither
    from data_prep import builder
    from shnet_jax.data.records import open_dataset

    sizes = {split: flag.value for split, flag in SPLITS.items() if flag.value}
    if too_many := [split for split, size in sizes.items() if size > FIRST["val"]]:
        raise app.UsageError(f"--{too_many[0]}: expected at most {FIRST['val']} images")
    options: dict[str, Any] = {"label_noise": LABEL_NOISE.value, "regions": REGIONS.value}
    settings = {
        "generator": "data_prep.scenes",
        "version": scenes.VERSION,
        "seed": SEED.value,
        **options,
        **sizes,
    }
    source = json.dumps(settings, sort_keys=True)

    target = Path(OUT.value) / NAME.value / builder.VERSION
    if target.exists():
        found = open_dataset(target).metadata.get("source")
        if found == source:
            print(f"scenes: {target} exists and was made with these settings")
            return
        sys.exit(
            f"scenes: {target} exists and was made otherwise: expected {source}, found {found}; "
            "remove it or choose another --name"
        )
    progress = Progress(sum(sizes.values()))
    splits = {
        split: progress.count(scenes.records(SEED.value, FIRST[split], FIRST[split] + size, **options))
        for split, size in sizes.items()
    }
    metadata = {
        "source": source,
        "class_names": list(scenes.CLASS_NAMES),
        "predicates": list(scenes.PREDICATES),
    }
    print(f"scenes: wrote {builder.write_dataset(OUT.value, NAME.value, splits, metadata)}")


if __name__ == "__main__":
    app.run(main)
