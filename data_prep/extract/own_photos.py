"""Data sets of somebody's own photographs, for `shnet photos`: all of them to search, captioned ones to train on.

DATA/photos     split photos: every photograph in and below the folder, its path as image_id, without captions
DATA/captioned  splits train, val and test of those with captions: the caption file's own splits, or, where it has none,
                by the SHA-256 of the path: the first tenth is test, the second val, the rest train
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data_prep import captions
from data_prep.builder import VERSION, write_dataset
from data_prep.captions import Captioned, Splits
from data_prep.counts import Found
from data_prep.extract import run
from data_prep.extract.images import Folder, files_below
from data_prep.rows import Row
from data_prep.schema import DataError, Record, is_text
from shnet_jax.data.records import open_dataset
from shnet_jax.observe.files import sole_writer
from shnet_jax.paths import to_path

ALL, CAPTIONED = "photos", "captioned"
"""Names of the two data sets; ALL is also the split of the first."""
LEAST = 50
"""Captioned photographs that splits are made of."""
SPLITS = ("train", "val", "test")
RULE = (
    "Splits are those of the caption file; where it names none, photographs are ordered by the SHA-256 of their path: "
    "the first tenth is test, the second val, the rest train."
)


def extract(
    folder: Path,
    model: Path,
    out: Path,
    caption_files: str = "",
    *,
    device: str = "",
    batch_size: int = 8,
    overwrite: bool = False,
    trained: Path | None = None,
) -> tuple[Path, Path | None]:
    """Writes the data sets into `out` unless they are there; returns the folders of ALL and, with captions, CAPTIONED.

    A stopped extraction goes on; photographs that cannot be read are left out and named. Other captions replace
    CAPTIONED by one with the vectors of ALL: nothing is extracted again.

    Args:
      folder: of photographs.
      model: folder of the dual encoder.
      out: folder of data sets.
      caption_files: as the flag --captions of the importers; "": no captions.
      device: of PyTorch, see `data_prep.extract`. batch_size: photographs at once.
      overwrite: make the data sets again.
      trained: folder of what was trained on CAPTIONED, which other captions then do not replace.

    Raises:
      DataError: no photographs, captions of no photograph or of too few; see also `data_prep.extract`.
      FileExistsError: ALL was made of other photographs or with another model; CAPTIONED of other captions, and
        something was trained on it.
    """
    files = files_below(folder)
    for file in files:
        if not is_text(file):
            raise DataError(f"{folder}: expected names in UTF-8, found {file!r:.200}; rename this photograph")
    groups = _captions(folder, files, caption_files) if caption_files else Splits()
    source = f"photographs of {folder.resolve()} by {model} ({_digest(files)})"
    of_captions = f"captions ({_captions_digest(groups)}) of {source}"
    target, captioned = out / ALL / VERSION, out / CAPTIONED / VERSION
    made = not overwrite and _made(target, source)
    same_captions = made and captioned.exists() and open_dataset(captioned).metadata.get("source") == of_captions
    if made and groups and trained is not None and not same_captions:
        raise FileExistsError(
            f"{trained} was trained on other captions than {caption_files}; remove that folder, or choose another --out"
        )
    if not made:
        everything = Splits({ALL: [Captioned(file, file, ()) for file in files]})
        everything.found = Found(len(files), len(files), 0)
        args = _arguments(folder, model, out, source, device, batch_size, overwrite)
        work = run.prepare(args, everything)
        with sole_writer(work.folder):
            run.extract_here(work, args)
        run.build(work, args)
    if not groups:
        return target, None
    if not same_captions:
        _write_captioned(out, target, groups, of_captions)
    return target, captioned


def _made(target: Path, source: str) -> bool:
    """Whether the data set ALL is there already. Raises FileExistsError when it was made of something else."""
    if not target.exists():
        return False
    if (stored_source := open_dataset(target).metadata.get("source")) != source:
        raise FileExistsError(
            f"{target} was made otherwise: expected {source}, found {stored_source}; --overwrite makes it again, or "
            "choose another --out"
        )
    print(f"{target}: made of these photographs before", file=sys.stderr)
    return True


def _arguments(
    folder: Path, model: Path, out: Path, source: str, device: str, batch_size: int, overwrite: bool
) -> argparse.Namespace:
    """The arguments of `data_prep.extract` that make the set ALL."""
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    flags = [f"--images={folder}", f"--backbone={model}", f"--out={out}", f"--name={ALL}", "--tokens=none"]
    flags += [f"--source={source}", f"--device={device}", f"--batch_size={batch_size}"]
    return parser.parse_args(flags + ["--overwrite"] * overwrite)


def _digest(lines: Iterable[str]) -> str:
    """A short hash of lines: the names of the photographs, or their captions."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _captions_digest(groups: Splits) -> str:
    """A short hash of captions and their splits."""
    items = ((split, item) for split, group in groups.items() for item in group)
    return _digest(f"{split}\t{item.file}\t{item.captions}\t{item.caption_ids}" for split, item in items)


def _captions(folder: Path, files: Sequence[str], caption_files: str) -> Splits:
    """The photographs with captions by split, named as in `files`."""
    photographs, names, absent = Folder(folder), set(files), []
    rows: list[Row] = []
    for row in captions.file_rows(caption_files):
        file = photographs.find(row.file).relative_to(to_path(folder)).as_posix()
        if file in names:
            rows.append(row._replace(file=file))
        else:
            absent.append(row.file)
    if absent:
        print(f"note: {len({*absent})} captioned images are not in {folder}, such as {absent[0]!r}", file=sys.stderr)
    captioned = {row.file for row in rows if any(row.captions)}
    if len(captioned) < LEAST:
        raise DataError(
            f"{caption_files}: expected captions of at least {LEAST} photographs of {folder}, found {len(captioned)}; "
            f"its image column has paths below that folder, such as {max(files, key=lambda file: file.count('/'))!r}"
        )
    if not any(row.split for row in rows):
        split_of = _split_by_hash(captioned)
        rows = [row._replace(split=split_of.get(row.file)) for row in rows]
    groups = captions.gather(rows, None, caption_files)
    if missing := [split for split in SPLITS if split not in groups]:
        raise DataError(
            f"{caption_files}: expected the splits {', '.join(SPLITS)} or none at all, found no {', '.join(missing)}"
        )
    of_all = Splits({split: [replace(item, image_id=item.file) for item in groups[split]] for split in SPLITS})
    of_all.found = groups.found
    return of_all


def _split_by_hash(files: set[str]) -> dict[str, str]:
    """The split of each file: the first tenth by SHA-256 is test, the second val, the rest train."""
    order = sorted(files, key=lambda file: hashlib.sha256(file.encode()).digest())
    tenth = max(1, len(order) // 10)
    return {file: SPLITS[max(0, 2 - place // tenth)] for place, file in enumerate(order)}


def _write_captioned(out: Path, source_set: Path, groups: Splits, source: str) -> None:
    """Writes CAPTIONED with the vectors of ALL; photographs that were left out there are left out here."""
    everything = open_dataset(source_set)
    rows = {name: row for row, name in enumerate(everything.image_ids(ALL).tolist())}
    vectors = everything.open_split(ALL, ["image_embedding"])

    def records(items: Sequence[Captioned]) -> Iterator[Record]:
        for item in items:
            if item.file in rows:
                record = item.record()
                assert isinstance(record, dict)  # `gather` was strict
                yield record | {"image_embedding": vectors[rows[item.file]]["image_embedding"]}

    splits = {split: records(items) for split, items in groups.items()}
    write_dataset(out, CAPTIONED, splits, {"source": source}, total=groups.found.records, overwrite=True)
