"""Imports features kept as one .npy file an image, with captions and ids in text files.

    python -m data_prep.from_npy --src=DIR --features=DIR --as=grid|regions --name=NAME --out=DATA_DIR

`--src` holds {split}_caps.txt and {split}_ids.txt as in the SCAN layout, and any of its arrays, which are
imported too (3SHNet keeps COCO so: regions by image, segmentations by split). `--features` holds ID.npy for
each id: [units, D], or a map [D, h, w] or [1, D, h, w] as grid-feats-vqa writes it, whose cells become
units row by row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import command, from_scan, schema
from data_prep.builder import write_dataset
from data_prep.schema import DataError, Record

MASK = {"grid": "grid_mask", "regions": "region_mask"}


@dataclass(frozen=True)
class NpySplit:
    """The records of a split, with the features of each image from its own file.

    max_units: pad every image to this many units and add a mask; None when all have the same number.
    pool: average a feature map to pool x pool cells first; None keeps its cells.
    """

    text: from_scan.ScanSplit
    folder: Path
    field: str
    max_units: int | None
    pool: int | None

    def __iter__(self) -> Iterator[Record]:
        for row, record in enumerate(self.text):
            path = feature_file(self.folder, record["image_id"])
            where = f"split {self.text.name!r} row {row} (image {record['image_id']!r}), {path}"
            units = as_units(from_scan.open_array(path), path, self.pool)
            units = schema.as_field(self.field, units, where=where, dtype=self.text.feature_dtype)
            if self.max_units is not None:
                units, mask = pad(units, self.max_units, path)
                record[MASK[self.field]] = mask
            record[self.field] = units
            yield record


def feature_file(folder: Path, image_id: str) -> Path:
    """The file of an image: its id, with or without the extension of the photograph, and .npy."""
    for stem in (image_id, Path(image_id).stem):
        path = folder / f"{stem}.npy"
        if path.is_file():
            return path
    raise DataError(f"{folder}: image {image_id!r}: expected a file {image_id}.npy, found none")


def as_units(array: np.ndarray, path: Path, pool: int | None) -> np.ndarray:
    """Units [G, D] of an array [G, D], [D, h, w] or [1, D, h, w]; maps are averaged to pool x pool cells."""
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3:
        cells = array if pool is None else adaptive_average(np.asarray(array, dtype=np.float32), pool)
        return np.ascontiguousarray(cells.reshape(len(cells), -1).T)
    if array.ndim == 2 and pool is None:
        return np.array(array)
    wanted = "[D, h, w] or [1, D, h, w] to pool" if pool else "[units, D], [D, h, w] or [1, D, h, w]"
    raise DataError(f"{path}: expected an array {wanted}, found {list(array.shape)}")


def adaptive_average(cells: np.ndarray, size: int) -> np.ndarray:
    """Average a map [D, h, w] to [D, size, size], as torch's AdaptiveAvgPool2d does.

    Cell i covers rows floor(i h / size) to ceil((i + 1) h / size), so neighbours may share a row.
    """
    for axis in (1, 2):
        length = cells.shape[axis]
        edges = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
        cells = np.stack([cells.take(range(a, b), axis).mean(axis) for a, b in edges], axis)
    return cells


def pad(units: np.ndarray, count: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Units [G, D] -> [count, D] with zeros behind, and the mask [count] of the G valid ones."""
    if len(units) > count:
        raise DataError(f"{path}: expected at most max_units = {count} units, found {len(units)}")
    padded = np.zeros((count, units.shape[1]), units.dtype)
    padded[: len(units)] = units
    return padded, np.arange(count) < len(units)


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
    feature_dtype: str | None = "float16",
    source: str = "",
    overwrite: bool = False,
) -> Path:
    """Import .npy files by image; returns the version folder. `--help` explains the arguments."""
    if not features.is_dir():
        raise DataError(f"{features}: no such folder")
    texts = {
        split: from_scan.open_split(
            src, split, captions_per_image=captions_per_image, feature_dtype=feature_dtype, need="ids"
        )
        for split in (splits or from_scan.split_names(src))
    }
    for text in texts.values():
        if field in text.arrays:
            raise DataError(f"{text.arrays[field]}: expected {field!r} only in {features}, found it here too")
    records = {split: NpySplit(text, features, field, max_units, pool) for split, text in texts.items()}
    files = {split: {**text.files, field: f"{features}/ID.npy"} for split, text in texts.items()}
    metadata = {
        "source": source or f"data_prep.from_npy of {features.resolve().name}",
        **from_scan.class_metadata(src, texts.values()),
    }
    total = sum(map(len, texts.values()))
    return write_dataset(out, name, records, metadata, files=files, total=total, overwrite=overwrite)


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("from_npy", __doc__)
    count = command.at_least(1)
    from_scan.add_arguments(parser)
    parser.add_argument("--features", type=Path, required=True, help="folder with ID.npy of each image")
    parser.add_argument("--as", dest="field", choices=("grid", "regions"), required=True, help="what they are")
    parser.add_argument("--max_units", type=count, help="pad each image to this many units and add a mask")
    parser.add_argument("--pool", type=count, help="average feature maps to this many rows and columns, such as 7")
    args = parser.parse_args(argv)
    sizes = {"max_units": args.max_units, "pool": args.pool}
    print(import_npy(args.src, args.features, args.field, args.name, args.out, **sizes, **from_scan.options(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
