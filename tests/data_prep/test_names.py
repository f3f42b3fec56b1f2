"""Which entry of a joined file belongs to which image."""

import json

import numpy as np
import pytest

from data_prep import from_npy, scene_graphs
from data_prep.names import Ambiguous, FileNames, Names
from data_prep.schema import DataError
from data_prep.sources.panoptic import Panoptic
from shnet_jax.data.records import open_dataset


def _names(*entries):
    names = Names("file.tsv")
    for entry in entries:
        names.add(entry, [entry])
    return names


@pytest.mark.parametrize(
    ("entry", "image_id"),
    [
        ("a.jpg", "a.jpg"),
        ("a", "a.JPG"),
        ("a.png", "a.jpg"),  # a label map of a photograph
        ("a.tif", "a"),
        ("a.webp", "a"),
        ("a.bmp", "a.gif"),
        ("391895", "COCO_val2014_000000391895.jpg"),
        ("COCO_val2014_000000391895", "000000391895.jpg"),
        ("000000391895", "391895"),
    ],
)
def test_one_entry_of_that_name_or_number(entry, image_id):
    assert _names("b", entry, "v1.5").find(image_id) == [entry]


@pytest.mark.parametrize("image_id", ["v1", "v1.6", "x/a.jpg", "dog_12", "12.5", "٣.jpg"])
def test_no_entry(image_id):
    assert _names("a.jpg", "v1.5", "12", "3").find(image_id) is None


def test_two_entries_of_one_number():
    names = _names("001", "1", "a.png", "a.tif")
    assert names.find("1.jpg") == ["1"] and names.find("001.jpg") == ["001"]
    with pytest.raises(Ambiguous, match=r"^file\.tsv: image '00001\.jpg': .* found '001' and '1'; give"):
        names.find("00001.jpg")
    with pytest.raises(Ambiguous, match=r"image 'a\.jpg': .* found 'a\.png' and 'a\.tif'"):
        names.find("a.jpg")


@pytest.mark.parametrize("images", [("001.jpg", "1.jpg"), ("1.jpg", "001.jpg"), ("1.jpg", "1.png"), ("1", "1.jpg")])
def test_two_images_of_one_number(images):
    names = _names("1", "2")
    assert names.find(images[0]) == names.find(images[0]) == ["1"]  # an image may be in two splits
    with pytest.raises(Ambiguous, match=rf"entry '1': .* found '{images[0]}' and '{images[1]}'"):
        names.find(images[1])


def test_an_entry_of_two_names_is_one():
    names, entry = Names("x"), ["a"]
    for name in ("139", "000000000139.jpg"):
        names.add(name, entry)
    assert names.find("139.png") is entry
    with pytest.raises(Ambiguous, match=r"found '139\.png' and '000000000139\.jpg'"):
        names.find("000000000139.jpg")


def test_files_of_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("7.npy", "b.jpg.npy", "c.pth", "c.npy", "sub/7.npy", "7.txt"):
        (tmp_path / name).write_text("")
    names = FileNames(tmp_path, (".npy", ".pth"))
    expected = {"COCO_x_007.jpg": "7.npy", "b.jpg": "b.jpg.npy", "c.jpg": "c.npy", "sub/007.jpg": "sub/7.npy"}
    assert {image_id: names.find(image_id) for image_id in expected} == {k: tmp_path / v for k, v in expected.items()}
    assert names.find("d") is None and names.find("nowhere/7") is None


def _import(tmp_path, ids, files, *flags):
    for folder in ("src", "features"):
        (tmp_path / folder).mkdir()
    for name in files:
        np.save(tmp_path / "features" / name, np.full((2, 3), int(name), np.float32))
    (tmp_path / "src" / "train_ids.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
    (tmp_path / "src" / "train_caps.txt").write_text("a caption\n" * len(ids))
    folders = [f"--src={tmp_path / 'src'}", f"--features={tmp_path / 'features'}"]
    return from_npy.main([*folders, "--as=grid", "--name=toy", f"--out={tmp_path / 'out'}", *flags])


@pytest.mark.parametrize("flags", [[], ["--on_bad_record=skip"], ["--absent=skip"]])
def test_images_never_share_features(tmp_path, capsys, flags):
    assert _import(tmp_path, ["001.jpg", "1.jpg"], ["1"], *flags) == 1
    assert "entry '1': expected one image that it belongs to, found '001.jpg' and '1.jpg'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "toy" / "1.0.0").exists()


def test_images_of_equal_number_have_their_own_features(tmp_path):
    assert _import(tmp_path, ["001.jpg", "1.jpg"], ["001", "1"]) == 0
    assert open_dataset(tmp_path / "out").image_ids("train").tolist() == ["001.jpg", "1.jpg"]


def test_a_panoptic_file_of_running_numbers_and_numbered_names(tmp_path):
    """Image 2.jpg has the number 1: its name counts, not the number of another."""
    images = [{"id": 1, "file_name": "2.jpg"}, {"id": 2, "file_name": "1.jpg"}]
    entries = [{"image_id": n, "file_name": f"of_{n}.png", "segments_info": []} for n in (1, 2)]
    (tmp_path / "p.json").write_text(json.dumps({"images": images, "annotations": entries}))
    source = Panoptic(tmp_path / "p.json", tmp_path)
    assert source._entries.find("2.jpg")[0] == "of_1.png" and source._entries.find("1.jpg")[0] == "of_2.png"


def test_scene_graphs_are_found_by_number(tmp_path):
    empty = {"objects": [], "relationships": []}
    path = tmp_path / "graphs.json"
    path.write_text(json.dumps([{"image_id": number, **empty} for number in (42, 7)]))
    graphs = scene_graphs.read_graphs(path)
    assert graphs.find("COCO_val2014_000000000042.jpg") and not graphs.find("8.jpg")
    path.write_text(json.dumps([{"image_id": 42, **empty}] * 2))
    with pytest.raises(DataError, match="image 42: expected one entry, found two"):
        scene_graphs.read_graphs(path)
