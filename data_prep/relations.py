"""Adds relations between regions to a data set that has boxes, as a new data set.

    shnet data relations --data=DATA/coco --name=coco_graphs --out=DATA --scene_graphs=predicted.json
    shnet data relations --data=DATA/coco --name=coco_stand_in --out=DATA --geometric

`--scene_graphs` takes Visual Genome's JSON, annotated or predicted (`data_prep.scene_graphs`). `--geometric` derives a
stand-in from boxes and classes alone (`data_prep.geometric`); its results are to be called that. Confidences of
predicted relations as arrays need no step of their own: SPLIT_relation_scores.npy beside the others (`from_scan`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data_prep import command, geometric, scene_graphs
from data_prep.bad_records import Bad, Policy, record_or_bad
from data_prep.builder import write_dataset
from data_prep.schema import DataError, Record, refuse
from shnet_jax.data.records import DataSet, RandomAccess, open_dataset
from shnet_jax.paths import to_path

ROWS = 15  # most confident relations that an image keeps
STAND_IN = "geometric stand-in"

Relate = Callable[[Record], np.ndarray]
"""A record with boxes -> its relations [rows, 3]."""


class _Related:
    """The records of a split with relations; iterated once, like any importer's."""

    def __init__(self, records: RandomAccess, relate: Relate):
        self._records, self._relate = records, relate

    def __iter__(self) -> Iterator[Record | Bad]:
        for row, image_id in enumerate(self._records.dataset.image_ids(self._records.split).tolist()):
            yield record_or_bad(image_id, self._record, row)

    def _record(self, row: int) -> Record:
        record = self._records[row]
        return record | {"relations": self._relate(record)}


def add_relations(
    dataset: DataSet,
    relate: Relate,
    name: str,
    out: Path,
    *,
    predicates: Sequence[str],
    origin: str,
    overwrite: bool,
    on_bad_record: Policy = "fail",
) -> Path:
    """Writes the data set once more with `relate`'s relations instead of those that it may have; returns its folder.

    origin: where the relations come from, kept in the metadata as `relations_source`.
    """
    _need(dataset, "boxes")
    kept = {k: v for k, v in dataset.metadata.items() if k != "num_classes"}
    metadata = kept | {
        "source": f"{kept.get('source', '')}; relations: {origin}",
        "relations_source": origin,
        "predicates": list(predicates),
    }
    fields = tuple(dataset.features)
    splits = {split: _Related(dataset.open_split(split, fields), relate) for split in dataset.splits}
    total = sum(dataset.splits.values())
    return write_dataset(out, name, splits, metadata, total=total, overwrite=overwrite, on_bad_record=on_bad_record)


def stand_in(record: Record, *, least_score: float, rows: int) -> np.ndarray:
    """Geometric relations, see `geometric.geometric_relations`; boxes without scores all count as certain."""
    boxes = record["boxes"]
    scores = record.get("box_scores", np.ones(len(boxes), np.float32))
    return geometric.geometric_relations(
        boxes, record["box_classes"], scores, _valid(record), least_score=least_score, rows=rows
    )


def from_graphs(
    record: Record,
    *,
    graphs: scene_graphs.Graphs,
    names: Mapping[str, int],
    least_iou: float,
    least_score: float,
    rows: int,
) -> np.ndarray:
    """Scene-graph relations, see `scene_graphs.region_relations`; an image without a graph has no relations."""
    graph = graphs.find(record["image_id"])
    if graph is None:
        return np.full((rows, 3), -1, np.int32)
    limits = {"least_iou": least_iou, "least_score": least_score, "rows": rows}
    return scene_graphs.region_relations(graph, record["boxes"], _valid(record), names, **limits)  # type: ignore[arg-type]


def _valid(record: Record) -> np.ndarray:
    return record.get("region_mask", np.ones(len(record["boxes"]), bool))


def _need(dataset: DataSet, field: str) -> None:
    refuse(field not in dataset.features, dataset.path, f"the field {field!r}, which relations need", "none")


def _check_coverage(dataset: DataSet, graphs: scene_graphs.Graphs, path: Path) -> None:
    """Raises DataError when a split has no graph, or it is not clear which image has which."""
    for split in dataset.splits:
        ids = dataset.image_ids(split).tolist()
        missing = [i for i in ids if graphs.find(i) is None]
        if len(missing) == len(ids):
            raise DataError(f"{path}: no graph for any image of split {split!r}, such as {missing[0]!r}")
        if missing:
            print(f"note: {path}: no graph for {len(missing)} of {len(ids)} images of {split!r}", file=sys.stderr)


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = command.parser("relations", __doc__)
    parser.add_argument("--data", type=to_path, required=True, help="data set with boxes")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--scene_graphs", type=to_path, help="JSON in the layout of Visual Genome's scene_graphs.json")
    kind.add_argument("--geometric", action="store_true", help="a stand-in from boxes and classes alone")
    parser.add_argument("--image_data", type=to_path, help="JSON file with width and height of each image")
    parser.add_argument("--least_score", type=float, default=0.3, help="of a predicted relation, or of a box (0.3)")
    parser.add_argument("--least_iou", type=float, default=0.5, help="of an object and its region (0.5)")
    parser.add_argument("--rows", type=command.at_least(1), default=ROWS, help=f"relations of an image ({ROWS})")
    command.add_writing_arguments(parser)
    args = parser.parse_args(argv)
    dataset = open_dataset(args.data)
    limits = {"least_score": args.least_score, "rows": args.rows}
    relate: Relate
    if args.geometric:
        _need(dataset, "box_classes")
        names: Sequence[str] = geometric.PREDICATES
        relate = partial(stand_in, **limits)
        origin = f"{STAND_IN}, boxes of score {args.least_score:g} and more"
    else:
        graphs = scene_graphs.read_graphs(args.scene_graphs, args.image_data)
        _check_coverage(dataset, graphs, args.scene_graphs)
        names = scene_graphs.predicates(graphs)
        numbers = {name: i for i, name in enumerate(names)}
        relate = partial(from_graphs, graphs=graphs, names=numbers, least_iou=args.least_iou, **limits)
        origin = f"scene graphs of {args.scene_graphs.name}"
    path = add_relations(
        dataset,
        relate,
        args.name,
        args.out,
        predicates=names,
        origin=origin,
        overwrite=args.overwrite,
        on_bad_record=args.on_bad_record,
    )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
