"""Imports features kept as one .npy file an image, with captions and ids in text files.

    shnet data from_npy --src=DIR --features=DIR --as=grid|regions --name=NAME --out=DATA_DIR

`--src` holds {split}_caps.txt and {split}_ids.txt as in the SCAN layout, and any of its arrays, which are
imported too (3SHNet keeps COCO so: regions by image, segmentations by split). `--features` holds ID.npy for
each id: [units, D], or a map [D, h, w] or [1, D, h, w] as grid-feats-vqa writes it, whose cells become
units row by row. --layout=hwc says that the channels are last, [h, w, D], --layout=chw that they are first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from data_prep import command, from_scan
from data_prep.join import Writing
from data_prep.schema import DataError
from data_prep.sources.units import Layout, UnitFiles
from shnet_jax.paths import to_path


def import_npy(
    src: Path,
    features: Path,
    field: str,
    name: str,
    out: Path,
    *,
    splits: list[str] | None = None,
    captions_per_image: int | None = None,
    max_units: int | None = None,
    pool: int | None = None,
    layout: Layout | None = None,
    **writing: Unpack[Writing],
) -> Path:
    """Import .npy files by image; returns the version folder. `--help` explains the arguments."""
    units = UnitFiles(features, field, max_units, pool, layout)
    opened = from_scan.open_splits(
        src, splits, captions_per_image=captions_per_image, layout=layout, writing=writing, need="ids"
    )
    for split in opened.values():
        if field in split.arrays:
            raise DataError(f"{split.arrays[field]}: expected {field!r} only in {features}, found it here too")
    writing["sources"] = [units, *writing.get("sources", ())]
    return from_scan.write_splits(opened, src, name, out, f"from_npy of {features.resolve().name}", writing)


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("from_npy", __doc__)
    count = command.at_least(1)
    from_scan.add_arguments(parser)
    parser.add_argument("--features", type=to_path, required=True, help="folder with ID.npy of each image")
    parser.add_argument("--as", dest="field", choices=("grid", "regions"), required=True, help="what they are")
    parser.add_argument("--max_units", type=count, help="pad each image to this many units and add a mask")
    parser.add_argument("--pool", type=count, help="average feature maps to this many rows and columns, such as 7")
    args = parser.parse_args(argv)
    sizes = {"max_units": args.max_units, "pool": args.pool}
    print(import_npy(args.src, args.features, args.field, args.name, args.out, **sizes, **from_scan.options(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
