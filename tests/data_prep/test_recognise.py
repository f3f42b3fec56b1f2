"""`shnet data FOLDER`: each layout is recognised, and the command that is printed imports it."""

import codecs
import csv
import json
import os
import pickle
import re
import shlex
from importlib import import_module
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet as pq

from data_prep import __main__ as command
from data_prep import from_npz, from_scan, parts, places
from data_prep import recognise as recognition
from data_prep.builder import write_dataset
from data_prep.extract import run as extract
from data_prep.recognise import recognise
from data_prep.schema import DataError
from data_prep.sources import npz as npz_source
from shnet_jax.data.records import open_dataset
from tests.data_prep import (
    test_embeddings,
    test_from_clip_retrieval,
    test_from_person_search,
    test_lmdb,
    test_sources,
    test_vinvl,
)
from tests.data_prep.example import record
from tests.data_prep.extract import conftest, test_containers
from tests.interop import torch_writer

FILES = ("COCO_val2014_000000000042.jpg", "COCO_val2014_000000000139.jpg")
NUMBERS = ("42", "139")
RNG = np.random.default_rng(0)


def captions(folder, files=FILES, split="val"):
    """Karpathy's JSON of the two images."""
    images = [{"filename": file, "split": split, "sentences": [{"raw": "a dog"}]} for file in files]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


def regions(count, width=64):
    return RNG.normal(size=(count, width)).astype(np.float32)


def pixels(count):
    """Boxes of an image of 200 x 100, the first of it all."""
    boxes = np.sort(RNG.random((count, 2, 2)), 1).reshape(count, 4)
    boxes[0] = 0, 0, 1, 1
    return (boxes * [200, 100, 200, 100]).astype(np.float32)


def sizes(folder):
    images = [
        {"id": int(number), "file_name": file, "width": 200, "height": 100}
        for number, file in zip(NUMBERS, FILES, strict=True)
    ]
    (folder / "instances_val2014.json").write_text(json.dumps({"images": images, "annotations": []}))


def bottom_up(folder):
    test_sources._write_tsv(folder / "val_36.tsv", counts=(2, 3))
    captions(folder)
    return "from_bottom_up", {"bottom_up": "val_36.tsv", "max_regions": "100"}


def bottom_up_with_header(folder):
    test_sources._write_tsv(folder / "val_36.tsv")
    lines = (folder / "val_36.tsv").read_text().split("\n")[:2]
    (folder / "val_36.tsv").write_text("\n".join(["image_id\timage_w\timage_h\tnum_boxes\tboxes\tfeatures", *lines]))
    captions(folder)
    return "from_bottom_up", {"bottom_up": "val_36.tsv"}


def bottom_up_with_bom(folder):
    module, flags = bottom_up(folder)
    (folder / "val_36.tsv").write_bytes(codecs.BOM_UTF8 + (folder / "val_36.tsv").read_bytes())
    return module, flags


def grids(folder):
    (folder / "maps").mkdir()
    for number in NUMBERS:
        np.save(folder / "maps" / f"{number}.npy", RNG.normal(size=(7, 7, 64)).astype(np.float32))
    captions(folder)
    return "from_grid_feats", {"grids": "maps", "layout": "hwc"}


def grids_of_torch(folder):
    """Of different sizes, so they are pooled."""
    (folder / "maps").mkdir()
    for number, height in zip(NUMBERS, (3, 4), strict=True):
        torch_writer.save(folder / "maps" / f"{number}.pth", RNG.normal(size=(1, 64, height, 5)).astype(np.float32))
    captions(folder)
    return "from_grid_feats", {"grids": "maps", "pool_grids": "7"}


def transposed(folder):
    (folder / "units").mkdir()
    for number in NUMBERS:
        np.save(folder / "units" / f"{number}.npy", regions(64, 36))
    captions(folder)
    return "from_grid_feats", {"grids": "units", "layout": "chw"}


def npz(folder):
    (folder / "f").mkdir()
    for file, count in zip(FILES, (2, 3), strict=True):
        np.savez(folder / "f" / f"{file}.npz", x=regions(count), bbox=pixels(count), image_w=200, image_h=100)
    captions(folder)
    return "from_npz", {"npz": "f", "max_regions": "100"}


def make_bu_data(folder):
    """Boxes in pixels, whose sizes lie in another file."""
    for kind in ("att", "box", "fc"):
        (folder / f"coco_{kind}").mkdir()
    for number in NUMBERS:
        np.savez_compressed(folder / "coco_att" / f"{number}.npz", feat=regions(3))
        np.save(folder / "coco_box" / f"{number}.npy", pixels(3))
        np.save(folder / "coco_fc" / f"{number}.npy", regions(1)[0])
    captions(folder)
    sizes(folder)
    return "from_npz", {"npz": "coco_att", "sizes": "instances_val2014.json"}


def boxes_in_shares(folder):
    (folder / "f").mkdir()
    for number in NUMBERS:
        np.savez(folder / "f" / f"{number}.npz", x=regions(3), bbox=pixels(3) / [200, 100, 200, 100])
    captions(folder)
    return "from_npz", {"npz": "f", "boxes": "shares"}


def boxes_without_sizes(folder):
    make_bu_data(folder)
    (folder / "instances_val2014.json").unlink()
    return "from_npz", {"npz": "coco_att", "boxes": "none"}


def hdf5(folder, path="val36.hdf5", **extra):
    with h5py.File(folder / path, "w") as file:
        file["image_features"] = np.stack([regions(3), regions(3)])
        file["spatial_features"] = np.stack([pixels(3) / [200, 100, 200, 100]] * 2)
        for name, value in extra.items():
            file[name] = value
    captions(folder)


def hdf5_rows(folder):
    hdf5(folder)
    (folder / "val36_imgid2idx.json").write_text(json.dumps({"42": 0, "139": 1}))
    return "from_hdf5", {"hdf5": "val36.hdf5"}


def hdf5_with_ids(folder):
    hdf5(folder)
    (folder / "val_ids.txt").write_text("42\n139\n")
    return "from_hdf5", {"hdf5": "val36.hdf5", "hdf5_ids": "val_ids.txt"}


def hdf5_with_ids_of_numpy(folder):
    hdf5(folder)
    np.save(folder / "val_ids.npy", np.array([42, 139]))
    return "from_hdf5", {"hdf5": "val36.hdf5", "hdf5_ids": "val_ids.npy"}


def hdf5_with_texts(folder):
    """Ids of variable length in the file."""
    hdf5(folder, image_ids=list(NUMBERS))
    return "from_hdf5", {"hdf5": "val36.hdf5"}


def hdf5_by_id(folder):
    """Sizes as (width, height), which the boxes tell."""
    with h5py.File(folder / "detections.h5", "w") as file:
        for number, count in zip(NUMBERS, (2, 3), strict=True):
            file[f"{number}_features"], file[f"{number}_boxes"] = regions(count), pixels(count)
            file[f"{number}_size"] = [200, 100]
    captions(folder)
    return "from_hdf5", {"hdf5": "detections.h5", "size_order": "wh", "max_regions": "100"}


def lmdb(folder):
    values = {key: test_lmdb.npz(test_lmdb.uniter(count)[0]) for key, count in zip(test_lmdb.KEYS, (3, 2), strict=True)}
    (folder / "img_db").mkdir()
    test_lmdb.write(folder / "img_db" / "feat_th0.2_max100_min10", values)
    captions(folder)
    return "from_lmdb", {"lmdb": "img_db/feat_th0.2_max100_min10", "max_regions": "100"}


def vinvl(folder):
    (folder / "model_0060000").mkdir()
    rows = [test_vinvl.row(number, features) for number, (features, _) in zip(NUMBERS, test_vinvl.IMAGES, strict=True)]
    test_vinvl.write(folder / "model_0060000" / "features.tsv", rows, index=True)
    (folder / "model_0060000" / "imageid2idx.json").write_text(json.dumps({"42": 0, "139": 1}))
    captions(folder)
    return "from_vinvl", {"vinvl": "model_0060000/features.tsv", "max_regions": "100"}


def vinvl_with_labels(folder):
    rows, labels = [], []
    for number, (features, boxes) in zip(NUMBERS, test_vinvl.IMAGES, strict=True):
        rows.append(test_vinvl.json_row(number, features[:2]))
        labels.append([number, json.dumps(test_vinvl.objects(2, boxes[:2]))])
    test_vinvl.write(folder / "val.feature.tsv", rows)
    test_vinvl.write(folder / "val.label.tsv", labels)
    captions(folder)
    return "from_vinvl", {"vinvl": "val.feature.tsv", "vinvl_labels": "val.label.tsv"}


def torch(folder):
    """As Oscar's retrieval has it, with the captions."""
    torch_writer.save(folder / "val_img_frcnn_feats.pt", {int(number): regions(3) for number in NUMBERS})
    torch_writer.save(folder / "val_captions.pt", {int(number): ["a dog"] for number in NUMBERS})
    return "from_torch", {"torch": "val_img_frcnn_feats.pt", "captions": "val=val_captions.pt"}


def panoptic(folder):
    test_sources._write_panoptic(folder / "panoptic_val2017")
    entries = [{"id": int(number), "file_name": file} for number, file in zip(NUMBERS, FILES, strict=True)]
    notes = [{"image_id": int(number), "id": int(number), "caption": "a dog"} for number in NUMBERS]
    (folder / "captions_val2017.json").write_text(json.dumps({"images": entries, "annotations": notes}))
    flags = {"panoptic": "panoptic_val2017.json", "panoptic_png": "panoptic_val2017"}
    return "from_panoptic", flags | {"captions": "val=captions_val2017.json"}


def upsnet(folder):
    (folder / "pan_2ch").mkdir()
    for number in NUMBERS:
        labels = np.zeros((8, 9, 3), np.uint8)
        labels[..., 0] = int(number) % 100
        Image.fromarray(labels).save(folder / "pan_2ch" / f"{int(number):012}.png")
    captions(folder)
    return "from_upsnet", {"upsnet": "pan_2ch"}


def embeddings(folder):
    for name in ("train", "val"):
        test_embeddings._folder(folder / name, {f"{name}.jpg": ["a dog"]})
    entries = {"train.jpg": ["a dog"], "val.jpg": ["a dog"]}
    test_embeddings._captions(folder / "dataset.json", entries, splits={"val.jpg": "val"})
    return "from_embeddings", {"embeddings": "train,val", "captions": "dataset.json"}


def clip_retrieval(folder):
    test_from_clip_retrieval._shard(folder, "0", [("1.jpg", "a dog"), ("2.jpg", "a cat")])
    return "from_clip_retrieval", {"src": "", "split": "train"}


def person_search(folder):
    test_from_person_search.folder(folder, test_from_person_search.rows())
    return "from_person_search", {"annotations": "raw.json", "images": "imgs"}


def scan(folder):
    for split in ("train", "dev"):
        np.save(folder / f"{split}_ims.npy", np.stack([regions(4), regions(4)]))
        (folder / f"{split}_caps.txt").write_text("a dog\n" * 10)
        (folder / f"{split}_ids.txt").write_text(f"{split}1.jpg\n{split}2.jpg\n")
    return "from_scan", {"src": ""}


def scan_with_channels_last(folder):
    np.save(folder / "val_grids.npy", RNG.normal(size=(2, 7, 7, 64)).astype(np.float32))
    (folder / "val_caps.txt").write_text("a dog\n" * 10)
    return "from_scan", {"src": "", "layout": "hwc"}


def npy(folder):
    (folder / "val_ids.txt").write_text("".join(f"{number}\n" for number in NUMBERS))
    (folder / "val_caps.txt").write_text("a dog\n" * 4)
    (folder / "features").mkdir()
    for number, count in zip(NUMBERS, (2, 3), strict=True):
        np.save(folder / "features" / f"{number}.npy", regions(count))
    return "from_npy", {"src": "", "features": "features", "as": "regions", "max_units": "100"}


def photographs(folder):
    (folder / "photos").mkdir()
    for number, file in enumerate(FILES):
        (folder / "photos" / file).write_bytes(test_containers._picture(number, "JPEG"))
    with (folder / "captions.txt").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], *([file, "a dog, running"] for file in FILES)])
    (folder / "Flickr_8k.trainImages.txt").write_text(f"{FILES[0]}\n")
    (folder / "Flickr_8k.devImages.txt").write_text(f"{FILES[1]}\n")
    lists = "val=Flickr_8k.devImages.txt,train=Flickr_8k.trainImages.txt"
    return "extract", {"images": "photos", "captions": "captions.txt", "split_lists": lists}


def coco_photographs(folder):
    for number, file in enumerate(FILES):
        (folder / f"images/val201{number}").mkdir(parents=True)
        (folder / f"images/val201{number}" / file).write_bytes(test_containers._picture(number, "PNG"))
    captions(folder, [f"val2010/{FILES[0]}", f"val2011/{FILES[1]}"])
    return "extract", {"images": "images"}


def tars(folder):
    test_containers._img2dataset(folder, 0, 3)
    return "extract", {"images": "", "split": "train"}


def tars_that_say_their_split(folder):
    test_containers._img2dataset(folder, 0, 3, split="val")
    return "extract", {"images": ""}


def pictures_in_parquet(folder):
    pq.write_table(test_containers._hub(), folder / "test-00000-of-00001.parquet")
    return "extract", {"images": ""}


COMPLETE = (
    *(bottom_up, bottom_up_with_header, bottom_up_with_bom, grids, grids_of_torch, transposed, npz, make_bu_data),
    *(boxes_in_shares, boxes_without_sizes, hdf5_rows, hdf5_with_ids, hdf5_with_ids_of_numpy, hdf5_with_texts),
    *(hdf5_by_id, lmdb, vinvl, vinvl_with_labels, torch, panoptic),
    *(upsnet, embeddings, clip_retrieval, person_search, scan, scan_with_channels_last, npy, photographs),
    *(coco_photographs, tars, tars_that_say_their_split, pictures_in_parquet),
)
OTHERS = ("captions", "name", "out", "segmenter", "backbone")


def commands(text):
    """Module and flags of each command in a report, as a shell would split it."""
    parsed = []
    for line in text.split("\n"):
        if line.startswith("  shnet data "):
            _, _, module, *words = shlex.split(line)
            parsed.append((module, dict(word[2:].split("=", 1) for word in words)))
    return parsed


def whole(folder, value):
    """The value of a flag, with the folder before each name that is one of a file."""
    parts = value.split(",")
    split = [(part.partition("=")[0] + "=", part.partition("=")[2]) if "=" in part else ("", part) for part in parts]
    return ",".join(
        f"{name}{folder / rest}" if rest == "" or (folder / rest).exists() else part
        for (name, rest), part in zip(split, parts, strict=True)
    )


@pytest.mark.parametrize("make", COMPLETE, ids=lambda make: make.__name__)
def test_the_command_imports_the_folder(make, tmp_path, monkeypatch):
    folder = tmp_path / "a folder, of=mine"
    folder.mkdir()
    module, expected = make(folder)
    text, known = recognise(folder)
    assert known, text
    [(actual, flags)] = commands(text)
    assert actual == module and "needed:" not in text and "not read" not in text, text
    shown = {name: value for name, value in flags.items() if name not in OTHERS or name in expected}
    assert shown == {name: whole(folder, value) for name, value in expected.items()}, text
    assert flags["name"] == "a_folder_of_mine" and flags["out"] == "data_sets"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extract, "load_extractor", lambda settings, device: conftest.Colours())
    [words] = [shlex.split(line)[3:] for line in text.split("\n") if line.startswith("  shnet data ")]
    assert import_module(f"data_prep.{'extract.__main__' if actual == 'extract' else actual}").main(words) == 0
    text, known = recognise(tmp_path / "data_sets")
    assert known and "shnet data verify " in text and "shnet train --config=" in text
    assert sum(open_dataset(tmp_path / "data_sets").splits.values()) > 1
    assert "a_folder_of_mine/1.0.0" in text


def test_the_command_names_the_splits_of_a_data_set(tmp_path):
    write_dataset(tmp_path, "toy", {"train": [record(0)], "dev": [record(1)]}, {})
    assert " --config.data.val_split=dev --config.text.weights=" in recognise(tmp_path)[0]
    (tmp_path / "toy/1.0.0/dataset_info.json").write_text("{")
    text, known = recognise(tmp_path)
    assert known and "val_split" not in text


# ------------------------------------------------------------------------------------------------ what is not complete


def needs(tmp_path, *expected, known=True):
    text, actual = recognise(tmp_path)
    assert actual == known and all(part in text for part in expected), text
    return text


@pytest.mark.parametrize("make", [npz, grids, upsnet, coco_photographs])
def test_captions_that_are_missing(make, tmp_path):
    make(tmp_path)
    (tmp_path / "dataset_coco.json").unlink()
    needs(tmp_path, "--captions=CAPTIONS", "needed: captions of the images")


def test_ids_of_rows_that_are_missing(tmp_path):
    hdf5(tmp_path)
    (tmp_path / "ids.txt").write_text("42\n")
    text = needs(tmp_path, "shnet data from_hdf5", "needed: the ids of the rows: --hdf5_ids=FILE")
    assert "--hdf5_ids=/" not in text


def test_pictures_of_annotations_that_are_missing(tmp_path):
    panoptic(tmp_path)
    for path in (tmp_path / "panoptic_val2017").iterdir():
        path.unlink()
    needs(tmp_path, "shnet data from_panoptic", "needed: the folder of its PNG files: --panoptic_png=DIR")
    made = test_from_person_search.rows()
    (tmp_path / "raw.json").write_text(json.dumps(made))
    needs(tmp_path, "shnet data from_person_search", f"needed: the folder of its pictures, with {made[0]['file_path']}")


def test_texts_of_the_scan_layout_alone(tmp_path):
    (tmp_path / "val_caps.txt").write_text("a dog\n")
    needs(tmp_path, "SCAN's layout, val", "needed: SPLIT_ims.npy or another array")


def test_an_array_of_all_images(tmp_path):
    np.save(tmp_path / "val.npy", np.stack([regions(3)] * 2))
    needs(tmp_path, "looks like an array of all images", "SPLIT_ims.npy", "needed: features", known=False)


@pytest.mark.parametrize("says", [True, False])
def test_captions_alone(says, tmp_path):
    rows = [{"image": "a.jpg", "caption": "a dog"} | ({"split": "val"} if says else {})] * 2
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = needs(tmp_path, "captions in JSONL", "needed: features or photographs of these images")
    assert (", without splits" in text) != says and not commands(text)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.json", json.dumps([{"image": "a.jpg", "caption": ["a dog"], "image_id": 3}]), "in a JSON list"),
        ("a.json", json.dumps({"a.jpg": ["a dog"], "b.jpg": ["a cat"]}), "by image in JSON"),
        ("a.token", "a.jpg#0\ta dog\n", "in TOKEN"),
        ("a.txt", "image,caption\na.jpg,a dog\n", "in TXT"),
        ("results.csv", "image_name| comment_number| comment\na.jpg| 0| a dog\n", "in CSV"),
        ("a.tsv", "image\tcaption\na.jpg\ta dog\n", "in TSV"),
    ],
)
def test_kinds_of_captions(name, content, kind, tmp_path):
    (tmp_path / name).write_text(content)
    needs(tmp_path, f"{name}: captions {kind}, without splits")
    needs(tmp_path / name, f"{name}: captions {kind}, without splits")


def test_captions_of_each_split_and_others(tmp_path):
    npz(tmp_path)
    (tmp_path / "dataset_coco.json").unlink()
    for split in ("train", "val"):
        (tmp_path / f"coco_{split}.json").write_text(json.dumps([{"image": FILES[0], "caption": "a dog"}]))
    [(_, flags)] = commands(needs(tmp_path))
    assert flags["captions"] == f"train={tmp_path / 'coco_train.json'},val={tmp_path / 'coco_val.json'}"
    captions(tmp_path)
    text = needs(tmp_path, "note: other captions there: coco_train.json, coco_val.json")
    assert commands(text)[0][1]["captions"] == str(tmp_path / "dataset_coco.json")


def test_captions_among_many_files(tmp_path):
    for number in range(250):
        np.savez(tmp_path / f"COCO_{number:03}.npz", x=regions(2))
        (tmp_path / f"COCO_{number:03}.txt").write_text("a dog")
    captions(tmp_path)
    [(_, flags)] = commands(needs(tmp_path))
    assert flags["captions"] == str(tmp_path / "dataset_coco.json")


def test_sizes_in_another_folder_than_the_captions(tmp_path):
    make_bu_data(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "instances_val2014.json").rename(tmp_path / "annotations" / "instances_val2014.json")
    [(_, flags)] = commands(needs(tmp_path))
    assert flags["sizes"] == str(tmp_path / "annotations" / "instances_val2014.json")


def test_several_sources_of_the_same_images(tmp_path):
    npz(tmp_path)
    upsnet(tmp_path)
    text = needs(tmp_path, "go into one data set: give one command the flags of the others too")
    (module, flags), (other, more) = commands(text)
    assert (module, other) == ("from_npz", "from_upsnet")
    out = tmp_path / "out"
    words = [f"--{name}={value}" for name, value in (flags | more | {"out": str(out)}).items()]
    assert from_npz.main(words) == 0 and {"regions", "boxes", "seg_map"} <= set(open_dataset(out).features)


def test_keys_at_the_end_of_a_long_file(tmp_path):
    images = [{"id": number, "file_name": f"{number:012}.jpg", "coco_url": "http://a"} for number in range(3000)]
    notes = [{"image_id": 1, "id": 1, "caption": "a dog"}]
    (tmp_path / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": notes}))
    needs(tmp_path, "captions in COCO's JSON, without splits")
    assert len(places.ends(tmp_path / "captions_val2017.json")) < 150_000


def test_hdf5_files_of_two_splits_and_of_another_layout(tmp_path):
    for split in ("train", "val"):
        hdf5(tmp_path, f"{split}36.hdf5")
    (tmp_path / "a_val_ids.txt").write_text("42\n139\n")
    (tmp_path / "b_train_ids.txt").write_text("1\n2\n")
    hdf5_by_id(tmp_path)
    flags_of_each = [flags for _, flags in commands(needs(tmp_path))]
    assert [flags["hdf5"] for flags in flags_of_each] == [
        str(tmp_path / "detections.h5"),
        f"{tmp_path / 'train36.hdf5'},{tmp_path / 'val36.hdf5'}",
    ]
    assert flags_of_each[1]["hdf5_ids"] == f"{tmp_path / 'b_train_ids.txt'},{tmp_path / 'a_val_ids.txt'}"


def test_dark_photographs_are_no_label_maps(tmp_path):
    (tmp_path / "1.png").write_bytes(test_containers._picture(1))
    [(module, _)] = commands(needs(tmp_path, "1 photographs"))
    assert module == "extract"


def test_weights_are_no_features(tmp_path):
    torch_writer.save(tmp_path / "model.pth", {"fc.weight": regions(3), "fc.bias": regions(3)})
    needs(tmp_path, "needed: features", known=False)


def test_splits_in_the_metadata(tmp_path):
    test_from_clip_retrieval._shard(tmp_path, "0", [("1.jpg", "a dog")], split=["val"])
    [(module, flags)] = commands(needs(tmp_path))
    assert module == "from_clip_retrieval" and "split" not in flags


def test_a_folder_called_as_a_split_is(tmp_path, monkeypatch):
    """In the folder that one stands in: the flag --split=train is no path."""
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path)
    assert places.Recognised("", "", {"src": "train", "split": "val"}).paths == [Path("train")]
    assert places.Recognised("", "", {"src": "val", "split": "train"}).paths == []


def test_captions_without_splits(tmp_path):
    npz(tmp_path)
    (tmp_path / "dataset_coco.json").unlink()
    (tmp_path / "mine.csv").write_text(f"image,caption\n{FILES[0]},a dog\n")
    [(_, flags)] = commands(needs(tmp_path, "says no splits: all images become train"))
    assert flags["captions"] == f"train={tmp_path / 'mine.csv'}"


def test_what_nobody_takes(tmp_path):
    for name in ("a.zip", "b.zip", "c.pkl", "d.mat", "e.weird"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "inner").mkdir()
    text = needs(tmp_path, "2 .zip, 1 .pkl, 1 .mat, 1 .weird, 1 folders (inner)", known=False)
    assert (
        "unpack them first" in text and "pickles are not loaded" in text and "needed: features, or photographs" in text
    )


def test_faults_are_said(tmp_path):
    (tmp_path / "a.npz").write_text("version https://git-lfs.github.com/spec/v1\n")
    needs(tmp_path, "not read: ", "git lfs pull", known=False)
    (tmp_path / "texts").mkdir()
    test_lmdb.write(tmp_path / "texts" / "txt.db", {b"1": b"\x04\x22\x4d\x18 a text"})
    needs(tmp_path, "LZ4 (UNITER's texts?)", known=False)
    (tmp_path / "captions.json").write_text("<!DOCTYPE html>")
    needs(tmp_path, "captions.json: found a web page in place of the file", known=False)
    with pytest.raises(DataError, match="no such folder or file"):
        recognise(tmp_path / "b")


def test_links_pipes_and_folders_that_vanish(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "a.npz")  # which no one writes to
    (tmp_path / "b.npz").symlink_to(tmp_path / "nowhere")
    for name in ("gone", "there"):
        (tmp_path / name).mkdir()
    np.savez(tmp_path / "there" / "1.npz", x=regions(2))
    look = recognition.look

    def vanished(path):
        if path.name == "gone":
            raise DataError("gone: no such folder or file")
        return look(path)

    monkeypatch.setattr(recognition, "look", vanished)
    text = needs(tmp_path, "1 .npz, 2 folders", "not read: gone: no such folder", "b.npz: No such file")
    assert [flags["npz"] for _, flags in commands(text)] == [str(tmp_path / "there")]


def test_a_first_image_that_cannot_be_read(tmp_path):
    (tmp_path / "f").mkdir()
    np.savez(tmp_path / "f" / "1.npz", x=np.zeros((2, 3, 4, 5, 6)))
    needs(tmp_path, "shnet data from_npz", "note: the first image cannot be read: ", "expected an array of one image")


@pytest.mark.parametrize(("make", "library"), [(hdf5_rows, "h5py"), (lmdb, "lmdb"), (clip_retrieval, "pyarrow")])
def test_a_library_that_is_missing(make, library, tmp_path, monkeypatch):
    module, _ = make(tmp_path)
    find_spec = places.find_spec
    monkeypatch.setattr(places, "find_spec", lambda name: None if name == library else find_spec(name))
    text = needs(tmp_path, f"pip install -e '.[{next(e for e, name in places.LIBRARIES.items() if name == library)}]'")
    assert [name for name, _ in commands(text)] == [module]


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_no_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hdf5(tmp_path)
    for name in ("a.pt", "b.pth", "ids.pkl", "1.npz", "c.th"):
        (tmp_path / name).write_bytes(pickle.dumps({1: Bomb()}))
    test_lmdb.write(tmp_path / "db", {b"1": pickle.dumps(Bomb(), 2)})
    needs(tmp_path, "needed: the ids of the rows", "not read: ")
    assert not (tmp_path / "exploded").exists()


def test_little_is_read_of_a_large_folder(tmp_path, monkeypatch):
    (tmp_path / "f").mkdir()
    for number in range(120):
        np.savez(tmp_path / "f" / f"{number:03}.npz", x=regions(2))
    captions(tmp_path)
    read, opened = npz_source.read_npz, []
    monkeypatch.setattr(npz_source, "read_npz", lambda path, *rest: opened.append(path) or read(path, *rest))
    needs(tmp_path, "120 files ID.npz with x")
    assert len(opened) == 1 + places.SAMPLE
    monkeypatch.setattr(places, "MOST", 50)
    needs(tmp_path / "f", "50 .npz among the first 50 entries")


def test_folders_that_are_not_looked_into_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(recognition, "_FOLDERS", 3)
    for name in "abcde":
        (tmp_path / name).mkdir()
    needs(tmp_path, f"not read: 3 more folders, such as {tmp_path / 'c'}", known=False)


def test_a_file_alone(tmp_path):
    hdf5_rows(tmp_path)
    [(module, flags)] = commands(needs(tmp_path / "val36.hdf5"))
    assert module == "from_hdf5" and flags["captions"] == str(tmp_path / "dataset_coco.json")
    test_containers._img2dataset(tmp_path / "in", 0, 2)
    [(module, flags)] = commands(needs(tmp_path / "in" / "00000.tar"))
    assert module == "extract" and flags["images"] == str(tmp_path / "in" / "00000.tar")


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_importers_are_listed(arguments, capsys):
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out.split("\n")
    modules = [path.stem for path in Path(parts.__file__).parent.glob("from_*.py")]
    for module in [*modules, "extract"]:
        assert len([line for line in lines if line.startswith(f"  {module} --")]) == 1
    for name, part in parts.PARTS.items():
        [line] = [line for line in lines if f" --{name}=" in line]
        assert part.help in line
    for module, extra in (("hdf5", "hdf5"), ("lmdb", "lmdb"), ("clip_retrieval", "parquet")):
        assert f"(extra {extra})" in next(line for line in lines if f"from_{module} " in line)
    assert lines[-2].endswith("other commands: encode_captions, relations, verify, people, scenes")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_an_importer_by_its_name(tmp_path, monkeypatch, capsys):
    """Also where a folder is called so."""
    (tmp_path / "npz").mkdir()
    monkeypatch.chdir(tmp_path)
    npz(tmp_path)
    flags = ["--npz=f", "--captions=dataset_coco.json", "--name=toy", "--out=out", "--max_regions=3"]
    for name in ("npz", "from_npz"):
        monkeypatch.setattr("sys.argv", [])  # which is set for the importer
        with pytest.raises(SystemExit) as ended:
            command.main([name, *flags, "--overwrite"])
        assert ended.value.code == 0 and dict(open_dataset(tmp_path / "out").splits) == {"val": 2}
    assert command.main(["npz"]) == 1
    assert "npz: nothing" in capsys.readouterr().out
    assert command.main(["nothing"]) == 1
    assert re.search("error: nothing: expected a folder, a file or one of .*from_bottom_up", capsys.readouterr().err)


def test_importers_name_the_command(tmp_path, capsys):
    assert from_scan.main([f"--src={tmp_path}", "--name=a", f"--out={tmp_path}"]) == 1
    assert f"see: shnet data {tmp_path}" in capsys.readouterr().err
