"""The table of sources that any import joins by image id, and their flags: one row a format."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from data_prep import command
from data_prep.places import Place, Recognised, listed, missing
from data_prep.schema import DataError
from data_prep.sources import bottom_up, lmdb_files, npz, panoptic, torch_dict, units, vinvl
from data_prep.sources.base import Source
from data_prep.sources.bottom_up import BottomUp
from data_prep.sources.boxes import FORMS, Sizes
from data_prep.sources.detections import Reading
from data_prep.sources.lmdb_files import Lmdb
from data_prep.sources.npz import NpzFiles
from data_prep.sources.panoptic import Panoptic, Upsnet
from data_prep.sources.torch_dict import TorchDict
from data_prep.sources.units import LAYOUTS, UnitFiles
from data_prep.sources.vinvl import GEOMETRIES, Vinvl
from shnet_jax.data.schema import MASKS
from shnet_jax.paths import to_path, to_paths


class Part(NamedTuple):
    """A format that is joined by image id; its flag is the key of PARTS.

    help: layout and fields, for --help.
    open: makes the source from all flags; raises DataError when files are missing.
    recognise: finds it in a folder, for `shnet data FOLDER`.
    options: names in OPTIONS of the flags that this format takes.
    """

    help: str
    open: Callable[[argparse.Namespace], Source]
    recognise: Callable[[Place], Iterable[Recognised]]
    options: tuple[str, ...] = ()


def _bottom_up(args: argparse.Namespace) -> Source:
    return BottomUp(to_paths(args.bottom_up), args.max_regions, args.boxes or "pixels")


def _grids(args: argparse.Namespace) -> Source:
    return UnitFiles(to_path(args.grids), "grid", args.max_cells, args.pool_grids, args.layout)


def _reading(args: argparse.Namespace) -> Reading:
    return Reading(
        field=args.features_as,
        layout=args.layout,
        pool=args.pool_grids,
        form=args.boxes or "pixels",
        sizes=Sizes(args.sizes) if args.sizes else None,
        size_order=args.size_order or "hw",
        max_regions=args.max_regions,
        max_cells=args.max_cells,
    )


def _npz(args: argparse.Namespace) -> Source:
    return NpzFiles(to_path(args.npz), _reading(args))


def _hdf5(args: argparse.Namespace) -> Source:
    try:
        from data_prep.sources.hdf5 import Hdf5Features
    except ModuleNotFoundError as error:
        raise DataError(f"reading HDF5 needs {error.name}: pip install -e '.[hdf5]'") from None
    return Hdf5Features(to_paths(args.hdf5), to_paths(args.hdf5_ids) if args.hdf5_ids else [], _reading(args))


def _recognise_hdf5(place: Place) -> Iterator[Recognised]:
    files = place.of(".hdf5", ".h5", ".hdf")
    if files and missing("hdf5"):
        yield Recognised("HDF5", "from_hdf5", {"hdf5": listed(files)}, extra="hdf5")
    elif files:
        from data_prep.sources import hdf5

        yield from hdf5.recognise(place)


def _recognise_embeddings(place: Place) -> Iterator[Recognised]:
    folders = [
        folder
        for folder in (place.path, *place.folders)
        if all((folder / name).is_file() for name in ("embeddings.json", "ids.json"))
    ]
    if folders:
        yield Recognised("vectors of --mode=embed", "from_embeddings", {"embeddings": listed(folders)})


def _panoptic(args: argparse.Namespace) -> Source:
    path = to_path(args.panoptic)
    folder = args.panoptic_png or path.with_suffix("")
    for needed, kind in ((path, "file"), (folder, "folder")):
        if not needed.exists():
            raise DataError(f"{needed}: no such {kind}")
    return Panoptic(path, folder)


def _upsnet(args: argparse.Namespace) -> Source:
    return Upsnet(to_path(args.upsnet))


def _embeddings(args: argparse.Namespace) -> Source:
    from data_prep.sources.embeddings import Embeddings  # imports JAX, which takes a second

    return Embeddings(to_paths(args.embeddings))


def _lmdb(args: argparse.Namespace) -> Source:
    return Lmdb(to_path(args.lmdb), _reading(args))


def _vinvl(args: argparse.Namespace) -> Source:
    return Vinvl(to_paths(args.vinvl), _reading(args), args.geometry, args.vinvl_labels)


def _torch(args: argparse.Namespace) -> Source:
    return TorchDict(to_paths(args.torch), _reading(args), args.geometry)


_READING = ("features_as", "layout", "pool_grids", "max_cells", "max_regions", "boxes", "sizes")

PARTS: dict[str, Part] = {
    "bottom_up": Part(
        "TSV of bottom-up attention or LXMERT, several by commas: regions, boxes",
        _bottom_up,
        bottom_up.recognise,
        ("max_regions", "boxes"),
    ),
    "grids": Part(
        "folder with ID.npy, ID.pth or ID.pt (grid-feats-vqa): grid",
        _grids,
        units.recognise,
        ("max_cells", "pool_grids", "layout"),
    ),
    "npz": Part("folder with ID.npz (x and bbox, or feat): regions and boxes, or grid", _npz, npz.recognise, _READING),
    "hdf5": Part(
        "HDF5, several by commas (image_features, ID_features, ...): regions and boxes, or grid",
        _hdf5,
        _recognise_hdf5,
        (*_READING, "hdf5_ids", "size_order"),
    ),
    "lmdb": Part(
        "LMDB of UNITER (feat_*), ViLBERT or MMF: regions, boxes, scores", _lmdb, lmdb_files.recognise, _READING
    ),
    "vinvl": Part(
        "features.tsv or SPLIT.feature.tsv of VinVL, several by commas: regions, boxes",
        _vinvl,
        vinvl.recognise,
        (*_READING, "geometry", "vinvl_labels"),
    ),
    "torch": Part(
        "FILE.pt of torch.save, {image: tensor}, several by commas: regions, boxes",
        _torch,
        torch_dict.recognise,
        (*_READING, "geometry"),
    ),
    "panoptic": Part(
        "COCO panoptic JSON: seg_semantic, seg_map, categories",
        _panoptic,
        panoptic.recognise_panoptic,
        ("panoptic_png",),
    ),
    "upsnet": Part(
        "folder with UPSNet's PNG (pan_2ch or ssegs): seg_semantic, seg_map, categories",
        _upsnet,
        panoptic.recognise_upsnet,
    ),
    "embeddings": Part(
        "folder of --mode=embed, several by commas: image_embedding, caption_embeddings",
        _embeddings,
        _recognise_embeddings,
    ),
}

OPTIONS: dict[str, Mapping[str, Any]] = {
    "panoptic_png": {"type": to_path, "help": "folder of the panoptic PNG; default: the JSON's name"},
    "max_regions": {"type": command.at_least(1), "help": "pad regions to this many and add a mask (adaptive files)"},
    "max_cells": {"type": command.at_least(1), "help": "pad the grid to this many cells and add a mask"},
    "pool_grids": {"type": command.at_least(1), "help": "average maps to this many rows and columns, such as 7"},
    "layout": {
        "choices": LAYOUTS,
        "help": "where the channels of features are: hwc last ([h, w, D], [K, D]), chw first ([D, h, w], [D, K]); "
        "without it a shape that leaves this open is an error",
    },
    "features_as": {
        "choices": tuple(MASKS),
        "help": "what features are; default: regions, but a grid where they are maps",
    },
    "boxes": {
        "choices": FORMS,
        "help": "boxes are corners x1 y1 x2 y2 in pixels (default) or in shares of the image, or x, y, width, height; "
        "none leaves them out",
    },
    "sizes": {
        "type": to_path,
        "help": "width and height of images, for boxes in pixels: COCO JSON, JSON name: [width, height], CSV or TSV",
    },
    "size_order": {"choices": ("hw", "wh"), "help": "of the two numbers in ID_size (default: hw, as DLCT writes them)"},
    "geometry": {
        "choices": GEOMETRIES,
        "help": "whether VinVL's last 6 of 2,054 numbers, which become boxes, stay in the features too; default: drop",
    },
    "vinvl_labels": {
        "type": to_path,
        "help": "predictions.tsv or SPLIT.label.tsv of its detector: box classes, scores",
    },
    "hdf5_ids": {"help": "ids of the rows, by commas a file for each HDF5: list or id: row as JSON, text or pickle"},
}
"""Flags of single formats, as keyword arguments of `add_argument`; their default is None, which means not given."""


def add_arguments(parser: argparse.ArgumentParser, required: str | None = None) -> None:
    """Add the flags; `required` names the one that the importer is for."""
    group = parser.add_argument_group("joined by image id")
    for name, part in PARTS.items():
        group.add_argument(f"--{name}", required=name == required, help=part.help)
    for name, keywords in OPTIONS.items():
        group.add_argument(f"--{name}", **keywords)
    group.add_argument(
        "--absent", choices=("fail", "skip"), default="fail", help="an image that a joined file lacks: fail or skip it"
    )


def open_sources(args: argparse.Namespace, also: Collection[str] = ()) -> list[Source]:
    """The sources that the flags name. Raises DataError when files are missing, or a flag belongs to another.

    also: names in OPTIONS of the flags that the importer itself takes too.
    """
    given = [name for name in PARTS if getattr(args, name)]
    for option in OPTIONS:
        takers = [name for name, part in PARTS.items() if option in part.options]
        if getattr(args, option) is not None and option not in also and not set(takers) & set(given):
            raise DataError(f"--{option} belongs to {' or '.join(f'--{name}' for name in takers)}, which is not given")
    return [PARTS[name].open(args) for name in given]
