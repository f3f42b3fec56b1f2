"""Writes a data set of rendered scenes: `shnet data scenes --out=DIR`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep import builder, command, scenes, vocabulary
from data_prep.schema import Record
from shnet_jax.observe.files import atomic_path
from shnet_jax.paths import to_path

SIZES = {"train": 4000, "val": 500, "test": 500}
# Indices of the splits lie far apart: the images of a split do not depend on the sizes of the others.
FIRST = {"train": 0, "val": 1_000_000_000, "test": 2_000_000_000}
PICTURES = "pictures"  # folder beside the versions of a data set, where page and serve look for photographs


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number in 0 <= share < 1, found {text!r}")
    return value


def write(out: Path, name: str, seed: int, sizes: dict[str, int], options: dict[str, Any]) -> Path:
    """Write the set and return its version folder; one that was made with the same settings is left as it is.

    Args:
      out, name: as for `builder.write_dataset`.
      seed: world that the scenes are drawn from.
      sizes: images of each split of FIRST; a split of none is left out.
      options: `label_noise` and `regions` of `scenes.scene`.

    Raises:
      FileExistsError: the set exists and was made with other settings.
    """
    sizes = {split: size for split, size in sizes.items() if size}
    settings = {"generator": "data_prep.scenes", "version": scenes.VERSION, "seed": seed, **options, **sizes}
    metadata = {"class_names": list(scenes.CLASS_NAMES), "predicates": list(scenes.PREDICATES)}
    with scenes.renderers() as pool:
        splits = {
            split: scenes.records(seed, FIRST[split], FIRST[split] + size, pool=pool, **options)
            for split, size in sizes.items()
        }
        return write_once(out, name, settings, splits, metadata, sum(sizes.values()))


def write_once(
    out: Path,
    name: str,
    settings: Mapping[str, Any],
    splits: Mapping[str, Iterable[Record]],
    metadata: Mapping[str, Any],
    total: int,
) -> Path:
    """Write a rendered set and return its version folder; one that was made with the same settings is left as it is.

    settings: all that the records depend on. splits: read only if the set is written. total: records of all splits.
    """
    source = json.dumps({**settings, "vocabulary": vocabulary.VERSION}, sort_keys=True)
    target = out / name / builder.VERSION
    if builder.made_before(target, source):
        return target
    return builder.write_dataset(out, name, splits, {"source": source, **metadata}, total=total)


def add_arguments(parser: argparse.ArgumentParser, name: str, sizes: Mapping[str, int], unit: str) -> None:
    """The flags of every rendered set: --out, --name, --seed, and a size for each split, in a `unit` such as images."""
    parser.add_argument("--out", type=to_path, required=True, help="folder that holds data sets")
    parser.add_argument("--name", default=name, help="name of the data set")
    for split, size in sizes.items():
        help_text = f"{unit} of the split {split}; default: {size}"
        parser.add_argument(f"--{split}", type=command.at_least(0), default=size, help=help_text)
    parser.add_argument("--seed", type=command.at_least(0), default=0, help="world that they are drawn from")


def write_pictures(folder: Path, seed: int, indices: Iterable[int]) -> None:
    """Write the pictures of scenes as `folder`/IMAGE_ID.jpg; those that are there stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in indices:
        path = folder / f"{scenes.image_id(seed, index)}.jpg"
        if not path.exists():
            with atomic_path(path) as temporary:
                Image.fromarray(scenes.draw(seed, index)).save(temporary, "JPEG", quality=95)


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("scenes", __doc__)
    add_arguments(parser, "scenes", SIZES, "images")
    noise = "share of wrong blocks in the label maps and of wrong box labels"
    parser.add_argument("--label_noise", type=_share, default=0.05, help=noise)
    noise = "share of relations with a wrong object"
    parser.add_argument("--relation_noise", type=_share, default=0.0, help=noise)
    regions = "regions of an image: things, distractors and padding"
    parser.add_argument("--regions", type=command.at_least(scenes.LEAST_REGIONS), default=16, help=regions)
    pictures = f"also write the pictures of the split test, which page and serve show, to OUT/NAME/{PICTURES}"
    parser.add_argument("--pictures", action="store_true", help=pictures)
    args = parser.parse_args(argv)
    sizes = {split: getattr(args, split) for split in SIZES}
    for split, size in sizes.items():
        if size > FIRST["val"]:
            parser.error(f"argument --{split}: expected at most {FIRST['val']} images, found {size}")
    options = {"label_noise": args.label_noise, "regions": args.regions}
    if args.relation_noise:  # sets without are what they were before there was this choice
        options["relation_noise"] = args.relation_noise
    target = write(args.out, args.name, args.seed, sizes, options)
    if args.pictures:
        write_pictures(target.parent / PICTURES, args.seed, range(FIRST["test"], FIRST["test"] + sizes["test"]))
    print(target)
    return 0
