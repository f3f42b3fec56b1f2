"""Data sets in object storage: what the cache fetches, compares, keeps and removes."""

from __future__ import annotations

import json
import multiprocessing
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
    for split in ("train", "val", "train", "test", "val", "train"):
        assert opened[split][3]["image_id"] == tiny.records(split)[3]["image_id"]
        assert sum(path.stat().st_size for path in folder.iterdir()) <= limit


def test_a_shard_that_does_not_fit_is_an_error(url, monkeypatch):
    dataset = open_dataset(url)
    monkeypatch.setenv(cache.LIMIT, "1e-6")
    with pytest.raises(
        StorageError, match=r"tiny-train\.array_record\S*: the shard has .* the whole cache 1e-06 .*SHNET"
    ):
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
    assert not list(storage.cache_folder().glob("data/*"))


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
    folder, rows = find_dataset(url), np.arange(33, dtype=np.float32).reshape(11, 3)
    made = storage.cache_folder() / "made"
    made.mkdir()
    writer = ColumnWriter(made, "image_vectors", "val")
    writer.add(rows)
    writer.close()
    origin = json.loads((folder / cache.ORIGIN).read_text())
    for file in made.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/bucket/sets/tiny/1.0.0/{file.name}", file.read_bytes())
        origin["shards"][file.name] = file.stat().st_size
    (folder / cache.ORIGIN).write_text(json.dumps(origin))
    from shnet_jax.data.columns import Column

    column = Column(folder, "image_vectors", "val", 11, (3,), np.dtype(np.float32))
    assert np.array_equal(column.take(np.array([9, 1])), rows[[9, 1]])
    assert {path.name for path in folder.glob("*.npy")} == {
        "image_vectors_val-00000.npy",
        "image_vectors_val-00002.npy",
    }
    assert np.array_equal(column.block(0, 11), rows)


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
