"""Arms and seeds: one table, finished runs are not repeated."""

from __future__ import annotations

import json
import shutil
import statistics

import numpy as np
import pytest
from ml_collections import ConfigDict

from shnet_jax.evaluation.bootstrap import NAMES, Interval
from shnet_jax.evaluation.metrics import QueryRanks
from shnet_jax.evaluation.protocols import Results
from shnet_jax.modes import study as module
from shnet_jax.modes.study import Run, arm_config, differences, study, table, wall_time_table
from shnet_jax.modes.study_charts import study_charts, validation_curve
from shnet_jax.observe.clock import KINDS
from tests.train import tiny


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick():
        yield


def configuration(only=(), **changes):
    """3 steps, evaluated at the end; the narrow arm has its own width, the two seeds their own weights."""
    c = tiny.config(
        model__name="tests.train.toy", train__steps=3, train__log_steps=3, train__eval_epochs=0.0, **changes
    )
    c.study.arms = ConfigDict({"wide": {}, "narrow": {"model": {"dim": 4}, "optim": {"lr": 0.01}}})
    c.study.seeds = (3, 4)
    c.study.only = only
    return c


def with_ensemble():
    c = configuration()
    c.study.ensembles = ConfigDict({"both": ("wide", "narrow")})
    c.study.compare = ("wide - narrow", "both - narrow")
    return c


def results(rsum, queries=None):
    metrics = dict.fromkeys(NAMES, 10.0) | {"rsum": rsum}
    return Results(metrics=metrics, folds=(), chance=dict.fromkeys(NAMES, 1.0), card={}, queries=queries)


def test_the_tile_of_a_loss_makes_no_other_run():
    configs = [configuration(loss__pairs__tile=tile) for tile in (0, 1024)]
    assert module._identity(configs[0]) == module._identity(configs[1]) != module._identity(configuration(seed=7))


def test_the_wall_time_of_the_arms():
    spent = dict.fromkeys(KINDS, 0.0)
    seeds = [spent | {"step": 90.0, "lost": 30.0}, spent | {"step": 90.0, "compile": 150.0}, None]
    arms = {
        "full": [Run(i, results(1), 1.0, 1.0, s) for i, s in enumerate(seeds)],
        "old": [Run(0, results(1), 1.0, 1.0)],
    }
    (row,) = wall_time_table(arms).rows
    assert row[:2] == ["full", "3.0"]  # mean of 2 and 4 minutes
    shares = dict(zip(KINDS, row[2:], strict=True))
    assert shares == dict.fromkeys(KINDS, "0.0") | {"step": "50.0", "lost": "8.3", "compile": "41.7"}
    assert wall_time_table({"old": arms["old"]}) is None


def test_the_table_has_mean_and_standard_deviation():
    runs = {
        "full": [
            Run(seed, results(rsum), minutes=2.0, examples_per_second=100.0) for seed, rsum in enumerate((50, 54))
        ],
        "none": [Run(0, results(40), minutes=1.0, examples_per_second=200.0)],
    }
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in str(table(runs)).splitlines() if line]
    assert rows[0][:2] == ["arm", "seeds"] and rows[0][-3:] == ["rSum", "minutes", "pairs/s"]
    by_arm = {row[0]: row for row in rows[2:]}
    assert by_arm["full"][1] == "2" and by_arm["full"][-3] == f"52.0 ± {statistics.stdev((50, 54)):.1f}"
    assert by_arm["none"][-3:] == ["40.0", "1.0", "200"]
    assert "1.0" in by_arm["chance"]


def test_differences_are_of_the_seeds_that_both_arms_have():
    owner = np.repeat(np.arange(50), 2)

    def run(seed, rank):
        return Run(seed, results(0, QueryRanks(np.full(50, rank), np.full(100, 9), owner)), 1.0, None)

    runs = {"ours": [run(0, 0), run(1, 4)], "none": [run(1, 20), run(0, 7)], "new": [run(5, 0)]}
    actual = differences(runs, ("ours - none", "new - none"))
    assert list(actual) == ["ours - none"]  # a seed that the other does not have is not compared
    # Both of our seeds are among the first 5, one at rank 0; of the others one is among the first 10.
    assert [actual["ours - none"][f"i2t_r{k}"].estimate for k in (1, 5, 10)] == [50.0, 100.0, 50.0]
    assert actual["ours - none"]["t2i_r10"] == Interval(0.0, 0.0, 0.0)


def test_rows_that_were_not_trained_have_no_speed():
    runs = {"both": [Run(0, results(50), minutes=2.0, examples_per_second=None)]}
    text = str(table(runs, results(30.0)))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[2][-3:] == ["50.0", "2.0", ""]
    assert [rows[3][i] for i in (0, -3)] == ["zero-shot", "30.0"]


def test_charts():
    names = [f"{side}_r{cut}" for side in ("i2t", "t2i") for cut in (1, 5, 10)]
    recalls = {"a": [dict.fromkeys(names, 10.0), dict.fromkeys(names, 20.0)], "<b>": [dict.fromkeys(names, 50.0)]}
    curves = {"a": [[(1, 60.0), (2, 90.0)], [(1, 120.0)]], "<b>": []}
    compared, learned = study_charts(recalls, curves)
    assert "lowest to the highest seed" in compared and "image to text R@1" not in learned
    assert "</b>a</span>" in compared and "</b>&lt;b&gt;</span>" in compared and "&lt;b&gt;" not in learned
    (alone,) = study_charts({"a": recalls["a"][:1]}, {"a": []})
    assert "seed" not in alone
    history = [{"kind": "train", "step": 1, "loss": 1.0}, {"kind": "eval", "step": 2, "rsum": 9}]
    assert validation_curve(history) == [(2, 9.0)]


@pytest.mark.parametrize(
    ("members", "compare", "message"),
    [
        (("wide", "narow"), (), "ensembles.both is .*at least 2 of the arms"),
        (("wide", "wide"), (), "at least 2 of the arms"),
        (
            ("wide", "narrow"),
            ("both - nobody",),
            "compare has 'both - nobody'; expected 'ARM - OTHER', .*'both'",
        ),
        (("wide", "narrow"), ("wide",), "compare has 'wide'"),
    ],
)
def test_mistakes_in_ensembles_and_comparisons(members, compare, message, tmp_path):
    config = configuration()
    config.study.ensembles = ConfigDict({"both": members})
    config.study.compare = compare
    with pytest.raises(ValueError, match=message):
        study(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_ensemble_is_ranked_exactly(tmp_path):
    config = with_ensemble()
    config.eval.two_stage, config.eval.exact = 5, False
    with pytest.raises(ValueError, match=r"an ensemble is ranked exactly: set config\.eval\.two_stage to 0"):
        study(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_arm_differs_only_in_its_fields():
    config = configuration()
    own = arm_config(config, "narrow", 4)
    assert (own.model.dim, own.optim.lr, own.seed, own.name) == (4, 0.01, 4, "3SHNet region, narrow")
    assert own.model.map_channels == config.model.map_channels and config.model.dim == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": {"dimm": 4}}, "config.study.arms.narrow: .*dimm"),
        ({"model": {"dim": "wide"}}, "narrow: .*dim"),
        ({"train": {"batch_size": 7}}, "config.study.arms.narrow: config.train.batch_size is 7"),
        ({"momentum": {"queue": 64, "from_epoch": 9.0}, "loss": {"weights": {"infonce": 1.0}}}, "never take part"),
    ],
)
def test_a_mistake_in_an_arm_is_told_before_anything_is_trained(fields, message, tmp_path):
    config = configuration()
    config.study.arms.narrow = ConfigDict(fields)
    with pytest.raises(ValueError, match=message):
        study(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_arm(tmp_path):
    with pytest.raises(ValueError, match=r"names \['narow'\]; config.study.arms has \['narrow', 'wide'\]"):
        study(configuration(only=("narow",)), tmp_path)
    with pytest.raises(ValueError, match="at least one arm"):
        study(empty(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_seed_twice_is_no_second_run(tmp_path):
    config = configuration()
    config.study.seeds = (3, 3)
    with pytest.raises(ValueError, match=r"config.study.seeds is \(3, 3\); expected each once"):
        study(config, tmp_path)


def empty():
    c = configuration()
    c.study.seeds = ()
    return c


@pytest.mark.slow
def test_a_study_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    trained, real = [], module.train_and_evaluate

    def counted(config, workdir):
        before = len(tiny.lines(workdir)) if (workdir / "metrics.jsonl").exists() else 0
        actual = real(config, workdir)
        trained.append((config.name, config.seed, len(tiny.lines(workdir)) - before))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return actual

    monkeypatch.setattr(module, "train_and_evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        study(with_ensemble(), tmp_path)
    trained.append(("interrupted", 0, 0))
    runs = study(with_ensemble(), tmp_path)
    wide, narrow = "3SHNet region, wide", "3SHNet region, narrow"
    assert trained == [
        (narrow, 3, 2),
        (narrow, 4, 2),
        (wide, 3, 2),
        ("interrupted", 0, 0),
        (wide, 3, 0),  # trained and not evaluated yet
        (wide, 4, 2),
    ]
    assert [(arm, run.seed) for arm, actual in runs.items() for run in actual] == [
        ("narrow", 3),
        ("narrow", 4),
        ("wide", 3),
        ("wide", 4),
        ("both", 3),
        ("both", 4),
    ]
    page = (tmp_path / "study.html").read_text("utf-8")
    assert page.count("<svg") == 2 and page.count("</b>both</span>") == 1  # an ensemble has no curve
    text = (tmp_path / "study.md").read_text("utf-8")
    rsums = [run.results.metrics["rsum"] for run in runs["wide"]]
    assert f"{statistics.mean(rsums):.1f} ± {statistics.stdev(rsums):.1f}" in text
    assert text in capsys.readouterr().out
    document = json.loads((tmp_path / "study.json").read_text("utf-8"))
    assert [run["results"]["metrics"]["rsum"] for run in document["wide"]] == rsums
    assert all(run["results"]["card"]["split"] == "test" for run in document["narrow"])
    assert "2 models: 3SHNet region, wide (0.5), 3SHNet region, narrow (0.5)" in json.dumps(document["both"])
    assert document["wide"][0]["spent"]["step"] > 0 and document["both"][0]["spent"] is None
    assert "goodput" in (tmp_path / "study.html").read_text("utf-8")
    assert document["both"][0]["minutes"] == sum(document[arm][0]["minutes"] for arm in ("wide", "narrow"))
    gap = document["differences"]["wide - narrow"]["rsum"]
    narrow = [run.results.metrics["rsum"] for run in runs["narrow"]]
    assert gap["estimate"] == pytest.approx(statistics.mean(rsums) - statistics.mean(narrow))
    assert "wide - narrow" in text and f"[{gap['low']:.1f}, {gap['high']:.1f}]" in text
    count = len(trained)
    again = study(configuration(only=("wide",)), tmp_path)
    for before, after in zip(runs["wide"], again["wide"], strict=True):
        assert json.dumps(module._as_dict(before)) == json.dumps(module._as_dict(after))
        np.testing.assert_array_equal(before.results.queries.t2i, after.results.queries.t2i)
    assert list(again) == ["wide"] and len(trained) == count  # at once
    other = study(configuration(only=("wide",), eval__split="val"), tmp_path)["wide"]
    assert [run.results.card["split"] for run in other] == ["val", "val"] and len(trained) == count + 2
    shutil.rmtree(tmp_path / "wide" / "seed_3" / "checkpoints")
    study(configuration(only=("wide",), eval__split="val"), tmp_path)
    assert [entry[:2] for entry in trained[count + 2 :]] == [(wide, 3)]
