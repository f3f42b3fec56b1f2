"""Imports the SCAN layout ({split}_ims.npy, {split}_caps.txt, {split}_ids.txt) and 3SHNet's arrays beside it.

    shnet data from_scan --src=DIR --name=NAME --out=DATA_DIR [--splits=train,val,test] [--overwrite]

Arrays may have one row an image or, as the released ones do, one row a caption with equal rows in a row.
Vectors of frozen models (image_emb, caption_emb, caption_tokens and its mask) may also be the only tensor of a
.safetensors file of the same name.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from data_prep import command, join, parts, schema
from data_prep.bad_records import Bad, record_or_bad
from data_prep.counts import Found
from data_prep.files import open_array, read_lines
from data_prep.join import Writing
from data_prep.places import Place, Recognised, look
from data_prep.schema import DataError, Record, refuse
from data_prep.sources.detections import Reading
from data_prep.sources.units import Layout, as_units, first_units, open_units, unit_files
from shnet_jax.data.schema import COLUMNS, FIELDS, MASKS
from shnet_jax.paths import to_path

ARRAYS = {
    "regions": "_ims.npy",
    "boxes": "_boxes.npy",
    "box_classes": "_box_cls.npy",
    "box_scores": "_box_scores.npy",
    "grid": "_grids.npy",
    "seg_semantic": "_segmentations.npy",
    "seg_map": "_seg_maps.npy",
    "categories": "_cat_onehots.npy",
    "relations": "_relations.npy",
    "relation_scores": "_relation_scores.npy",
    "image_embedding": "_image_emb.npy",
}
CAPTION_ARRAYS = {
    "caption_embeddings": "_caption_emb.npy",
    "caption_tokens": "_caption_tokens.npy",
    "caption_token_mask": "_caption_token_mask.npy",
}
CAPTION_IDS = "_capids.txt"
USUAL_CAPTIONS = 5  # captions an image in Flickr and COCO as SCAN distributes them
_RUNS = 16  # of equal rows, from which the captions of an image are found
_MOST_CAPTIONS = 64  # rows of an image that are looked for
_BLOCK = 64  # images read at once


@dataclass(frozen=True)
class ScanSplit:
    """The files of one split and how their rows belong to images.

    arrays: field -> path; steps: field -> rows of that array for each image (1, or the captions of an image).
    caption_ids: of all captions, () without; of_captions: field -> file with a row a caption. layout: of the features.
    """

    name: str
    captions: tuple[str, ...]
    ids: tuple[str, ...]
    captions_per_image: int
    arrays: Mapping[str, Path]
    steps: Mapping[str, int]
    files: Mapping[str, str]
    feature_dtype: str | None
    caption_ids: tuple[int, ...] = ()
    of_captions: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    layout: Layout | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Record | Bad]:
        count = self.captions_per_image
        for start in range(0, len(self), _BLOCK):
            stop = min(start + _BLOCK, len(self))
            blocks = {field: _rows(path, start, stop, self.steps[field]) for field, path in self.arrays.items()}
            for name, path in self.of_captions.items():
                rows = _rows(path, start * count, stop * count, 1)
                blocks[name] = rows.reshape(stop - start, count, *rows.shape[1:])
            for image in range(start, stop):
                arrays = {field: block[image - start] for field, block in blocks.items()}
                yield record_or_bad(self.ids[image], self._record, image, arrays)

    def _record(self, image: int, arrays: Mapping[str, np.ndarray]) -> Record:
        """The record of an image from its rows of the arrays."""
        where = f"split {self.name!r} row {image} (image {self.ids[image]!r})"
        of_image = slice(image * self.captions_per_image, (image + 1) * self.captions_per_image)
        record: Record = {"image_id": self.ids[image], "captions": list(self.captions[of_image])}
        if self.caption_ids:
            record["caption_ids"] = np.array(self.caption_ids[of_image], np.int64)
        for field, value in arrays.items():
            file = self.files[field]
            if field in MASKS and value.ndim > 1:
                value = as_units(value, file, None, self.layout)
            record[field] = schema.as_field(field, value, where=where, file=file, dtype=self.feature_dtype)
        return record


def _rows(path: Path, start: int, stop: int, step: int) -> np.ndarray:
    """Rows start*step, (start+1)*step, ... copied: an open map would keep every page it read resident."""
    return np.array(open_array(path)[start * step : stop * step : step])


def open_split(
    src: Path,
    split: str,
    *,
    captions_per_image: int | None = None,
    feature_dtype: str | None = None,
    need: str = "an array",
    strict: bool = True,
    layout: Layout | None = None,
) -> ScanSplit:
    """Find the files of a split and work out from their counts which rows belong to which image.

    `need` is "an array", or "ids" when the features lie elsewhere under the images' ids. Without `strict` a caption
    that is no text spoils the record of its image only.
    Raises DataError when files are missing or their counts do not fit together.
    """
    captions = read_lines(src / f"{split}_caps.txt", strict=strict)
    arrays = {field: path for field in ARRAYS if (path := _array_file(src, split, field)) is not None}
    refuse(need == "an array" and not arrays, f"{src}: split {split!r}", f"{split}_ims.npy or another array", "none")
    refuse(not captions, src / f"{split}_caps.txt", "a caption a line", "none")
    shapes = {field: open_array(path).shape for field, path in arrays.items()}
    for field, shape in shapes.items():
        refuse(not shape or not shape[0], arrays[field], "a row for each image", f"shape {list(shape)}")
        if field in MASKS and len(shape) > 2:  # of all images, so of no record alone
            as_units(open_array(arrays[field])[0], arrays[field], None, layout)
    rows = {field: shape[0] for field, shape in shapes.items()}
    ids_file = src / f"{split}_ids.txt"
    ids = read_lines(ids_file) if need == "ids" or ids_file.is_file() else []
    per_image = captions_per_image or _captions_per_image(src, split, len(captions), arrays, rows, ids)
    images, rest = divmod(len(captions), per_image)
    refuse(rest, src / f"{split}_caps.txt", f"a multiple of {per_image} captions", len(captions))
    steps = {field: _step(path, rows[field], images, per_image) for field, path in arrays.items()}
    files = {field: path.name for field, path in arrays.items()} | {
        "captions": f"{split}_caps.txt",
        "image_id": ids_file.name,
        "caption_ids": f"{split}{CAPTION_IDS}",
        **{name: path.name for name in CAPTION_ARRAYS if (path := _array_file(src, split, name)) is not None},
    }
    image_ids = _image_ids(ids_file, ids, images, per_image, split)
    return ScanSplit(
        split,
        tuple(captions),
        image_ids,
        per_image,
        arrays,
        steps,
        files,
        feature_dtype,
        _caption_ids(src / f"{split}{CAPTION_IDS}", len(captions)),
        _caption_arrays(src, split, len(captions)),
        layout,
    )


def _array_file(src: Path, split: str, field: str) -> Path | None:
    """The file of a field: .npy, or for the vectors of frozen models also .safetensors; None without one.

    Raises DataError where there are both.
    """
    plain = src / f"{split}{(ARRAYS | CAPTION_ARRAYS)[field]}"
    if field in COLUMNS and (other := plain.with_suffix(".safetensors")).is_file():
        refuse(plain.is_file(), other, "one file of these vectors", f"{plain.name} beside it; remove one of the two")
        return other
    return plain if plain.is_file() else None


def _caption_ids(path: Path, captions: int) -> tuple[int, ...]:
    """The numbers of the captions, one a line; () without the file."""
    if not path.is_file():
        return ()
    lines = read_lines(path)
    refuse(len(lines) != captions, path, f"{captions} lines, one a caption", len(lines))
    for number, line in enumerate(lines, 1):
        if not line.isdecimal() or len(line) > 18:
            raise DataError(f"{path} line {number}: expected a whole number of at most 18 digits, found {line!r:.80}")
    return tuple(map(int, lines))


def _caption_arrays(src: Path, split: str, captions: int) -> dict[str, Path]:
    """The files with a row a caption, by field. Raises DataError for one of another shape."""
    paths = {name: path for name in CAPTION_ARRAYS if (path := _array_file(src, split, name)) is not None}
    for name, path in paths.items():
        shape, axes = open_array(path).shape, FIELDS[name].shape
        expected = f"[{', '.join([str(captions), *axes[1:]])}], a row a caption"
        refuse(len(shape) != len(axes) or shape[0] != captions, path, expected, list(shape))
    return paths


def _captions_per_image(
    src: Path, split: str, captions: int, arrays: Mapping[str, Path], rows: Mapping[str, int], ids: list[str]
) -> int:
    """Captions an image from counts: of rows, else of different ids, else from how often rows repeat."""
    named = len(ids) if len(ids) != captions else sum(1 for _ in groupby(ids))
    images = min([*rows.values(), *([named] if ids else [])])
    if images == captions and not ids:
        repeats = _repeats(min(arrays.values(), key=lambda path: path.stat().st_size), captions)
        if repeats == 1 and captions % USUAL_CAPTIONS == 0:  # rather ask than take captions for images
            return USUAL_CAPTIONS
        images = captions // repeats
    if images == 0 or captions % images:
        raise DataError(
            f"{src}: split {split!r}: expected as many captions for each image, found {captions} for "
            f"{images} images; give --captions_per_image if the counts mislead"
        )
    return captions // images


def _repeats(path: Path, rows: int) -> int:
    """Number of times that each row is repeated: the common divisor of the first runs of equal rows, and of the last.

    Raises DataError when no run is as short as that, it does not divide `rows`, or there is no end of a run.
    """
    array = open_array(path)

    def run(start: int, step: int) -> int:
        """Rows from `start` on that are equal to the one there, 0 when there are too many."""
        places = range(start, rows if step > 0 else -1, step)
        near = places[: _MOST_CAPTIONS + 1]
        end = len(near) if near == places else 0
        return next((n for n, place in enumerate(near) if not _equal(array[place], array[start])), end)

    runs, start = [run(rows - 1, -1)], 0
    for _ in range(_RUNS):
        runs.append(run(start, 1) if start < rows else 0)
        start += runs[-1]
    divisor = math.gcd(*runs)
    if divisor == 0 and rows % USUAL_CAPTIONS == 0:
        print(f"note: {path}: its rows are all equal; {USUAL_CAPTIONS} captions an image are assumed", file=sys.stderr)
        return USUAL_CAPTIONS
    if divisor not in runs or divisor == 0 or rows % divisor:  # neighbours may be equal, but not all of them
        raise DataError(
            f"{path}: expected the row of each image once for each of its captions, found runs of "
            f"{', '.join(map(str, sorted({*runs} - {0}))) or 'more'} equal rows among {rows}; give --captions_per_image"
        )
    return divisor


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")


def _step(path: Path, rows: int, images: int, per_image: int) -> int:
    """Rows of an array for each image. Raises DataError for a number of rows that does not fit."""
    if rows not in (images, images * per_image):
        raise DataError(
            f"{path}: expected {images} rows (one an image) or {images * per_image} (one a caption) for "
            f"{images * per_image} captions of {per_image} an image, found {rows}"
        )
    if rows > images:
        _check_repeated(path, images, rows // images)
    return rows // images


def _check_repeated(path: Path, images: int, step: int) -> None:
    """Look at the first, middle and last image: are its rows really copies, and those of the next image others?"""
    array = open_array(path)
    for image in sorted({0, images // 2, images - 1}):
        group = np.asarray(array[image * step : (image + 1) * step])
        if not all(np.array_equal(row, group[0]) for row in group[1:]):
            raise DataError(
                f"{path}: expected the row of each image {step} times, one for each caption; found "
                f"that rows {image * step}..{(image + 1) * step - 1} differ (one caption an image: "
                "--captions_per_image=1)"
            )


def _image_ids(path: Path, ids: list[str], images: int, per_image: int, split: str) -> tuple[str, ...]:
    if not ids:
        return tuple(f"{split}_{image}" for image in range(images))
    if len(ids) == images:
        return tuple(ids)
    refuse(len(ids) != images * per_image, path, f"{images} or {images * per_image} lines", len(ids))
    for line, image_id in enumerate(ids):
        first = ids[line - line % per_image]
        if image_id != first:
            raise DataError(f"{path} line {line + 1}: expected {first!r} as in the lines before, found {image_id!r}")
    return tuple(ids[::per_image])


def split_names(src: Path) -> list[str]:
    """The splits in a folder: whatever stands before `_caps.txt`."""
    if not src.is_dir():
        raise DataError(f"{src}: no such folder")
    names = sorted(path.name.removesuffix("_caps.txt") for path in src.glob("*_caps.txt"))
    refuse(not names, src, "at least one SPLIT_caps.txt", f"none; see: shnet data {src}")
    return names


def class_names(path: Path, classes: int) -> list[str]:
    """Names from a categories.txt: the name alone, or index, name, ... by tabs; void may follow the last."""
    names = [line.split("\t")[1] if "\t" in line else line for line in read_lines(path)]
    if len(names) not in (classes, classes + 1):
        raise DataError(f"{path}: expected {classes} classes, perhaps and void, found {len(names)} lines")
    return names[:classes]


def class_metadata(src: Path, splits: Iterable[ScanSplit]) -> dict[str, list[str]]:
    """`class_names` from categories.txt, when there is one and an array says how many classes there are."""
    path = src / "categories.txt"
    sized = [s.arrays[field] for s in splits for field in ("categories", "seg_semantic") if field in s.arrays]
    return {"class_names": class_names(path, open_array(sized[0]).shape[1])} if sized and path.is_file() else {}


def import_scan(
    src: Path,
    name: str,
    out: Path,
    *,
    splits: list[str] | None = None,
    captions_per_image: int | None = None,
    layout: Layout | None = None,
    **writing: Unpack[Writing],
) -> Path:
    """Import a folder and return the version folder of the data set; see `--help` for the arguments."""
    opened = open_splits(src, splits, captions_per_image=captions_per_image, layout=layout, writing=writing)
    return write_splits(opened, src, name, out, f"from_scan of {src.resolve().name}", writing)


def open_splits(
    src: Path,
    splits: list[str] | None,
    *,
    captions_per_image: int | None,
    layout: Layout | None,
    writing: Writing,
    need: str = "an array",
) -> dict[str, ScanSplit]:
    """The splits to import, all of the folder by default; see `open_split`."""
    return {
        split: open_split(
            src,
            split,
            captions_per_image=captions_per_image,
            feature_dtype=writing.get("feature_dtype", "float16"),
            need=need,
            strict=writing.get("on_bad_record", "fail") == "fail",
            layout=layout,
        )
        for split in (splits or split_names(src))
    }


def write_splits(
    splits: Mapping[str, ScanSplit], src: Path, name: str, out: Path, origin: str, writing: Writing
) -> Path:
    """Write the data set of splits of a folder; see `join.write_joined`."""
    captions = sum(len(split.captions) for split in splits.values())
    images = sum(map(len, splits.values()))
    return join.write_joined(
        splits,
        name,
        out,
        origin=origin,
        metadata=class_metadata(src, splits.values()),
        found=Found(captions, images, captions),
        files={split: opened.files for split, opened in splits.items()},
        **writing,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that importers of this layout share."""
    parser.add_argument("--src", type=to_path, required=True, help="folder with SPLIT_caps.txt and the files beside it")
    parser.add_argument("--splits", help="comma-separated; default: every SPLIT_caps.txt in the folder")
    parser.add_argument(
        "--captions_per_image", type=command.at_least(1), help="default: from the counts of rows, ids and captions"
    )
    join.add_writing_arguments(parser, "keep")
    parts.add_arguments(parser)


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The shared flags as keyword arguments of an importer."""
    return {
        "splits": [name.strip() for name in args.splits.split(",")] if args.splits else None,
        "captions_per_image": args.captions_per_image,
        "layout": args.layout,
        **join.writing_options(args, also=("layout",)),
    }


def recognise(place: Place) -> Iterator[Recognised]:
    """A folder with SPLIT_caps.txt, and its arrays or a folder of features by image."""
    splits = [file.name.removesuffix("_caps.txt") for file in place.of("_caps.txt")]
    if not splits:
        return
    names = {file.name for file in place.files}
    fields = [field for field, suffix in ARRAYS.items() if all(f"{split}{suffix}" in names for split in splits)]
    contents, flags = f"SCAN's layout, {', '.join(splits)}", {"src": str(place.path)}
    if fields:

        def read(reading: Reading) -> Iterator[Record]:
            for field in set(MASKS) & set(fields):
                array = open_array(place.path / f"{splits[0]}{ARRAYS[field]}")
                if array.ndim > 2:
                    yield {field: as_units(array[0], f"{splits[0]}{ARRAYS[field]}", None, reading.layout)}

        contents += f", with {', '.join(fields)}"
        yield Recognised(contents, "from_scan", flags, captions=False, read=read, pads={}, pool="")
        return
    for folder in place.folders:
        if all(f"{split}_ids.txt" in names for split in splits) and (files := unit_files(look(folder))):
            field = "regions" if open_units(files[0]).ndim == 2 else "grid"
            yield Recognised(
                f"{contents}, with features by image in {folder.name}",
                "from_npy",
                {**flags, "features": str(folder), "as": field},
                captions=False,
                read=partial(first_units, files, field),
                pads={field: "max_units"},
                pool="pool",
            )
            return
    wanted = "SPLIT_ims.npy or another array of each split; or SPLIT_ids.txt and a folder of ID.npy for from_npy"
    yield Recognised(contents, "from_scan", flags, captions=False, lacks=(wanted,))


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("from_scan", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    print(import_scan(args.src, args.name, args.out, **options(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
