import json

import numpy as np
import pytest
from PIL import Image

from data_prep import (
    coco_panoptic,
    from_bottom_up,
    from_grid_feats,
    from_npy,
    from_panoptic,
    from_scan,
    from_upsnet,
    label_maps,
)
from shnet_jax.data.records import open_dataset
from tests.data_prep.example import FILES, NUMBERS, cell, stored_records
from tests.interop import torch_writer

RNG = np.random.default_rng(0)


def _write_tsv(path, counts=(3, 3), extra=False):
    """Image 42 is 200 x 100; returns regions and boxes in pixels of each image, in the order of FILES."""
    arrays = [
        (RNG.normal(size=(k, 4)).astype(np.float32), np.sort(RNG.random((k, 2, 2)), 1).reshape(k, 4)) for k in counts
    ]
    lines = []
    for number, (features, unit) in zip(NUMBERS, arrays, strict=True):
        boxes = (unit * [200, 100, 200, 100]).astype(np.float32)
        if extra:  # LXMERT's columns
            ids, sure = np.arange(len(unit)), np.linspace(0.5, 1, len(unit), dtype=np.float32)
            cells = [str(number), "100", "200", cell(ids), cell(sure), cell(ids), cell(sure)]
        else:
            cells = [str(number), "200", "100"]
        lines.append("\t".join([*cells, str(len(unit)), cell(boxes), cell(features)]))
    path.write_text(
        "\n".join(reversed(lines)) + "\n" + lines[0][:100]
    )  # another order; a line cut off, of a known image
    return arrays


def test_bottom_up(tmp_path, run):
    arrays = _write_tsv(tmp_path / "a.tsv")
    records, _ = run(from_bottom_up.main, f"--bottom_up={tmp_path / 'a.tsv'}", "--feature_dtype=float32")
    for record, file, (features, boxes) in zip(records, FILES, arrays, strict=True):
        assert record["image_id"] == file and len(record["captions"]) == 3
        np.testing.assert_array_equal(record["regions"], features)
        np.testing.assert_allclose(record["boxes"], boxes, atol=1e-6)


def test_adaptive_bottom_up_with_classes(tmp_path, run):
    arrays = _write_tsv(tmp_path / "a.tsv", counts=(2, 4), extra=True)
    records, _ = run(from_bottom_up.main, f"--bottom_up={tmp_path / 'a.tsv'}", "--max_regions=5")
    for record, (features, boxes) in zip(records, arrays, strict=True):
        count = len(features)
        assert record["region_mask"].tolist() == [True] * count + [False] * (5 - count)
        np.testing.assert_array_equal(record["regions"][:count], features.astype(np.float16))
        np.testing.assert_allclose(record["boxes"][:count], boxes, atol=1e-6)
        assert record["box_classes"].tolist() == [*range(count), *[0] * (5 - count)]
        assert not record["regions"][count:].any() and not record["boxes"][count:].any()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("42\t200\t100\t3\t!!\t" + cell(np.zeros((3, 4), np.float32)), "column 'boxes': expected base64"),
        ("42\t200\t100\t3\t" + "\t".join([cell(np.zeros((3, 4), np.float32))] * 1 + ["AAAA"]), "column 'features'"),
        ("42\t200\t100\t3", "expected 6 or 10 columns, found 4"),
        ("42\t200\tx\t3\ta\tb", "expected whole pixels"),
        ("42\t200\t100\t" + "9" * 5000 + "\ta\tb", "expected an image and boxes, found 200 x 100 with 9"),
        (
            "41\t1\t1\t1\ta\tb",
            "expected its line, found none among 1 others, such as '41'; --absent=skip",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, run, line, message):
    (tmp_path / "a.tsv").write_text(line + "\n")
    records, error = run(from_bottom_up.main, f"--bottom_up={tmp_path / 'a.tsv'}")
    assert records is None
    assert message in error and "a.tsv" in error


def _write_panoptic(folder):
    """Two segments, a dog above on grass, and a void row; returns the label maps."""
    folder.mkdir()
    maps = []
    annotations = []
    for number in NUMBERS:
        segments = np.zeros((20, 30), np.int64)
        segments[2:9], segments[9:] = 300, 70000 + number
        colors = np.stack([segments % 256, segments // 256 % 256, segments // 65536], -1).astype(np.uint8)
        Image.fromarray(colors).save(folder / f"{number:012}.png")
        listed = [{"id": 300, "category_id": 18}, {"id": 70000 + number, "category_id": 193}]
        annotations.append({"image_id": number, "file_name": f"{number:012}.png", "segments_info": listed})
        labels = np.full((20, 30), 255, np.uint8)
        labels[2:9] = coco_panoptic.NAMES.index("dog")
        labels[9:] = coco_panoptic.NAMES.index("grass-merged")
        maps.append(labels)
    path = folder.with_suffix(".json")
    path.write_text(json.dumps({"annotations": annotations}))
    return path, maps


def _check_segmentation(record, labels):
    expected = label_maps.fields(labels, 133)
    np.testing.assert_array_equal(record["seg_semantic"], expected["seg_semantic"].astype(np.float16))
    np.testing.assert_array_equal(record["categories"], expected["categories"])
    np.testing.assert_array_equal(record["seg_map"], np.where(expected["seg_map"] == 255, 133, expected["seg_map"]))


def test_panoptic_png_and_json(tmp_path, run):
    path, maps = _write_panoptic(tmp_path / "panoptic_val")
    records, _ = run(from_panoptic.main, f"--panoptic={path}")
    for record, labels in zip(records, maps, strict=True):
        _check_segmentation(record, labels)
    assert open_dataset(tmp_path / "out").metadata["class_names"][16] == "dog"


@pytest.mark.parametrize("kind", ["pan_2ch", "ssegs"])
def test_upsnet_label_maps(tmp_path, run, kind):
    _, maps = _write_panoptic(tmp_path / "panoptic_val")
    folder = tmp_path / kind
    folder.mkdir()
    of_class = {index: number for number, index in enumerate(coco_panoptic.STUFF_FIRST.tolist())} | {255: 255}
    for number, labels in zip(NUMBERS, maps, strict=True):
        pixels = np.vectorize(of_class.get)(labels).astype(np.uint8)
        if kind == "pan_2ch":
            pixels = np.stack([pixels, np.ones_like(pixels), np.zeros_like(pixels)], -1)
        name = f"{number:012}" + (".jpg.png" if kind == "ssegs" else ".png")
        Image.fromarray(pixels).save(folder / name)
    records, _ = run(from_upsnet.main, f"--upsnet={folder}")
    for record, labels in zip(records, maps, strict=True):
        _check_segmentation(record, labels)


def test_a_coloured_picture_is_no_label_map(tmp_path, run):
    (tmp_path / "ssegs").mkdir()
    for number in NUMBERS:
        Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "ssegs" / f"{number:012}.png")
    assert (
        ".png: expected grey, or class, instance and 0 as in pan_2ch, found colours"
        in run(from_upsnet.main, f"--upsnet={tmp_path / 'ssegs'}")[1]
    )


def test_three_parts_of_one_record(tmp_path, run):
    arrays = _write_tsv(tmp_path / "a.tsv")
    path, maps = _write_panoptic(tmp_path / "panoptic_val")
    grids = tmp_path / "grids"
    grids.mkdir()
    cells = RNG.normal(size=(2, 1, 5, 6, 8)).astype(np.float32)
    for number, array in zip(NUMBERS, cells, strict=True):
        np.save(grids / f"{number}.npy", array)
    parts = [f"--bottom_up={tmp_path / 'a.tsv'}", f"--panoptic={path}", f"--grids={grids}", "--pool_grids=2"]
    records, _ = run(from_grid_feats.main, *parts)
    for place, record in enumerate(records):
        np.testing.assert_array_equal(record["regions"], arrays[place][0].astype(np.float16))
        _check_segmentation(record, maps[place])
        quarters = cells[place, 0].reshape(5, 2, 3, 2, 4).mean((2, 4)).reshape(5, 4).T
        np.testing.assert_allclose(record["grid"], quarters, atol=2e-3)


@pytest.mark.parametrize("importer", ["from_scan", "from_npy"])
def test_a_segmentation_joins_a_folder_in_the_scan_layout(tmp_path, importer, capsys):
    path, maps = _write_panoptic(tmp_path / "panoptic_val")
    (tmp_path / "val_ids.txt").write_text("139\n7\n42\n")
    (tmp_path / "val_caps.txt").write_text("a\nb\nc\n")
    np.save(tmp_path / "val_ims.npy", np.arange(12, dtype=np.float16).reshape(3, 2, 2))
    flags = [f"--src={tmp_path}", "--name=toy", f"--out={tmp_path / 'out'}", f"--panoptic={path}"]
    if importer == "from_npy":
        for name in ("139", "7", "42"):
            np.save(tmp_path / f"{name}.npy", np.full((1, 3), int(name), np.float16))
        flags += [f"--features={tmp_path}", "--as=grid"]
    main = {"from_scan": from_scan, "from_npy": from_npy}[importer].main
    assert main(flags) == 1
    assert "row 1 (image '7')" in capsys.readouterr().err
    assert main([*flags, "--absent=skip"]) == 0
    assert "left out 1 images that a source lacks: 7\n" in capsys.readouterr().err
    records = stored_records(tmp_path / "out")
    assert [(r["image_id"], r["captions"], r["regions"][0, 0]) for r in records] == [
        ("139", ["a"], 0),
        ("42", ["c"], 8),
    ]
    _check_segmentation(records[0], maps[1])


def test_a_field_from_two_sources_is_an_error(tmp_path, capsys):
    path, maps = _write_panoptic(tmp_path / "panoptic_val")
    (tmp_path / "val_ids.txt").write_text("42\n")
    (tmp_path / "val_caps.txt").write_text("a\n")
    np.save(tmp_path / "val_seg_maps.npy", maps[0][None])
    assert from_scan.main([f"--src={tmp_path}", "--name=toy", f"--out={tmp_path / 'out'}", f"--panoptic={path}"]) == 1
    assert f"{path}: field 'seg_map': expected it from one source" in capsys.readouterr().err


def test_damaged_panoptic_files_are_named(tmp_path, run):
    path, _ = _write_panoptic(tmp_path / "panoptic_val")
    (tmp_path / "panoptic_val" / "000000000139.png").write_bytes(b"no PNG")
    assert "000000000139.png: expected a picture" in run(from_panoptic.main, f"--panoptic={path}")[1]
    entry = {"image_id": 139, "file_name": "x.png", "segments_info": []}
    for again in (entry, entry | {"image_id": 7, "file_name": "139"}):  # the name of one is the id of the other
        path.write_text(json.dumps({"annotations": [entry, again]}))
        assert (
            "panoptic_val.json: image '139': expected one annotation, found two"
            in run(from_panoptic.main, f"--panoptic={path}")[1]
        )
    path.write_text('{"annotations": [{"image_id": 1}]}')
    assert "panoptic_val.json: expected the key 'segments_info'" in run(from_panoptic.main, f"--panoptic={path}")[1]
    assert "absent.json: no such file" in run(from_panoptic.main, f"--panoptic={tmp_path / 'absent.json'}")[1]


def test_pth_files_of_grid_features(tmp_path, run):
    features = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    torch_writer.save(tmp_path / "42.pth", features)
    records, _ = run(from_grid_feats.main, f"--grids={tmp_path}", "--absent=skip")
    np.testing.assert_array_equal(records[0]["grid"], features[0].reshape(2, 12).T)
    torch_writer.save(tmp_path / "42.pth", {"features": features})
    error = run(from_grid_feats.main, f"--grids={tmp_path}")[1]
    assert "42.pth: expected a tensor saved by PyTorch, found dict" in error
