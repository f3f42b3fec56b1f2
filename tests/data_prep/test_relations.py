"""Relations from scene graphs, and the geometric stand-in."""

import json

import numpy as np
import pytest

from data_prep import geometric, relations, scene_graphs
from data_prep.builder import write_dataset
from data_prep.geometric import BESIDE, INSIDE, ON
from shnet_jax.data.records import open_dataset
from tests.data_prep.example import record

BOXES = np.array([[0.1, 0.1, 0.3, 0.5], [0.0, 0.45, 0.6, 0.9], [0.65, 0.45, 0.9, 0.8], [0.4, 0.5, 0.5, 0.6]])


def stand_in(boxes=BOXES, classes=(0, 1, 1, 2), scores=(0.9, 0.8, 0.7, 0.6), valid=(1, 1, 1, 1), **more):
    options = {"least_score": 0.3, "rows": 6} | more
    arrays = (np.asarray(boxes), np.array(classes), np.array(scores), np.array(valid, bool))
    return [tuple(row) for row in geometric.geometric_relations(*arrays, **options).tolist() if row[0] >= 0]


def test_the_stand_in_follows_its_rule():
    # a person on a sofa, the next sofa to its right, a cushion within the first
    assert stand_in() == [(0, ON, 1), (1, BESIDE, 2), (3, INSIDE, 1)]
    assert stand_in(rows=1) == [(0, ON, 1)]
    assert stand_in(least_score=0.65) == [(0, ON, 1), (1, BESIDE, 2)]
    assert stand_in(valid=(0, 1, 1, 1)) == [(1, BESIDE, 2), (3, INSIDE, 1)]
    assert stand_in(classes=(1, 1, 1, 1)) == [(1, BESIDE, 2)]  # one class: neither on nor within itself


def test_two_boxes_of_one_thing_are_not_related():
    boxes = [[0.1, 0.1, 0.5, 0.5], [0.12, 0.1, 0.52, 0.5]]
    assert stand_in(boxes, (3, 3), (1, 1), (1, 1)) == []


def graph(**changes):
    things = [(7, 0, 0, 64, 36), (8, 320, 0, 64, 72), (9, 500, 300, 20, 20)]
    return {
        "image_id": "image 0",
        "width": 640,
        "height": 360,
        "objects": [dict(zip(("object_id", *"xywh"), row, strict=True)) for row in things],
        "relationships": [
            {"subject_id": 7, "predicate": "wears", "object_id": 8, "score": 0.4},
            {"subject_id": 8, "predicate": " Next  to", "object_id": 7, "score": 0.9},
            {"subject_id": 7, "predicate": "near", "object_id": 9, "score": 0.9},
        ],
    } | changes


def written(tmp_path, *graphs):
    path = tmp_path / "graphs.json"
    path.write_text(json.dumps(graphs))
    return path


def test_objects_become_the_regions_that_overlap_them(tmp_path):
    graphs = scene_graphs.read_graphs(written(tmp_path, graph()))
    names = {name: i for i, name in enumerate(scene_graphs.predicates(graphs))}
    assert names == {"near": 0, "next to": 1, "wears": 2}
    boxes = np.array([[0.5, 0, 0.6, 0.2], [0, 0, 0.1, 0.1], [0.01, 0, 0.1, 0.1]])

    def found(valid=(1, 1, 1), least_score=0.3):
        return scene_graphs.region_relations(
            graphs.find("image 0"), boxes, np.array(valid, bool), names, least_iou=0.5, least_score=least_score, rows=3
        ).tolist()

    assert found() == [[0, 1, 1], [1, 2, 0], [-1] * 3]  # by score; object 9 lies on no region
    assert found(valid=(1, 0, 1)) == [[0, 1, 2], [2, 2, 0], [-1] * 3]
    assert found(least_score=0.5) == [[0, 1, 1], [-1] * 3, [-1] * 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": None}, None),
        ({"objects": [{"object_id": 1, "x": 0}]}, "image image 0: expected the key 'y'"),
        ({"objects": []}, "object 7 is not among its 0 objects"),
    ],
)
def test_what_is_missing_is_named(tmp_path, changes, message):
    entry = graph(**changes)
    if entry["width"] is None:
        del entry["width"]
        message = "expected boxes in 0..1, or width and height of the image"
    with pytest.raises(scene_graphs.DataError, match=message):
        scene_graphs.read_graphs(written(tmp_path, entry))


def test_a_data_set_is_written_again_with_relations(tmp_path, capsys):
    images = [record(0), record(1, region_mask=np.array([False, True, True, True]))]
    path = write_dataset(tmp_path, "plain", {"train": images}, {"source": "tests", "predicates": ["a", "b", "c"]})
    flags = [f"--data={path}", f"--out={tmp_path}", "--least_score=0"]
    assert relations.main([*flags, "--name=stand_in", "--geometric"]) == 0
    made = open_dataset(tmp_path / "stand_in")
    assert made.metadata["relations_source"].startswith("geometric stand-in")
    assert list(made.metadata["predicates"]) == list(geometric.PREDICATES)
    before, after = (list(open_dataset(p).open_split("train", list(made.features))) for p in (path, made.path))
    for old, new in zip(before, after, strict=True):
        for name in old.keys() - {"relations"}:
            np.testing.assert_array_equal(new[name], old[name], err_msg=name)
        expected = relations.stand_in(old, least_score=0, rows=relations.ROWS)
        np.testing.assert_array_equal(new["relations"], expected)

    assert relations.main([*flags, "--name=graphs", f"--scene_graphs={written(tmp_path, graph())}"]) == 0
    assert "no graph for 1 of 2 images of 'train'" in capsys.readouterr().err
    other = written(tmp_path, graph(image_id=5))
    assert relations.main([*flags, "--name=wrong", f"--scene_graphs={other}"]) == 1
    assert "no graph for any image of split 'train', such as 'image 0'" in capsys.readouterr().err


def test_a_data_set_without_boxes_is_refused(tmp_path, capsys):
    bare = record(0, boxes=None, relations=None)
    path = write_dataset(tmp_path, "plain", {"train": [bare]}, {})
    assert relations.main([f"--data={path}", f"--out={tmp_path}", "--name=x", "--geometric"]) == 1
    assert f"{path}: expected the field 'boxes'" in capsys.readouterr().err
