"""Work folders in object storage: what is fetched, uploaded, ignored; who may write."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import fsspec
import pytest

from shnet_jax import cli, mirror, storage
from shnet_jax.mirror import MARKER, OWNER, Mirror, working_in
from shnet_jax.observe.files import FolderInUse

URL = "memory://bucket/runs/one"


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(mirror, "EVERY", 0.05)
    monkeypatch.setattr(mirror, "PATIENCE", 0.2)
    mirror._fetched.clear()
    yield fs
    fs.store.clear()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Moves to a machine of this name: one with a cache of its own."""

    def move(name: str) -> None:
        monkeypatch.setenv(storage.CACHE, str(tmp_path / name))

    move("first")
    return move


def put(folder: Path, name: str, text: str = "x") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def names() -> set[str]:
    return {name for name in storage.find(URL) if name != OWNER}


def test_another_machine_goes_on_where_the_first_one_was(machine):
    with working_in(URL, alone=True) as folder:
        put(folder, "config.json", "{}")
        put(folder, "checkpoints/30/model/a")
        put(folder, f"checkpoints/30/{MARKER}")
        put(folder, "curves.png.tmp")
        put(folder, "checkpoints/40.orbax-checkpoint-tmp-1/model/a")
        put(folder, ".lock")
    assert names() == {"config.json", "checkpoints/30/model/a", f"checkpoints/30/{MARKER}"}
    machine("second")
    with working_in(URL, alone=True) as folder:
        assert (folder / "config.json").read_text() == "{}"
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["30"]
        put(folder, "metrics.jsonl", "second")
        (folder / "checkpoints/30" / MARKER).unlink()
        (folder / "checkpoints/30/model/a").unlink()
    assert names() == {"config.json", "metrics.jsonl"}
    machine("first")
    with working_in(URL, alone=True) as folder:
        assert (folder / "metrics.jsonl").read_text() == "second"
        assert not (folder / "checkpoints/30").exists()


def test_a_checkpoint_without_checksums_is_not_whole(machine, bucket):
    bucket.pipe_file("/bucket/runs/one/checkpoints/30/model/a", b"1")
    bucket.pipe_file("/bucket/runs/one/study/checkpoints/30/model/a", b"1")
    bucket.pipe_file(f"/bucket/runs/one/study/checkpoints/30/{MARKER}", b"{}")
    with working_in(URL) as folder:
        assert not (folder / "checkpoints").exists()
        assert (folder / "study/checkpoints/30/model/a").exists()


def test_checksums_go_last_and_removals_take_them_first(machine, monkeypatch):
    order = []
    for name in ("upload", "remove"):
        whole = getattr(storage, name)
        monkeypatch.setattr(
            storage, name, lambda *a, f=whole, n=name: (order.append((n, a[-1].partition("one/")[2])), f(*a))
        )
    with working_in(URL, alone=True) as folder:
        put(folder, f"checkpoints/30/{MARKER}")
        put(folder, "checkpoints/30/model/a")
        put(folder, "metrics.jsonl")
    uploaded = [name for _, name in order]
    assert uploaded == ["metrics.jsonl", "checkpoints/30/model/a", f"checkpoints/30/{MARKER}"]
    order.clear()
    with working_in(URL, alone=True) as folder:
        (folder / "checkpoints/30" / MARKER).unlink()
    assert order[0] == ("remove", f"checkpoints/30/{MARKER}") and ("remove", "checkpoints/30/model/a") in order


def test_a_checkpoint_removed_while_it_is_listed_goes_whole(machine, monkeypatch):
    whole = mirror._files
    monkeypatch.setattr(mirror, "EVERY", 60.0)  # uploads at the end alone
    with working_in(URL, alone=True) as folder:
        put(folder, "checkpoints/30/model/a")
        put(folder, f"checkpoints/30/{MARKER}")
    with working_in(URL, alone=True) as folder:

        def cut(place):
            found = whole(place)
            if (place / "checkpoints/30").exists():
                (place / "checkpoints/30").rename(place / "checkpoints/removed")
                found.pop("checkpoints/30/model/a")
            return found

        monkeypatch.setattr(mirror, "_files", cut)
    assert names() == set()


def test_a_reader_sees_what_was_removed_and_keeps_what_it_makes(machine):
    with working_in(URL, alone=True) as folder:
        put(folder, "kept")
        put(folder, "removed")
    machine("second")
    with working_in(URL) as beside:
        assert (beside / "removed").exists()
    put(beside, "embeddings/parts/0")  # by a process that was killed
    machine("first")
    with working_in(URL, alone=True) as folder:
        (folder / "removed").unlink()
    machine("second")
    with working_in(URL) as beside:
        assert not (beside / "removed").exists() and (beside / "embeddings/parts/0").exists()
    assert names() == {"kept", "embeddings/parts/0"}


def test_what_a_killed_process_did_not_upload_is_kept_on_its_machine_alone(machine):
    copy = Mirror(URL)
    copy.fetch()
    copy._take()  # and dies
    put(copy.folder, "metrics.jsonl", "newer")
    with working_in(URL, alone=True) as folder:
        assert (folder / "metrics.jsonl").read_text() == "newer"
    assert "metrics.jsonl" in names()
    put(folder, "metrics.jsonl", "newest")
    put(folder, "left")
    machine("second")
    with working_in(URL, alone=True) as folder:
        put(folder, "other")
    machine("first")
    with working_in(URL, alone=True) as folder:
        assert (folder / "metrics.jsonl").read_text() == "newer" and (folder / "other").exists()
        assert not (folder / "left").exists()


def test_a_live_writer_on_another_machine_is_named(machine, monkeypatch):
    monkeypatch.setattr(mirror, "PATIENCE", 30.0)
    with working_in(URL, alone=True) as folder:
        put(folder, "config.json")
        machine("second")
        refused = pytest.raises(FolderInUse, match=rf"{URL} is being written to by process {os.getpid()} on ")
        with refused, working_in(URL, alone=True):
            pass
        with working_in(URL) as beside:
            put(beside, "results.json")
    assert names() == {"config.json", "results.json"}


def test_a_writer_without_a_sign_of_life_is_replaced(machine):
    copy = Mirror(URL)
    copy.fetch()
    copy._take()  # and dies
    machine("second")
    with working_in(URL, alone=True) as folder:
        put(folder, "config.json")
    with pytest.raises(FolderInUse, match="was taken over by process"):
        copy.push()


def test_a_run_ends_when_its_folder_is_taken(machine):
    told = []
    previous = signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    try:
        with pytest.raises(FolderInUse, match="was taken over"), working_in(URL, alone=True) as folder:
            storage.write(f"{URL}/{OWNER}", json.dumps({"session": "other", "process": 7, "host": "b"}).encode())
            deadline = time.monotonic() + 60
            while not told and time.monotonic() < deadline:
                time.sleep(0.01)
            put(folder, "late")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert told and "late" not in names()


def test_what_a_full_bucket_did_not_take_stays_and_is_told(machine, monkeypatch):
    def refuse(*_):
        raise storage.StorageError("memory://bucket/x: could not write it")

    with (
        monkeypatch.context() as patch,
        pytest.raises(storage.StorageError, match=r"could not write it\. What is not in the bucket yet is kept in"),
        working_in(URL, alone=True) as folder,
    ):
        patch.setattr(storage, "upload", refuse)
        put(folder, "config.json")
    with working_in(URL, alone=True):
        pass
    assert names() == {"config.json"}


def test_flags_take_urls(machine, bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bucket.pipe_file("/bucket/queries.txt", b"a dog\n")
    copy = str(Mirror(URL).folder)
    assert cli._with_paths(f"--workdir={URL}") == f"--workdir={copy}"
    path = cli._with_paths("--query_file=memory://bucket/queries.txt").partition("=")[2]
    assert Path(path).read_text() == "a dog\n"
    assert cli._with_paths(f"--config.eval.ensemble={URL},memory://b/two") == (
        f"--config.eval.ensemble={(URL, 'memory://b/two')!r}"
    )
    config = cli.bundled.get_config("base")
    config.data.dir, config.search.embeddings, config.eval.ensemble = "memory://b/set", "memory://b/vectors", (URL,)
    cli._expand_paths(config)
    assert config.data.dir == "memory://b/set" and config.eval.ensemble == (copy,)
    assert config.search.embeddings == str(Mirror("memory://b/vectors").folder)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_whole_bucket_is_no_work_folder(machine):
    with pytest.raises(storage.StorageError, match="expected SCHEME://BUCKET/FOLDER"):
        Mirror("s3://")
