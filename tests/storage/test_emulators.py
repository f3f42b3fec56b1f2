"""Runs in emulated S3 and Google storage: trained, killed, resumed elsewhere, evaluated, embedded and searched.

Without s3fs, gcsfs or an emulator, which `make setup` installs, its tests are skipped.
"""

from __future__ import annotations

import json
import signal
import sys
import uuid

import pytest

from shnet_jax import storage
from shnet_jax.data.records import open_dataset
from shnet_jax.mirror import MARKER, Mirror
from tests.processes import Program
from tests.soak import flags
from tests.storage import emulators
from tests.storage.emulators import BUCKET, EMULATORS, S3, Faults, needs, proxy
from tests.train import tiny

SCHEMES = [pytest.param("s3", marks=needs("s3")), pytest.param("gs", marks=needs("gs"))]
STEPS = 20
HELD = """
import signal
from shnet_jax.cli import run
from shnet_jax.training.checkpoint import Checkpoints

save = Checkpoints.save

def held(checkpoints, step, *rest):
    if step >= 10:
        signal.pause()  # while other threads upload the checkpoint before this one
    return save(checkpoints, step, *rest)

Checkpoints.save = held
run()
"""
"""main.py, whose training waits before it saves step 10 until it is killed."""


@pytest.fixture(scope="module", params=SCHEMES)
def emulator(request):
    """Scheme, address and environment of an emulator."""
    with EMULATORS[request.param]() as (address, environment):
        yield request.param, address, environment


@pytest.fixture
def bucket(emulator, tmp_path, monkeypatch):
    """Place of a test in the bucket, and the environment of processes on a first machine; this process has it too."""
    scheme, _, environment = emulator
    environment = environment | {storage.CACHE: str(tmp_path / "first"), "SHNET_SYNC_SECONDS": "0.5"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.05)
    _forget_clients()
    yield f"{scheme}://{BUCKET}/{uuid.uuid4().hex}", environment
    _forget_clients()


def _forget_clients() -> None:
    """fsspec keeps a client for each environment that it was first asked in."""
    for package, name in (("s3fs", "S3FileSystem"), ("gcsfs", "GCSFileSystem")):
        if package in sys.modules:
            getattr(sys.modules[package], name).clear_instance_cache()


def put_dataset(place: str) -> str:
    for file in tiny.dataset().iterdir():
        storage.upload(file, f"{place}/sets/tiny/1.0.0/{file.name}")
    return f"{place}/sets/tiny"


def test_objects_are_written_found_read_and_removed(bucket, tmp_path):
    place, _ = bucket
    assert storage.find(place) == {}
    for name, data in {"a": b"1", "b/c": b"22", "b/d/e": b"", "aa": b"3\r"}.items():
        storage.write(f"{place}/x/{name}", data)
    assert {name: stat.size for name, stat in storage.find(f"{place}/x").items()} == {
        "a": 1,
        "b/c": 2,
        "b/d/e": 0,
        "aa": 2,
    }
    assert storage.read(f"{place}/x/aa") == b"3\r"
    assert set(storage.find(f"{place}/x", depth=1)) == {"a", "aa"} and set(storage.find(f"{place}/x/a")) == {""}
    before = storage.find(f"{place}/x")
    (tmp_path / "file").write_bytes(b"4")
    storage.upload(tmp_path / "file", f"{place}/x/a")
    after = storage.find(f"{place}/x")
    assert storage.read(f"{place}/x/a") == b"4" and {n for n in after if after[n] != before[n]} == {"a"}
    assert storage.read_range(f"{place}/x/b/c", 1, 2) == b"2"
    storage.remove(f"{place}/x/a")
    storage.remove(f"{place}/x/a")
    with pytest.raises(FileNotFoundError, match=f"{place}/x/a"):
        storage.read(f"{place}/x/a")


@pytest.mark.slow
def test_records_are_read_through_failures(emulator, bucket, monkeypatch, caplog):
    scheme, address, _ = emulator
    place, _ = bucket
    url, faults = put_dataset(place), Faults(0.4, silence=3.0)
    with proxy(address, faults) as failing:
        monkeypatch.setenv("AWS_ENDPOINT_URL" if scheme == "s3" else "STORAGE_EMULATOR_HOST", failing)
        monkeypatch.setenv(storage.TIMEOUT, "1")
        _forget_clients()
        monkeypatch.setattr(storage, "PIECE", 20_000)
        for split, count in tiny.SPLITS.items():
            assert len(list(open_dataset(url).open_split(split, ("image_id", "regions")))) == count
    assert min(faults.counts.values()) > 0, faults.counts
    assert scheme != "s3" or "; attempt 2 of 6" in caplog.text  # gcsfs retries most failures itself


@needs("s3")
def test_missing_credentials_are_one_line(tmp_path, monkeypatch):
    for name in S3:
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with emulators.s3() as (address, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        _forget_clients()
        with pytest.raises(storage.StorageError, match="no credentials; set AWS_ACCESS_KEY_ID") as caught:
            storage.find("s3://emulated/none")
    assert "\n" not in str(caught.value)
    _forget_clients()


@pytest.mark.slow
def test_a_run_is_killed_resumed_elsewhere_evaluated_embedded_and_searched(bucket, tmp_path, monkeypatch):
    place, environment = bucket
    data, run = put_dataset(place), f"{place}/runs/one"
    changes = {"train__steps": STEPS, "train__checkpoint_steps": 5, "train__eval_epochs": 10.0}
    command = [*flags(data, "train", **changes), f"--workdir={run}"]
    (tmp_path / "held.py").write_text(HELD)
    held = [str(tmp_path / "held.py"), *command[1:]]
    with Program(held, tmp_path / "first.log", **environment | {"SHNET_SYNC_SECONDS": "0.05"}) as first:
        saved = first.until(lambda: any(name.endswith(MARKER) for name in storage.find(f"{run}/checkpoints")))
        first.send(signal.SIGKILL)
        assert saved and first.wait() == -signal.SIGKILL, first.output()
    elsewhere = environment | {storage.CACHE: str(tmp_path / "second")}
    with Program(command, tmp_path / "second.log", **elsewhere) as second:
        assert second.wait() == 0, second.output()
        assert "continuing from step 5" in second.output()
    undisturbed = tmp_path / "undisturbed"
    local = [*flags(tiny.dataset().parent, "train", **changes), f"--workdir={undisturbed}"]
    with Program(local, tmp_path / "local.log") as third:
        assert third.wait() == 0, third.output()
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "second"))
    copy = Mirror(run).folder
    ours, theirs = tiny.arrays(copy, STEPS), tiny.arrays(undisturbed, STEPS)
    assert ours.keys() == theirs.keys() and all(ours[n].tobytes() == theirs[n].tobytes() for n in ours)
    assert tiny.lines(copy) == tiny.lines(undisturbed)
    third_machine = environment | {storage.CACHE: str(tmp_path / "third")}
    for mode, more in (("eval", []), ("embed", []), ("search", ["--query=a red star"])):
        given = [*flags(data, mode, eval__split="test", search__split="test"), f"--workdir={run}", *more]
        with Program(given, tmp_path / f"{mode}.log", **third_machine) as program:
            assert program.wait() == 0, program.output()
    found = storage.find(run)
    assert {name.rpartition("/")[2] for name in found} >= {
        "embeddings.json",
        "metrics.jsonl",
        "config.json",
        "curves.png",
    }
    assert not any(".tmp" in name or "parts/" in name for name in found)
    [results] = [name for name in found if name.startswith("results_") and name.endswith(".json")]
    assert json.loads(storage.read(f"{run}/{results}"))
    config = json.loads(storage.read(f"{run}/config.json"))
    assert config["data"]["dir"] == data
