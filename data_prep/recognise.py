"""Says which importer takes what lies in a folder, with the command to paste."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import caption_files, from_clip_retrieval, from_person_search, from_scan
from data_prep.extract import run as extract
from data_prep.files import text_lines
from data_prep.names import EXTENSIONS
from data_prep.parts import PARTS
from data_prep.places import MOST, Place, Recognised, ends, has_keys, look, missing, split_of
from data_prep.schema import DataError, Record, split_flags
from data_prep.sources.boxes import HEIGHTS, MAX_SIDE, WIDTHS
from data_prep.sources.detections import Reading
from shnet_jax.data.records import open_dataset
from shnet_jax.observe.files import describe

RECOGNISERS: tuple[Callable[[Place], Iterable[Recognised]], ...] = (
    from_scan.recognise,
    from_clip_retrieval.recognise,
    from_person_search.recognise,
    *(part.recognise for part in PARTS.values()),
    extract.recognise,
)
_FOLDERS, _ENTRIES = 200, 2 * MOST  # that are looked into, and looked at, in all
_FILES = 200  # of a folder that may hold captions or sizes
_ROUND = 100  # units are padded to a multiple of this, the most regions of adaptive bottom-up attention
_HINT = re.compile(r"--([a-z]\w*)=(\w+)")
_READINGS = {"layout": "layout", "boxes": "form", "sizes": "sizes", "size_order": "size_order", "features_as": "field"}


_NOT_TAKEN = {
    (".zip", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"): "archives are not read: unpack them first",
    (".pkl", ".pickle", ".p"): "pickles are not loaded: write their arrays as ID.npz or HDF5",
    (".mat", ".bin", ".safetensors", ".ckpt"): "not taken: write their arrays as SPLIT_ims.npy, ID.npy or HDF5",
}


@dataclass
class Report:
    """Sources in a folder, and captions, split lists and sizes in it or beside it; notes: faults."""

    place: Place
    sources: list[Recognised] = field(default_factory=list)
    made: list[Path] = field(default_factory=list)
    captions: list[tuple[Path, caption_files.Kind]] = field(default_factory=list)
    lists: list[Path] = field(default_factory=list)
    sizes: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Faults inside of the block become notes."""
        try:
            yield
        except DataError as error:
            self.notes.append(str(error))
        except OSError as error:
            self.notes.append(describe(error))


def recognise(path: Path) -> tuple[str, bool]:
    """Describes the files at a path and the commands that import them; also returns whether anything was recognised.

    Read are names, headers and some records; of folders with very many entries the first (`places.MOST`).
    """
    report = Report(look(path))
    places = list(_walk(report))
    _find_texts(report, places)
    paragraphs = [*map(_data_set, report.made), *(_import(report, source) for source in report.sources)]
    if not paragraphs:
        paragraphs = _alone(report)
    if sum(next(iter(source.flags)) in PARTS for source in report.sources) > 1:
        paragraphs.append(
            "Fields of the same images go into one data set: give one command the flags of the others too."
        )
    notes = ["\n".join(f"not read: {note}" for note in report.notes)] if report.notes else []
    known = bool(report.made or report.sources or report.captions)
    return "\n\n".join([f"{path}: {report.place.kinds()}", *paragraphs, *notes]), known


def _walk(report: Report) -> Iterator[Place]:
    """The folder and those in it, outer ones first, but not inside of what is imported as a whole."""
    queue, claimed, seen = [report.place.path], set[Path](), 0
    for number, path in enumerate(queue):
        if path in claimed:
            continue
        if seen > _ENTRIES or number == _FOLDERS:
            report.notes.append(f"{len(queue) - number} more folders, such as {path}")
            return
        place = report.place
        if number:
            with report.noting():
                place = look(path)
            if place.path != path:
                continue
        seen += len(place.files) + len(place.folders)
        yield place
        if any(file.name == "dataset_info.json" for file in place.files):
            report.made.append(path)
            continue
        for recogniser in RECOGNISERS:
            with report.noting():
                for source in recogniser(place):
                    report.sources.append(source)
                    claimed.update(source.paths)
        if path not in claimed:
            queue += place.folders


def _find_texts(report: Report, places: Iterable[Place]) -> None:
    """Note captions of the folder itself, else of those in it, else beside what it has; sizes and lists of all."""
    taken = {path for source in report.sources for path in source.paths}
    inner = [place for place in places if place is not report.place]
    beside = [look(report.place.path.resolve().parent)] if report.sources else []
    for group in ([report.place], inner, beside):
        captions = []
        for file in (file for place in group for file in _texts(place) if file not in taken):
            with report.noting():
                if kind := caption_files.recognise(file):
                    captions.append((file, kind))
                elif _lists_images(file):
                    report.lists.append(file)
                if _has_sizes(file):
                    report.sizes.append(file)
        report.captions = report.captions or captions


def _texts(place: Place) -> list[Path]:
    """Files that may hold captions, lists or sizes; a folder with a .txt or .json of each image has too many."""
    return sorted(place.of(*caption_files.SUFFIXES), key=lambda file: file.suffix == ".txt")[:_FILES]


def _lists_images(path: Path) -> bool:
    """Whether a text file named after a split has the name of an image a line."""
    if path.suffix != ".txt" or not split_of(path):
        return False
    first = next(text_lines(path), "").strip()
    return first.isdecimal() or (len(first.split()) == 1 and Path(first).suffix.lower() in EXTENSIONS)


def _has_sizes(path: Path) -> bool:
    """Whether --sizes may read a file."""
    if path.suffix == ".json":
        text = ends(path)
        sizes = has_keys(text, "width", "height") or "size" in path.stem
        return sizes and not any(has_keys(text, key) for key in ("segments_info", "object_id", "region_id"))
    if path.suffix in (".csv", ".tsv"):
        words = set(re.split(r"\W", ends(path).partition("\n")[0].lower()))
        return path.name.endswith(".hw.tsv") or bool(
            words & set(WIDTHS) and words & set(HEIGHTS) and "boxes" not in words
        )
    return False


# ------------------------------------------------------------------------------------------------------------- commands


def _import(report: Report, source: Recognised) -> str:
    """The command that imports a layout, with what is needed before."""
    flags, notes, lacks = dict(source.flags), list[str](), list(source.lacks)
    if source.read and not missing(source.extra):
        options, notes = _options(source, report.sizes)
        flags |= options
    if source.captions:
        given, note = _captions(report)
        flags |= given
        (notes if "split_lists" in given or report.captions else lacks).extend(note)
    name = re.sub(r"\W+", "_", report.place.path.resolve().stem, flags=re.ASCII).strip("_")
    flags |= {"name": name if name[:1].isalpha() else f"set_{name}", "out": "data_sets"}
    lines = [source.what]
    lines += [f"pip install -e '.[{source.extra}]'"] if missing(source.extra) else []
    lines += [_line("data", source.module, *(f"--{flag}={value}" for flag, value in flags.items()))]
    return "\n".join([*lines, *(f"needed: {lack}" for lack in lacks), *(f"note: {note}" for note in notes)])


def _line(*words: str) -> str:
    return "  " + shlex.join(["shnet", *words])


def _options(source: Recognised, sizes: Sequence[Path]) -> tuple[dict[str, str], list[str]]:
    """Flags that the first images ask for, and why: those that the errors of the reader name, and of padding."""
    options: dict[str, str] = {}
    why: dict[str, str] = {}
    tried: set[tuple[str, str]] = set()
    while True:
        records, error = _records(source, options)
        hints = _HINT.findall(str(error or ""))
        if "[D, units]" in str(error):
            hints.reverse()  # the features say themselves that the channels are first
        hints = [(flag, str(sizes[0]) if flag == "sizes" and sizes else value) for flag, value in hints]
        hints = [hint for hint in hints if hint[0] in _READINGS and hint not in tried and hint[1] != "FILE"]
        if not hints:
            break
        flag, value = hints[0]
        tried.add(hints[0])
        options[flag], why[flag] = value, f"--{flag}={value}, as otherwise: {error}"
    if error is not None and not records:
        return {}, [f"the first image cannot be read: {error}"]
    for name, flag in source.pads.items():
        lengths = sorted({len(record[name]) for record in records if name in record})
        if len(lengths) > 1:
            pool = name == "grid" and source.pool and _records(source, options | {source.pool: "7"})[1] is None
            flag = source.pool if pool else flag
            options[flag] = "7" if pool else str(-(-lengths[-1] // _ROUND) * _ROUND)
            why[flag] = (
                f"--{flag}={options[flag]}, as images have {lengths[0]} to {lengths[-1]} units, or more further on"
            )
    return options, list(why.values())


def _records(source: Recognised, options: Mapping[str, str]) -> tuple[list[Record], DataError | None]:
    """The first records, and what ended them."""
    chosen: dict[str, Any] = {name: options[flag] for flag, name in _READINGS.items() if flag in options}
    if "sizes" in chosen:
        chosen["sizes"] = _AnySize()
    records: list[Record] = []
    assert source.read is not None
    try:
        for record in source.read(Reading(**chosen, pool=7 if source.pool and source.pool in options else None)):
            records.append(record)
    except DataError as error:
        return records, error
    return records, None


class _AnySize:
    """Substitute for a file of sizes, which may be large: every box lies inside."""

    def find(self, image_id: str) -> tuple[int, int]:
        return MAX_SIDE, MAX_SIDE


def _captions(report: Report) -> tuple[dict[str, str], list[str]]:
    """The flags of captions, and what is to be known of them."""
    if not report.captions:
        return {"captions": "CAPTIONS"}, ["captions of the images in one of the formats that docs/data.md lists"]
    with_splits = [path for path, kind in report.captions if kind.says_split]
    named: dict[str, Path] = {}
    for path, _ in report.captions:
        named.setdefault(split_of(path), path)
    flags: dict[str, str] = {}
    notes: list[str] = []
    splits = {split: path for split, path in named.items() if split}
    if with_splits:
        flags["captions"] = str(with_splits[0])
    elif splits:
        flags["captions"] = _named(splits)
    elif report.lists:
        flags = {"captions": str(named[""]), "split_lists": _named({split_of(path): path for path in report.lists})}
    else:
        flags["captions"] = _named({"train": named[""]})
        notes.append(f"{named['']} says no splits: all images become train; --split_lists=SPLIT=FILE,... parts them")
    others = [path.name for path, _ in report.captions if str(path) not in flags["captions"]]
    return flags, [*notes, *([f"other captions there: {', '.join(others)}"] if others else [])]


def _named(splits: Mapping[str, Path]) -> str:
    return ",".join(f"{split}={path}" for split, path in splits.items())


def _data_set(path: Path) -> str:
    """Commands that check a data set of this project and train on it."""
    fields = {feature.name for feature in path.glob("features.json") if has_keys(ends(feature), "seg_semantic")}
    name = path.resolve().parent.name
    try:
        splits = [*open_dataset(path).splits]
    except (ValueError, OSError):  # `verify` says more
        splits = []
    train = ["train", f"--config={'base' if fields else 'vse'}"]
    return "\n".join(
        [
            f"{path}: a data set of this project, to be checked and trained on",
            _line("data", "verify", str(path)),
            _line(
                *train,
                f"--workdir=runs/{name}",
                f"--config.data.dir={path}",
                *(flag for flag in split_flags(splits) if flag.startswith("--config.data")),
                "--config.text.weights=BERT_FOLDER",
            ),
        ]
    )


def _alone(report: Report) -> list[str]:
    """Describes the files that are missing where no importer can read anything."""
    lines = [f"{path}: {kind.what}{'' if kind.says_split else ', without splits'}" for path, kind in report.captions]
    there = {file.suffix.lower() for file in report.place.files}
    lines += [
        f"{', '.join(sorted(there & set(kinds)))}: {why}" for kinds, why in _NOT_TAKEN.items() if there & set(kinds)
    ]
    contents = (
        "features or photographs of these images" if report.captions else "features, or photographs, and captions"
    )
    return ["\n".join([*lines, f"needed: {contents}, in a layout of those that `shnet data` lists"])]
