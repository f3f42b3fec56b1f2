"""Regions from the TSV files of VinVL and from dictionaries of torch.save, as Oscar's tasks have them."""

import json
import tracemalloc

import numpy as np
import pytest

from data_prep import caption_files, captions, from_grid_feats, from_torch, from_vinvl, torch_files
from data_prep.schema import DataError
from data_prep.sources.detections import Reading
from data_prep.sources.torch_dict import TorchDict
from data_prep.sources.vinvl import Vinvl, parse, split_geometry
from shnet_jax.data.records import open_dataset
from shnet_jax.interop import torch_pickle
from tests.data_prep.example import FILES, cell
from tests.interop import torch_writer

NUMBERS = ("42", "139")
RNG = np.random.default_rng(0)


def vinvl(count):
    """Features [count, 2054] of an image, and its boxes in 0..1."""
    boxes = np.sort(RNG.random((count, 2, 2)), 1).reshape(count, 4)
    place = np.concatenate([boxes, boxes[:, 2:] - boxes[:, :2]], 1)
    return np.concatenate([RNG.normal(size=(count, 2048)), place], 1).astype(np.float32), boxes


IMAGES = [vinvl(3), vinvl(2)]


def row(name, features):
    return [name, str(len(features)), cell(features)]


def json_row(name, features):
    return [name, json.dumps({"num_boxes": len(features), "features": cell(features)})]


def write(path, rows, index=False):
    """A TSV file, with NAME.lineidx beside it."""
    lines = ["\t".join(cells) + "\n" for cells in rows]
    path.write_text("".join(lines))
    if index:
        starts = np.cumsum([0, *(len(line) for line in lines[:-1])])
        path.with_suffix(".lineidx").write_text("".join(f"{start}\n" for start in starts))
    return path


def check(records, width=2048):
    for record, (features, boxes) in zip(records, IMAGES, strict=True):
        count = len(boxes)
        np.testing.assert_array_equal(record["regions"][:count], features[:, :width])
        np.testing.assert_allclose(record["boxes"][:count], boxes, atol=1e-6)
        assert record["region_mask"].sum() == count and record["regions"].shape == (4, width)


@pytest.mark.parametrize("index", ["none", "lineidx", "both", "folder"])
@pytest.mark.parametrize("kind", [row, json_row])
def test_rows_of_features(tmp_path, run, kind, index):
    rows = [kind(number, features) for number, (features, _) in zip(NUMBERS, IMAGES, strict=True)][::-1]
    path = write(tmp_path / "features.tsv", rows, index=index != "none")
    if index == "both":
        (tmp_path / "imageid2idx.json").write_text(json.dumps({"139": 0, "42": 1}))
    source = tmp_path if index == "folder" else path
    flags = [f"--vinvl={source}", "--max_regions=4", "--feature_dtype=float32"]
    check(run(from_vinvl.main, *flags)[0])
    check(run(from_vinvl.main, *flags, "--geometry=keep")[0], 2054)


def test_the_first_whole_line_of_an_image_counts(tmp_path, capsys):
    features, other = IMAGES[0][0], IMAGES[1][0]
    rows = [[*row("42", features)[:2], "AAAA"], row("42", features), row("42", other)]
    actual = Vinvl([write(tmp_path / "a.tsv", rows)], Reading()).read("42.jpg")
    np.testing.assert_array_equal(actual["regions"], features[:, :2048])
    printed = capsys.readouterr().err
    assert "1 images have more than one line, such as '42'; the first whole one of each is taken" in printed
    assert "is taken, not the broken line: " in printed and "expected a multiple of 3 float32" in printed
    with pytest.raises(DataError, match=r"b\.tsv, byte 0: column 'features': expected a multiple of 3"):
        Vinvl([write(tmp_path / "b.tsv", rows[:1]), tmp_path / "b.tsv"], Reading()).read("42.jpg")


def objects(count, boxes, width=200, height=100, **extra):
    """Objects with pixel boxes, as the benchmark's predictions.tsv has them."""
    pixels = (boxes * [width, height, width, height]).tolist()
    names = ["dog", "cat", "a b"]
    return [{"class": names[i % 3], "conf": 0.5 + i / 10, "rect": pixels[i], **extra} for i in range(count)]


@pytest.mark.parametrize("with_sizes", [True, False])
def test_labels_give_scores_and_classes(tmp_path, run, with_sizes):
    write(
        tmp_path / "train.feature.tsv", [json_row(n, f) for n, (f, _) in zip(NUMBERS, IMAGES, strict=True)], index=True
    )
    contents = [objects(len(boxes), boxes) for _, boxes in IMAGES]
    if with_sizes:
        contents = [{"objects": entries, "image_w": 200, "image_h": 100} for entries in contents]
    labels = write(tmp_path / "train.label.tsv", [[n, json.dumps(c)] for n, c in zip(NUMBERS, contents, strict=True)])
    flags = [f"--vinvl={tmp_path / 'train.feature.tsv'}", f"--vinvl_labels={labels}", "--max_regions=4"]
    records, _ = run(from_vinvl.main, *flags, "--feature_dtype=float32")
    check(records)
    names = open_dataset(tmp_path / "out").metadata["box_class_names"]
    assert names == ["a b", "cat", "dog"]
    for record, (_, boxes) in zip(records, IMAGES, strict=True):
        assert [names[c] for c in record["box_classes"][: len(boxes)]] == ["dog", "cat", "a b"][: len(boxes)]
        np.testing.assert_allclose(record["box_scores"][: len(boxes)], 0.5 + np.arange(len(boxes)) / 10, atol=1e-6)


def test_labels_of_another_detector_are_refused(tmp_path, run):
    path = write(tmp_path / "features.tsv", [row(n, f) for n, (f, _) in zip(NUMBERS, IMAGES, strict=True)])

    def refused(*contents):
        labels = write(tmp_path / "labels.tsv", [[n, json.dumps(c)] for n, c in zip(NUMBERS, contents, strict=False)])
        records, error = run(from_vinvl.main, f"--vinvl={path}", f"--vinvl_labels={labels}", "--max_regions=4")
        assert records is None and str(tmp_path) in error and error.count("\n") == 1
        return error

    good = [objects(len(boxes), boxes) for _, boxes in IMAGES]
    sized = {"image_w": 200, "image_h": 100}
    turned = {"objects": objects(3, IMAGES[0][1][::-1]), **sized}
    assert "expected the objects of the features' regions, found boxes elsewhere" in refused(turned, good[1])
    assert "expected 3, one a region, found 2" in refused(good[0][:2], good[1])
    assert "image '000000000139.jpg': expected its line, found none" in refused(good[0])
    assert "expected the class of each object, found None" in refused([{"rect": [0, 0, 1, 1]}], good[1])
    assert "expected a list of objects" in refused({"captions": []}, good[1])
    assert "'rect': expected numbers [3, 4]" in refused([*good[0][:2], {"class": "dog", "conf": 1.0}], good[1])


def test_predictions_that_hold_the_features(tmp_path, run):
    contents = []
    for features, boxes in IMAGES:
        entries = objects(len(boxes), boxes)
        contents.append({"objects": [e | {"feature": cell(f[:2048])} for e, f in zip(entries, features, strict=True)]})
    path = write(tmp_path / "predictions.tsv", [[n, json.dumps(c)] for n, c in zip(NUMBERS, contents, strict=True)])
    flags = [f"--vinvl={path}", "--max_regions=4", "--feature_dtype=float32"]
    assert "expected the image's size for boxes in pixels, found none; --sizes=FILE" in run(from_vinvl.main, *flags)[1]
    sizes = write(tmp_path / "val.hw.tsv", [[n, '[{"height": 100, "width": 200}]'] for n in NUMBERS])
    check(run(from_vinvl.main, *flags, f"--sizes={sizes}")[0])
    sized = [[n, json.dumps(c | {"image_w": 200, "image_h": 100})] for n, c in zip(NUMBERS, contents, strict=True)]
    write(path, sized)
    check(run(from_vinvl.main, *flags)[0])


def test_indices_of_another_file(tmp_path, run):
    rows = [row(n, f) for n, (f, _) in zip(NUMBERS, IMAGES, strict=True)]
    path = write(tmp_path / "features.tsv", rows, index=True)
    index, ids = tmp_path / "features.lineidx", tmp_path / "imageid2idx.json"
    good = index.read_text()

    def refused(message):
        records, error = run(from_vinvl.main, f"--vinvl={path}")
        assert records is None and message in error and error.count("\n") == 1, error

    ids.write_text('{"42": 1, "139": 0}')
    refused("expected the line of '42', found that of b'139'; the .lineidx or imageid2idx.json beside it is of another")
    ids.write_text('{"42": 2}')
    refused("imageid2idx.json: image '42': expected a line 0..1, found 2")
    ids.write_text("[0]")
    refused("imageid2idx.json: expected a JSON object, found list")
    ids.unlink()
    index.write_text(good + "99999999\n")
    refused("features.lineidx: expected places below")
    index.write_text("0\nx\n")
    refused("features.lineidx: expected the first byte of each line as numbers")
    index.write_text("")
    refused("features.lineidx: expected places below")
    index.write_text("0\n5\n")
    refused("features.lineidx: expected the first byte of a line of features.tsv, found 5; remove it")
    index.write_text("0\n")
    refused("features.lineidx: expected all lines of features.tsv, found the last at 0; remove it")
    path.unlink()
    refused("features.tsv: no such file")
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused("git-LFS pointer")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["42"], "found 1 columns"),
        (["42", "1", "2", "3", "4", "5"], "found 6 columns; --bottom_up reads 6 or 10"),
        (["42", "x", "AAAA"], "expected the number of boxes in column 2, found b'x'"),
        (["42", "0", "AAAA"], "expected boxes, found 0"),
        (["42", "99999999999999999999", "AAAA"], "expected a multiple of"),
        (["42", "-1", "AAAA"], "expected boxes, found -1"),
        (["42", "1", "!"], "expected base64"),
        (["42", "AAAA"], "expected JSON"),
        (["42", "[" * 100_000], "nested too deeply"),
        (["42", "3"], "expected a list of objects"),
        (["42", "[]"], "found no objects"),
        (["42", '[{"rect": [0, 0, 1, 1], "class": "dog"}]'], "or 'feature' of each object, found"),
        (["42", '[{"feature": "AAAAAA=="}, {"feature": "AAAAAAAAAAA="}]'], "expected features of one width"),
        (["42", '{"features": [1], "num_boxes": 1}'], "expected num_boxes and features in base64"),
        (["42", '{"features": "AAAA"}'], "expected num_boxes and features in base64"),
        (["42", '{"features": "AAAA", "num_boxes": true}'], "expected num_boxes and features in base64"),
        (["42", '[{"feature": "AAAAAA==", "rect": [1, [2], 3, 4]}]'], "'rect': expected numbers [1, 4]"),
        (["42", '{"image_w": "a", "objects": [{"feature": "AAAAAA=="}]}'], "'image_w': expected numbers []"),
    ],
)
def test_a_line_that_is_none_is_refused_with_what_it_has(cells, message):
    with pytest.raises(DataError) as error:
        parse([text.encode() for text in cells], "here", None)
    assert message in str(error.value) and str(error.value).startswith("here")


def test_the_geometry():
    features, boxes = IMAGES[0]
    for order in ([4, 5], [5, 4]):  # width and height, or the other way round
        turned = np.concatenate([features[:, :2052], features[:, 2048:][:, order]], 1)
        np.testing.assert_allclose(split_geometry(turned, None, "here")["norm_bb"], boxes, atol=1e-6)
    assert split_geometry(features.astype(np.float16), None, "here")["norm_bb"].shape == (3, 4)
    wrong = features.copy()
    wrong[1, -1] += 0.1
    with pytest.raises(DataError, match="expected x1 y1 x2 y2 width height in shares of the image as the last 6"):
        split_geometry(wrong, None, "here")
    wrong[1, -1] = np.nan
    with pytest.raises(DataError, match="expected x1 y1 x2 y2 width height"):
        split_geometry(wrong, "keep", "here")
    narrow = features[:, :2048]
    assert list(split_geometry(narrow, None, "here")) == ["features"]
    for geometry in ("keep", "drop"):
        with pytest.raises(DataError, match=r"found \[3, 2048\]; leave --geometry out"):
            split_geometry(narrow, geometry, "here")


@pytest.mark.parametrize("keys", [tuple(map(int, NUMBERS)), FILES])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_dictionary_of_tensors(tmp_path, run, keys, dtype):
    content = dict(zip(keys, (features.astype(dtype) for features, _ in IMAGES), strict=True))
    first, second = ({key: content[key]} for key in keys)
    torch_writer.save(tmp_path / "a.pt", first)
    torch_writer.save(tmp_path / "b.pt", second)
    flags = [f"--torch={tmp_path / 'a.pt'},{tmp_path / 'b.pt'}", "--max_regions=4", "--feature_dtype=float32"]
    for record, (features, boxes) in zip(run(from_torch.main, *flags)[0], IMAGES, strict=True):
        np.testing.assert_array_equal(record["regions"][: len(boxes)], features[:, :2048].astype(dtype))
        np.testing.assert_allclose(record["boxes"][: len(boxes)], boxes, atol=1e-3)
    torch_writer.save(tmp_path / "b.pt", first)
    assert "expected it once, found it twice" in run(from_torch.main, *flags)[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({42: {"features": np.zeros((2, 8), np.float32)}}, "expected a tensor [K, D], found a dictionary of features"),
        ({42: [1.0]}, "expected a tensor [K, D], found list"),
        ({42: np.zeros((2, 3, 4, 5), np.float32)}, "expected an array of one image"),
        ([np.zeros((2, 8), np.float32)], "expected a dictionary by image, found list"),
        ({}, "expected a dictionary by image, found an empty dict"),
        ({(1, 2): 3}, "expected a dictionary by image, found a dictionary of (1, 2)"),
        ({7: np.zeros((2, 8), np.float32)}, "image 'COCO_val2014_000000000042.jpg': expected its tensor, found none"),
    ],
)
def test_a_file_of_torch_that_is_another(content, message, tmp_path, run):
    path = torch_writer.save(tmp_path / "x.pt", content)
    records, error = run(from_torch.main, f"--torch={path}")
    assert records is None and message in error and str(path) in error and error.count("\n") == 1, error


def test_arrays_of_numpy_by_image(tmp_path):
    array = torch_writer.of_numpy(IMAGES[0][0])
    path = torch_writer.save(tmp_path / "x.pt", {"42": array})
    assert TorchDict([path], Reading()).read("42.jpg")["regions"].shape == (3, 2048)


@pytest.mark.parametrize("kind", ["vinvl", "torch"])
def test_one_record_is_in_memory_at_a_time(kind, tmp_path):
    arrays = {str(i): np.ones((36, 1000), np.float32) for i in range(40)}
    if kind == "vinvl":
        source = Vinvl([write(tmp_path / "a.tsv", [row(name, array) for name, array in arrays.items()])], Reading())
    else:
        source = TorchDict([torch_writer.save(tmp_path / "a.pt", arrays)], Reading())
    tracemalloc.start()
    for name in arrays:
        source.read(f"{name}.jpg")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 36 * 1000 * 4


def test_captions_by_image(tmp_path):
    content = {42: ["a dog", "a cat #2 \t x"], "139": json.dumps(["ä"]), 7: []}
    path = torch_writer.save(tmp_path / "val_captions.pt", content)
    assert [(row.file, row.captions) for row in caption_files.read_captions(path)] == [
        ("42", ("a dog", "a cat #2 x")),
        ("139", ("ä",)),
        ("7", ()),
    ]
    for wrong in ("[1]", '["a"', [1], {"a": 1}):
        torch_writer.save(path, {42: wrong, 43: "a dog"})
        with pytest.raises(
            DataError, match=r"val_captions\.pt row 0: image '42': 'caption': expected .*--on_bad_record=skip"
        ):
            captions.read(f"val={path}")
        assert captions.read(f"val={path}", strict=False)["val"][0].fault


def test_the_captions_of_coco_are_within_the_bounds(tmp_path, monkeypatch):
    """Five captions of 120,000 images are 2 million opcodes, twice the usual bound; here all is a hundredth."""
    monkeypatch.setattr(torch_pickle, "MAX_STEPS", 10_000)
    content = {number: ["a"] * 5 for number in range(1200)}
    path = torch_writer.save(tmp_path / "train_captions.pt", content)
    assert sum(len(row.captions) for row in caption_files.read_captions(path)) == 6000
    with pytest.raises(ValueError, match="more than 10000 steps"):
        torch_files.open_torch_file(path)


def test_a_tensor_in_a_pt_file_of_each_image(tmp_path, run):
    for number in NUMBERS:
        torch_writer.save(tmp_path / f"{number}.pt", np.full((1, 16, 3, 4), int(number), np.float32))
    records, _ = run(from_grid_feats.main, f"--grids={tmp_path}")
    assert [record["grid"][0, 0] for record in records] == [42, 139]
