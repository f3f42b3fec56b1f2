"""Data sets in object storage: what the cache fetches, compares, keeps and removes."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from shnet_jax import storage
from shnet_jax.data import cache
from shnet_jax.data.columns import ColumnWriter
from shnet_jax.data.errors import DataError
from shnet_jax.data.records import find_dataset, open_dataset
from shnet_jax.storage import StorageError
from tests.patience import PATIENCE
from tests.processes import LIBRARIES
from tests.train import tiny

FIELDS = ("image_id", "captions", "regions")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(cache.LIMIT, raising=False)
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.0)


@pytest.fixture
def url():
    """The tiny data set in memory."""
    fs, version = fsspec.filesystem("memory"), tiny.dataset()
    fs.store.clear()
    for file in version.iterdir():
        fs.pipe_file(f"/bucket/sets/tiny/1.0.0/{file.name}", file.read_bytes())
    yield "memory://bucket/sets/tiny"
    fs.store.clear()


def shards(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if "array_record" in path.name}


def same(ours, theirs) -> bool:
    return all(
        a["image_id"] == b["image_id"] and a["captions"] == b["captions"] and np.array_equal(a["regions"], b["regions"])
        for a, b in zip(ours, theirs, strict=True)
    )


def test_records_are_those_of_the_bucket_and_only_read_shards_are_fetched(url):
    dataset, local = open_dataset(url), open_dataset(tiny.dataset())
    assert dataset.path.parent.name == "tiny" and dataset.splits == local.splits
    assert shards(dataset.path) == set()
    assert dataset.index("val").captions(0) == local.index("val").captions(0)
    assert same(dataset.open_split("val", FIELDS), local.open_split("val", FIELDS))
    assert shards(dataset.path) == {path.name for path in tiny.dataset().glob("*val.array_record*")}


def test_a_second_run_fetches_no_shard_again(url, monkeypatch):
    list(open_dataset(url).open_split("val", FIELDS))
    monkeypatch.setattr(storage, "read_range", lambda *_: pytest.fail("fetched again"))
    assert len(list(open_dataset(url).open_split("val", FIELDS))) == tiny.SPLITS["val"]


def test_a_changed_data_set_is_another_one(url):
    before = find_dataset(url)
    fs, name = fsspec.filesystem("memory"), "/bucket/sets/tiny/1.0.0/checksums.json"
    fs.pipe_file(name, fs.cat_file(name) + b"\n")
    assert find_dataset(url) != before


def test_the_cache_stays_below_its_limit(url, monkeypatch):
    size = {name: path.stat().st_size for path in tiny.dataset().iterdir() for name in [path.name]}
    folder = find_dataset(url)
    description = sum(path.stat().st_size for path in folder.iterdir())
    of_shards = {s: sum(n for name, n in size.items() if f"{s}.array_record" in name) for s in tiny.SPLITS}
    limit = description + of_shards["train"] + min(of_shards.values()) // 2
    monkeypatch.setenv(cache.LIMIT, repr(limit / 1e9))
    opened = {split: open_dataset(url).open_split(split, FIELDS) for split in tiny.SPLITS}
    expected = {split: open_dataset(tiny.dataset()).open_split(split, FIELDS)[3]["image_id"] for split in tiny.SPLITS}
    for split in ("train", "val", "train", "test", "val", "train"):
        assert opened[split][3]["image_id"] == expected[split]
        assert sum(path.stat().st_size for path in folder.iterdir()) <= limit


def test_a_shard_that_does_not_fit_is_an_error(url, monkeypatch):
    dataset = open_dataset(url)
    monkeypatch.setenv(cache.LIMIT, "1e-6")
    with pytest.raises(StorageError, match=r"tiny-train\.array_record\S*: it has .* the whole cache 1e-06 .*SHNET"):
        dataset.open_split("train", FIELDS)[0]


def test_damage_is_told_and_not_kept(url):
    fs = fsspec.filesystem("memory")
    name = next(name for name in fs.find("/bucket") if "val.array_record" in name)
    data = bytearray(fs.cat_file(name))
    data[len(data) // 2] ^= 1
    fs.pipe_file(name, bytes(data))
    dataset = open_dataset(url)
    with pytest.raises(DataError, match=r"memory://.*val\.array_record\S*: expected sha256 \w+, found"):
        dataset.open_split("val", FIELDS)[0]
    assert [path.name for path in dataset.path.iterdir() if "array_record" in path.name] == []


def test_a_description_unlike_its_checksum_is_not_kept(url):
    fs, name = fsspec.filesystem("memory"), "/bucket/sets/tiny/1.0.0/features.json"
    fs.pipe_file(name, fs.cat_file(name) + b" ")
    with pytest.raises(DataError, match=r"features\.json: expected sha256"):
        find_dataset(url)
    assert not list(storage.cache_folder().rglob("features.json*"))
    fs.pipe_file(name, (tiny.dataset() / "features.json").read_bytes())
    assert same(open_dataset(url).open_split("val", FIELDS), open_dataset(tiny.dataset()).open_split("val", FIELDS))


def test_faults_are_retried_and_named(url, monkeypatch, caplog):
    memory, calls = type(fsspec.filesystem("memory")), []
    whole = memory.cat_file

    def failing(self, path, start=None, end=None, **options):
        if "array_record" in path:
            calls.append(path)
            if len(calls) == 1:
                raise TimeoutError("read timed out")
            if len(calls) == 2:
                return whole(self, path, start, end - 1)
        return whole(self, path, start, end, **options)

    monkeypatch.setattr(memory, "cat_file", failing)
    assert len(list(open_dataset(url).open_split("val", FIELDS))) == tiny.SPLITS["val"]
    assert "TimeoutError: read timed out; attempt 2 of 6" in caplog.text
    assert "ConnectionError: expected" in caplog.text


def test_faults_that_stay_end_in_one_error(url, monkeypatch):
    dataset = open_dataset(url)
    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(
        memory, "cat_file", lambda *_, **__: (_ for _ in ()).throw(ConnectionResetError("reset by peer"))
    )
    with pytest.raises(StorageError, match=r"could not read it in 6 attempts .* ConnectionResetError: reset by peer"):
        dataset.open_split("val", FIELDS)[0]


def test_columns_are_fetched_shard_by_shard(url, monkeypatch):
    monkeypatch.setattr("shnet_jax.data.columns.SHARD_BYTES", 4 * 12)  # four rows
    rows, made = np.arange(33, dtype=np.float32).reshape(11, 3), storage.cache_folder() / "made"
    made.mkdir(parents=True)
    writer = ColumnWriter(made, "image_vectors", "val")
    writer.add(rows)
    writer.close()
    for file in made.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/bucket/sets/tiny/1.0.0/{file.name}", file.read_bytes())
    folder = find_dataset(url)
    from shnet_jax.data.columns import Column

    column = Column(folder, "image_vectors", "val", 11, (3,), np.dtype(np.float32))
    assert np.array_equal(column.take(np.array([9, 1])), rows[[9, 1]])
    assert {path.name for path in folder.glob("*.npy")} == {
        "image_vectors_val-00000.npy",
        "image_vectors_val-00002.npy",
    }
    assert np.array_equal(column.block(0, 11), rows)


PLACE = "/bucket/sets/tiny/1.0.0"


def val_shard() -> Path:
    [path] = tiny.dataset().glob("*val.array_record*")
    return path


@pytest.mark.parametrize("broken", ["cut off", "not there"])
def test_a_shard_mended_in_the_bucket_is_read(url, broken):
    fs, shard = fsspec.filesystem("memory"), val_shard()
    data, name = shard.read_bytes(), f"{PLACE}/{shard.name}"
    if broken == "cut off":
        fs.pipe_file(name, data[: len(data) // 2])
    else:
        fs.rm_file(name)
    opened = open_dataset(url)
    with pytest.raises(
        DataError, match=r"val\.array_record\S*: expected (sha256|this file of the data set, found none)"
    ):
        opened.open_split("val", FIELDS)[0]
    fs.pipe_file(name, data)
    assert same(opened.open_split("val", FIELDS), open_dataset(tiny.dataset()).open_split("val", FIELDS))
    assert find_dataset(url) == opened.path


def test_a_set_opened_before_its_copy_was_whole_is_read_once_it_is(url):
    fs, name = fsspec.filesystem("memory"), f"{PLACE}/index_val.npz"
    data = fs.cat_file(name)
    fs.rm_file(name)
    folder = find_dataset(url)
    assert not (folder / "index_val.npz").exists()
    fs.pipe_file(name, data)
    assert find_dataset(url) == folder and (folder / "index_val.npz").read_bytes() == data


def test_a_set_without_checksums_is_read_as_it_was_when_it_was_opened(url):
    fs, shard = fsspec.filesystem("memory"), val_shard()
    fs.rm_file(f"{PLACE}/checksums.json")
    opened = open_dataset(url)
    fs.pipe_file(f"{PLACE}/{shard.name}", shard.read_bytes())
    with pytest.raises(DataError, match=r"val\.array_record\S*: expected it as it was when .* found another version"):
        opened.open_split("val", FIELDS)[0]
    again = open_dataset(url)
    assert again.path != opened.path and len(list(again.open_split("val", FIELDS))) == tiny.SPLITS["val"]


def test_a_shard_replaced_while_it_is_fetched_is_fetched_again(url, monkeypatch, caplog):
    fs, shard, ranged, reads = fsspec.filesystem("memory"), val_shard(), storage.read_range, []
    data, name = shard.read_bytes(), f"{PLACE}/{shard.name}"
    fs.pipe_file(name, data[:-1] + b"x")

    def replaced(url, start, stop):
        reads.append(ranged(url, start, stop))
        fs.pipe_file(name, data)
        return reads[-1]

    dataset = open_dataset(url)
    monkeypatch.setattr(storage, "read_range", replaced)
    assert len(list(dataset.open_split("val", FIELDS))) == tiny.SPLITS["val"] and len(reads) == 2
    assert "changed while it was fetched" in caplog.text


def four_shards() -> tuple[Path, list[Path]]:
    """A set of four shards of 1000 bytes in memory, opened: its local folder, and where the shards will lie."""
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/four/1.0.0/dataset_info.json", b"{}")
    for number in range(4):
        fs.pipe_file(f"/bucket/four/1.0.0/x-{number:05d}.npy", bytes([number]) * 1000)
    folder = find_dataset("memory://bucket/four")
    return folder, [folder / f"x-{number:05d}.npy" for number in range(4)]


def room_for(folder: Path, size: int) -> str:
    """$SHNET_CACHE_GB with which `size` bytes of shards fit beside the description."""
    files = [path for path in folder.parents[2].rglob("*") if path.is_file() and path.suffix != ".npy"]
    return repr((sum(path.stat().st_size for path in files) + size) / 1e9)


@pytest.mark.parametrize("slow", ["download", "opening"])
def test_threads_wait_for_room_while_others_fetch(url, monkeypatch, slow):
    folder, paths = four_shards()
    monkeypatch.setenv(cache.LIMIT, room_for(folder, 2500))
    monkeypatch.setattr(cache, "TRIES", 1)
    go_on, pause, ranged = threading.Event(), cache.time.sleep, storage.read_range
    slowed: list[str] = []
    looks: list[float] = []

    def paused(seconds):
        if len(slowed) >= 2:  # both that have room are at the slow step
            looks.append(seconds)
        if len(looks) >= 3:  # one of the two that wait has looked for room since
            go_on.set()
        pause(0.001)

    def until_others_wait(value, step):
        if step == slow:
            slowed.append(step)
            assert go_on.wait(PATIENCE)
        return value

    def read(number):
        try:
            return shards[number]
        finally:
            go_on.set()

    monkeypatch.setattr(cache.time, "sleep", paused)
    monkeypatch.setattr(storage, "read_range", lambda *place: until_others_wait(ranged(*place), "download"))
    shards = cache.Shards(paths, lambda _, path: until_others_wait(path.read_bytes(), "opening"))
    with ThreadPoolExecutor(4) as pool:
        assert [data[:1] for data in pool.map(read, range(4))] == [b"\0", b"\1", b"\2", b"\3"]
    assert sum(path.exists() for path in paths) <= 2


def test_a_shard_is_not_completed_while_another_thread_makes_room(url, monkeypatch):
    """Its new name may come after the listing of the cache, which would miss it."""
    _, paths = four_shards()
    downloaded = threading.Event()
    monkeypatch.setattr(cache, "_download", lambda path, file: downloaded.set())
    fetch = threading.Thread(target=cache._fetch, args=(paths[0],))
    with cache._alone():
        fetch.start()
        assert downloaded.wait(PATIENCE)
        fetch.join(0.2)
        assert fetch.is_alive() and not paths[0].exists()
    fetch.join(PATIENCE)
    assert paths[0].exists()


def test_other_processes_are_named_only_where_they_read(url, monkeypatch):
    folder, paths = four_shards()
    monkeypatch.setattr(cache, "PAUSE", 0.0)
    shards = cache.Shards(paths, lambda _, path: path.read_bytes())
    assert shards[0][:1] == b"\0"
    with paths[0].open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)  # as another process does
        monkeypatch.setenv(cache.LIMIT, room_for(folder, 1500))
        with pytest.raises(StorageError, match=r"x-00001\.npy: no room .* where other processes read 1e-06: set"):
            shards[1]
    assert shards[1][:1] == b"\1" and not paths[0].exists()
    monkeypatch.setenv(cache.LIMIT, room_for(folder, 1400))
    (folder / "large.labels.txt").write_bytes(b"x" * 1000)
    with pytest.raises(StorageError, match=r"no room .* descriptions of data sets in use take up"):
        shards[2]


def test_the_limit_holds_for_descriptions_and_nothing_else_is_fetched(url, monkeypatch):
    fsspec.filesystem("memory").pipe_file(f"{PLACE}/pictures.tar", b"x" * 1000)
    four, _ = four_shards()
    monkeypatch.setattr(cache, "PAUSE", 0.0)
    needed = sum(path.stat().st_size for path in tiny.dataset().iterdir() if "array_record" not in path.name)
    monkeypatch.setenv(cache.LIMIT, room_for(four, needed - 100))
    with pytest.raises(StorageError, match=r"no room .* descriptions of data sets in use"):
        find_dataset(url)
    assert four.is_dir()
    limit = float(os.environ[cache.LIMIT]) * 1e9
    cache._used.pop(four / cache.ORIGIN).close()  # as the end of a process does
    folder = find_dataset(url)
    assert not four.exists() and not (folder / "pictures.tar").exists()
    found = [path.stat().st_size for path in storage.cache_folder().rglob("*") if path.is_file()]
    assert sum(found) <= limit


def of_nfs(flock):
    """flock as NFS has it: an exclusive lock needs a file that is open to write."""

    def locked(file, kind):
        if kind & fcntl.LOCK_EX and fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return flock(file, kind)

    return locked


def test_shards_are_removed_on_nfs_and_other_users_files_are_read(url, monkeypatch):
    folder, paths = four_shards()
    monkeypatch.setattr(fcntl, "flock", of_nfs(fcntl.flock))
    monkeypatch.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "not the owner")))
    monkeypatch.setenv(cache.LIMIT, room_for(folder, 1500))
    shards = cache.Shards(paths, lambda _, path: path.read_bytes())
    assert [shards[number][0] for number in (0, 1, 0, 3)] == [0, 1, 0, 3]
    assert cache.Shards(paths, lambda _, path: path.read_bytes())[3][0] == 3  # it is in the cache


def test_without_locks_shards_are_read_and_none_is_removed(url, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    cache._warn_of_no_locks.cache_clear()
    folder, paths = four_shards()
    monkeypatch.setattr(cache, "PAUSE", 0.0)
    shards = cache.Shards(paths, lambda _, path: path.read_bytes())
    assert [shards[number][0] for number in range(3)] == [0, 1, 2] and "has no locks" in caplog.text
    monkeypatch.setenv(cache.LIMIT, room_for(folder, 3500))
    with pytest.raises(StorageError, match=r"x-00003\.npy: no room"):
        shards[3]
    assert {path.name for path in folder.iterdir() if cache._is_shard(path)} == {path.name for path in paths[:3]}


def test_the_limit_is_part_of_what_is_free_and_what_the_cache_has(url, monkeypatch):
    find_dataset(url)
    taken = sum(path.stat().st_blocks * 512 for path in storage.cache_folder().rglob("*") if path.is_file())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 9 * 10**8, 10**8))
    assert cache.limit() == int(0.8 * (10**8 + taken))


def _read_all(url: str, counts) -> None:
    ids = [record["image_id"] for split in ("val", "train") for record in open_dataset(url).open_split(split, FIELDS)]
    counts.put(len(set(ids)))


@pytest.mark.slow
def test_processes_share_the_cache():
    url = f"file://{tiny.dataset()}"
    multiprocessing.set_forkserver_preload(LIBRARIES)
    context = multiprocessing.get_context("forkserver")
    counts = context.Queue()
    processes = [context.Process(target=_read_all, args=(url, counts)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [counts.get(timeout=PATIENCE) for _ in processes] == [50, 50, 50]
    for process in processes:
        process.join()
    assert not list(storage.cache_folder().rglob("*.part")) and not list(storage.cache_folder().glob("data/.new_*"))


@pytest.mark.parametrize("text", ["s3:/bucket/a", "gs:/bucket"])
def test_no_local_folder_is_called_like_a_scheme(text):
    with pytest.raises(StorageError, match="two slashes"):
        find_dataset(text)


def test_unknown_schemes_and_missing_sets_are_one_line(url):
    with pytest.raises(StorageError, match="nothing here opens nowhere://; expected a local folder, s3://, gs://"):
        find_dataset("nowhere://bucket")
    with pytest.raises(FileNotFoundError, match="memory://bucket/else: no data set"):
        find_dataset("memory://bucket/else")
