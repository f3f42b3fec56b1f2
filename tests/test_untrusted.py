"""Files of somebody else: pickles, bombs, sizes that are not true, names that lead elsewhere."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import base
from data_prep import captions, files
from data_prep.bad_records import Bad
from data_prep.extract import images
from data_prep.from_person_search import Annotation, Pictures
from data_prep.schema import DataError
from data_prep.sources.bottom_up import BottomUp
from data_prep.sources.panoptic import Panoptic, Upsnet
from data_prep.sources.units import UnitFiles
from shnet_jax import registry, untrusted
from shnet_jax.data.records import open_dataset
from shnet_jax.interop import weights_file
from shnet_jax.interop.bert_weights import read_tensors
from shnet_jax.interop.torch_file import open_torch_file
from shnet_jax.modes.convert import load_folder
from shnet_jax.retrieve import pictures, tensors
from shnet_jax.training.workdir import WorkdirError, save_config, trained_config


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def peak(read, *arguments) -> int:
    """Bytes that a call takes at most; it has to fail."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"expected|more than|should"):
            read(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("read", ["npy", "npz"])
def test_a_pickle_in_an_array_is_not_loaded(read, tmp_path):
    trace = tmp_path / "ran"
    bomb = np.array([Bomb(trace)], object)
    if read == "npy":
        np.save(tmp_path / "0.npy", bomb, allow_pickle=True)
        with pytest.raises(DataError, match=r"0\.npy: expected a \.npy array of numbers"):
            UnitFiles(tmp_path, "grid").read("0")
        (tmp_path / "0.npy").write_bytes(pickle.dumps(Bomb(trace)))  # np.load would take it for one of these
        with pytest.raises(DataError, match=r"0\.npy: expected a \.npy array"):
            UnitFiles(tmp_path, "grid").read("0")
    else:
        np.savez(tmp_path / "0.npz", a=bomb)
        with pytest.raises(ValueError, match=r"0\.npz: .*Python objects"):
            untrusted.read_npz(tmp_path / "0.npz")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()  # it would have


def header(shape: str, dtype: str = "<f8", data: bytes = b"") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


@pytest.mark.parametrize(
    "data",
    [
        header("(1073741824, 1024)"),
        header("(1000000000000,)", data=bytes(800)),
        header("(-1, -8)", data=bytes(8)),
        header("(2,", data=bytes(16)),
        header("(" * 60 + "2" + ",)" * 60),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{",
        header("(2,)", data=bytes(15)),
        b"\x93NUMPY\x09\x00",
        b"PK\x03\x04",
        b"",
    ],
)
def test_headers_that_say_what_is_not_so(data, tmp_path):
    (tmp_path / "0.npy").write_bytes(data)
    assert peak(files.open_array, tmp_path / "0.npy") < 2**23
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as archive:
        archive.writestr("a.npy", data)
    assert peak(untrusted.read_npz, tmp_path / "0.npz") < 2**23


def test_arrays_of_an_npz_are_those_that_were_saved(tmp_path):
    arrays = {
        "a": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "text": np.array(["ü", "犬 dog"]),
        "empty": np.zeros((0, 3), bool),
        "scalar": np.array(7, ">i4"),
    }
    np.savez(tmp_path / "0.npz", **arrays)
    found = untrusted.read_npz(tmp_path / "0.npz")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and not found[name].flags.writeable
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("code", [0x110000, 0xFFFFFFFF, 0xD800])
def test_text_that_is_no_unicode(code, order, tmp_path):
    codes = np.array([0x41, code], f"{order}u4")
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as archive:
        archive.writestr("a.npy", header("(2,)", f"{order}U1", codes.tobytes()))
    with pytest.raises(ValueError, match=r"'a\.npy' holds text that is no Unicode"):
        untrusted.read_npz(tmp_path / "0.npz")


def test_compressed_arrays_are_read_up_to_a_bound(tmp_path):
    arrays = {"x": np.arange(600.0).reshape(20, 30), "y": np.zeros(10**6), "z": np.array([{}], object)}
    np.savez_compressed(tmp_path / "0.npz", **arrays)
    found = untrusted.read_npz(tmp_path / "0.npz", ("x", "absent"), 4928)
    assert found.keys() == {"x"}
    np.testing.assert_array_equal(found["x"], arrays["x"])
    with pytest.raises(ValueError, match="together have 4928 bytes, more than the 4927"):
        untrusted.read_npz(tmp_path / "0.npz", ("x",), 4927)
    assert peak(untrusted.read_npz, tmp_path / "0.npz", ("x", "y"), 10**6) < 10**6
    with pytest.raises(ValueError, match="is compressed"):
        untrusted.read_npz(tmp_path / "0.npz", ("x",))
    with zipfile.ZipFile(tmp_path / "0.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", header("(2,)", data=bytes(16)))
    with pytest.raises(ValueError, match=r"np\.savez_compressed does not use"):
        untrusted.read_npz(tmp_path / "0.npz", ("x",), 10**6)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as archive:
        for _ in range(2):
            archive.writestr("x.npy", header("(2,)", data=bytes(16)))
    with pytest.raises(ValueError, match="two arrays of one name"):
        untrusted.read_npz(tmp_path / "0.npz")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "found an empty file"),
        (bytes(5000), "found zeros"),
        (b"\n<?xml", "found a page of HTML"),
        (b"\x1f\x8b\x08", "found a gzip archive"),
        (pickle.dumps([1], 2), "found a pickle, which is not loaded"),
    ],
)
def test_a_file_of_another_kind_is_named(data, match, tmp_path):
    for name, read in (("0.npy", untrusted.open_npy), ("0.npz", untrusted.read_npz)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}: expected .*{match}"):
            read(tmp_path / name)


def test_a_map_without_cells(tmp_path):
    np.save(tmp_path / "0.npy", np.zeros((0, 2, 2)))
    with pytest.raises(DataError, match=r"0\.npy: expected features, found an empty array \[0, 2, 2\]"):
        UnitFiles(tmp_path, "grid").read("0")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "0.npz", a=np.zeros(10**7))
    assert (tmp_path / "0.npz").stat().st_size < 10**5
    assert peak(untrusted.read_npz, tmp_path / "0.npz") < 2**23
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as archive:  # two entries of the directory for the same bytes
        archive.writestr("a.npy", header("(1000,)", data=bytes(8000)))
        archive.filelist.append(copy.copy(archive.filelist[0]))
        archive.filelist[1].filename = "b.npy"
    with pytest.raises(ValueError, match=r"should be larger than the file|[Oo]verlap"):
        untrusted.read_npz(tmp_path / "0.npz")
    with zipfile.ZipFile(tmp_path / "0.npz", "w") as archive:
        for number in range(untrusted.MAX_ARRAYS + 1):
            archive.writestr(f"{number}.npy", b"")
    with pytest.raises(ValueError, match="1001 arrays, more than 1000"):
        untrusted.read_npz(tmp_path / "0.npz")


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}, "does not fit"),
        ({"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, "is described by"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "is described by"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, "is described by"),
        ([], "is described by"),
    ],
)
def test_a_safetensors_header_that_lies(entry, match, tmp_path):
    text = json.dumps({"vector": entry}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match=match):
        tensors.open_mapped(tmp_path / "x")
    (tmp_path / "x").write_bytes(struct.pack("<Q", 2**60) + text)
    with pytest.raises(ValueError, match="its header would have"):
        tensors.open_mapped(tmp_path / "x")


@pytest.mark.parametrize("code", ["F8_E4M3", "F4", "X"])
def test_numbers_of_a_kind_that_is_not_known(code, tmp_path):
    text = json.dumps({"a": {"dtype": code, "shape": [2], "data_offsets": [0, 1 if code == "F4" else 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(1 if code == "F4" else 2))
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        read_tensors(tmp_path)


# ---------------------------------------------------------------------------------------------------- JSON and pictures


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": 1', "9" * 5000, '"\xff"'])
def test_json_that_is_none(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1" if "\xff" in text else "utf-8"))
    with pytest.raises(ValueError, match=r"a\.json: expected JSON"):
        untrusted.read_object(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"a\.json: expected JSON"):
        captions.read(f"train={tmp_path / 'a.json'}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
def test_json_in_every_encoding(encoding, tmp_path):
    (tmp_path / "a.json").write_bytes('{"ä": "犬"}'.encode(encoding))
    assert untrusted.read_object(tmp_path / "a.json") == {"ä": "犬"}


@pytest.mark.parametrize(("text", "what"), [('{"a": [1, 2', "a file that is cut off"), ("a: 1", "other text")])
def test_json_that_is_cut_off_is_told_from_other_text(text, what, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json: expected JSON, found {what}: "):
        untrusted.read_json(tmp_path / "a.json")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
READERS = {
    "json": untrusted.read_json,
    "npy": untrusted.open_npy,
    "npz": untrusted.read_npz,
    "picture": untrusted.read_picture,
    "torch": open_torch_file,
    "weights": weights_file.read_weights,
    "lines": files.read_lines,
    "tsv": lambda path: BottomUp([path]).read("1"),
    "captions": lambda path: captions.read(f"train={path}"),
    "units": lambda path: UnitFiles(path.parent, "grid").read("a"),
    "upsnet": lambda path: Upsnet(path.parent).read("a"),
    "panoptic": lambda path: Panoptic(path, path.parent).read("a"),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(("data", "what"), [(POINTER, "a git-LFS pointer .*git lfs pull"), (b"<html>\n", "a web page")])
def test_what_lies_in_place_of_a_file_is_named(kind, data, what, tmp_path):
    path = tmp_path / {"units": "a.npy", "upsnet": "a.png"}.get(kind, "a.bin")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.\w+: found {what}"):
        READERS[kind](path)


def test_names_of_many_zeros_are_read_in_no_time():
    assert list(captions.keys("0" * 10**6 + "x")) == ["0" * 10**6 + "x"]
    assert (
        list(captions.keys("COCO_val2014_000000391895.jpg"))[-1] == "391895" and list(captions.keys("000"))[-1] == "0"
    )


def test_a_picture_that_another_program_would_read(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was asked"))
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch ran) (w) file\n%%EOF\n"
    (tmp_path / "0.jpg").write_text(text)
    assert Image.open(tmp_path / "0.jpg").format == "EPS"
    with pytest.raises(ValueError, match=r"0\.jpg: expected a picture"):
        pictures.photograph(tmp_path, "0")
    with pytest.raises(images.BrokenImage, match=r"0\.jpg"):
        images.Folder(tmp_path).load("0.jpg")


def test_a_picture_that_is_a_bomb(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = 12_000  # 144 million pixels, which Pillow only warns of
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10**6))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "0.png").write_bytes(bomb)
    with pytest.warns(Image.DecompressionBombWarning):
        assert peak(pictures.photograph, tmp_path, "0") < 2**23
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(images.BrokenImage, match="pixels, more than"):
        images.Folder(tmp_path).load("0.png")
    # A part that says to have 2 GB is looked for in the file, not made room for.
    small = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    part = struct.pack(">I", 2**31 - 1) + b"IDAT" + zlib.compress(bytes(8 * 25))
    (tmp_path / "0.png").write_bytes(bomb[:8] + small + part)
    tracemalloc.start()
    with contextlib.suppress(ValueError):
        pictures.photograph(tmp_path, "0")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    for data in (b"", b"no picture", bomb[:40]):
        (tmp_path / "0.png").write_bytes(data)
        with pytest.raises(ValueError, match=r"0\.png: expected a picture"):
            pictures.photograph(tmp_path, "0")


# --------------------------------------------------------------------------------------------------------------- paths

AWAY = ["../secret", "/etc/passwd", "a/../../secret", "link", "loop", "a" * 300, "", ".." + "/.." * 20 + "/etc/passwd"]


@pytest.fixture
def folder(tmp_path):
    """A folder with links out of it and in a circle, beside a secret; all named as every kind of file."""
    inner = tmp_path / "folder"
    inner.mkdir()
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    array = io.BytesIO()
    np.save(array, np.ones((2, 3)))
    for suffix, data in ((".png", png.getvalue()), ("", png.getvalue()), (".npy", array.getvalue())):
        (tmp_path / f"secret{suffix}").write_bytes(data)
        (inner / f"good{suffix}").write_bytes(data)
        (inner / f"link{suffix}").symlink_to(tmp_path / f"secret{suffix}")
        (inner / f"loop{suffix}").symlink_to(inner / f"loop{suffix}")
        (inner / f"within{suffix}").symlink_to(inner / f"good{suffix}")
    return inner


@pytest.mark.parametrize("name", [*AWAY, "nul\0", "half \ud800", "", ".", "./"])
def test_names_that_lead_out_of_a_folder(name, folder):
    with pytest.raises(ValueError, match="folder"):
        untrusted.inside(folder, name)


def test_names_that_stay_in_a_folder(folder, tmp_path):
    for name in ("good", "within", "a/b.jpg", "..a", "犬.jpg"):
        assert untrusted.inside(folder, name) == folder / name
    (tmp_path / "other").symlink_to(folder)  # a folder that is a link itself
    assert untrusted.inside(tmp_path / "other", "good").is_file()


@pytest.fixture
def hub(tmp_path):
    """The cache of the Hugging Face hub with one file, 0.npy; -> (repository, snapshot)."""
    repository = tmp_path / "hub" / "datasets--someone--features"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    np.save(tmp_path / "0.npy", np.ones((2, 3)))
    (tmp_path / "0.npy").rename(repository / "blobs" / "f00d")
    (snapshot / "0.npy").symlink_to("../../blobs/f00d")
    (snapshot / "sub" / "1.npy").symlink_to("../../../blobs/f00d")
    return repository, snapshot


def test_blobs_of_a_hub_cache_are_read_through_its_snapshot(hub, tmp_path):
    _, snapshot = hub
    assert UnitFiles(snapshot, "grid").read("0.jpg")["grid"].shape == (2, 3)
    assert UnitFiles(snapshot / "sub", "grid").read("1")["grid"].shape == (2, 3)
    assert untrusted.inside(snapshot, "sub/1.npy").is_file()
    (tmp_path / "mine").symlink_to(snapshot)
    assert untrusted.inside(tmp_path / "mine", "0.npy").is_file()


@pytest.mark.parametrize(
    "change",
    ["blob is a link", "blobs is a link", "of another repository", "no hub", "not blobs", "below blobs", "above"],
)
def test_links_that_only_look_like_a_hub_cache(change, hub, tmp_path):
    repository, snapshot = hub
    secret = tmp_path / "secret"
    secret.mkdir()
    np.save(secret / "f00d.npy", np.ones((2, 3)))
    (secret / "f00d.npy").rename(secret / "f00d")
    folder, name = snapshot, "0.npy"
    match change:
        case "blob is a link":
            (repository / "blobs" / "f00d").unlink()
            (repository / "blobs" / "f00d").symlink_to(secret / "f00d")
        case "blobs is a link":
            (repository / "blobs").rename(tmp_path / "old")
            (repository / "blobs").symlink_to(secret)
        case "of another repository":
            other = repository.with_name("datasets--someone--secret")
            (other / "blobs").mkdir(parents=True)
            (secret / "f00d").rename(other / "blobs" / "f00d")
            (snapshot / "1.npy").symlink_to(other / "blobs" / "f00d")
            name = "1.npy"
        case "no hub":
            repository.rename(repository.with_name("features"))
            folder = repository.with_name("features") / "snapshots" / "0123abc"
        case "not blobs":
            (repository / "refs").mkdir()
            (secret / "f00d").rename(repository / "refs" / "f00d")
            (snapshot / "1.npy").symlink_to("../../refs/f00d")
            name = "1.npy"
        case "below blobs":
            (repository / "blobs" / "x").mkdir()
            (secret / "f00d").rename(repository / "blobs" / "x" / "f00d")
            (snapshot / "1.npy").symlink_to("../../blobs/x/f00d")
            name = "1.npy"
        case "above":  # names are of files in a snapshot
            folder, name = repository / "snapshots", "1.npy"
            (folder / name).symlink_to("../blobs/f00d")
    with pytest.raises(ValueError, match="leads out of this folder by a link"):
        untrusted.inside(folder, name)


@pytest.mark.parametrize("name", [name for name in AWAY if name])
def test_no_source_reads_outside_of_its_folder(name, folder, tmp_path):
    faults = (DataError, ValueError)
    with pytest.raises(faults):
        UnitFiles(folder, "grid").read(name)
    with pytest.raises(faults):
        Upsnet(folder).read(name)
    annotation = {"image_id": 1, "file_name": f"{name}.png", "segments_info": []}
    path = tmp_path / "panoptic.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "x.jpg"}], "annotations": [annotation]}))
    with pytest.raises(DataError, match="folder"):
        Panoptic(path, folder).read("x.jpg")
    with pytest.raises(DataError):
        images.Folder(folder).find(name)
    (bad,) = Pictures([Annotation(f"{name}.png", 1, ("a man",))], folder, (4, 4), 0)
    assert isinstance(bad, Bad) and "folder" in str(bad.error)
    assert pictures.photograph(folder, name) is None
    assert UnitFiles(folder, "grid").read("good")["grid"].shape == (2, 3)  # and what lies there is read
    assert pictures.photograph(folder, "within") is not None


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", "", ".."])
def test_caption_files_name_images_below_the_folder(name, tmp_path):
    table, karpathy = tmp_path / "a.csv", tmp_path / "a.json"
    table.write_text(f"image,caption,split\n{name},a dog,train\n")
    image = {"filename": name, "split": "train", "sentences": [{"raw": "a dog"}]}
    karpathy.write_text(json.dumps({"images": [image]}))
    for path in (table, karpathy):
        with pytest.raises(DataError, match=rf"{path.name} row [012]: expected the name of an image below the folder"):
            captions.read(str(path))


# ------------------------------------------------------------------------------------------ what somebody's folder says


@pytest.fixture
def evil_module(tmp_path, monkeypatch):
    """A module that leaves a trace when it is run, on the path of this program."""
    (tmp_path / "evil_package").mkdir()
    (tmp_path / "evil_package" / "__init__.py").write_text("")
    trace = tmp_path / "ran"
    (tmp_path / "evil_package" / "model.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "evil_package.model", trace
    for name in ("evil_package", "evil_package.model"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(tmp_path):
    """A folder that looks like a run; `write` gives it a configuration."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "vocabulary.txt").write_text("x")

    def write(**changes):
        config = base.get_config()
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
        save_config(config, workdir / "config.json")
        return workdir

    return write


@pytest.mark.parametrize("field", ["model__name", "text__tower"])
def test_a_folder_cannot_name_modules_to_be_run(field, run, evil_module):
    name, trace = evil_module
    workdir = run(**{field: name})
    for read in (trained_config, load_folder):
        with pytest.raises(
            ValueError, match=rf"config\.json names the module '{name}', which is not a part of shnet_jax"
        ):
            read(workdir)
    assert not trace.exists()
    own = base.get_config()
    own.model.name = name
    assert trained_config(workdir, own).name  # the user's own --config names it
    assert not trace.exists()
    registry.model(name)
    assert trace.exists()  # it would have
    assert trained_config(workdir).name  # imported by the program: nothing new is run


def test_unknown_names_are_not_looked_for_elsewhere():
    for name in ("a/b", "../x", ".models", "x y", "", "contract\0"):
        with pytest.raises(ValueError, match="unknown model"):
            registry.model(name)


@pytest.mark.parametrize("change", [{"model": 3}, {"text": None}, {"model": {"name": ["a"]}}, {"model": {"name.x": 1}}])
def test_a_configuration_of_another_kind(change, run):
    workdir = run()
    saved = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(saved | change))
    with pytest.raises((ValueError, WorkdirError), match=r"config\.json: "):
        trained_config(workdir)


def test_a_vocabulary_that_is_a_link_elsewhere(run):
    workdir = run()
    (workdir / "vocabulary.txt").unlink()
    os.symlink("/etc/passwd", workdir / "vocabulary.txt")
    with pytest.raises(ValueError, match=r"'vocabulary\.txt' leads out of this folder by a link"):
        trained_config(workdir)


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("features.json", {"featuresDict": {"a": {"pythonClassName": "evil_package.model.X"}}}, "is no part of"),
        ("features.json", {"type": "evil_package.model.X", "content": {}}, "is no part of"),
        ("dataset_info.json", {"splits": [{"name": "a", "filepathTemplate": "../{SPLIT}"}]}, "leads out of"),
        ("dataset_info.json", {"splits": [3]}, "is no name"),
        ("dataset_info.json", {"name": "../../x"}, "leads out of"),
        ("dataset_info.json", {"splits": [{"name": "../../x", "shardLengths": ["1"]}]}, "leads out of"),
    ],
)
def test_a_data_set_cannot_name_modules_or_files_elsewhere(file, content, match, tmp_path, evil_module):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{file}: .*{match}"):
        open_dataset(folder)
    assert not evil_module[1].exists()
