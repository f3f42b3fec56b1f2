"""Every run on every data set, and the row of a pretrained encoder where a data set has its vectors."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest

from data_prep.builder import write_dataset
from shnet_jax.data.records import open_dataset
from shnet_jax.evaluation.zero_shot import zero_shot
from shnet_jax.modes.cross import cross
from shnet_jax.modes.evaluate import evaluate, evaluate_checkpoint
from tests.retrieve.gallery import toy, toy_run
from tests.train import tiny


def with_vectors(record):
    """The vector of a caption is nearly that of its image, and not of unit length."""
    rng = np.random.default_rng(zlib.crc32(record["image_id"].encode()))
    image = rng.normal(size=8)
    captions = image + 0.8 * rng.normal(size=(len(record["captions"]), 8))
    scale = rng.uniform(0.1, 9.0, (len(captions), 1))
    vectors = {"image_embedding": 3 * image, "caption_embeddings": scale * captions}
    return record | {name: value.astype(np.float32) for name, value in vectors.items()}


@pytest.fixture(scope="module")
def run():
    return toy_run()


@pytest.fixture(scope="module")
def vectors():
    return tiny.write("vectors", with_vectors)


def test_the_matrix_of_runs_and_data_sets(run, vectors, tmp_path, capsys):
    config = toy()
    config.cross.runs, config.cross.data_dirs = (str(run),), (str(tiny.dataset()), str(vectors))
    matrix = cross(config, tmp_path / "out")
    row = "3SHNet region, seed 0, trained on tiny"
    assert list(matrix) == [row, "zero-shot"] and list(matrix["zero-shot"]) == ["vectors"]
    for column, folder in (("tiny", tiny.dataset()), ("vectors", vectors)):
        alone = evaluate_checkpoint(toy(data__dir=str(folder)), run)
        assert matrix[row][column].metrics == alone.metrics
        assert matrix[row][column].card["dataset"] == column
    text = (tmp_path / "out/cross.md").read_text("utf-8")
    assert text in capsys.readouterr().out and f"{matrix[row]['tiny'].metrics['rsum']:.1f}" in text
    document = json.loads((tmp_path / "out/cross.json").read_text("utf-8"))
    assert list(document["arms"]) == [f"{row} → tiny", f"{row} → vectors", "zero-shot → vectors"]


def test_in_two_stages(run, tmp_path):
    """Where the exact ranking is switched off; all images and captions as candidates give the same ranks."""
    config = toy(eval__two_stage=1000, eval__exact=False)
    config.cross.runs, config.cross.data_dirs = (str(run),), (str(tiny.dataset()),)
    ((found,),) = (row.values() for row in cross(config, tmp_path).values())
    assert found.card["ranking"].startswith("two stages: 1000") and found.card["pairs_scored"] == 10 * 50
    assert found.metrics == evaluate_checkpoint(toy(), run).metrics
    assert "two stages: 1000" in (tmp_path / "cross.html").read_text("utf-8")


def test_nothing_to_do_and_names_that_repeat(run, tmp_path):
    config = toy()
    with pytest.raises(ValueError, match=r"config\.cross\.runs is \(\)"):
        cross(config, tmp_path / "out")
    config.cross.runs, config.cross.data_dirs = (str(run),), (str(tiny.dataset()), str(tiny.dataset()))
    with pytest.raises(ValueError, match=r"data_dirs is .* names of their own, found \['tiny'\]"):
        cross(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_zero_shot_is_ranking_by_cosine(vectors):
    found = zero_shot(open_dataset(vectors), "test")
    records = list(open_dataset(vectors).open_split("test", ("image_embedding", "caption_embeddings")))
    images = np.stack([r["image_embedding"] for r in records]).astype(np.float64)
    texts = np.concatenate([r["caption_embeddings"] for r in records]).astype(np.float64)
    cosine = images @ texts.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(texts, axis=1)
    np.testing.assert_allclose(found.score(found.images, found.texts), cosine, atol=1e-6)
    assert found.caption_image.tolist() == np.repeat(np.arange(10), 5).tolist()
    assert zero_shot(open_dataset(tiny.dataset()), "test") is None


def test_evaluation_prints_the_zero_shot_row_beside_ours(run, vectors, capsys):
    evaluate(toy(data__dir=str(vectors)), run)
    out = capsys.readouterr().out
    assert "| zero-shot" in out and "| 3SHNet region" in out
    document = json.loads((run / "results_vectors_test_whole_best.json").read_text("utf-8"))
    ours, theirs = (document["arms"][name] for name in ("3SHNet region", "zero-shot"))
    assert theirs["metrics"]["rsum"] > ours["metrics"]["rsum"] + 100
    assert theirs["card"]["parameters"].startswith("none learned here")


def test_a_vector_without_direction(tmp_path):
    vectors = np.ones((5, 8), np.float32) * (np.arange(5) != 2)[:, None]
    record = {"image_id": "a", "captions": list("abcde"), "image_embedding": np.ones(8, np.float32)}
    splits = {"test": [record | {"caption_embeddings": vectors.astype(np.float32)}]}
    broken = open_dataset(write_dataset(tmp_path, "broken", splits, {"source": "made by the tests"}))
    with pytest.raises(ValueError, match="split 'test': caption_embeddings: row 2 is all zero"):
        zero_shot(broken, "test")
