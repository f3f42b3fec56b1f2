"""Faults that are found in time: damaged checkpoints, a second writer, a full disk, a folder of something else."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from configs import scaling as small
from data_prep.scenes.write import main as importer
from shnet_jax import api
from shnet_jax.experiment import assemble
from shnet_jax.modes.convert import load_run, write_run
from shnet_jax.modes.cross import cross
from shnet_jax.modes.evaluate import EVALUATION_LOCK, evaluate
from shnet_jax.modes.scale import scale
from shnet_jax.observe.files import FolderInUse, describe, disk_faults, sole_writer
from shnet_jax.observe.writer import MetricWriter
from shnet_jax.retrieve import tensors
from shnet_jax.training import integrity
from shnet_jax.training.checkpoint import CheckpointError, Checkpoints
from shnet_jax.training.integrity import set_damaged_aside
from shnet_jax.training.loop import train_and_evaluate
from shnet_jax.training.workdir import WorkdirError, claim, load_config, save_config
from tests.train import tiny
from tests.train.test_checkpoint import iterator, make_state, save
from tests.train.test_loop import same_arrays, toy

ROOT = Path(__file__).parents[2]


def bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run's folder with checkpoints 3, 6 (the best) and 9."""
    workdir = tmp_path_factory.mktemp("three")
    checkpoints = Checkpoints(workdir, keep=3)
    for step, rsum in ((3, 10.0), (6, 30.0), (9, 20.0)):
        save(checkpoints, step, value=step / 10, metrics={"rsum": rsum})
    checkpoints.close()
    return workdir


@pytest.fixture
def run(three, tmp_path):
    return Path(shutil.copytree(three, tmp_path / "run"))


def file(run: Path, step: int, pattern: str) -> Path:
    return sorted((run / "checkpoints" / str(step)).glob(pattern))[0]


DAMAGES = [
    ("model/d/*", bit, r"model/d/\w+: expected sha256 (\w{64}), found sha256 (?!\1)\w{64}"),
    ("ema/d/*", cut, r"ema/d/\w+: expected (\d+) bytes, found (?!\1)\d+ bytes"),
    ("notes/metadata", Path.unlink, r"notes/metadata: expected 23 bytes, found no file"),
    ("model/manifest.ocdbt", bit, r"model/manifest\.ocdbt: expected sha256"),
    ("_CHECKPOINT_METADATA", cut, r"_CHECKPOINT_METADATA: cannot be read"),
    ("checksums.json", cut, r"checksums\.json: expected a JSON object"),
]


@pytest.mark.parametrize(("pattern", "damage", "message"), DAMAGES)
def test_damage_is_found_and_named(pattern, damage, message, run):
    damage(file(run, 6, pattern))
    checkpoints = Checkpoints(run)
    like = {"params": make_state().params["model"], "batch_stats": make_state().batch_stats}
    for read in (
        lambda: checkpoints.restore(6, make_state(), iterator()),
        lambda: checkpoints.restore_variables(6, like, averaged=True),
        lambda: checkpoints.abstract_variables(6, averaged=False),
        lambda: checkpoints.notes(6),
    ):
        with pytest.raises(CheckpointError, match=message) as fault:
            read()
        assert f"checkpoint 6 in {run}" in str(fault.value) and "Whole are: 3, 9." in str(fault.value)
    assert checkpoints.notes(9) == {"sums": {"loss": 0.1}}


@pytest.mark.parametrize("damage", [bit, cut, Path.unlink])
def test_which_is_best_is_not_told_from_damaged_metrics(damage, run):
    damage(file(run, 6, "metrics/metrics"))
    with pytest.raises(CheckpointError, match=r"checkpoint 6 .* is damaged:\n  metrics/metrics: "):
        Checkpoints(run)


def test_the_damaged_are_set_aside_and_the_whole_go_on(run, caplog):
    folder = run / "checkpoints"
    whole = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "6" not in p.relative_to(folder).parts[0]}
    for number in ("", ".2"):  # twice: the second does not replace the first
        cut(file(run, 6, "model/d/*"))
        caplog.clear()
        set_damaged_aside(run)
        assert f"checkpoint 6 in {folder} is damaged and was skipped, it is 6.damaged{number} now" in caplog.text
        assert "model/d/" in caplog.text and (folder / f"6.damaged{number}" / "model").is_dir()
        shutil.copytree(folder / "6.damaged", folder / "6")
    shutil.rmtree(folder / "6")
    assert {p: p.read_bytes() for p in whole} == whole

    checkpoints = Checkpoints(run, keep=3)
    assert (checkpoints.step("last"), checkpoints.step("best")) == (9, 9)
    assert "6.damaged, 6.damaged.2 was set aside as damaged; 9 is the best of the others" in caplog.text
    save(checkpoints, 12, metrics={"rsum": 25.0})
    checkpoints.close()
    assert Checkpoints(run).step("best") == 12 and integrity.faults(folder / "12") == []


def test_nothing_is_renamed_when_none_is_whole(run):
    for step in (3, 6, 9):
        cut(file(run, step, "trainer/manifest.ocdbt"))
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is whole:\n  3/trainer/manifest\.ocdbt: expected \d+ bytes"
    ):
        set_damaged_aside(run)
    assert integrity.steps(run / "checkpoints") == [3, 6, 9]


def test_a_checkpoint_without_checksums_is_read_with_a_warning(run, caplog):
    file(run, 9, "checksums.json").unlink()
    set_damaged_aside(run)
    restored = Checkpoints(run).restore(9, make_state(), iterator())
    assert restored.notes == {"sums": {"loss": 0.1}}
    assert caplog.text.count("checkpoint 9 in") == 1 and "whether its files are whole is not known" in caplog.text
    bit(file(run, 9, "model/manifest.ocdbt"))
    with pytest.raises(CheckpointError, match=r"checkpoint 9 in .* cannot be read: DATA_LOSS"):
        Checkpoints(run).restore(9, make_state(), iterator())


def test_a_step_has_its_checksums_when_it_gets_its_name(run, monkeypatch):
    def killed(folder):
        assert not (folder.parent / "12").exists()
        raise KeyboardInterrupt

    checkpoints = Checkpoints(run, keep=3)
    with monkeypatch.context() as patch:
        patch.setattr(integrity, "write_checksums", killed)
        save(checkpoints, 12)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
    assert Checkpoints(run).step("last") == 9


def test_a_checkpoint_that_training_removes_meanwhile(run):
    reader = Checkpoints(run)
    shutil.rmtree(run / "checkpoints" / "6")
    with pytest.raises(
        CheckpointError, match=r"checkpoint 6 in .* was removed while it was read, by the training that"
    ):
        reader.notes(6)
    assert Checkpoints(run).step("last") == 9


def test_removed_checkpoints_are_never_half_there(run, monkeypatch):
    """A run that is killed while it deletes leaves them in a folder of their own."""
    checkpoints = Checkpoints(run, keep=1)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    save(checkpoints, 12)
    checkpoints.wait()
    assert integrity.steps(run / "checkpoints") == [6, 12]
    assert sorted(p.name for p in (run / "checkpoints" / "removed").iterdir()) == ["3", "9"]
    monkeypatch.undo()
    again = Checkpoints(run, keep=1)
    save(again, 15)
    again.close()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["15", "6"]


@pytest.fixture(scope="module")
def quick():
    with tiny.quick():
        yield


@pytest.mark.slow
def test_training_goes_on_from_the_last_whole_checkpoint(quick, tmp_path, caplog):
    """The run, moreover, began before some fields existed, and while another did."""
    config, whole, run = toy(), tmp_path / "whole", tmp_path / "run"
    train_and_evaluate(config, whole)
    shutil.copytree(whole, run)
    bit(file(run, 11, "model/d/*"))
    saved = load_config(run / "config.json").to_dict()
    del saved["data"]["identity"], saved["loss"]["sdm"], saved["loss"]["weights"]["uto"], saved["momentum"]
    del saved["eval"]["stages"]
    saved["train"]["profile_steps"] = 0
    (run / "config.json").write_text(json.dumps(saved))
    with caplog.at_level(logging.INFO, logger="shnet_jax"):
        train_and_evaluate(config, run)
    assert "checkpoint 11 in" in caplog.text and "continuing from step 10 of 11" in caplog.text
    assert "this run is older than some fields" in caplog.text and "config.data.identity: True" in caplog.text
    same_arrays(tiny.arrays(run, 11), tiny.arrays(whole, 11))
    assert tiny.lines(run) == tiny.lines(whole)
    assert (run / "checkpoints" / "11.damaged").is_dir()

    best = Checkpoints(whole).step("best")
    alone = api.load(run)  # without a configuration, fields that are younger than the run have their defaults
    assert alone.loaded.step == best and alone.config.eval.stages == 1
    assert api.load(run, config=config).loaded.step == load_run(run, "best", config).step == best
    assert load_run(run, "last", config).step == 11

    config.loss.weights.uto = 1.0  # what it has never done
    config.momentum.queue = 20
    with pytest.raises(WorkdirError) as refused:
        claim(run, assemble(config))
    assert "config.loss.weights.uto: 1.0, there 0.0" in str(refused.value)
    assert "config.momentum.queue: 20, there 0" in str(refused.value)
    (run / "config.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"run/config\.json: not the JSON of a configuration"):
        claim(run, assemble(config))


@pytest.mark.parametrize("name", ["config.json", "dataset_info.json"])
def test_a_folder_of_something_else_is_left_alone(name, tmp_path):
    (tmp_path / name).write_text('{"model_type": "bert"}')
    with pytest.raises(WorkdirError, match="holds something else than a run"):
        claim(tmp_path, assemble(toy()))
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"model_type": "bert"}'


# ------------------------------------------------------------------------------------------------------- two writers

HOLD = """
import sys
from shnet_jax.observe.files import sole_writer
with sole_writer(*sys.argv[1:]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder, name=".lock"):
    """Another process is the one that writes to `folder`, or to what the lock of that name is for."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), name],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            yield other
        finally:
            other.kill()


def test_one_writer_at_a_time(tmp_path):
    with held(tmp_path) as other:
        before = (tmp_path / ".lock").read_text()
        with pytest.raises(FolderInUse) as refused, sole_writer(tmp_path):
            pytest.fail("two writers")
        expected = f"{tmp_path} is being written to by process {other.pid} on {os.uname().nodename} since "
        assert str(refused.value).startswith(expected)
        assert (tmp_path / ".lock").read_text() == before
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert (tmp_path / ".lock").exists()  # nobody's
        with sole_writer(tmp_path):
            assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
    assert not list(tmp_path.iterdir())


def test_evaluations_wait_for_each_other_but_not_for_training(tmp_path):
    config = toy()
    with held(tmp_path, EVALUATION_LOCK), pytest.raises(FolderInUse):
        evaluate(config, tmp_path)
    with held(tmp_path), pytest.raises(WorkdirError, match="not the work folder of a training run"):
        evaluate(config, tmp_path)  # it got as far as that
    with held(tmp_path), pytest.raises(FolderInUse):
        config.cross.runs, config.cross.data_dirs = (str(tmp_path),), (config.data.dir,)
        save_config(config, tmp_path / "config.json")
        (tmp_path / "vocabulary.model").touch()
        cross(config, tmp_path)
    with pytest.raises(WorkdirError):
        evaluate(config, tmp_path / "misspelt")
    assert not (tmp_path / "misspelt").exists()


def test_importers_and_conversion_wait_for_nobody(tmp_path, capsys):
    with held(tmp_path / "scenes"):
        assert importer(["--out", str(tmp_path), "--train=5", "--val=5", "--test=5"]) == 1
        assert f"error: {tmp_path / 'scenes'} is being written to by process " in capsys.readouterr().err
        with pytest.raises(FolderInUse):
            write_run(tmp_path / "scenes", None)
    with held(tmp_path), pytest.raises(FolderInUse):
        scale(small.get_config(), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


# ------------------------------------------------------------------------------------------------------------- disks


@contextmanager
def disk(folder: Path, size: str):
    """A small disk at `folder`; skips where this user may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 128 kB."""
    with disk(tmp_path / "disk", "128k") as folder:
        yield folder


def wait_for_writers(folder: Path) -> None:
    """Waits until nothing changes below a folder: other threads of a save that failed may still write there."""
    before = None
    while (now := [(place, sorted(names), sorted(files)) for place, names, files in os.walk(folder)]) != before:
        before = now
        time.sleep(0.5)


def fill(folder: Path, left: int = 0) -> None:
    """Leaves `left` bytes free."""
    usage = shutil.disk_usage(folder)
    with (folder / "filler").open("wb") as file:
        file.write(bytes(usage.free - left))


def test_a_full_disk_ends_the_log_with_its_reason(small_disk):
    with pytest.raises(OSError, match="No space left") as fault, sole_writer(small_disk):
        writer = MetricWriter(small_disk)
        fill(small_disk)
        for step in range(1000):  # a thread of its own would have died, and left this loop waiting for it
            writer.write(step, "train", {f"metric_{i}": 1.0 for i in range(20)})
    assert fault.value.errno == errno.ENOSPC
    text = describe(fault.value)
    assert text.startswith(f"{small_disk}: No space left on device; 0.0 of 0.1 MB are free there.")


def test_a_full_disk_does_not_take_the_name_of_who_writes(small_disk):
    fill(small_disk)
    with pytest.raises(OSError, match="No space left") as fault, sole_writer(small_disk):
        pytest.fail("began")
    assert fault.value.filename == str(small_disk)
    assert sorted(p.name for p in small_disk.iterdir()) == ["filler"]


def test_a_full_disk_is_the_same_error_whoever_tells_of_it(small_disk):
    with pytest.raises(OSError, match="No space left") as fault, disk_faults(small_disk, SafetensorError):
        save_file({"vector": np.zeros(200_000, np.float32)}, small_disk / "a.safetensors")
    assert describe(fault.value).startswith(f"{small_disk}: No space left on device; ")
    with pytest.raises(SafetensorError, match="No such file"), disk_faults(small_disk, SafetensorError):
        save_file({"vector": np.zeros(2, np.float32)}, small_disk / "nowhere" / "a.safetensors")


def test_a_full_disk_is_an_error_before_vectors_are_mapped(small_disk):
    fill(small_disk, left=50_000)
    with pytest.raises(OSError, match="No space left"):
        tensors.create(small_disk / "a.safetensors", {"vector": ((100, 200), np.dtype("<f4"))})


@pytest.mark.parametrize("size", ["64k", "300k"])
def test_a_data_set_that_does_not_fit_on_the_disk(size, small_disk, capsys):
    remount(small_disk, f"size={size}")
    assert importer(["--out", str(small_disk), "--train=15", "--val=5", "--test=5"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: {small_disk}") and "No space left on device; " in told
    assert not [path for path in small_disk.rglob("*") if path.is_file()]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of orbax's threads
def test_a_checkpoint_that_does_not_fit_on_the_disk(small_disk, capfd):
    disk = small_disk / "run"
    remount(small_disk, "size=1m")
    checkpoints = Checkpoints(disk, keep=2)
    save(checkpoints, 3)
    checkpoints.wait()
    fill(small_disk, left=20_000)
    save(checkpoints, 6)
    with pytest.raises(CheckpointError) as fault:
        checkpoints.close()
    assert str(fault.value).startswith(f"checkpoint 6 could not be written to {disk / 'checkpoints'}, where 0.0 of ")
    assert "No space left on device. The checkpoints before it are as they were, the last one is 3" in str(fault.value)
    assert "Traceback" not in capfd.readouterr().err
    (small_disk / "filler").unlink()
    wait_for_writers(disk)
    again = Checkpoints(disk, keep=2)
    assert again.step("last") == 3
    save(again, 6)
    again.close()
    assert sorted(p.name for p in (disk / "checkpoints").iterdir()) == ["3", "6"]
    assert integrity.faults(disk / "checkpoints" / "3") == integrity.faults(disk / "checkpoints" / "6") == []


def test_what_the_system_refuses_is_one_line(tmp_path):
    refused = describe(PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "run")))
    assert refused == f"{tmp_path / 'run'}: Permission denied; needed was to write there, as user {os.geteuid()}"
    assert describe(FileNotFoundError("x: no such file")) == "x: no such file"
