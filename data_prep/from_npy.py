"""Imports features kept as one .npy file an image, with captions and ids in text files.

    python -m data_prep.from_npy --src=DIR --features=DIR --as=grid|regions --name=NAME --out=DATA_DIR

`--src` holds {split}_caps.txt and {split}_ids.txt as in the SCAN layout, and any of its arrays, which are
imported too (3SHNet keeps COCO so: regions by image, segmentations by split). `--features` holds ID.npy for
each id: [units, D], or a map [D, h, w] or [1, D, h, w] as grid-feats-vqa writes it, whose cells become
units row by row. --layout=hwc says that the channels are last, [h, w, D], --layout=chw that they are first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep import command, from_scan, join
from data_prep.bad_records import Policy
from data_prep.schema import DataError
from data_prep.sources.base import Source
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
    feature_dtype: str | None = "float16",
    source: str = "",
    overwrite: bool = False,
    sources: Sequence[Source] = (),
    skip_absent: bool = False,
    on_bad_record: Policy = "fail",
) -> Path:
    """Import .npy files by image; returns the version folder. `--help` explains the arguments."""
    units = UnitFiles(features, field, max_units, pool, layout)
    texts = {
        split: from_scan.open_split(
            src,
            split,
            captions_per_image=captions_per_image,
            feature_dtype=feature_dtype,
            need="ids",
            strict=on_bad_record == "fail",
            layout=layout,
        )
        for split in (splits or from_scan.split_names(src))
    }
    for text in texts.values():
        if field in text.arrays:
            raise DataError(f"{text.arrays[field]}: expected {field!r} only in {features}, found it here too")
    return join.write_joined(
        texts,
        [units, *sources],
        name,
        out,
        metadata={
            "source": source or f"data_prep.from_npy of {features.resolve().name}",
            **from_scan.class_metadata(src, texts.values()),
        },
        found=from_scan.found(texts.values()),
        files={split: texts[split].files for split in texts},
        feature_dtype=feature_dtype,
        skip_absent=skip_absent,
        overwrite=overwrite,
        on_bad_record=on_bad_record,
    )


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
