"""A data set in object storage, read through a local cache that all runs and processes of a machine share.

    $SHNET_CACHE/data/KEY/NAME/VERSION/     the description: checksums, features, indices, vocabulary, .origin.json
                                            the shards that this machine has read, each compared with its checksum

A file is fetched when it is first needed, as the bucket has it then. Where the cache is full, shards that no process
reads go, the least recently used ones first, then descriptions of sets that no process has opened. The key is a hash of
the URL, of checksums.json and of the versions of files without a checksum: a changed set is another one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

from shnet_jax import storage
from shnet_jax.data.checksums import ADVICE, CHECKSUMS, read_checksums
from shnet_jax.data.errors import DataError
from shnet_jax.locks import lock
from shnet_jax.storage import Stat, StorageError
from shnet_jax.untrusted import read_object

LIMIT = "SHNET_CACHE_GB"
DEFAULT_GB = 100.0
SHARE = 0.8
"""Largest share that the cache takes of its own and the free bytes of its disk, unless $SHNET_CACHE_GB is set."""
LARGE = 200_000_000
"""The download of a file of at least this many bytes is logged."""
PAUSE = 0.1
"""Seconds between two attempts to make room in a full cache."""
TRIES = 10
"""Failed attempts to make room, while no file is being downloaded, before an error is raised."""
ORIGIN, _INFO = ".origin.json", "dataset_info.json"
_SHARD = re.compile(r".*\.(array_record|tfrecord)[^/]*|.*-\d{5}\.npy")
_DESCRIPTION = re.compile(
    r"(dataset_info|features|metadata|checksums)\.json|index_.*\.npz|sentencepiece\.model|.*\.(labels\.txt|image\.json)"
)
"""Files that opening a set may read: those of data_prep and of TFDS."""
_PART = ".part"

log = logging.getLogger(__name__)

T = TypeVar("T")


def fetch_description(url: str) -> Path:
    """The local version folder of the data set below `url`, without its shards.

    Finds the set as `records.find_dataset` does. Raises FileNotFoundError where there is none or more than one,
    StorageError, or DataError for a file unlike its checksum.
    """
    url = url.rstrip("/")
    objects = storage.find(url, depth=3)
    versions = [name for name in objects if name.rpartition("/")[2] == _INFO and not _hidden(name)]
    versions = [_INFO] if _INFO in versions else versions
    if len(versions) != 1:
        listed = ", ".join(sorted({name.partition("/")[0] for name in objects})[:20]) or "nothing"
        several = ", ".join(storage.join(url, name.rpartition("/")[0]) for name in sorted(versions))
        raise FileNotFoundError(
            f"data set {url}: holds several: {several}"
            if versions
            else f"data set {url}: no data set ({_INFO}) here or up to two folders below; found {listed}"
        )
    inside = versions[0].rpartition("/")[0]
    source = storage.join(url, inside)
    files = _listed(source)
    checksums = storage.read(storage.join(source, CHECKSUMS)) if CHECKSUMS in files else None
    unlisted = {name: list(files[name]) for name in files.keys() - _names(checksums) - {CHECKSUMS}}
    identity = json.dumps([source, (checksums or b"").hex(), sorted(unlisted.items())])
    name, version = ["data", *source.partition("://")[2].split("/")][-2:]
    folder = _root() / hashlib.sha256(identity.encode()).hexdigest()[:16] / name / version
    _use_description(folder, {"url": source, "unlisted": unlisted}, checksums)
    for name in sorted(name for name in files if _DESCRIPTION.fullmatch(name)):
        _fetch_small(folder / name)
    return folder


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _listed(source: str) -> dict[str, Stat]:
    """The files of a version folder in storage that are of use here."""
    objects = storage.find(source, depth=1)
    return {name: stat for name, stat in objects.items() if _DESCRIPTION.fullmatch(name) or _SHARD.fullmatch(name)}


def _names(checksums: bytes | None) -> set[str]:
    """The names in a checksums.json; none in a damaged one, which is told when files are compared with it."""
    with suppress(ValueError, RecursionError):
        return {*json.loads(checksums or b"{}")}
    return set()


def _root() -> Path:
    root = storage.cache_folder() / "data"
    root.mkdir(parents=True, exist_ok=True)
    return root


_used: dict[Path, BinaryIO] = {}
"""Open .origin.json of each description that this process has opened: nobody removes it before the process ends."""


def _use_description(folder: Path, origin: Mapping[str, Any], checksums: bytes | None) -> None:
    """Makes a version folder in the cache, unless it is there, and keeps it from being removed by others."""
    path = folder / ORIGIN
    with _alone():
        if path in _used and _same(_used[path], path):
            return
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if checksums is not None:
                (folder / CHECKSUMS).write_bytes(checksums)
            new = path.with_name(f"{ORIGIN}.new")
            new.write_text(json.dumps(origin, indent=1), encoding="utf-8")
            new.replace(path)
        if (held := _held(path)) is not None:
            _used[path] = held


def _fetch_small(path: Path) -> None:
    try:
        while not path.is_file():
            if held := _fetch(path):
                held.close()
    finally:
        _taking.discard(threading.get_ident())


def is_cached(folder: Path) -> bool:
    """Whether a version folder is one of the cache, whose shards may not be there yet."""
    return (folder / ORIGIN).is_file()


def limit() -> int:
    """Bytes that the cache may take: $SHNET_CACHE_GB in GB.

    Unless that is set: 100 GB, or 80% of the bytes of the cache and the free bytes of its disk if that is less.
    """
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
    # Counts blocks: a file that is being downloaded already has its full size, but not yet the disk space.
    taken = sum(stat.st_blocks * 512 for _, stat in _files())
    return int(min(DEFAULT_GB * 1e9, SHARE * (usage.free + taken)))


class _Open(NamedTuple):
    value: Any
    held: BinaryIO  # a shared lock on the shard ends with this file


_guard = threading.RLock()
_open: OrderedDict[tuple[int, int], _Open] = OrderedDict()
"""Shards that this process has open, the least recently used first; keys: numbers of a `Shards` and of its file."""
_numbers = iter(range(1 << 62))
_taking: set[int] = set()
"""Threads of this process that hold a file which is not yet in `_open`, or have room for one that they are fetching."""
os.register_at_fork(after_in_child=_taking.clear)


class Shards(Generic[T]):
    """The shards of one split or column in the cache: fetched and opened when they are first used.

    opened: (number of a shard, its local path) -> the value of `self[number]`. Threads may share an instance.
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
        try:
            held = self._fetched(self._paths[index])
            value = self._opened(index, self._paths[index])
            with _guard:
                return _open.setdefault(key, _Open(value, held)).value
        finally:
            _taking.discard(threading.get_ident())

    def _fetched(self, path: Path) -> BinaryIO:
        while True:
            _taking.add(threading.get_ident())
            if (held := _held(path)) is not None:
                return held
            _taking.discard(threading.get_ident())
            self._warn_of_size(path)
            if (held := _fetch(path)) is not None:
                return held

    def _warn_of_size(self, path: Path) -> None:
        if self._warned:
            return
        self._warned = True
        files = _listed(read_object(path.parent / ORIGIN)["url"])
        total = sum(files[other.name].size for other in self._paths if other.name in files)
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


def _held(path: Path) -> BinaryIO | None:
    """The open file with a shared lock, under which nobody removes it; None where it is not in the cache."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    _lock(file, fcntl.LOCK_SH)
    if not _same(file, path):  # removed in between
        file.close()
        return None
    with suppress(PermissionError):  # another user's
        os.utime(path)
    return file


def _lock(file: BinaryIO, kind: int) -> bool:
    """Locks an open file; False on a file system without locks. Raises BlockingIOError where that was asked for."""
    locked = lock(file, kind)
    if not locked:
        _warn_of_no_locks(_root())
    return locked


@cache
def _warn_of_no_locks(root: Path) -> None:
    log.warning(
        "%s: this file system has no locks: two processes may fetch a file twice, and nothing is removed for what "
        "other processes read; set $%s to a folder of another",
        *(root, storage.CACHE),
    )


def _is_free(path: Path) -> BinaryIO | None:
    """The open file with an exclusive lock, where no process reads or fetches it; else None."""
    try:
        file: BinaryIO = path.open("r+b")  # NFS locks a file exclusively only where it is open to write
    except PermissionError:  # another user's
        file = path.open("rb")
    try:
        if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) and _same(file, path):
            return file
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EBADF):
            file.close()
            raise
    file.close()
    return None


def _same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _fetch(path: Path) -> BinaryIO | None:
    """Downloads a file into the cache; one thread of one process downloads, and the others wait for it.

    Returns the file as `_held` does; None where another process may have added or removed it meanwhile. Raises
    StorageError, or DataError for a file that is not in the bucket or does not match its checksum.
    """
    part, file = _part_of(path)
    held = None
    try:
        if _same(file, part) and not path.exists():  # else another process has completed it
            _download(path, file)
            with _alone():  # who makes room counts the file by one name or the other
                part.replace(path)
            _lock(file, fcntl.LOCK_SH)
            held = file if _same(file, path) else None
        return held
    finally:
        if held is None:
            if _same(file, part):
                part.unlink(missing_ok=True)
            file.close()


def _part_of(path: Path) -> tuple[Path, BinaryIO]:
    """The path and the locked file of a partial download; without locks, a path that only this thread uses."""
    part = path.with_name(path.name + _PART)
    file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    if _lock(file, fcntl.LOCK_EX):
        return part, file
    file.close()
    part.unlink(missing_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}{_PART}")
    return part, part.open("x+b")


def _download(path: Path, file: BinaryIO) -> None:
    """Writes a file as the bucket has it now, whole and compared with its checksum or with its version at opening."""
    origin, expected = read_object(path.parent / ORIGIN), read_checksums(path.parent).get(path.name)
    url = storage.join(origin["url"], path.name)
    stat, at_opening = _now(origin["url"], path.name), origin["unlisted"].get(path.name)
    while True:
        if expected is None and list(stat) != at_opening:
            raise DataError(
                f"{url}: expected it as it was when this command opened the set, found another version, and "
                f"{CHECKSUMS} does not list it; give the command again when the set is whole",
                file=path.name,
            )
        _reserve(file, url, stat.size)
        if stat.size >= LARGE:
            log.info("%s: fetching %.1f GB", url, stat.size / 1e9)
        digest = _copy(url, file, stat.size)
        before, stat = stat, _now(origin["url"], path.name) if digest != expected else stat
        if stat == before:
            break
        log.warning("%s: changed while it was fetched; fetching it again", url)
    if expected is not None and digest != expected:
        raise DataError(f"{url}: expected sha256 {expected}, found {digest}{ADVICE}", file=path.name)


def _now(source: str, name: str) -> Stat:
    """Size and version that a file of a set has now. Raises DataError where it is not there."""
    files = _listed(source)
    if name not in files:
        raise DataError(
            f"{storage.join(source, name)}: expected this file of the data set, found none; copy the set there again",
            file=name,
        )
    return files[name]


def _copy(url: str, file: BinaryIO, size: int) -> str:
    """Writes an object of `size` bytes to an open file, on the disk when it returns; gives its SHA-256."""
    digest = hashlib.sha256()
    file.seek(0)
    for start in range(0, size, storage.PIECE):
        piece = storage.read_range(url, start, min(start + storage.PIECE, size))
        digest.update(piece)
        file.write(piece)
    file.flush()
    os.fsync(file.fileno())  # before the file gets its final name
    return digest.hexdigest()


def _files() -> Iterator[tuple[Path, os.stat_result]]:
    """Every file of the cache; a file that is being downloaded has its final size."""
    for place, _, names in os.walk(_root()):
        for path in map(Path(place).joinpath, names):
            with suppress(FileNotFoundError):
                yield path, path.stat()


@contextmanager
def _alone() -> Iterator[None]:
    with (_root() / ".lock").open("ab") as file:
        _lock(file, fcntl.LOCK_EX)
        yield


def _reserve(file: BinaryIO, url: str, size: int) -> None:
    """Sets a file that will be downloaded to its final size, once there is room.

    Waits while other files are being downloaded, as they can be removed once they are read. Raises StorageError where
    there is no room.
    """
    most, this = limit(), threading.get_ident()
    if size > most:
        raise StorageError(
            f"{url}: it has {size / 1e9:.3g} GB and the whole cache {most / 1e9:.3g} ({_root()}): set ${LIMIT} to "
            "more, or mount the bucket"
        )
    left, told = TRIES, False
    while left:
        with _alone():
            file.truncate(0)
            fetched_now = bool(_taking - {this}) or _are_fetched()  # read first: a download may end during _make_room
            if _make_room(size - most):
                file.truncate(size)
                _taking.add(this)
                return
        if fetched_now and not told:
            log.info("%s: waiting for room in the cache of %.3g GB", url, most / 1e9)
        told, left = told or fetched_now, TRIES if fetched_now else left - 1
        time.sleep(PAUSE)
    read = sum(stat.st_size for path, stat in _files() if _SHARD.fullmatch(path.name))
    why = (
        f"where other processes read {read / 1e9:.3g}" if read else "which the descriptions of data sets in use take up"
    )
    raise StorageError(
        f"{url}: no room for its {size / 1e9:.3g} GB in the cache of {most / 1e9:.3g} ({_root()}), {why}: set ${LIMIT} "
        "to more, or mount the bucket"
    )


def _are_fetched() -> bool:
    """Whether any thread or process is fetching a file for which it has room."""
    for path, stat in _files():
        if path.name.endswith(_PART) and stat.st_size:
            with suppress(FileNotFoundError), path.open("rb") as file:
                try:
                    _lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
    return False


def _make_room(more: int) -> bool:
    """Removes files until the bytes left plus `more`, negative or 0, are at most 0; returns whether it could."""
    while (missing := sum(stat.st_size for _, stat in _files()) + more) > 0:
        if _evict(missing):
            continue
        with _guard:
            if not _open:
                return False
            _, oldest = _open.popitem(last=False)
        oldest.held.close()  # a thread that reads it has its own open file or mapping
    return True


def _evict(missing: int) -> int:
    """Removes files that no process uses until `missing` bytes are free; returns the bytes removed.

    Partial downloads of killed processes and shards go first, the least recently used before others; then descriptions.
    """
    candidates = [(path, stat) for path, stat in _files() if _is_shard(path) or path.name == ORIGIN]
    removed = 0
    for path, _ in sorted(candidates, key=lambda entry: (entry[0].name == ORIGIN, entry[1].st_mtime)):
        with suppress(FileNotFoundError):
            if file := _is_free(path):
                with file:
                    removed += _remove_description(path.parent) if path.name == ORIGIN else _remove(path)
        if removed >= missing:
            break
    return removed


def _is_shard(path: Path) -> bool:
    return path.name.endswith(_PART) or _SHARD.fullmatch(path.name) is not None


def _remove(path: Path) -> int:
    size = path.stat().st_size
    path.unlink()
    return size


def _remove_description(folder: Path) -> int:
    """Removes a version folder in which no shards are left; returns its bytes."""
    files = [path for path in folder.iterdir() if path.is_file()]
    if any(map(_is_shard, files)):
        return 0
    # ORIGIN last: this process may be killed.
    removed = sum(map(_remove, sorted(files, key=lambda path: path.name == ORIGIN)))
    for path in (folder, folder.parent, folder.parent.parent):
        with suppress(OSError):
            path.rmdir()
    return removed
