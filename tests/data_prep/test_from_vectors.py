"""Vectors of both sides from folders of .pt and .npy, in natural order, text i of image i mod N."""

from __future__ import annotations

import weakref
import zlib

import ml_dtypes
import numpy as np
import pytest

from data_prep import from_vectors
from data_prep.schema import DataError
from shnet_jax.data.records import open_dataset
from shnet_jax.evaluation.zero_shot import zero_shot
from shnet_jax.interop import torch_file
from tests.interop.torch_writer import save


def folders(root, images=(5, 4), texts=(10, 8), dtype=np.float16):
    """.pt files of that many rows, named so that natural order is not that of text."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, sizes, width in (("images", images, 3), ("texts", texts, 2)):
        (root / name).mkdir(parents=True)
        parts = [rng.normal(size=(size, width)).astype(dtype) for size in sizes]
        for number, part in zip((9, 10), parts, strict=True):
            save(root / name / f"{number}.pt", part)
        arrays[name] = np.concatenate(parts)
    return arrays


@pytest.mark.parametrize("block", [2, 1024])
def test_text_i_belongs_to_image_i_mod_n(tmp_path, monkeypatch, block):
    monkeypatch.setattr(from_vectors, "_BLOCK", block)
    arrays = folders(tmp_path)
    (tmp_path / "texts.txt").write_text("".join(f"sentence {i}\n" for i in range(18)))
    argv = [f"--image_vectors={tmp_path / 'images'}", f"--text_vectors={tmp_path / 'texts'}", "--name=v", "--val=2"]
    assert from_vectors.main([*argv, f"--captions={tmp_path / 'texts.txt'}", f"--out={tmp_path}"]) == 0
    dataset = open_dataset(tmp_path / "v")
    assert dataset.splits == {"train": 7, "val": 2}
    fields = ("captions", "caption_ids", "image_embedding", "caption_embeddings")
    records = [record for split in ("train", "val") for record in dataset.open_split(split, fields)]
    for image, record in enumerate(records):
        assert record["captions"] == [f"sentence {image}", f"sentence {image + 9}"]
        assert record["caption_ids"].tolist() == [image, image + 9]
        assert record["image_embedding"].dtype == np.float16
        np.testing.assert_array_equal(record["image_embedding"], arrays["images"][image])
        np.testing.assert_array_equal(record["caption_embeddings"], arrays["texts"][[image, image + 9]])


def test_npy_and_texts_without_captions(tmp_path, capsys):
    for name, rows in (("images", 3), ("texts", 3)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "all.npy", np.ones((rows, 2)))
    path = from_vectors.import_vectors([tmp_path / "images"], [tmp_path / "texts"], "v", tmp_path)
    assert "called 'text NUMBER'" in capsys.readouterr().err
    dataset = open_dataset(path)
    assert dataset.features["image_embedding"].dtype == np.float32
    assert [record["captions"] for record in dataset.open_split("train", ("captions",))] == [
        ["text 0"],
        ["text 1"],
        ["text 2"],
    ]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda root: (root / "texts" / "10.pt").unlink(),
            "texts: expected a multiple of 9 texts, the images, found 10",
        ),
        (
            lambda root: save(root / "images" / "9.pt", np.ones((5, 4), np.float32)),
            r"10\.pt: expected as wide as 9\.pt, 4",
        ),
        (lambda root: save(root / "images" / "9.pt", {"a": np.ones(3, np.float32)}), r"9\.pt: expected a tensor"),
        (
            lambda root: save(root / "images" / "9.pt", np.ones(5, np.float32)),
            r"9\.pt: expected \[rows, E\], found \[5\]",
        ),
        (lambda root: (root / "images" / "9.pt").write_bytes(b"PK\3\4nothing"), r"9\.pt"),
    ],
)
def test_a_fault_names_the_file(tmp_path, spoil, message):
    folders(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        from_vectors.import_vectors([tmp_path / "images"], [tmp_path / "texts"], "v", tmp_path)
    assert not (tmp_path / "v" / "1.0.0").exists()


def test_each_file_is_checked_once_and_few_are_open(tmp_path, monkeypatch):
    for name, width in (("images", 3), ("texts", 2)):
        (tmp_path / name).mkdir()
        for number in range(200):
            save(tmp_path / name / f"{number}.pt", np.full((2, width), number, np.float32))
    checked, maps, check, made = [], [], zlib.crc32, np.memmap

    def crc32(data):
        checked.extend([1] * isinstance(data, memoryview))  # of vectors; other entries are bytes
        return check(data)

    def memmap(*args):
        array = made(*args)
        maps.append(weakref.ref(array))
        assert sum(one() is not None for one in maps) < 10, "files stay open"
        return array

    monkeypatch.setattr(torch_file.zlib, "crc32", crc32)
    monkeypatch.setattr(torch_file.np, "memmap", memmap)
    monkeypatch.setattr(from_vectors, "_OPEN", 2)
    path = from_vectors.import_vectors([tmp_path / "images"], [tmp_path / "texts"], "v", tmp_path)
    stored = open_dataset(path).open_split("train", ("image_embedding",))
    assert [int(record["image_embedding"][0]) for record in stored] == np.repeat(np.arange(200), 2).tolist()
    assert len(checked) == 400


@pytest.mark.parametrize("flag", [[], ["--one_model"]])
def test_only_one_model_of_both_sides_has_a_zero_shot_row(tmp_path, flag):
    for name in ("images", "texts"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "all.npy", np.eye(3, dtype=np.float32))
    argv = [f"--image_vectors={tmp_path / 'images'}", f"--text_vectors={tmp_path / 'texts'}", "--name=v"]
    assert from_vectors.main([*argv, f"--out={tmp_path}", *flag]) == 0
    assert (zero_shot(open_dataset(tmp_path / "v"), "train") is not None) == bool(flag)


def test_bfloat16_stays_bfloat16(tmp_path):
    folders(tmp_path, dtype=ml_dtypes.bfloat16)
    path = from_vectors.import_vectors([tmp_path / "images"], [tmp_path / "texts"], "v", tmp_path)
    assert open_dataset(path).features["caption_embeddings"].dtype == ml_dtypes.bfloat16
