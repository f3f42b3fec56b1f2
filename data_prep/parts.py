"""The flags that add what another tool made of the photographs to any import."""

from __future__ import annotations

import argparse

from data_prep import command
from data_prep.schema import DataError
from data_prep.sources.base import Source
from data_prep.sources.bottom_up import BottomUp
from data_prep.sources.panoptic import Panoptic, Upsnet
from data_prep.sources.units import UnitFiles
from shnet_jax.paths import to_path, to_paths

KINDS = ("bottom_up", "grids", "panoptic", "upsnet")


def add_arguments(parser: argparse.ArgumentParser, required: str | None = None) -> None:
    """The flags; `required` names the one that the importer is for."""
    count = command.at_least(1)
    group = parser.add_argument_group("joined by image id")
    helps = {
        "bottom_up": "TSV of bottom-up attention or LXMERT, several by commas: regions, boxes",
        "grids": "folder with ID.npy or ID.pth (grid-feats-vqa): grid",
        "panoptic": "COCO panoptic JSON: seg_semantic, seg_map, categories",
        "upsnet": "folder with UPSNet's PNG (pan_2ch or ssegs): seg_semantic, seg_map, categories",
    }
    for kind in KINDS:
        group.add_argument(f"--{kind}", required=kind == required, help=helps[kind])
    group.add_argument("--panoptic_png", type=to_path, help="folder of the panoptic PNG; default: the JSON's name")
    group.add_argument("--max_regions", type=count, help="pad regions to this many and add a mask (adaptive TSV)")
    group.add_argument("--max_cells", type=count, help="pad the grid to this many cells and add a mask")
    group.add_argument("--pool_grids", type=count, help="average maps to this many rows and columns, such as 7")
    group.add_argument(
        "--absent", choices=("fail", "skip"), default="fail", help="an image that a joined file lacks: fail or skip it"
    )


def open_sources(args: argparse.Namespace) -> list[Source]:
    """The sources that the flags name. Raises DataError when files are missing, or a flag belongs to another."""
    sources: list[Source] = []
    belongs = {"panoptic_png": "panoptic", "max_regions": "bottom_up", "max_cells": "grids", "pool_grids": "grids"}
    for option, kind in belongs.items():
        if getattr(args, option) is not None and not getattr(args, kind):
            raise DataError(f"--{option} belongs to --{kind}, which is not given")
    if args.bottom_up:
        sources.append(BottomUp(to_paths(args.bottom_up), args.max_regions))
    if args.grids:
        sources.append(UnitFiles(to_path(args.grids), "grid", args.max_cells, args.pool_grids))
    if args.panoptic:
        path = to_path(args.panoptic)
        folder = args.panoptic_png or path.with_suffix("")
        for needed, kind in ((path, "file"), (folder, "folder")):
            if not needed.exists():
                raise DataError(f"{needed}: no such {kind}")
        sources.append(Panoptic(path, folder))
    if args.upsnet:
        sources.append(Upsnet(to_path(args.upsnet)))
    return sources
