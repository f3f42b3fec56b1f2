"""A data set in object storage, read through a local cache that all runs and processes of a machine share.

    $SHNET_CACHE/data/KEY/NAME/VERSION/     description, indices, vocabulary; .origin.json says where it comes from
                                            the shards that this machine has read, each compared with its checksum

A shard is fetched when a record or row of it is first read. Where the cache is full, shards that no process reads go,
the least recently used ones first. The key is a hash of the URL and of checksums.json: a changed set is another one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

from shnet_jax import storage
from shnet_jax.data.checksums import ADVICE, CHECKSUMS, read_checksums, sha256
from shnet_jax.data.errors import DataError
from shnet_jax.storage import Stat, StorageError
from shnet_jax.untrusted import read_object

LIMIT = "SHNET_CACHE_GB"
DEFAULT_GB = 100.0
SHARE = 0.8
"""Part of the disk that the cache takes at most, where $SHNET_CACHE_GB does not say."""
LARGE = 200_000_000
"""Bytes of a shard whose download is logged."""
ORIGIN, _INFO = ".origin.json", "dataset_info.json"
_SHARD = re.compile(r".*\.(array_record|tfrecord)[^/]*|.*-\d{5}\.npy")
_PART = ".part"

log = logging.getLogger(__name__)

T = TypeVar("T")


def fetch_description(url: str) -> Path:
    """The local version folder of the data set below `url`, without its shards.

    Finds the set as `records.find_dataset` does. Raises FileNotFoundError where there is none or more than one,
    StorageError, or DataError for a file unlike its checksum.
    """
    url = url.rstrip("/")
    found = storage.find(url, depth=3)
    versions = [name for name in found if name.rpartition("/")[2] == _INFO and not _hidden(name)]
    versions = [_INFO] if _INFO in versions else versions
    if len(versions) != 1:
        listed = ", ".join(sorted({name.partition("/")[0] for name in found})[:20]) or "nothing"
        several = ", ".join(storage.join(url, name.rpartition("/")[0]) for name in sorted(versions))
        raise FileNotFoundError(
            f"data set {url}: holds several: {several}"
            if versions
            else f"data set {url}: no data set ({_INFO}) here or up to two folders below; found {listed}"
        )
    inside = versions[0].rpartition("/")[0]
    source = storage.join(url, inside)
    files = {name: stat for name, stat in storage.find(source, depth=1).items() if name and not name.startswith(".")}
    identity = storage.read(storage.join(source, CHECKSUMS)) if CHECKSUMS in files else json.dumps(files).encode()
    key = hashlib.sha256(f"{source}\n".encode() + identity).hexdigest()[:16]
    name, version = ["data", *source.partition("://")[2].split("/")][-2:]
    folder = _root() / key / name / version
    if not (folder / ORIGIN).is_file():
        _fetch_small(source, files, _root() / key, Path(name, version))
    return folder


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _root() -> Path:
    root = storage.cache_folder() / "data"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _fetch_small(source: str, files: Mapping[str, Stat], target: Path, below: Path) -> None:
    """Makes the folder `target`/`below` with all files but the shards, whole or not at all."""
    temporary = Path(tempfile.mkdtemp(prefix=".new_", dir=target.parent))
    try:
        folder = temporary / below
        folder.mkdir(parents=True)
        small = [name for name in files if not _SHARD.fullmatch(name)]
        for name in small:
            storage.download(storage.join(source, name), folder / name, files[name].size)
        sums = read_checksums(folder)
        for name in sums.keys() & {*small}:
            _compare(f"{source}/{name}", name, sha256(folder / name), sums[name])
        shards = {name: stat.size for name, stat in files.items() if _SHARD.fullmatch(name)}
        origin = {"url": source, "shards": shards}
        (folder / ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")
        try:
            temporary.rename(target)
        except OSError:  # another process was first
            if not (target / below / ORIGIN).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _compare(where: str, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise DataError(f"{where}: expected sha256 {expected}, found {found}{ADVICE}", file=name)


def is_cached(folder: Path) -> bool:
    """Whether a version folder is one of the cache, whose shards may not be there yet."""
    return (folder / ORIGIN).is_file()


def limit() -> int:
    """Bytes that the cache may take: $SHNET_CACHE_GB, else 100 GB or, where that is less, 80% of its disk."""
    text = os.environ.get(LIMIT, "")
    if text:
        try:
            gigabytes = float(text)
        except ValueError:
            gigabytes = 0.0
        if not gigabytes > 0:
            raise ValueError(f"${LIMIT} is {text!r}; expected gigabytes, a number above 0")
        return int(gigabytes * 1e9)
    usage = shutil.disk_usage(_root())
    return int(min(DEFAULT_GB * 1e9, SHARE * (usage.free + sum(size for _, size in _sizes()))))


class _Open(NamedTuple):
    value: Any
    held: BinaryIO  # a shared lock on the shard ends with this file


_guard = threading.RLock()
_open: OrderedDict[tuple[int, int], _Open] = OrderedDict()
"""What this process has open, the least recently used first; keys: a number for each `Shards`, and one of its files."""
_numbers = iter(range(1 << 62))


class Shards(Generic[T]):
    """The shards of one split or column in the cache: fetched and opened when they are first used.

    opened: makes of a shard's number and local path what `self[number]` gives. Threads may share it.
    """

    def __init__(self, paths: Sequence[Path], opened: Callable[[int, Path], T]):
        self._paths, self._opened, self._number = list(paths), opened, next(_numbers)
        weakref.finalize(self, _forget, self._number)
        self._warned = False

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> T:
        key = self._number, index
        with _guard:
            if key in _open:
                _open.move_to_end(key)
                return _open[key].value
        held = self._fetched(self._paths[index])
        value = self._opened(index, self._paths[index])
        with _guard:
            return _open.setdefault(key, _Open(value, held)).value

    def _fetched(self, path: Path) -> BinaryIO:
        while (held := _held(path)) is None:
            self._warn_of_size(path)
            _fetch(path)
        return held

    def _warn_of_size(self, path: Path) -> None:
        if self._warned:
            return
        self._warned = True
        shards = _shards(path.parent)
        total = sum(shards.get(other.name, 0) for other in self._paths)
        if total > limit():
            log.warning(
                "%s: its shards have %.1f GB and the cache %.1f: what is read in random order is fetched again and "
                "again; set $%s, or mount the bucket",
                *(path.parent, total / 1e9, limit() / 1e9, LIMIT),
            )


def _forget(number: int) -> None:
    with _guard:
        for key in [key for key in _open if key[0] == number]:
            del _open[key]


def _shards(folder: Path) -> dict[str, int]:
    return read_object(folder / ORIGIN)["shards"]


def _held(path: Path) -> BinaryIO | None:
    """The open shard with a shared lock, under which nobody removes it; None where it is not in the cache."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    if not _same(file, path):  # removed in between
        file.close()
        return None
    os.utime(path)
    return file


def _same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def ensure(path: Path) -> None:
    """Fetches a shard of a cached data set, unless it is there."""
    while (held := _held(path)) is None:
        _fetch(path)
    held.close()


def _fetch(path: Path) -> None:
    """Downloads a shard; of several threads and processes one does, and the others wait."""
    part = path.with_name(path.name + _PART)
    with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _same(file, part):
            return  # another one had it, and is done
        try:
            if path.exists():
                return
            origin, sums = read_object(path.parent / ORIGIN), read_checksums(path.parent)
            url = storage.join(origin["url"], path.name)
            if path.name not in origin["shards"]:
                raise DataError(f"{url}: expected this shard, found none when the set was opened", file=path.name)
            size = origin["shards"][path.name]
            _reserve(file, url, size)
            if size >= LARGE:
                log.info("%s: fetching %.1f GB", url, size / 1e9)
            digest = hashlib.sha256()
            for start in range(0, size, storage.PIECE):
                piece = storage.read_range(url, start, min(start + storage.PIECE, size))
                digest.update(piece)
                os.pwrite(file.fileno(), piece, start)
            if path.name in sums:
                _compare(url, path.name, digest.hexdigest(), sums[path.name])
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _sizes() -> Iterator[tuple[Path, int]]:
    """Every file of the cache; those that are being fetched with the size that they will have."""
    for place, _, names in os.walk(_root()):
        for path in map(Path(place).joinpath, names):
            with suppress(FileNotFoundError):
                yield path, path.stat().st_size


@contextmanager
def _alone() -> Iterator[None]:
    with (_root() / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _reserve(file: BinaryIO, url: str, size: int) -> None:
    """Gives a file that is to be fetched its size, once there is room. Raises StorageError when there is none."""
    most = limit()
    if size > most:
        raise StorageError(
            f"{url}: the shard has {size / 1e9:.3g} GB and the whole cache {most / 1e9:.3g} ({_root()}): set ${LIMIT} "
            "to more, or mount the bucket"
        )
    with _alone():
        file.truncate(0)
        while (missing := sum(found for _, found in _sizes()) + size - most) > 0:
            if not _evict(missing):
                raise StorageError(
                    f"{url}: no room for its {size / 1e9:.3g} GB in the cache of {most / 1e9:.3g} ({_root()}), whose "
                    f"shards other processes read: set ${LIMIT} to more, or mount the bucket"
                )
        file.truncate(size)


def _evict(missing: int) -> bool:
    """Removes shards that nobody reads, and halves of killed processes, until `missing` bytes are free.

    Where there are none, closes one that this process has open; False where it has none.
    """
    shards = [path for path, _ in _sizes() if _SHARD.fullmatch(path.name.removesuffix(_PART))]
    removed = 0
    for path in sorted(shards, key=lambda path: path.stat().st_mtime):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            removed += path.stat().st_size
            path.unlink()
        if removed >= missing:
            return True
    if removed:
        return True
    with _guard:
        if not _open:
            return False
        _, oldest = _open.popitem(last=False)
    oldest.held.close()  # who reads it now has its own open file, or map
    return True
