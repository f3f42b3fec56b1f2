"""Captions encoded by a frozen text model, as a copy of their data set; goes on where it was."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data_prep import encode_captions
from data_prep.builder import write_dataset
from data_prep.schema import DataError
from data_prep.verify import verify
from shnet_jax.data.records import open_dataset
from shnet_jax.interop.sentence_vectors import Description
from tests.data.test_columns import records
from tests.interop.test_sentence_vectors import bert

DESCRIBED = Description("a model", "abc", "mean", False, 16)


def vectors(texts):
    return np.array([[len(text), text.count("a"), int(text.split()[2]) / 8] for text in texts], np.float32)


def encoded(tmp_path, encode, dtype="float16", described=DESCRIBED):
    return encode_captions.encode_captions(
        tmp_path / "set", "copy", tmp_path, described, encode, dtype=dtype, overwrite=False
    )


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(encode_captions, "BLOCK", 4)


@pytest.fixture
def source(tmp_path):
    of_val = [record | {"image_id": f"v {i}"} for i, record in enumerate(list(records())[:2])]
    write_dataset(tmp_path, "set", {"train": records(), "val": of_val}, {"source": "by hand"})


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_copy_has_the_vectors_and_all_else(tmp_path, dtype):
    copy, original = open_dataset(encoded(tmp_path, vectors, dtype)), open_dataset(tmp_path / "set")
    assert copy.metadata["text_encoder"] == dataclasses.asdict(DESCRIBED) and copy.metadata["source"] == "by hand"
    assert "text_encoder" not in original.metadata and original.features["caption_embeddings"].shape == (None, 3)
    for split in ("train", "val"):
        fields = ("image_id", "captions", "regions", "image_embedding", "caption_embeddings")
        for old, new in zip(original.open_split(split, fields), copy.open_split(split, fields), strict=True):
            for name in fields[:-1]:
                np.testing.assert_array_equal(new[name], old[name])
            assert new["caption_embeddings"].dtype.name == dtype
            np.testing.assert_array_equal(
                new["caption_embeddings"], vectors(new["captions"]).astype(new["caption_embeddings"].dtype)
            )
    assert not verify(tmp_path / "copy").problems and not verify(tmp_path / "set").problems
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "set"]


@pytest.mark.usefixtures("source")
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    done = []

    def dying(texts):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(texts)
        return vectors(texts)

    with pytest.raises(KeyboardInterrupt):
        encoded(tmp_path, dying)
    assert not (tmp_path / "copy").exists()
    with pytest.raises(DataError, match="blocks of a run with other settings"):
        encoded(tmp_path, vectors, described=dataclasses.replace(DESCRIBED, pooling="cls"))
    again = []
    encoded(tmp_path, lambda texts: again.append(texts) or vectors(texts))
    assert len(again) == 6 - 3 and again[0] != done[-1]
    copy = open_dataset(tmp_path / "copy")
    for record in copy.open_split("train", ("captions", "caption_embeddings")):
        np.testing.assert_array_equal(record["caption_embeddings"], vectors(record["captions"]).astype(np.float16))


@pytest.mark.usefixtures("source")
def test_vectors_that_are_not_finite_stop_it(tmp_path):
    with pytest.raises(DataError, match="split 'train', block 0: expected finite vectors"):
        encoded(tmp_path, lambda texts: vectors(texts) * np.nan)


@pytest.mark.usefixtures("source")
def test_the_command_with_a_bert(tmp_path, capsys):
    folder = bert(tmp_path / "bert")
    argv = [str(tmp_path / "set"), f"--text_encoder={folder}", "--name=copy", f"--out={tmp_path}"]
    assert encode_captions.main([*argv, "--text_encoder_sha256=00"]) == 1
    assert "sha256 of its weights: expected 00, found" in capsys.readouterr().err
    assert encode_captions.main(argv) == 0
    assert "mean pooling, sha256 of its weights" in capsys.readouterr().err
    described = Description.parse(open_dataset(tmp_path / "copy").metadata["text_encoder"], "metadata")
    assert described.encoder == str(folder) and described.pooling == "mean"
    assert encode_captions.main([*argv[:-2], "--name=set", argv[-1]]) == 1
    assert "exists; choose another name or ask to overwrite it" in capsys.readouterr().err
    assert encode_captions.main([*argv[:-2], "--name=set", argv[-1], "--overwrite"]) == 0  # in its own place
    assert not verify(tmp_path / "set").problems and "text_encoder" in open_dataset(tmp_path / "set").metadata
