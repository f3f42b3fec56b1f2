import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from data_prep import from_clip_retrieval
from tests.data_prep.example import stored_records

RNG = np.random.default_rng(0)


def _shard(src, name, rows, **columns):
    """A file of each kind with `rows` of (image_path, caption); returns the vectors. The same path, the same image."""
    paths, captions = zip(*rows, strict=True)
    known = {path: RNG.normal(size=4).astype(np.float16) for path in dict.fromkeys(paths)}
    images, texts = np.stack([known[path] for path in paths]), RNG.normal(size=(len(rows), 4)).astype(np.float16)
    for kind in ("img_emb", "text_emb", "metadata"):
        (src / kind).mkdir(exist_ok=True, parents=True)
    np.save(src / "img_emb" / f"img_emb_{name}.npy", images)
    np.save(src / "text_emb" / f"text_emb_{name}.npy", texts)
    table = pa.table({"image_path": paths, "caption": captions, "url": ["http://a"] * len(rows)} | columns)
    pq.write_table(table, src / "metadata" / f"metadata_{name}.parquet", row_group_size=2)
    return images.astype(np.float32), texts.astype(np.float32)


@pytest.fixture
def run(tmp_path):
    return lambda *flags: from_clip_retrieval.main(
        [f"--src={tmp_path / 'in'}", "--name=toy", f"--out={tmp_path / 'out'}", *flags]
    )


@pytest.mark.parametrize("digits", [1, 3])
def test_shards_in_the_order_of_their_numbers(tmp_path, run, digits):
    made = {
        number: _shard(
            tmp_path / "in", f"{number:0{digits}d}", [(f"{number}/{i}", f"dog {number} {i}") for i in range(3)]
        )
        for number in (10, 2, 0)
    }
    assert run("--split=train") == 0
    records = stored_records(tmp_path / "out", "train")
    assert [r["image_id"] for r in records] == [f"{n}/{i}" for n in (0, 2, 10) for i in range(3)]
    for record, (number, row) in zip(records, ((n, i) for n in (0, 2, 10) for i in range(3)), strict=True):
        assert record["captions"] == [f"dog {number} {row}"]
        images, texts = made[number]
        np.testing.assert_array_equal(record["image_embedding"], images[row])
        np.testing.assert_array_equal(record["caption_embeddings"], texts[[row]])
    assert [r["caption_ids"].tolist() for r in records] == [[n] for n in range(9)]


def test_captions_of_one_image_and_those_that_are_missing(tmp_path, run, capsys):
    """Rows of an image apart from each other, over the end of a shard."""
    src = tmp_path / "in"
    rows = [("a/1.jpg", "one"), ("a/2.jpg", "two"), ("a/1.jpg", " three "), ("a/3.jpg", None), ("a/4.jpg", "")]
    images, texts = _shard(src, "0", rows, split=["train", "test", "train", "train", "train"])
    _, more = _shard(src, "1", [("a/1.jpg", "four")], split=["train"])
    np.save(src / "img_emb" / "img_emb_1.npy", (images[:1] * 1.001).astype(np.float16))
    assert run() == 0
    (first,), (other,) = stored_records(tmp_path / "out", "train"), stored_records(tmp_path / "out", "test")
    assert (first["image_id"], first["captions"]) == ("1.jpg", ["one", "three", "four"])
    np.testing.assert_array_equal(first["caption_embeddings"], [texts[0], texts[2], more[0]])
    np.testing.assert_array_equal(first["image_embedding"], images[0])
    assert other["captions"] == ["two"]
    err = capsys.readouterr().err
    assert "read 6 rows, 4 captions of 4 images; stored 2 images with 4 captions (train 1 with 3, test 1 with 1)" in err
    assert "left out 2: 2 without captions, such as 'a/3.jpg'" in err


def test_lists_of_splits_and_no_vectors_of_captions(tmp_path, run, capsys):
    _shard(tmp_path / "in", "0", [(f"{n}.jpg", f"dog {n}") for n in range(4)])
    (tmp_path / "in" / "text_emb" / "text_emb_0.npy").unlink()
    (tmp_path / "train.txt").write_text("3.jpg\n0.jpg\n")
    (tmp_path / "val.txt").write_text("1.jpg\n")
    assert run(f"--split_lists=train={tmp_path / 'train.txt'},val={tmp_path / 'val.txt'}") == 0
    assert [r["image_id"] for r in stored_records(tmp_path / "out", "train")] == ["0.jpg", "3.jpg"]
    assert "caption_embeddings" not in stored_records(tmp_path / "out", "val")[0]
    assert "left out 1: 1 in no split list, such as '2.jpg'" in capsys.readouterr().err


def _drop(kind):
    return lambda src: next((src / kind).iterdir()).unlink()


def _save(name, array):
    return lambda src: np.save(src / name, array)


def _table(**columns):
    return lambda src: pq.write_table(pa.table(columns), src / "metadata" / "metadata_0.parquet")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_drop("img_emb"), "img_emb: expected img_emb_0.npy, ..., found none"),
        (_drop("metadata"), "metadata: expected metadata_0.parquet, ..., found none"),
        (_save("img_emb/img_emb_1.npy", np.ones((1, 4))), "text_emb: expected text_emb_1.npy as in the other folders"),
        (_save("img_emb/img_emb_00.npy", np.ones((1, 4))), "expected one file of this number"),
        (_save("img_emb/img_emb_a.npy", np.ones((1, 4))), "img_emb_a.npy: expected img_emb_NUMBER.npy"),
        (
            _save("text_emb/text_emb_0.npy", np.ones((2, 4))),
            "number 0: expected as many rows in each file, found 3 in metadata_0.parquet, 3 in img_emb_0.npy, 2 in",
        ),
        (_save("img_emb/img_emb_0.npy", np.ones(3)), "img_emb_0.npy: expected [rows, E], found [3]"),
        (
            _save("img_emb/img_emb_0.npy", np.eye(3, 4)),
            "image 'a': expected one vector in all of its rows, found others",
        ),
        (_table(url=["a"] * 3), "expected a column named image or filename or file_name"),
        (_table(key=["a", "b", "c"]), "expected a column named caption or"),
        (_table(key=["a", None, "c"], caption=["x"] * 3), "metadata_0.parquet row 1: 'key': expected the name"),
        (_table(key=["a"] * 3, caption=[["x", "y"]] * 3), "row 0: 'caption': expected one caption, found 2"),
    ],
)
def test_folders_that_are_refused(tmp_path, run, capsys, change, expected):
    _shard(tmp_path / "in", "0", [("a", "x"), ("a", "y"), ("b", "z")])
    change(tmp_path / "in")
    assert run("--split=train") == 1
    assert expected in capsys.readouterr().err.splitlines()[-1]


def test_a_split_has_to_be_said(tmp_path, run, capsys):
    _shard(tmp_path / "in", "0", [("a", "x")])
    assert run() == 1
    assert "metadata_0.parquet row 0: image 'a': expected a split; give --split=NAME" in capsys.readouterr().err
