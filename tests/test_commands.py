"""Loading and evaluating what was trained, on the same data set and on others."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest

from shnet_jax import stored_config
from shnet_jax.modes.evaluate import evaluate, evaluate_checkpoint
from shnet_jax.modes.train import train
from shnet_jax.training.checkpoint import CheckpointError, Checkpoints
from shnet_jax.training.load import load
from shnet_jax.training.workdir import WorkdirError
from tests.train import tiny


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick():
        yield


def toy(**changes):
    return tiny.config(model__name="tests.train.toy", train__steps=6, train__checkpoint_steps=2, **changes)


@pytest.fixture(scope="module")
def workdir():
    """A run of 6 steps with evaluations at 5 and 6."""
    path = tiny.folder() / "commands"
    train(toy(), path)
    return path


def test_train_prints_the_last_validation_result(workdir, capsys):
    train(toy(), workdir)
    out = capsys.readouterr().out
    assert "3SHNet region, val" in out and "chance (10 images, 50 captions)" in out
    assert f"{tiny.lines(workdir)[-1]['rsum']:.1f}" in out


@pytest.mark.parametrize("which", ["best", "last"])
def test_evaluation_of_the_best_or_last_checkpoint(which, workdir):
    rsums = {line["step"]: line["rsum"] for line in tiny.lines(workdir) if line["kind"] == "eval"}
    step = 6 if which == "last" or rsums[6] >= rsums[5] else 5
    results = evaluate_checkpoint(toy(eval__checkpoint=which, eval__split="val"), workdir)
    assert results.metrics["rsum"] == pytest.approx(rsums[step], abs=1e-4)
    assert results.card["checkpoint_step"] == step
    assert results.card["selected_on"] == ("val" if which == "best" else "none")


def test_evaluation_writes_its_results(workdir, capsys):
    evaluate(toy(), workdir)
    out = capsys.readouterr().out
    assert "3SHNet region" in out and "protocol card " not in out  # the protocol card is in the files
    assert "protocol card " in (workdir / "results_tiny_test_whole_best.md").read_text("utf-8")
    assert f"{workdir / 'results_tiny_test_whole_best'}.html, .md and .json have" in out
    document = json.loads((workdir / "results_tiny_test_whole_best.json").read_text("utf-8"))
    assert "rsum" in json.dumps(document) and "3SHNet region" in json.dumps(document)


def test_candidates_alone_are_written_beside_the_exact_results(workdir):
    evaluate(toy(), workdir)
    exact = (workdir / "results_tiny_test_whole_best.json").read_bytes()
    evaluate(toy(eval__two_stage=3, eval__exact=False), workdir)
    actual = json.loads((workdir / "results_tiny_test_whole_best_two_stage_3.json").read_text("utf-8"))
    assert all("exact" not in name for name in actual["arms"])
    assert (workdir / "queries_tiny_test_whole_best_two_stage_3.npz").is_file()
    assert (workdir / "results_tiny_test_whole_best.json").read_bytes() == exact


def test_the_average_is_evaluated(workdir):
    step = Checkpoints(workdir).step("last")
    loaded = load(workdir, toy(eval__checkpoint="last"))
    saved = tiny.arrays(workdir, step)
    assert loaded.step == step
    for path, leaf in jax.tree_util.tree_leaves_with_path(loaded.variables["params"]):
        name = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(leaf, saved[f"ema['params']{name}"])
        assert (saved[f"ema['params']{name}"] != saved[f"model{name}"]).any()


def reworded(record):
    """Other words: a vocabulary of this set would have other ids."""
    return record | {"captions": [f"zebra quagga {caption[::-1]}" for caption in record["captions"]]}


def test_another_data_set_is_read_with_the_vocabulary_of_the_training(workdir):
    other = tiny.write("reworded", reworded)
    assert (other / "sentencepiece.model").read_bytes() != (workdir / "vocabulary.model").read_bytes()
    config = toy(data__dir=str(other))
    experiment = load(workdir, config).experiment
    assert experiment.dataset.path == other
    ours = load(workdir, toy()).experiment.tokenizer
    assert experiment.tokenizer.vocab_size == ours.vocab_size
    for word in (["zebra"], ["red square"]):
        assert experiment.tokenizer.vocabulary.pieces(word) == ours.vocabulary.pieces(word)
    results = evaluate_checkpoint(config, workdir)
    assert results.card["dataset"] == "reworded" and np.isfinite(results.metrics["rsum"])


def test_a_data_set_with_features_of_another_size(workdir):
    wide = tiny.write("wide", lambda record: record | {"regions": np.tile(record["regions"], 2)})
    with pytest.raises(CheckpointError, match="does not fit this configuration and data set") as fault:
        load(workdir, toy(data__dir=str(wide)))
    assert "image/linear/kernel: saved (200, 16), expected (400, 16)" in str(fault.value)


def test_a_data_set_without_what_the_model_reads(workdir):
    def without(record):
        return {name: value for name, value in record.items() if "region" not in name and "box" not in name}

    bare = tiny.write("bare", lambda record: {k: v for k, v in without(record).items() if k != "relations"})
    with pytest.raises(ValueError, match="this data set has no regions"):
        load(workdir, toy(data__dir=str(bare)))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model__dim": 8}, "config.model.dim: 8, there 16"),
        ({"text__tower": "transformer"}, "config.text.tower: 'transformer', there 'bigru'"),
    ],
)
def test_another_model_than_the_one_trained(changes, field, workdir):
    with pytest.raises(ValueError, match="was trained with another model than --config names") as fault:
        load(workdir, toy(**changes))
    assert field in str(fault.value) and str(workdir) in str(fault.value)


def test_folders_without_a_run(workdir, tmp_path):
    with pytest.raises(WorkdirError, match=r"no config\.json; not the work folder of a training run"):
        load(tmp_path / "nowhere", toy())
    assert not (tmp_path / "nowhere").exists()
    for name in ("config.json", "vocabulary.model"):
        with pytest.raises(WorkdirError, match=r"no config\.json|no vocabulary file"):
            load(tmp_path, toy())
        (tmp_path / name).write_bytes((workdir / name).read_bytes())
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load(tmp_path, toy())


def test_an_unknown_checkpoint_or_split(workdir):
    with pytest.raises(ValueError, match="'newest'; choose best or last"):
        load(workdir, toy(eval__checkpoint="newest"))
    with pytest.raises(ValueError, match="no split 'dev'; it has"):
        evaluate_checkpoint(toy(eval__split="dev"), workdir)


@pytest.mark.slow
def test_an_ensemble_of_runs_has_rows_of_its_own(workdir, tmp_path, capsys):
    """Of runs that differ in model: the given configuration decides on the evaluation alone."""
    other = tiny.folder() / "commands_other"
    train(toy(model__dim=8, name="other"), other)
    config = toy(model__dim=3, eval__ensemble=(str(workdir), str(other)), eval__hubness=True)
    config.eval.score_dtype = "bfloat16"  # of the members; ranks are the same
    config.eval.protocols = ("whole", "folds2")
    evaluate(config, tmp_path / "both", card=True)
    names = [f"{name}, {p}" for name in ("3SHNet region", "other", "ensemble of 2") for p in config.eval.protocols]
    document = json.loads((tmp_path / "both/results_tiny_test_whole+folds2_best.json").read_text("utf-8"))
    assert list(document["arms"]) == names
    alone = evaluate_checkpoint(toy(), workdir)
    assert document["arms"][names[0]]["metrics"] == alone.metrics
    whole = document["arms"]["ensemble of 2, whole"]
    assert whole["card"]["ensemble"] == "mean of the scores of 2 models: 3SHNet region (0.5), other (0.5)"
    assert whole["intervals"]["rsum"]["low"] <= whole["metrics"]["rsum"] <= whole["intervals"]["rsum"]["high"]
    assert whole["extra"].keys() == {"hubness_i2t", "hubness_t2i"}
    assert (tmp_path / "both/results_tiny_test_whole+folds2_best.md").read_text("utf-8") in capsys.readouterr().out
    # The saved ranks of the queries are what another evaluation is compared with.
    saved = tmp_path / "both/queries_tiny_test_whole+folds2_best.npz"
    evaluate(toy(eval__compare=str(saved)), workdir)
    document = json.loads((workdir / "results_tiny_test_whole_best.json").read_text("utf-8"))
    (difference,) = document["differences"].values()
    gap = alone.metrics["rsum"] - whole["metrics"]["rsum"]
    assert difference["rsum"]["estimate"] == pytest.approx(gap)


def test_an_ensemble_needs_two_runs(workdir, tmp_path):
    with pytest.raises(ValueError, match="at least 2 different work folders"):
        evaluate(toy(eval__ensemble=(str(workdir), str(workdir))), tmp_path)
    with pytest.raises(WorkdirError, match=r"nowhere: no config\.json"):
        evaluate(toy(eval__ensemble=(str(workdir), str(tmp_path / "nowhere"))), tmp_path)
    with pytest.raises(ValueError, match=r"config\.eval\.ensemble_weights has 1 numbers for 2 models"):
        evaluate(toy(eval__ensemble=(str(workdir), "other"), eval__ensemble_weights=(1.0,)), tmp_path)


def test_a_field_younger_than_the_run_has_to_be_off(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "old")
    path = tmp_path / "old/config.json"
    saved = json.loads(path.read_text("utf-8"))
    del saved["model"]["bn_sync"], saved["model"]["cmsei"]  # the section of another model is no part of this one
    del (
        saved["model"]["activation_dtype"],
        saved["optim"]["name"],
        saved["loss"]["pairs"]["dtype"],
        saved["loss"]["sigmoid"]["reduction"],
    )
    path.write_text(json.dumps(saved))
    assert load(tmp_path / "old", toy()).step
    old = stored_config.get_config(str(tmp_path / "old"))
    assert (old.optim.name, old.loss.pairs.dtype, old.loss.sigmoid.reduction) == ("adamw", "float32", "queries")
    assert old.model.activation_dtype == "float32"
    with pytest.raises(ValueError, match=r"config\.model\.bn_sync: True, there False"):
        load(tmp_path / "old", toy(model__bn_sync=True))
