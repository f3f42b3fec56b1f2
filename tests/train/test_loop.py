"""Whole runs in this process: resuming, faults, claims. The model is tests/train/toy.py unless a test is slow."""

from __future__ import annotations

import functools
import gzip
import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from shnet_jax.experiment import assemble
from shnet_jax.observe.clock import KINDS, read_wall_time
from shnet_jax.observe.writer import read_metrics
from shnet_jax.parallel import sharding
from shnet_jax.training import loop
from shnet_jax.training.checkpoint import CheckpointError, Checkpoints
from shnet_jax.training.loop import NonFiniteLoss, train_and_evaluate
from shnet_jax.training.signals import Interrupted
from shnet_jax.training.workdir import WorkdirError, claim, load_config
from tests.patience import PATIENCE
from tests.train import tiny


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick():
        yield


def toy(**changes):
    return tiny.config(model__name="tests.train.toy", **changes)


def same_arrays(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype
        assert ours[name].tobytes() == array.tobytes(), name


@functools.cache
def run_of(resident):
    """(configuration, work folder, final arrays, log) of a run that nothing interrupts."""
    config = toy(data__resident=resident)
    workdir = tiny.folder() / f"undisturbed_{resident}"
    train_and_evaluate(config, workdir)
    return config, workdir, tiny.arrays(workdir, config.train.steps), tiny.lines(workdir)


@pytest.fixture
def undisturbed():
    return run_of(False)


def at_step(monkeypatch, number, act):
    """Calls `act` while the batch of the `number`-th step from now is on its way."""
    put, calls = loop.put_batch, []

    def counted(*arguments):
        calls.append(0)
        if len(calls) == number:
            act()
        return put(*arguments)

    monkeypatch.setattr(loop, "put_batch", counted)


def test_the_log_of_a_run(undisturbed):
    config, _, _, lines = undisturbed
    steps = [(line["step"], line["kind"]) for line in lines]
    # log_steps 4, an evaluation every half epoch of 10 steps, and both at the end, 11.
    assert steps == [(4, "train"), (5, "eval"), (8, "train"), (10, "eval"), (11, "train"), (11, "eval")]
    assert all(np.isfinite(line["loss"]) and line["nonfinite"] == 0 for line in lines if line["kind"] == "train")
    assert lines[0]["loss"] > lines[-2]["loss"] > 0
    assert lines[0]["lr"] == pytest.approx(config.optim.lr * 3 / 5)  # step 4 of a warm-up over half an epoch


@pytest.mark.parametrize("resident", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resuming_gives_the_same_run(resident, monkeypatch, tmp_path):
    """A signal after step 2; a crash in step 9, whose last checkpoint, 6, lies within a log interval; the rest."""
    config, _, arrays, lines = run_of(resident)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train_and_evaluate(config, tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert Checkpoints(tmp_path).step("last") == 2
    first = read_wall_time(tmp_path)

    def crash():
        assert (tmp_path / "metrics.jsonl").read_text().count('"train"') == 2  # steps 4 and 8
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):
        at_step(patch, 7, crash)
        train_and_evaluate(config, tmp_path)
    assert Checkpoints(tmp_path).step("last") == 6

    train_and_evaluate(config, tmp_path)
    same_arrays(tiny.arrays(tmp_path, config.train.steps), arrays)
    assert tiny.lines(tmp_path) == lines

    last = read_wall_time(tmp_path)
    assert (first["step"], last["step"]) == (2, 11) and (first["examples"], last["examples"]) == (40, 220)
    assert first["spent"]["lost"] == 0 and last["spent"]["startup"] == first["spent"]["startup"]
    assert all(last["spent"][kind] > 0 for kind in KINDS)  # also what was made again, and the later start-ups
    shares = list(read_metrics(tmp_path / "metrics.jsonl"))[-1]["timing"]
    assert sum(shares[f"share_{kind}"] for kind in KINDS) == pytest.approx(1)


def test_a_finished_run_is_only_evaluated(undisturbed, monkeypatch):
    config, workdir, arrays, lines = undisturbed
    at_step(monkeypatch, 1, lambda: pytest.fail("a step was made"))
    results = train_and_evaluate(config, workdir)
    assert results.metrics["rsum"] == lines[-1]["rsum"]
    assert tiny.lines(workdir) == lines
    same_arrays(tiny.arrays(workdir, config.train.steps), arrays)


@pytest.fixture(scope="module")
def poisoned():
    """A data set in which the features of one training image are not numbers."""
    from data_prep import schema

    spoilt = tiny.records("train")[17]["image_id"]

    def change(record):
        if record["image_id"] == spoilt:
            record["regions"][:] = np.nan  # all of them: some are dropped in training
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "check_record", lambda *arguments, **options: None)
        return spoilt, str(tiny.write("poisoned", change))


@pytest.mark.slow
def test_not_finite_stop_then_skip(request, poisoned, tmp_path, caplog):
    """Bitwise: two programs make the steps, which round alike as users compile them, in a process of its own."""
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0":
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "XLA_"))}
        environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
        command = [sys.executable, "-m", "pytest", "-q", request.node.nodeid]
        done = subprocess.run(
            command, cwd=request.config.rootpath, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
        return
    spoilt, folder = poisoned
    config = toy(data__dir=folder, train__eval_epochs=0.0)
    with pytest.raises(NonFiniteLoss, match=r"^step \d+: the loss or its gradient is not finite") as fault:
        train_and_evaluate(config, tmp_path)
    message = str(fault.value)
    assert spoilt in message and "config.train.on_nonfinite=skip" in message
    at = int(message.split()[1].rstrip(":"))
    saved = Checkpoints(tmp_path).step("last")
    assert saved == at
    before = tiny.arrays(tmp_path, saved)
    assert all(np.isfinite(array).all() for array in before.values() if array.dtype == np.float32)

    with pytest.raises(NonFiniteLoss, match=rf"not finite in 1 of the first {saved} steps.*on_nonfinite=skip"):
        train_and_evaluate(config, tmp_path)
    assert Checkpoints(tmp_path).step("last") == saved

    config.train.on_nonfinite = "skip"
    with caplog.at_level(logging.WARNING, logger="shnet_jax"):
        results = train_and_evaluate(config, tmp_path)
    assert np.isfinite(results.metrics["rsum"])
    after = tiny.arrays(tmp_path, config.train.steps)
    assert all(np.isfinite(array).all() for array in after.values() if array.dtype == np.float32)
    assert any((after[name] != before[name]).any() for name in after if name.startswith("model"))

    skipping = tmp_path / "skipping"  # from the start
    train_and_evaluate(config, skipping)
    same_arrays(after, tiny.arrays(skipping, config.train.steps))
    assert tiny.lines(tmp_path) == tiny.lines(skipping)


@pytest.mark.slow
def test_not_finite_skipped_from_the_start(poisoned, tmp_path, caplog):
    spoilt, folder = poisoned
    config = toy(data__dir=folder, train__eval_epochs=0.0, train__on_nonfinite="skip", train__log_steps=1)
    with caplog.at_level(logging.WARNING, logger="shnet_jax"):
        train_and_evaluate(config, tmp_path)
    told = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    lines = [line for line in tiny.lines(tmp_path) if line["kind"] == "train"]
    faulty = [line["step"] for line in lines if line["nonfinite"]]
    # An image is met once in each pass of 10 steps.
    assert 1 <= len(faulty) <= 2 and len(lines) == config.train.steps
    assert [int(text.split()[1].rstrip(":")) for text in told] == faulty  # each told once
    assert all(spoilt in text and "skipped" in text for text in told)
    assert all(line["loss"] == 0 for line in lines if line["step"] in faulty)
    arrays = tiny.arrays(tmp_path, config.train.steps)
    assert arrays["trainer['nonfinite']"] == len(faulty)
    assert all(np.isfinite(array).all() for array in arrays.values() if array.dtype == np.float32)


def test_claim_names_the_fields_that_differ(undisturbed):
    config = undisturbed[0].copy_and_resolve_references()
    workdir = undisturbed[1]
    config.unlock()
    config.optim.lr = 0.25
    config.model.dim = 17
    with pytest.raises(WorkdirError) as refused:
        train_and_evaluate(config, workdir)
    message = str(refused.value)
    assert str(workdir) in message and "another configuration" in message
    assert "config.optim.lr: 0.25, there 0.0005" in message and "config.model.dim: 17, there 16" in message
    assert len(message.splitlines()) == 3


def test_claim_leaves_free_what_does_not_change_the_parameters(undisturbed):
    config = undisturbed[0].copy_and_resolve_references()
    workdir = undisturbed[1]
    moved = tiny.folder() / "moved"
    if not moved.exists():
        moved.symlink_to(tiny.dataset().parent)
    config.data.dir = str(moved)
    config.name = "another name"
    config.eval.batch_size = 3
    config.loss.pairs.tile = 77
    config.study.seeds = (1, 2)
    config.train.keep = 5
    config.train.on_nonfinite = "skip"
    claim(workdir, assemble(config))
    assert load_config(workdir / "config.json").name == undisturbed[0].name


def test_a_folder_without_a_checkpoint_can_be_claimed_anew(tmp_path):
    with pytest.raises(ValueError, match="no split 'dev'"):
        train_and_evaluate(toy(data__val_split="dev"), tmp_path)
    claim(tmp_path, assemble(toy()))
    assert load_config(tmp_path / "config.json").data.val_split == "val"
    assert (tmp_path / "vocabulary.model").read_bytes() == (tiny.dataset() / "sentencepiece.model").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train__batch_size": 25, "parallel__devices": 2},
            "batch_size is 25; it must divide into 2 devices",
        ),
        ({"parallel__devices": 99}, "config.parallel.devices is 99, this machine has 8"),
        ({"train__batch_size": 500}, "fewer than a batch of 500"),
        ({"train__on_nonfinite": "Stop"}, "'Stop'; choose stop or skip"),
        ({"train__microbatch": 3}, "microbatch is 3; it must divide"),
        ({"train__microbatch_statistics": "sync"}, "'sync'; choose from exact, local, running"),
        ({"train__log_steps": 0}, "config.train.log_steps is 0; it must be at least 1"),
        ({"train__profile_steps": (4,)}, r"profile_steps is \(4,\); expected the first and the last step"),
        ({"train__profile_steps": (4, 12)}, "between 1 and the 11 steps of the training"),
        ({"train__log_to": ("comet",)}, "log_to has 'comet'; choose from wandb, mlflow, trackio"),
        ({"data__captions_per_image": 0}, "config.data.captions_per_image is 0; it must be at least 1"),
        ({"model__dim": 0}, "config.model.dim is 0; it must be at least 1"),
        ({"optim__ema": 1.0}, "config.optim.ema is 1.0"),
        ({"text__weights": "minilm"}, "config.text.tower is 'bigru'"),
        ({"optim__schedule": "linear"}, "choose step, cosine or constant"),
        ({"loss__weights": {"triplet": 0.0, "infonce": 0.0}}, "no loss with a weight above 0"),
        ({"data__dir": ""}, "config.data.dir is empty"),
        (
            {"model__num_classes": 5, "model__name": "shnet"},
            "22 classes and config.model.num_classes is 5: add --config.model.num_classes=22",
        ),
        ({"model__name": "shnett"}, "unknown model 'shnett': .* has align, cmsei, dual, esa, shnet, user$"),
        ({"text__vocab_size": 5}, "the text tower has 5 tokens, the tokenizer"),
        ({"momentum__queue": 19}, "config.momentum.queue is 19; it must hold a whole batch"),
    ],
)
def test_a_configuration_that_cannot_be_trained(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_and_evaluate(tiny.config(**{"model__name": "tests.train.toy"} | changes), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_resident_reading_changes_no_example():
    """The two programs round differently, and Adam makes steps of it in the bias before a BatchNorm."""
    (_, _, arrays, lines), (_, _, expected, logged) = run_of(True), run_of(False)
    first, *_ = (pair for pair in zip(lines, logged, strict=True) if pair[0]["kind"] == "train")
    np.testing.assert_allclose(first[0]["loss"], first[1]["loss"], rtol=1e-5)
    for name, array in expected.items():
        if "['linear']['bias']" not in name:
            follows = "['norm']['mean']" in name or "['mu']" in name
            np.testing.assert_allclose(arrays[name], array, rtol=1e-3, atol=5e-4 if follows else 1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mapping, split", [("pmap", False), ("shard_map", True)])
def test_four_devices_resume_between_the_batches_of_an_update(mapping, split, monkeypatch, tmp_path):
    """split: parameters, moments and gathered gradients; toy arrays are large enough for that here."""
    monkeypatch.setattr(sharding, "SMALLEST", 16)
    parallel = {"parallel__devices": 4, "parallel__mapping": mapping, "parallel__shard_params": split}
    config = toy(**parallel, optim__accumulate=2, train__steps=6)
    stopped_and_resumed(config, 3, monkeypatch, tmp_path)


@pytest.mark.slow
def test_key_encoders_and_queues_resume(monkeypatch, tmp_path):
    """Between two wraps of the queues; the toy's key image encoder has dropout and statistics of its own."""
    weights = {"triplet": 0.0, "infonce": 0.0, "uto": 1.0}
    config = toy(train__steps=6, train__eval_epochs=0.0, momentum__queue=110, loss__weights=weights)
    stopped_and_resumed(config, 4, monkeypatch, tmp_path)
    arrays = tiny.arrays(tmp_path / "resumed", 6)
    assert arrays["momentum['texts']['pointer']"] == 6 * 20 % 110
    ids = arrays["momentum['texts']['ids']"]
    assert (ids >= 0).all() and len(set(ids)) > 10
    keys, own = (arrays[f"{item}['image']['norm']['mean']"] for item in ("momentum['batch_stats']", "batch_stats"))
    assert np.abs(keys).max() > 0 and not np.array_equal(keys, own)


@pytest.mark.slow
def test_3shnet_resumes_as_well(monkeypatch, tmp_path):
    """Dropout in both towers, both kinds of highlighting, a BiGRU."""
    config = tiny.config(data__resident=True, train__steps=7, train__eval_epochs=0.0)
    with tiny.quick():
        stopped_and_resumed(config, 5, monkeypatch, tmp_path)


def stopped_and_resumed(config, step, monkeypatch, folder):
    train_and_evaluate(config, folder / "undisturbed")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        train_and_evaluate(config, folder / "resumed")
    assert Checkpoints(folder / "resumed").step("last") == step
    train_and_evaluate(config, folder / "resumed")
    ours, theirs = (folder / name for name in ("resumed", "undisturbed"))
    same_arrays(tiny.arrays(ours, config.train.steps), tiny.arrays(theirs, config.train.steps))
    assert tiny.lines(ours) == tiny.lines(theirs)


def test_another_job_than_the_one_that_saved(tmp_path, caplog):
    saved = {"devices": 4, "processes": 2}
    with pytest.raises(CheckpointError, match=r"saved by a job of 2 processes, this one has 1; .* start 2 of them"):
        loop.check_job(saved, 4, tmp_path)
    loop.check_job(saved | {"processes": 1}, 4, tmp_path)
    loop.check_job({}, 4, tmp_path)  # of a checkpoint that does not say
    assert not caplog.messages
    loop.check_job(saved | {"processes": 1}, 8, tmp_path)
    assert "saved on 4 devices, going on with 8: the same batches in the same order" in caplog.text


def step_numbers(workdir):
    """Numbers of the steps that a trace in a work folder holds, from the file for Perfetto."""
    (path,) = workdir.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [int(e["args"]["step_num"]) for e in events if e.get("name") == "train" and "step_num" in e.get("args", {})]


@pytest.mark.slow
def test_a_trace_of_chosen_steps(monkeypatch, tmp_path, caplog):
    """The run is stopped within the steps; the rest of them is traced when it goes on; then they are over."""
    config = toy(train__steps=9, train__eval_epochs=0.0, train__profile_steps=(4, 7))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train_and_evaluate(config, tmp_path)
    assert step_numbers(tmp_path) == [4, 5] and list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
    shutil.rmtree(tmp_path / "profile")
    train_and_evaluate(config, tmp_path)
    assert step_numbers(tmp_path) == [6, 7]
    shutil.rmtree(tmp_path / "profile")
    config.train.steps = 10
    with caplog.at_level(logging.INFO, logger="shnet_jax"):
        train_and_evaluate(config, tmp_path)
    assert "profile_steps is (4, 7), and the run goes on from step 9: no trace" in caplog.text
    assert not (tmp_path / "profile").exists()
