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
    killed(tmp_path, 3)
    assert not (tmp_path / "copy").exists()
    with pytest.raises(DataError, match="blocks of a run with other settings"):
        encoded(tmp_path, vectors, described=dataclasses.replace(DESCRIBED, pooling="cls"))
    again = []
    encoded(tmp_path, lambda texts: again.append(texts) or vectors(texts))
    assert len(again) == 6 - 3
    copy = open_dataset(tmp_path / "copy")
    for record in copy.open_split("train", ("captions", "caption_embeddings")):
        np.testing.assert_array_equal(record["caption_embeddings"], vectors(record["captions"]).astype(np.float16))


def killed(tmp_path, after):
    """A run that is killed when that many blocks are written."""
    done = []

    def dying(texts):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(texts)
        return vectors(texts)

    with pytest.raises(KeyboardInterrupt):
        encoded(tmp_path, dying)
    return tmp_path / ".copy.encode_captions"


@pytest.mark.usefixtures("source")
def test_blocks_of_other_captions_do_not_count_as_done(tmp_path):
    killed(tmp_path, 2)
    others = [record | {"captions": [f"{text} too" for text in record["captions"]]} for record in records()]
    write_dataset(tmp_path, "set", {"train": others}, {"source": "by hand"}, overwrite=True)
    with pytest.raises(DataError, match=r"blocks of a run with other settings .captions: .* remove the folder"):
        encoded(tmp_path, vectors)


@pytest.mark.usefixtures("source")
def test_a_moved_data_set_goes_on(tmp_path):
    killed(tmp_path, 5)
    (tmp_path / "set").rename(tmp_path / "moved")
    again = []
    encode_captions.encode_captions(
        *(tmp_path / "moved", "copy", tmp_path, DESCRIBED, lambda texts: again.append(texts) or vectors(texts)),
        dtype="float16",
        overwrite=False,
    )
    assert len(again) == 6 - 5


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("place", ["set-set/1.0.0", "a/b"])
def test_a_set_whose_folder_has_another_name_is_copied(tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / "set" / "1.0.0").rename(tmp_path / place)
    (tmp_path / "set").rmdir()
    folder = tmp_path / place
    path = encode_captions.encode_captions(
        folder, "copy", tmp_path, DESCRIBED, vectors, dtype="float32", overwrite=False
    )
    copy, original = open_dataset(path), open_dataset(folder)
    for split in ("train", "val"):
        fields = ("image_id", "regions")
        for old, new in zip(original.open_split(split, fields), copy.open_split(split, fields), strict=True):
            assert old["image_id"] == new["image_id"]
            np.testing.assert_array_equal(old["regions"], new["regions"])
    assert not verify(path).problems


def test_a_file_with_the_name_in_its_middle_keeps_its_own(tmp_path):
    write_dataset(tmp_path, "a", {"data": records()}, {"source": "by hand"})
    (tmp_path / "a" / "1.0.0" / "data-a-notes.txt").write_text("notes")
    path = encode_captions.encode_captions(
        tmp_path / "a", "copy", tmp_path, DESCRIBED, vectors, dtype="float32", overwrite=False
    )
    assert (path / "data-a-notes.txt").read_text() == "notes"
    assert len(open_dataset(path).open_split("data", ("image_id",))) == 9


@pytest.mark.usefixtures("source")
def test_a_copy_that_cannot_be_read_does_not_appear(tmp_path, monkeypatch):
    links = encode_captions.link
    monkeypatch.setattr(encode_captions, "link", lambda old, new: "array_record" in new.name or links(old, new))
    with pytest.raises(DataError, match="the copy cannot be read"):
        encoded(tmp_path, vectors)
    assert not (tmp_path / "copy").exists()


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("name", ["a/b", "../x", "my-set"])
def test_a_name_that_no_data_set_can_have_is_refused_before_the_work(tmp_path, capsys, name):
    argv = [str(tmp_path / "set"), "--text_encoder=none there", f"--name={name}", f"--out={tmp_path / 'out'}"]
    assert encode_captions.main(argv) == 1
    assert f"data set name {name!r}: expected a letter" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"data set name .*: expected a letter"):
        encode_captions.encode_captions(
            tmp_path / "set", name, tmp_path / "out", DESCRIBED, vectors, dtype="float16", overwrite=False
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("rows", [3, 5])
def test_a_block_of_another_number_of_captions_is_refused(tmp_path, rows):
    folder = killed(tmp_path, 5)
    np.save(folder / "blocks" / "train-0000001.npy", np.ones((rows, 3), np.float16))
    with pytest.raises(DataError, match=rf"train-0000001\.npy: expected 4 rows, one a caption, found {rows}"):
        encoded(tmp_path, vectors)
    assert not (tmp_path / "copy").exists()


@pytest.mark.usefixtures("source")
def test_an_empty_description_of_the_blocks_is_one_clear_error(tmp_path, capsys):
    folder = killed(tmp_path, 2)
    (folder / "source.json").write_text("")
    argv = [str(tmp_path / "set"), f"--text_encoder={bert(tmp_path / 'bert')}", "--name=copy", f"--out={tmp_path}"]
    assert encode_captions.main(argv) == 1
    assert f"remove the folder {folder} to begin anew" in capsys.readouterr().err


@pytest.mark.usefixtures("source")
def test_vectors_that_are_not_finite_stop_it(tmp_path):
    with pytest.raises(DataError, match="split 'train', block 0: expected finite vectors"):
        encoded(tmp_path, lambda texts: vectors(texts) * np.nan)


@pytest.mark.usefixtures("source")
def test_vectors_too_large_for_their_dtype_stop_it(tmp_path):
    with pytest.raises(DataError, match="found NaN or infinity in float16; --text_dtype=float32 holds them"):
        encoded(tmp_path, lambda texts: vectors(texts) + 1e5)


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("batch_size, largest", [(1, 128), (200, 200), (5000, 300)])
def test_a_large_batch_reaches_the_model(tmp_path, monkeypatch, batch_size, largest):
    monkeypatch.setattr(encode_captions, "BLOCK", 300)
    many = {"image_id": "a", "captions": [f"a caption {i}" for i in range(301)], "image_embedding": np.ones(2, "f4")}
    write_dataset(tmp_path, "set", {"train": [many]}, {"source": "by hand"}, overwrite=True)
    seen, made = [], []

    def chosen(args, size):
        made.append(size)
        return DESCRIBED, lambda texts: seen.append(len(texts)) or vectors(texts)

    monkeypatch.setattr(encode_captions, "chosen_encoder", chosen)
    argv = [str(tmp_path / "set"), "--text_encoder=any", "--name=copy", f"--out={tmp_path}"]
    assert encode_captions.main([*argv, f"--batch_size={batch_size}"]) == 0
    assert max(seen) == largest and made == [min(batch_size, 300)] and sum(seen) == 301


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
    assert "exists; give another --name, or --overwrite to replace it" in capsys.readouterr().err
    assert encode_captions.main([*argv[:-2], "--name=set", argv[-1], "--overwrite"]) == 0  # in its own place
    assert not verify(tmp_path / "set").problems and "text_encoder" in open_dataset(tmp_path / "set").metadata
