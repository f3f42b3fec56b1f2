"""Imports what clip-retrieval's `inference` writes: vectors of images and captions by CLIP, joined by row.

    shnet data from_clip_retrieval --src=DIR --split=train --name=NAME --out=DATA_DIR

DIR/img_emb/img_emb_K.npy, DIR/text_emb/text_emb_K.npy (may be absent) and DIR/metadata/metadata_K.parquet with the
columns image_path and caption, perhaps split. Rows of one image_path become the captions of one image.

It needs: pip install -e '.[parquet]'
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from data_prep import captions, command, join, parquet, parts, rows
from data_prep.bad_records import Bad, record_or_bad
from data_prep.captions import Captioned
from data_prep.files import open_array
from data_prep.join import Writing
from data_prep.places import Place, Recognised, missing, split_of
from data_prep.rows import Row
from data_prep.schema import DataError, Record, as_field, is_text, refuse
from shnet_jax.paths import to_path

IMAGES, TEXTS, METADATA = "img_emb", "text_emb", "metadata"
SAME = 0.999
"""Least cosine of the vectors of one image in several rows, which batches of float16 change a little."""


@dataclass(frozen=True)
class Shard:
    """The files of one number K. texts: None without vectors of captions."""

    images: Path
    texts: Path | None
    metadata: Path


@dataclass(frozen=True)
class Shards:
    """All files of a folder. starts: number of the first row of each, and that of all rows."""

    files: Sequence[Shard]
    starts: Sequence[int]

    def rows(self, split: str | None) -> Iterator[Row]:
        """Rows of the metadata; the number of a row serves as the number of its caption.

        split: that of rows that name none. Raises DataError for a row without a name or with other than one caption.
        """
        for shard, start in zip(self.files, self.starts, strict=False):
            with parquet.open_parquet(shard.metadata) as file:
                known = rows.needed(tuple(file.schema_arrow.names), shard.metadata, rows.KEYS)
            image = str(known.image)
            chosen = dict.fromkeys(name for name in (image, *known.captions[:1], known.split) if name)
            for number, values in enumerate(parquet.rows(shard.metadata, list(chosen))):
                where, file = f"{shard.metadata} row {number}", values.pop(image)
                file = str(file) if type(file) is int else file
                if not is_text(file):
                    raise DataError(f"{where}: {image!r}: expected the name of an image, found {file!r:.200}")
                row = rows.parse(values, where, file)
                if len(row.captions) > 1:
                    raise DataError(f"{where}: {known.captions[0]!r}: expected one caption, found {len(row.captions)}")
                yield row._replace(numbers=(start + number,) * len(row.captions), split=row.split or split)

    def vector(self, kind: str, row: int) -> np.ndarray:
        """The vector in a row of "images" or "texts", [E] float16 or float32 as stored, copied out of its file."""
        shard = bisect_right(self.starts, row) - 1
        path = getattr(self.files[shard], kind)
        vector = np.array(open_array(path)[row - self.starts[shard]])
        field = "image_embedding" if kind == "images" else "caption_embeddings"
        return as_field(field, vector, where=f"row {row - self.starts[shard]}", file=path.name)


def open_shards(src: Path) -> Shards:
    """The files of a folder by the numbers in their names. Raises DataError where they or their rows do not fit."""
    numbered = {kind: _numbered(src / kind, suffix) for kind, suffix in _SUFFIXES.items()}
    for kind in (IMAGES, METADATA):
        refuse(not numbered[kind], src / kind, f"{kind}_0{_SUFFIXES[kind]}, ...", "none")
    files, starts = [], [0]
    for number in sorted(set().union(*numbered.values())):
        paths = {kind: numbered[kind].get(number) for kind in numbered}
        images, metadata = paths[IMAGES], paths[METADATA]
        missing = [kind for kind, path in paths.items() if path is None and (kind != TEXTS or numbered[TEXTS])]
        if missing or images is None or metadata is None:
            raise DataError(
                f"{src / missing[0]}: expected {missing[0]}_{number}{_SUFFIXES[missing[0]]} as in the other folders, "
                "found none"
            )
        with parquet.open_parquet(metadata) as file:
            counts = {metadata: file.metadata.num_rows}
        for path in (images, paths[TEXTS]):
            if path is not None:
                shape = open_array(path).shape
                refuse(len(shape) != 2, path, "[rows, E]", list(shape))
                counts[path] = shape[0]
        if len(set(counts.values())) > 1:
            each = ", ".join(f"{count} in {path.name}" for path, count in counts.items())
            raise DataError(f"{src}: number {number}: expected as many rows in each file, found {each}")
        files.append(Shard(images, paths[TEXTS], metadata))
        starts.append(starts[-1] + counts[metadata])
    return Shards(files, starts)


_SUFFIXES = {IMAGES: ".npy", TEXTS: ".npy", METADATA: ".parquet"}


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """The files of a folder by their numbers, which may be padded with zeros."""
    numbered: dict[int, Path] = {}
    for path in sorted(folder.glob(f"*{suffix}")):
        match = re.fullmatch(rf"{folder.name}_([0-9]+)", path.stem)
        if match is None:
            raise DataError(f"{path}: expected {folder.name}_NUMBER{suffix}, found this name")
        if numbered.setdefault(int(match[1]), path) != path:
            raise DataError(f"{path}: expected one file of this number, found {numbered[int(match[1])].name} too")
    return numbered


@dataclass(frozen=True)
class Images:
    """The records of a split, read when they are asked for."""

    items: Sequence[Captioned]
    shards: Shards

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Record | Bad]:
        for item in self.items:
            yield record_or_bad(item.image_id, self._record, item)

    def _record(self, item: Captioned) -> Record:
        vectors = [self.shards.vector("images", row) for row in item.caption_ids]
        first = vectors[0]
        for row, vector in zip(item.caption_ids[1:], vectors[1:], strict=True):
            one, other = vector.astype(np.float32), first.astype(np.float32)
            if one @ other < SAME * np.linalg.norm(one) * np.linalg.norm(other):
                raise DataError(
                    f"image {item.file!r}: expected one vector in all of its rows, found others in rows "
                    f"{item.caption_ids[0]} and {row} of all"
                )
        record: Record = {
            "image_id": item.image_id,
            "captions": list(item.captions),
            "caption_ids": np.array(item.caption_ids, np.int64),
            "image_embedding": first,
        }
        if self.shards.files[0].texts is not None:
            record["caption_embeddings"] = np.stack([self.shards.vector("texts", row) for row in item.caption_ids])
        return record


def recognise(place: Place) -> Iterator[Recognised]:
    """A folder with img_emb and metadata."""
    folders = [folder.name for folder in place.folders if folder.name in _SUFFIXES]
    if not {IMAGES, METADATA} <= set(folders):
        return
    flags = {"src": str(place.path)}
    if not missing("parquet"):
        shards = open_shards(place.path)
        with parquet.open_parquet(shards.files[0].metadata) as file:
            says_split = rows.SPLIT in file.schema_arrow.names
        flags |= {} if says_split else {"split": split_of(place.path) or "train"}
    contents = f"clip-retrieval's {', '.join(folders)}"
    yield Recognised(contents, "from_clip_retrieval", flags, captions=False, extra="parquet")


def import_clip_retrieval(
    src: Path,
    name: str,
    out: Path,
    *,
    split: str | None = None,
    split_lists: str | None = None,
    **writing: Unpack[Writing],
) -> Path:
    """Import a folder and return the version folder of the data set; see `--help` for the arguments."""
    shards = open_shards(src)
    gathered = captions.gather(shards.rows(split), split_lists, src)
    places = {"image_embedding": str(src / IMAGES), "caption_embeddings": str(src / TEXTS)}
    return join.write_joined(
        {split: Images(items, shards) for split, items in gathered.items()},
        name,
        out,
        origin=f"from_clip_retrieval of {src.resolve().name}",
        found=gathered.found,
        files=dict.fromkeys(gathered, places | {"captions": str(src / METADATA)}),
        **writing,
    )


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("from_clip_retrieval", __doc__)
    parser.add_argument("--src", type=to_path, required=True, help="folder with img_emb, text_emb and metadata")
    parser.add_argument("--split", help="of rows whose metadata have no column `split`")
    parser.add_argument("--split_lists", help="SPLIT=FILE,...: image names a line that put images into splits")
    join.add_writing_arguments(parser)
    parts.add_arguments(parser)
    args = parser.parse_args(argv)
    chosen = {"split": args.split, "split_lists": args.split_lists}
    print(import_clip_retrieval(args.src, args.name, args.out, **chosen, **join.writing_options(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
