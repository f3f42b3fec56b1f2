"""Imports CUHK-PEDES, ICFG-PEDES or RSTPReid: an annotation file and a folder of pictures, as their authors send them.

    shnet data from_person_search --annotations=reid_raw.json --images=imgs --name=cuhk_pedes --out=DATA_DIR

Pictures are resized and kept as they are in the record; no picture or caption is part of this project.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep import command
from data_prep.bad_records import Bad, Policy, record_or_bad
from data_prep.builder import write_dataset
from data_prep.counts import Found
from data_prep.files import inside, read_json
from data_prep.places import Place, Recognised, ends, first_object
from data_prep.rows import split_name
from data_prep.schema import DataError, Record, refuse
from shnet_jax import untrusted
from shnet_jax.paths import to_path

SPLITS = ("train", "val", "test")
PATHS = ("file_path", "img_path")  # CUHK-PEDES and ICFG-PEDES; RSTPReid
SIZE = (384, 128)  # height and width of a picture (IRRA)


@dataclass(frozen=True)
class Annotation:
    """One picture: where it lies in the folder, who it shows, what is said of it."""

    path: str
    person: int
    captions: tuple[str, ...]


Annotations = dict[str, list[Annotation | Bad]]
"""Annotations of each split, with a Bad for each row that has faults."""


def read_annotations(path: Path, *, strict: bool = True) -> Annotations:
    """The pictures of each split, in the order of the file: a JSON list of objects with

      split     "train" | "val" | "test"
      id        whole number >= 0, the person
      captions  list of strings
      file_path (CUHK-PEDES, ICFG-PEDES) or img_path (RSTPReid)

    Other fields (processed_tokens) are left out. Raises DataError naming file, row and field, and for a person in two
    splits; without `strict`, a row whose split is known becomes a Bad instead.
    """
    rows = read_json(path)
    refuse(not isinstance(rows, list) or not rows, path, "a list of pictures", type(rows).__name__)
    annotations: Annotations = {}
    split_of: dict[int, str] = {}
    for number, row in enumerate(rows):
        where = f"{path} row {number}"
        try:
            split, annotation = _annotation(where, row)
        except DataError as error:
            split = split_name(str(row.get("split"))) if isinstance(row, dict) else ""
            if strict or split not in SPLITS:
                raise
            place = str(next((row[name] for name in PATHS if name in row), number))
            annotations.setdefault(split, []).append(Bad(place, DataError(str(error), file=path.name)))
            continue
        if split_of.setdefault(annotation.person, split) != split:
            raise DataError(
                f"{where}: field 'id': person {annotation.person} is in the splits {split_of[annotation.person]} and "
                f"{split}; expected one"
            )
        annotations.setdefault(split, []).append(annotation)
    return {split: annotations[split] for split in SPLITS if split in annotations}


def _annotation(where: str, row: Any) -> tuple[str, Annotation]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}")
    field = next((name for name in PATHS if name in row), None)
    if field is None:
        raise DataError(f"{where}: expected a field {' or '.join(PATHS)}, found {', '.join(row)}")
    values: list[Any] = [row.get(name) for name in ("split", "id", "captions", field)]
    split, person, captions, place = values
    split = split_name(split) if isinstance(split, str) else split
    is_number = type(person) is int and 0 <= person < 2**63
    is_list = isinstance(captions, list) and captions and all(isinstance(c, str) and c.strip() for c in captions)
    is_inside = isinstance(place, str) and not Path(place).is_absolute() and ".." not in Path(place).parts
    for good, name, expected, value in (
        (split in SPLITS, "split", f"one of {', '.join(SPLITS)}", f"{split!r}"),
        (is_number, "id", "a whole number >= 0", f"{person!r}"),
        (is_list, "captions", "a list of sentences", f"{captions!r:.80}"),
        (is_inside, field, "a path inside the folder of pictures", f"{place!r}"),
    ):
        refuse(not good, f"{where}: field {name!r}", expected, value)
    return split, Annotation(place, person, tuple(" ".join(c.split()) for c in captions))


def hold_out(splits: Annotations, persons: int) -> Annotations:
    """The pictures of the last `persons` of the training split, by number, become the split val.

    For sets without one (ICFG-PEDES). Raises DataError when there is a val, or when the training split has no more.
    """
    if not persons:
        return splits
    people = sorted({a.person for a in _good(splits.get("train", []))})
    if "val" in splits or len(people) <= persons:
        raise DataError(
            f"--hold_out={persons}: expected no split val and more than {persons} persons in train, found splits "
            f"{', '.join(splits)} and {len(people)} persons"
        )
    held = set(people[-persons:])
    return splits | {
        "train": [a for a in splits["train"] if isinstance(a, Bad) or a.person not in held],
        "val": [a for a in _good(splits["train"]) if a.person in held],
    }


def _good(annotations: Iterable[Annotation | Bad]) -> list[Annotation]:
    return [annotation for annotation in annotations if isinstance(annotation, Annotation)]


def read_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The picture of a file as uint8 [height, width, 3], resized bilinearly. Raises DataError when it is none."""
    try:
        picture = untrusted.read_picture(path)
    except FileNotFoundError:
        raise DataError(f"{path}: expected a picture, found no such file", file=path.name, field="image") from None
    except ValueError as error:
        raise DataError(str(error), file=path.name, field="image") from None
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR), np.uint8)


@dataclass(frozen=True)
class Pictures:
    """The records of a split."""

    annotations: Sequence[Annotation | Bad]
    folder: Path
    size: tuple[int, int]
    first_caption: int

    def __len__(self) -> int:
        return len(self.annotations)

    def __iter__(self) -> Iterator[Record | Bad]:
        caption = self.first_caption
        for annotation in self.annotations:
            if isinstance(annotation, Bad):
                yield annotation
                continue
            yield record_or_bad(annotation.path, self._record, annotation, caption)
            caption += len(annotation.captions)

    def _record(self, annotation: Annotation, caption: int) -> Record:
        """The record of a picture whose first caption has the number `caption`."""
        return {
            "image_id": annotation.path,
            "captions": list(annotation.captions),
            "caption_ids": np.arange(caption, caption + len(annotation.captions), dtype=np.int64),
            "identity": np.int64(annotation.person),
            "image": read_picture(inside(self.folder, annotation.path), self.size),
        }


def import_person_search(
    annotations: Path,
    images: Path,
    name: str,
    out: Path,
    *,
    size: tuple[int, int] = SIZE,
    held_out: int = 0,
    source: str = "",
    overwrite: bool = False,
    on_bad_record: Policy = "fail",
) -> Path:
    """Import a set and return the version folder; see `--help` for the arguments."""
    if not images.is_dir():
        raise DataError(f"{images}: no such folder of pictures")
    splits = hold_out(read_annotations(annotations, strict=on_bad_record == "fail"), held_out)
    records, caption = {}, 0
    for split, pictures in splits.items():
        records[split] = Pictures(pictures, images, size, caption)
        caption += sum(len(a.captions) for a in _good(pictures))
    metadata = {"source": source or f"data_prep.from_person_search of {annotations.name}", "held_out": held_out}
    files = {split: {"captions": annotations.name, "identity": annotations.name} for split in splits}
    images_found = sum(map(len, records.values()))
    return write_dataset(
        out,
        name,
        records,
        metadata,
        files=files,
        total=images_found,
        found=Found(images_found, images_found, caption),
        overwrite=overwrite,
        on_bad_record=on_bad_record,
    )


def _size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 384x128, found {text!r}")
    return int(parts[0]), int(parts[1])


def recognise(place: Place) -> Iterator[Recognised]:
    """The annotations of a person search, and the folder of its pictures."""
    for path in place.of(".json"):
        first = first_object(ends(path))
        name = next((first[field] for field in PATHS if field in first), None)
        if not isinstance(name, str) or not {"id", "captions", "split"} <= set(first):
            continue
        folders = (*place.folders, path.parent, *(folder for folder in path.parent.iterdir() if folder.is_dir()))
        folder = next((folder for folder in folders if (folder / name).is_file()), None)
        yield Recognised(
            f"annotations of a person search in {path.name}",
            "from_person_search",
            {"annotations": str(path)} | ({"images": str(folder)} if folder else {}),
            captions=False,
            lacks=() if folder else (f"the folder of its pictures, with {name}: --images=DIR",),
        )


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("from_person_search", __doc__)
    parser.add_argument("--annotations", type=to_path, required=True, help="reid_raw.json, ICFG-PEDES.json, ...")
    parser.add_argument("--images", type=to_path, required=True, help="folder that the paths in it begin in")
    parser.add_argument("--size", type=_size, default=SIZE, help="HEIGHTxWIDTH of the pictures, 384x128 unless told")
    parser.add_argument(
        "--hold_out", type=command.at_least(0), default=0, help="training persons that become the split val"
    )
    parser.add_argument("--source", default="", help="how the data was made, kept in the metadata")
    command.add_writing_arguments(parser)
    args = parser.parse_args(argv)
    print(
        import_person_search(
            args.annotations,
            args.images,
            args.name,
            args.out,
            size=args.size,
            held_out=args.hold_out,
            source=args.source,
            overwrite=args.overwrite,
            on_bad_record=args.on_bad_record,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
