"""Work folders in object storage: what is fetched, uploaded, ignored; who may write."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
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
    monkeypatch.setenv(mirror.SYNC_SECONDS, "0.05")
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


def killed() -> Mirror:
    """The copy of a command that holds URL and was killed."""
    copy = Mirror(URL)
    copy.refresh()
    copy._take(alone=True)
    copy.fetch(reset=True)
    (copy.base / mirror.RESET).unlink()
    return copy


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
    monkeypatch.setenv(mirror.SYNC_SECONDS, "60")  # uploads at the end alone
    monkeypatch.setattr(time, "sleep", lambda _: None)
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
    monkeypatch.setenv(mirror.SYNC_SECONDS, "60")  # uploads at the end alone
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with working_in(URL, alone=True) as folder:
        put(folder, "config.json")
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
    assert names() == {"config.json"}


def test_a_reader_sees_what_was_removed_and_uploads_only_its_own(machine):
    with working_in(URL, alone=True) as folder:
        put(folder, "kept")
        put(folder, "removed")
    machine("second")
    with working_in(URL) as beside:
        assert (beside / "removed").exists()
        put(beside, "embeddings/parts/0")
    put(beside, "embeddings/parts/1")  # by a process that was killed
    machine("first")
    with working_in(URL, alone=True) as folder:
        (folder / "removed").unlink()
    machine("second")
    with working_in(URL) as beside:
        assert {path.name for path in beside.rglob("*") if path.is_file()} == {"kept", "0"}
    assert names() == {"kept", "embeddings/parts/0"}


def test_what_a_killed_process_did_not_upload_is_kept_on_its_machine_alone(machine):
    copy = killed()
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


def test_a_command_that_fails_lets_other_machines_write_at_once(machine):
    with pytest.raises(KeyError), working_in(URL, alone=True) as folder:
        put(folder, "config.json", "{}")
        raise KeyError
    assert names() == {"config.json"}
    assert json.loads(storage.read(f"{URL}/{OWNER}"))["released"]


def test_a_live_writer_on_another_machine_is_named(machine, monkeypatch):
    monkeypatch.setattr(mirror, "PATIENCE", 600)
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
    copy = killed()
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


@pytest.mark.parametrize("url", ["s3://", "s3://b", "s3://b/", "s3://b//x", "s3://b/x//", "s3://b/./x", "s3://b/../x"])
def test_what_is_no_work_folder(machine, url):
    with pytest.raises(storage.StorageError, match="expected SCHEME://BUCKET/FOLDER"):
        Mirror(url)


def test_urls_have_copies_of_their_own_and_aliases_share_one(machine):
    places = {
        Mirror(url).folder for url in (URL, f"{URL}/seed_0", "memory://bucket-runs/one", "memory://bucket/runs-one")
    }
    assert len(places) == 4
    assert Mirror("s3a://b/x/").folder == Mirror("s3://b/x").folder


@pytest.mark.parametrize(("inner", "word"), [(f"{URL}/full/seed_0", "inside"), ("memory://bucket/runs", "around")])
def test_a_folder_inside_or_around_a_held_one_is_refused(machine, inner, word):
    with (
        working_in(URL, alone=True),
        pytest.raises(FolderInUse, match=f"{inner} lies {word} {URL}, which a command of this machine writes to"),
        working_in(inner),
    ):
        pass
    with working_in(inner):
        pass


@pytest.mark.parametrize("name", ["../x", "a/../../x", "a//b", "./a"])
def test_names_that_leave_the_copy_are_refused(machine, bucket, name):
    bucket.store[f"/bucket/runs/one/{name}"] = bucket.store.get("/x") or _file(bucket)
    with (
        pytest.raises(storage.StorageError, match="expected objects whose keys are paths of files; found"),
        working_in(URL),
    ):
        pass


def _file(bucket):
    bucket.pipe_file("/x", b"x")
    return bucket.store["/x"]


def test_objects_that_stand_for_folders_are_left_out(machine, monkeypatch):
    storage.write(f"{URL}/a", b"1")
    fs, path = storage._opened(URL)
    whole = type(fs).find
    folder = {"name": f"{path}/two/", "size": 0, "type": "file"}
    monkeypatch.setattr(type(fs), "find", lambda *a, **k: whole(*a, **k) | {f"{path}/two/": folder, f"{path}/": folder})
    assert set(storage.find(URL)) == {"a"}


def test_a_killed_upload_loses_no_newer_file(machine, monkeypatch):
    copy = killed()
    put(copy.folder, "a", "v1")
    put(copy.folder, "b", "v1")
    copy.push()
    put(copy.folder, "a", "v2")
    put(copy.folder, "b", "v2!")
    whole = storage.upload
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "upload", lambda s, u: (whole(s, u), (_ for _ in ()).throw(KeyboardInterrupt)))
        copy.push()
    assert storage.read(f"{URL}/a") == b"v2"
    put(copy.folder, "a", "v3!!")
    with working_in(URL, alone=True) as folder:
        assert (folder / "a").read_text() == "v3!!" and (folder / "b").read_text() == "v2!"
    assert storage.read(f"{URL}/a") == b"v3!!" and storage.read(f"{URL}/b") == b"v2!"


def test_what_was_uploaded_before_a_kill_is_noted(machine, monkeypatch):
    copy = killed()
    whole = storage.upload
    put(copy.folder, "a")
    put(copy.folder, "b")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            storage, "upload", lambda s, u: whole(s, u) if u.endswith("a") else (_ for _ in ()).throw(KeyboardInterrupt)
        )
        copy.push()
    assert set(copy._synced()) == {"a"}


def test_a_reader_uploads_nothing_of_a_killed_run_after_another_took_over(machine):
    copy = killed()
    put(copy.folder, "metrics.jsonl", "stale")
    put(copy.folder, f"checkpoints/40/{MARKER}")
    machine("second")
    with working_in(URL, alone=True) as folder:
        put(folder, "metrics.jsonl", "new")
    machine("first")
    with working_in(URL) as beside:
        assert (beside / "metrics.jsonl").read_text() == "new"
        put(beside, "results.json")
    assert names() == {"metrics.jsonl", "results.json"} and storage.read(f"{URL}/metrics.jsonl") == b"new"


def test_a_reset_that_was_killed_is_made_again(machine, monkeypatch):
    copy = killed()
    put(copy.folder, "stale")
    machine("second")
    with working_in(URL, alone=True) as folder:
        put(folder, "new")
    machine("first")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Mirror, "refresh", lambda self: True)
        patch.setattr(Mirror, "fetch", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with working_in(URL, alone=True):
            pass
    with working_in(URL) as beside:
        assert not (beside / "stale").exists()
    with working_in(URL, alone=True) as folder:
        assert not (folder / "stale").exists() and (folder / "new").exists()


def test_an_object_replaced_while_it_is_read_is_read_again(machine, monkeypatch):
    storage.write(f"{URL}/a", b"old old old")
    whole, texts = storage.read_range, iter([b"new"])

    def replaced(*args, **kwargs):
        data = whole(*args, **kwargs)
        for text in texts:
            storage.write(f"{URL}/a", text)
        return data

    monkeypatch.setattr(storage, "read_range", replaced)
    with working_in(URL) as folder:
        assert (folder / "a").read_text() == "new"
    texts = iter([b"newer."])
    assert mirror.local(f"{URL}/a").read_text() == "newer."


def test_the_marker_of_embeddings_goes_before_their_data_is_replaced(machine, monkeypatch):
    order = []
    with working_in(URL) as folder:
        for name in ("embeddings/images.safetensors", "embeddings/embeddings.json", "embeddings/parts/embeddings.json"):
            put(folder, name)
    for name in ("upload", "remove"):
        whole = getattr(storage, name)
        monkeypatch.setattr(
            storage, name, lambda *a, f=whole, n=name: (order.append((n, a[-1].partition("one/")[2])), f(*a))
        )
    monkeypatch.setenv(mirror.SYNC_SECONDS, "60")  # uploads at the end alone
    with working_in(URL) as folder:
        put(folder, "embeddings/embeddings.json", "yy")
        put(folder, "embeddings/images.safetensors", "yy")
    assert order == [
        ("remove", "embeddings/embeddings.json"),
        ("upload", "embeddings/images.safetensors"),
        ("upload", "embeddings/embeddings.json"),
    ]


def test_the_url_of_a_file_works_twice_and_at_once(machine):
    storage.write("memory://bucket/queries.txt", b"a dog\n")
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(mirror.local, ["memory://bucket/queries.txt"] * 8))
    [path] = paths
    assert path.name == "queries.txt" and path.read_text() == "a dog\n"


def test_asking_whether_a_copy_is_held_disturbs_nobody(machine):
    copy = Mirror(URL)
    copy.refresh()
    assert not copy.is_held_here()
    with (copy.base / mirror.WRITER).open("a") as asked:
        fcntl.flock(asked, fcntl.LOCK_SH)
        assert not copy.is_held_here()
    with working_in(URL, alone=True):
        assert copy.is_held_here()


def test_of_two_that_claim_at_once_the_first_sees_it(machine, monkeypatch):
    copy, whole = Mirror(URL), storage.write
    copy.refresh()

    def overtaken(url, data, **options):
        whole(url, data, **options)
        whole(url, json.dumps({"session": "other", "mirror": "other"}).encode())

    monkeypatch.setattr(storage, "write", overtaken)
    with pytest.raises(FolderInUse, match="another machine began to write there a moment ago"), copy.held():
        pass


def test_a_claim_whose_answer_was_lost_counts(machine, monkeypatch):
    whole = storage.write

    def lost(url, data, *, new=False, **options):
        whole(url, data, **options)
        if new:
            raise FileExistsError(url)

    monkeypatch.setattr(storage, "write", lost)
    with working_in(URL, alone=True) as folder:
        put(folder, "a")
    assert names() == {"a"}


def test_uploads_go_on_after_any_error(machine, monkeypatch, caplog):
    whole, failures = Mirror.push, iter([ValueError("on purpose")])

    def push(self):
        for failure in failures:
            raise failure
        whole(self)

    monkeypatch.setattr(Mirror, "push", push)
    with working_in(URL, alone=True) as folder:
        put(folder, "a")
        deadline = time.monotonic() + 60
        while "a" not in names() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert names() == {"a"}
    assert "ValueError: on purpose; tried again in" in caplog.text


def test_a_sign_of_life_is_one_attempt_within_half_of_its_time(machine, monkeypatch):
    copy = killed()
    given = []
    for name in ("read", "write"):
        whole = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda *a, f=whole, **k: (given.append(k["within"]), f(*a, **k))[1])
    copy._beat()
    assert given == [mirror.every() / 2] * 2
    fs = fsspec.filesystem("memory")
    calls = []
    monkeypatch.setattr(
        type(fs), "cat_file", lambda *_, **__: (calls.append(1), (_ for _ in ()).throw(ConnectionError))[1]
    )
    with pytest.raises(storage.StorageError, match="in 1 attempts"):
        storage.read(f"{URL}/{OWNER}", within=1.0)
    assert len(calls) == 1


def test_the_owner_is_asked_before_each_file(machine, monkeypatch):
    copy, whole = killed(), storage.upload
    put(copy.folder, "a")
    put(copy.folder, "b")

    def taken(source, url):
        whole(source, url)
        storage.write(f"{URL}/{OWNER}", json.dumps({"session": "other", "process": 7, "host": "b"}).encode())

    monkeypatch.setattr(storage, "upload", taken)
    with pytest.raises(FolderInUse, match="was taken over"):
        copy.push()
    assert names() == {"a"}


def test_what_killed_uploads_left_of_checkpoints_goes(machine, bucket):
    bucket.pipe_file("/bucket/runs/one/checkpoints/30/model/left", b"1")
    with working_in(URL, alone=True) as folder:
        assert names() == set()
        bucket.pipe_file("/bucket/runs/one/checkpoints/40/model/left", b"1")
        put(folder, "checkpoints/40/model/a")
        put(folder, f"checkpoints/40/{MARKER}")
    assert names() == {"checkpoints/40/model/a", f"checkpoints/40/{MARKER}"}


def test_empty_folders_of_other_commands_stay(machine):
    storage.write(f"{URL}/gone/a", b"1")
    with working_in(URL) as folder:
        (folder / "made").mkdir()
    storage.remove(f"{URL}/gone/a")
    storage.write(f"{URL}/b", b"1")
    with working_in(URL) as folder:
        assert (folder / "made").is_dir() and not (folder / "gone").exists()


def test_a_copy_that_is_emptied_empties_no_bucket(machine):
    with working_in(URL, alone=True) as folder:
        put(folder, "config.json")
    with (
        pytest.raises(storage.StorageError, match="was emptied while a command works in it"),
        working_in(URL) as folder,
    ):
        (folder / "config.json").unlink()
    assert names() == {"config.json"}


@pytest.mark.parametrize("value", ["soon", "0", "nan", "-1"])
def test_bad_numbers_of_seconds_are_one_line(machine, monkeypatch, value):
    monkeypatch.setenv(mirror.SYNC_SECONDS, value)
    with pytest.raises(storage.StorageError, match=rf"\$SHNET_SYNC_SECONDS is '{value}'; expected seconds"):
        mirror.every()
    monkeypatch.setenv(storage.TIMEOUT, value)
    with pytest.raises(storage.StorageError, match=rf"\$SHNET_STORAGE_TIMEOUT is '{value}'; expected seconds"):
        storage.find(URL)


def test_of_two_nested_folders_opened_at_once_one_is_held(machine):
    outer, inner = Mirror(URL), Mirror(f"{URL}/seed_0")
    outer.refresh()
    inner.refresh()
    with outer.held(), pytest.raises(FolderInUse, match=f"{inner.url} lies inside {URL}"), inner.held():
        pass


def test_a_command_resets_nothing_under_another_one(machine):
    with working_in(URL) as folder:
        put(folder, "results.json")
        with working_in(URL) as beside:
            assert (beside / "results.json").exists()
