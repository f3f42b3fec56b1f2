import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import ml_dtypes
import numpy as np
import pytest
import sentencepiece
import tensorflow_datasets as tfds

from data_prep import builder
from data_prep.builder import write_dataset
from data_prep.schema import DataError
from shnet_jax.data.records import SENTENCEPIECE, find_dataset, open_dataset, open_split
from tests.data_prep.example import record


@pytest.fixture(scope="module")
def records():
    return [record(row, count=1 + row % 3) for row in range(130)]


@pytest.fixture(scope="module")
def data(tmp_path_factory, records):
    out = tmp_path_factory.mktemp("sets")
    dev = [r | {"image_id": f"dev {r['image_id']}"} for r in records[:3]]
    write_dataset(out, "toy", {"train": iter(records), "dev": dev}, {"source": "made by hand"})
    return out


def test_everything_comes_back_in_order(data, records):
    dataset = open_dataset(data)
    assert dataset.splits == {"train": 130, "dev": 3}
    assert dataset.num_classes == 11
    assert dataset.metadata["source"] == "made by hand"
    split = dataset.open_split("train", list(dataset.features))
    assert len(split) == len(records)
    for read, wrote in zip(split, records, strict=True):
        assert read.keys() == wrote.keys()
        for name, value in wrote.items():
            if name in ("image_id", "captions"):
                assert read[name] == value
            else:
                np.testing.assert_array_equal(read[name], np.asarray(value), strict=True, err_msg=name)


def test_features_say_what_a_record_holds(data):
    dataset = open_dataset(data)
    example = dataset.open_split("dev", list(dataset.features))[0]
    for name, (shape, dtype) in dataset.features.items():
        if name not in ("image_id", "captions"):
            assert len(shape) == example[name].ndim, name
            assert all(s in (None, n) for s, n in zip(shape, example[name].shape, strict=True)), name
            assert dtype == example[name].dtype, name


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_features_keep_their_dtype(tmp_path, dtype):
    regions = record()["regions"].astype(dtype)
    write_dataset(tmp_path, "toy", {"a": [record(regions=regions)]}, {})
    read = open_split(tmp_path, "a", ["regions"])[0]["regions"]
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, regions)


def test_only_wanted_fields_are_decoded(data):
    assert open_split(data, "train", ("captions", "grid"))[5].keys() == {"captions", "grid"}


def test_unknown_split_or_field_lists_what_there_is(data):
    with pytest.raises(ValueError, match=r"no split 'val'; it has train, dev"):
        open_split(data, "val", ["regions"])
    with pytest.raises(ValueError, match=r"no field depth; it has box_classes, .*regions"):
        open_split(data, "dev", ["regions", "depth"])


def _without_captions(path):
    """The sidecar as it was before it held captions."""
    with np.load(path) as index:
        kept = {name: index[name] for name in ("image_ids", "caption_counts")}
    np.savez(path, **kept)


@pytest.mark.parametrize(
    ("spoil", "scans"), [(lambda path: None, 0), (lambda path: path.unlink(), 1), (_without_captions, 1)]
)
def test_the_sidecar_and_one_scan_agree(tmp_path, records, caplog, spoil, scans):
    path = write_dataset(tmp_path, "toy", {"a": records[:5]}, {})
    spoil(path / "index_a.npz")
    dataset = open_dataset(path)
    with caplog.at_level("INFO"):
        assert dataset.caption_counts("a").tolist() == [1, 2, 3, 1, 2]
        assert dataset.image_ids("a").tolist() == [r["image_id"] for r in records[:5]]
        assert list(dataset.captions("a")) == [r["captions"] for r in records[:5]]
    assert caplog.text.count("no captions in index_a.npz; scanning 5 records") == scans


def test_a_sidecar_of_another_split_is_refused(tmp_path, records):
    path = write_dataset(tmp_path, "toy", {"a": records[:5], "b": records[:3]}, {})
    shutil.copy(path / "index_b.npz", path / "index_a.npz")
    with pytest.raises(ValueError, match=r"index_a\.npz: expected 5 image ids, found 3"):
        open_dataset(path).captions("a")
    with pytest.raises(ValueError, match="no split 'c'; it has a, b"):
        open_dataset(path).captions("c")


def test_a_pickle_is_small_and_threads_may_read(data, records):
    split = open_split(data, "train", ["regions", "image_id"])
    assert split[0]["image_id"] == "image 0"  # opened: the open files must not go into the pickle
    frozen = pickle.dumps(split)
    assert len(frozen) < 1000
    copy = pickle.loads(frozen)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(copy.__getitem__, range(len(copy))))
    assert [r["image_id"] for r in read] == [r["image_id"] for r in records]


def test_tfds_reads_it_without_our_code(data):
    source = tfds.builder_from_directory(find_dataset(data)).as_data_source("dev")
    assert source[1]["captions"] == [b"a dog number 1 runs to tree 0", b"a dog number 1 runs to tree 1"]
    assert source[1]["regions"].dtype == np.float16


def test_a_set_of_another_tool_is_read(tmp_path):
    class Other(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("2.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image_id": tfds.features.Text(),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "regions": tfds.features.Tensor(shape=(2, 3), dtype=np.float32),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for row in range(4):
                yield (
                    row,
                    {
                        "image_id": str(row),
                        "captions": ["a"] * (row + 1),
                        "regions": np.ones((2, 3), np.float32),
                    },
                )

    Other(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    dataset = open_dataset(tmp_path)
    counts = dict(zip(dataset.image_ids("train").tolist(), dataset.caption_counts("train").tolist(), strict=True))
    assert counts == {"0": 1, "1": 2, "2": 3, "3": 4}
    assert dataset.num_classes is None
    assert dataset.open_split("train", ["regions"])[0]["regions"].shape == (2, 3)


def test_sentencepiece_has_the_special_pieces_and_learns_from_train_only(tmp_path):
    splits = {"train": [record(count=3)], "dev": [record(1, count=1, captions=["zzz qqq"])]}
    path = write_dataset(tmp_path, "toy", splits, {})
    model = sentencepiece.SentencePieceProcessor(model_file=str(path / SENTENCEPIECE))
    assert [model.id_to_piece(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert model.encode("Dog") == model.encode("dog")
    assert model.unk_id() not in model.encode("a dog")
    assert model.unk_id() in model.encode("zzz")


def test_a_set_without_train_learns_from_all_splits(tmp_path):
    splits = {"a": [record()], "b": [record(captions=["zzz qqq", "qqq"])]}
    path = write_dataset(tmp_path, "toy", splits, {})
    model = sentencepiece.SentencePieceProcessor(model_file=str(path / SENTENCEPIECE))
    assert model.unk_id() not in model.encode("zzz dog")


def test_sentencepiece_is_the_same_each_time(tmp_path, records):
    models = [
        (write_dataset(tmp_path / out, "toy", {"train": records}, {}) / SENTENCEPIECE).read_bytes() for out in "ab"
    ]
    assert models[0] == models[1]


def test_checksums_cover_every_file(data):
    path = find_dataset(data)
    sums = json.loads((path / "checksums.json").read_text())
    assert sums.keys() == {file.name for file in path.iterdir()} - {"checksums.json"}
    assert all(builder.sha256(path / name) == value for name, value in sums.items())


def test_a_failing_import_leaves_nothing_and_keeps_the_old_set(tmp_path, records):
    def broken():
        yield from islice(records, 100)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_dataset(tmp_path, "toy", {"a": broken()}, {})
    assert list(tmp_path.iterdir()) == []
    write_dataset(tmp_path, "toy", {"a": records[:2]}, {})
    with pytest.raises(RuntimeError, match="disk on fire"):
        write_dataset(tmp_path, "toy", {"a": broken()}, {}, overwrite=True)
    assert open_dataset(tmp_path).splits == {"a": 2}


def test_what_a_killed_import_left_is_no_data_set(tmp_path, records):
    left = tmp_path / "toy" / ".1.0.0.incomplete"
    left.mkdir(parents=True)
    (left / "dataset_info.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no data set"):
        find_dataset(tmp_path)
    write_dataset(tmp_path, "toy", {"a": records[:2]}, {})
    assert not left.exists()


def test_an_existing_set_is_replaced_only_on_request(tmp_path, records):
    write_dataset(tmp_path, "toy", {"a": records[:2]}, {})
    with pytest.raises(FileExistsError, match="toy"):
        write_dataset(tmp_path, "toy", {"a": records[:3]}, {})
    path = write_dataset(tmp_path, "toy", {"b": records[:3]}, {}, overwrite=True)
    assert open_dataset(tmp_path).splits == {"b": 3}
    assert [entry.name for entry in path.parent.iterdir()] == ["1.0.0"]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"a": [record(0), record(1), record(0)]}, r"split 'a' row 2 .*'image_id'.*found that of row 0"),
        ({"a": []}, "split 'a': expected at least one record"),
        ({}, "at least one split"),
        ({"a b": [record()]}, "split name 'a b'"),
        (
            {"a": [record()], "b": [record(identity=None)]},
            r"split 'b' row 0 .*'identity': expected this field",
        ),
        (
            {"a": [record(image_embedding=np.full(7, np.nan, np.float32))]},
            r"file\.npy: field 'image_embedding'",
        ),
        (
            {"a": [record(relations=np.array([[0, 9, 1]], np.int32))]},
            r"'relations': expected predicates 0\.\.1, found 9",
        ),
    ],
)
def test_bad_records_are_refused(tmp_path, splits, message):
    metadata = {"predicates": ["on", "of"]} if "predicates" in message else {}
    with pytest.raises(DataError, match=message):
        write_dataset(tmp_path, "toy", splits, metadata, files={"a": {"image_embedding": "file.npy"}})


def test_a_whole_number_of_chunks(tmp_path, records):
    path = write_dataset(tmp_path, "toy", {"a": records[: 2 * builder._CHUNK], "b": records[: builder._CHUNK]}, {})
    assert [len(open_split(path, split, ["image_id"])) for split in "ab"] == [2 * builder._CHUNK, builder._CHUNK]
    assert (
        open_split(path, "b", ["image_id"])[builder._CHUNK - 1]["image_id"] == records[builder._CHUNK - 1]["image_id"]
    )


def test_many_small_shards_keep_the_order(tmp_path, records, monkeypatch):
    monkeypatch.setattr(builder, "SHARD_BYTES", 10_000)
    path = write_dataset(tmp_path, "toy", {"a": records}, {})
    assert len(list(path.glob("*array_record*"))) > 5
    read = open_split(path, "a", ["image_id"])
    assert [r["image_id"] for r in read] == [r["image_id"] for r in records]


def test_find_dataset_accepts_every_level_and_lists_otherwise(tmp_path, records):
    path = write_dataset(tmp_path / "sets", "toy", {"a": records[:1]}, {})
    assert find_dataset(path) == find_dataset(path.parent) == find_dataset(path.parent.parent) == path
    write_dataset(tmp_path / "sets", "other", {"a": records[:1]}, {})
    with pytest.raises(FileNotFoundError, match=r"several: .*other.*toy"):
        find_dataset(tmp_path / "sets")
    with pytest.raises(FileNotFoundError, match=r"found sets"):
        find_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_dataset(tmp_path / "absent")


def test_an_unknown_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"on_bad_record is 'Fail'; choose from fail, skip"):
        write_dataset(tmp_path, "toy", {"a": []}, {}, on_bad_record="Fail")
    assert not (tmp_path / "toy").exists()
