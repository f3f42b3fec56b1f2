"""The table of sources that any import joins by image id, and their flags: one row a format."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from data_prep import command
from data_prep.schema import DataError
from data_prep.sources.base import Source
from data_prep.sources.bottom_up import BottomUp
from data_prep.sources.panoptic import Panoptic, Upsnet
from data_prep.sources.units import UnitFiles
from shnet_jax.paths import to_path, to_paths


class Part(NamedTuple):
    """A format that is joined by image id; its flag is the key of PARTS.

    help: layout and fields, for --help.
    open: makes the source from all flags; raises DataError when files are missing.
    options: names in OPTIONS of the flags that this format takes.
    """

    help: str
    open: Callable[[argparse.Namespace], Source]
    options: tuple[str, ...] = ()


def _bottom_up(args: argparse.Namespace) -> Source:
    return BottomUp(to_paths(args.bottom_up), args.max_regions)


def _grids(args: argparse.Namespace) -> Source:
    return UnitFiles(to_path(args.grids), "grid", args.max_cells, args.pool_grids)


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


PARTS: dict[str, Part] = {
    "bottom_up": Part(
        "TSV of bottom-up attention or LXMERT, several by commas: regions, boxes", _bottom_up, ("max_regions",)
    ),
    "grids": Part("folder with ID.npy or ID.pth (grid-feats-vqa): grid", _grids, ("max_cells", "pool_grids")),
    "panoptic": Part("COCO panoptic JSON: seg_semantic, seg_map, categories", _panoptic, ("panoptic_png",)),
    "upsnet": Part("folder with UPSNet's PNG (pan_2ch or ssegs): seg_semantic, seg_map, categories", _upsnet),
    "embeddings": Part("folder of --mode=embed, several by commas: image_embedding, caption_embeddings", _embeddings),
}

OPTIONS: dict[str, Mapping[str, Any]] = {
    "panoptic_png": {"type": to_path, "help": "folder of the panoptic PNG; default: the JSON's name"},
    "max_regions": {"type": command.at_least(1), "help": "pad regions to this many and add a mask (adaptive files)"},
    "max_cells": {"type": command.at_least(1), "help": "pad the grid to this many cells and add a mask"},
    "pool_grids": {"type": command.at_least(1), "help": "average maps to this many rows and columns, such as 7"},
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


def open_sources(args: argparse.Namespace) -> list[Source]:
    """The sources that the flags name. Raises DataError when files are missing, or a flag belongs to another."""
    given = [name for name in PARTS if getattr(args, name)]
    for option in OPTIONS:
        takers = [name for name, part in PARTS.items() if option in part.options]
        if getattr(args, option) is not None and not set(takers) & set(given):
            raise DataError(f"--{option} belongs to {' or '.join(f'--{name}' for name in takers)}, which is not given")
    return [PARTS[name].open(args) for name in given]
