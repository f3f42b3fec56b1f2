import numpy as np
import pytest

from data_prep import schema, verify
from data_prep.builder import write_checksums, write_dataset
from shnet_jax.data.index import IndexBuilder, write_index
from tests.data_prep.example import record


@pytest.fixture
def records():
    return [record(row) for row in range(6)]


def _report(tmp_path, splits, **options):
    return verify.verify(write_dataset(tmp_path, "toy", splits, {"source": "by hand"}), **options)


def test_a_good_set_is_usable(tmp_path, records, capsys):
    report = _report(tmp_path, {"train": records[:4], "test": records[4:]})
    assert report.problems == report.notes == []
    assert {split: counts.tolist() for split, counts in report.captions.items()} == {"train": [2] * 4, "test": [2] * 2}
    assert report.read == {"train": 4, "test": 2}
    assert verify.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.endswith("usable\n")
    assert "source: by hand" in out
    assert [line.split() for line in out.splitlines() if line.startswith("train")] == [["train", "4", "4", "8", "2..2"]]


def test_statistics(tmp_path, records):
    values = _report(tmp_path, {"a": records[:4], "b": records[4:]}).values
    for name in schema.FIELDS:
        stacked = np.stack([r[name] for r in records]).astype(np.float64)
        statistics = values[name]
        assert statistics.count == stacked.size, name
        expected = (stacked.mean(), stacked.std(), stacked.min(), stacked.max(), (stacked == 0).mean())
        actual = (statistics.mean, statistics.std, statistics.least, statistics.most, statistics.zero_share)
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9, err_msg=name)


def test_a_sample_is_spread_over_the_split(tmp_path, records):
    report = _report(tmp_path, {"a": records}, sample=3)
    assert report.read == {"a": 3}
    np.testing.assert_allclose(report.values["identity"].mean, np.mean([0, 2, 5]))


def test_evaluation_splits_may_overlap(tmp_path, records):
    report = _report(tmp_path, {"test": records[:4], "testall": records})
    assert not report.problems
    assert report.notes == ["4 images in test and testall, such as 'image 0'"]


@pytest.mark.parametrize(
    ("splits", "flags"),
    [
        (["train", "val", "test"], ""),
        (["train", "test"], ""),  # to choose a checkpoint on test is no advice
        (["test", "testall"], ""),
        (["train", "dev", "final"], "data.val_split=dev eval.split=final search.split=final"),
        (["train", "final", "valid"], "data.val_split=valid eval.split=final search.split=final"),
        (["train_0", "a", "val", "test1"], "data.train_split=train_0 eval.split=test1 search.split=test1"),
        (["train", "dev"], "data.val_split=dev eval.split=dev search.split=dev"),
        (["dev"], "eval.split=dev search.split=dev"),
    ],
)
def test_flags_of_splits_with_other_names(splits, flags):
    assert schema.split_flags(splits) == [f"--config.{flag}" for flag in flags.split()]


def test_splits_with_other_names_are_noted_with_their_flags(tmp_path, records, capsys):
    report = _report(tmp_path, {"train": records[:4], "dev": records[4:]})
    assert report.notes == [
        "splits are called otherwise than train, val and test: name them by --config.data.val_split=dev "
        "--config.eval.split=dev --config.search.split=dev"
    ]
    assert verify.main([str(tmp_path)]) == 0
    alone = [{name: record[name] for name in ("image_id", "grid")} | {"captions": []} for record in records]
    path = write_dataset(tmp_path, "alone", {"photos": alone}, {}, least_captions=0)
    assert not [note for note in verify.verify(path).notes if "--config" in note]  # nothing to train on or evaluate


def test_identical_features_under_two_names_are_noted(tmp_path, records):
    copy = records[1] | {"image_id": "other name"}
    report = _report(tmp_path, {"train": records, "test": [copy]})
    assert not report.problems
    assert report.notes == ["identical visual fields: train image 1, test other name"]


def test_constant_and_empty_fields_are_noted(tmp_path, records):
    zero = {"regions": np.zeros_like(records[0]["regions"]), "image_embedding": np.ones(7, np.float32)}
    report = _report(tmp_path, {"a": [records[0] | zero]})
    assert "split 'a' row 0 (image 'image 0'): field 'regions': all zero" in report.notes
    assert "field image_embedding: every value is 1" in report.notes


def _write_index(path, images):
    index = IndexBuilder()
    for image in images:
        index.add(image["image_id"], image["captions"])
    write_index(path, "a", index.build())
    write_checksums(path)


def test_an_index_that_disagrees_is_a_problem(tmp_path, records):
    path = write_dataset(tmp_path, "toy", {"a": records}, {})
    other = records[1] | {"image_id": "image 9", "captions": ["a dog number 1 runs to tree 0", "a cat"]}
    _write_index(path, [records[0], other, *records[2:]])
    assert verify.verify(path).problems == [
        "split 'a' row 1 (image 'image 1'): index_a.npz: field 'image_id': expected 'image 1', found 'image 9'",
        "split 'a' row 1 (image 'image 1'): index_a.npz: field 'captions': expected "
        "['a dog number 1 runs to tree 0', 'a dog number 1 runs to tree 1'], "
        "found ['a dog number 1 runs to tree 0', 'a cat']",
    ]
    assert verify.verify(path, sample=1).problems == []  # row 0 is right


def test_an_index_of_other_records_is_a_problem(tmp_path, records):
    path = write_dataset(tmp_path, "toy", {"a": records}, {})
    _write_index(path, records[:4])
    (problem,) = verify.verify(path).problems
    assert problem.startswith(f"{path / 'index_a.npz'}: expected 6 image ids, found 4; copy the file again, or")


def test_a_set_without_sidecars_is_usable(tmp_path, records):
    path = write_dataset(tmp_path, "toy", {"test": records}, {})
    for name in ("index_test.npz", "sentencepiece.model", "checksums.json"):
        (path / name).unlink()
    report = verify.verify(path)
    assert not report.problems and report.captions["test"].tolist() == [2] * 6
    assert report.notes == [
        "no sentencepiece.model",
        "no checksums.json: files not compared",
        "no captions in index_test.npz: found by reading the records",
    ]


def test_no_data_set(tmp_path, capsys):
    assert verify.main([str(tmp_path)]) == 1
    assert "no data set" in capsys.readouterr().err
