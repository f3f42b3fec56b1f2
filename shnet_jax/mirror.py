"""Work folders in object storage: a local copy that is fetched first and written back while a command works in it.

    $SHNET_CACHE/work/SCHEME/BUCKET/FOLDER    the copy; everything that reads or writes a run sees a local folder

JAX's checkpoint library writes to gs:// alone and needs a file system's rename for the rest, so all checkpoints are
written locally. Here a checkpoint is uploaded with its checksums.json last: one without it is not whole and is ignored.
Files of a run go in the order in which they were written, and before the checkpoint that needs them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from shnet_jax import storage
from shnet_jax.observe.files import FolderInUse, atomic_path, sole_writer, write_json
from shnet_jax.parallel import hosts
from shnet_jax.paths import to_path

OWNER = ".shnet_owner.json"
"""In the bucket: who writes there, and a number that rises while it lives."""
STATE, MIRROR = ".shnet_synced.json", ".shnet_id"
"""In the copy: what both sides had when they were last equal; a name for this copy."""
WRITER, SYNC = ".lock_mirror", ".lock_sync"
JOB = ".shnet_job"
"""In the copy: a number of the job, by which its processes see whether they share the copy."""
MARKER = "checksums.json"
EVERY = float(os.environ.get("SHNET_SYNC_SECONDS", 20))
"""Seconds between two uploads of what has changed, and between two signs of life; the same on all machines."""
PATIENCE = 3 * EVERY
"""Seconds without a sign of life after which a writer on another machine counts as dead."""
AT_ONCE = 8
"""Files of a checkpoint that travel at the same time."""

log = logging.getLogger(__name__)

_LOCAL_ALONE = re.compile(
    r"(.*/)?(\.lock[^/]*|\.shnet_[^/]*|[^/]*\.tmp|.*\.orbax-checkpoint-tmp.*|checkpoints/removed/.*)"
)
_CHECKPOINT = re.compile(r"((?:.*/)?checkpoints/\d+)/.+")


class _Both(NamedTuple):
    """A file as it was when both sides were equal."""

    version: str
    remote_size: int
    time: int
    size: int


class Mirror:
    """The local copy of a folder in object storage. folder: its path; made by `fetch`."""

    def __init__(self, url: str):
        scheme, _, place = url.rstrip("/").partition("://")
        parts = [part for part in place.split("/") if part]
        if ".." in parts or (not parts and scheme != "file"):
            raise storage.StorageError(f"{url}: expected SCHEME://BUCKET/FOLDER")
        self.url = f"{scheme}://{place}"
        self.folder = storage.cache_folder().joinpath("work", scheme, *parts)
        self._owner: dict[str, Any] | None = None
        self._in_process = threading.RLock()

    def fetch(self, *, reset: bool = False) -> None:
        """Makes the copy like the bucket, without checkpoints that are not whole there.

        What was changed here and not yet uploaded stays. reset: it does not, as another machine wrote since.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            there, here, synced = _whole(storage.find(self.url)), _files(self.folder), self._synced()
            for name in here.keys() - there.keys():
                if reset or (name in synced and here[name] == synced[name][2:]):
                    (self.folder / name).unlink(missing_ok=True)
            wanted = [
                name
                for name, stat in there.items()
                if not self._is_current(stat, here.get(name), synced.get(name), reset)
            ]
            wanted.sort(key=lambda name: name.endswith(MARKER))
            with ThreadPoolExecutor(AT_ONCE) as pool:
                fetched = dict(
                    zip(wanted, pool.map(lambda name: self._fetch_file(name, there[name].size), wanted), strict=True)
                )
            for name in [name for name, done in fetched.items() if not done]:  # removed by the run that goes on there
                if found := _CHECKPOINT.fullmatch(name):
                    shutil.rmtree(self.folder / found[1], ignore_errors=True)
            _remove_empty(self.folder)
            here = _files(self.folder)
            kept = {name: synced[name] for name in there.keys() & here.keys() & synced.keys() - fetched.keys()}
            new = {name: _Both(there[name].version, there[name].size, *here[name]) for name in fetched if name in here}
            self._keep(kept | new)

    @staticmethod
    def _is_current(stat: storage.Stat, here: tuple[int, int] | None, synced: _Both | None, reset: bool) -> bool:
        """Whether the local file stays, as it is that of the bucket or a newer one."""
        if here is None or synced is None or (stat.version, stat.size) != synced[:2]:
            return False
        return here == synced[2:] or not reset

    def _fetch_file(self, name: str, size: int) -> bool:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_path(path) as temporary:
                storage.download(storage.join(self.url, name), temporary, size)
        except FileNotFoundError:
            return False
        return True

    def push(self) -> None:
        """Uploads what has changed here, and removes there what was removed here. Raises StorageError, FolderInUse."""
        with self._alone():
            self._check_owner()
            here, synced = _files(self.folder), self._synced()
            gone = sorted(self._gone(here, synced), key=lambda name: not name.endswith(MARKER))
            changed = [name for name in here.keys() - set(gone) if name not in synced or synced[name][2:] != here[name]]
            if not changed and not gone:
                return
            checkpoints: dict[str, list[str]] = {}
            for name in sorted(changed, key=lambda name: here[name]):  # by the time of their last change
                if found := _CHECKPOINT.fullmatch(name):
                    checkpoints.setdefault(found[1], []).append(name)
                else:
                    self._upload(name)
            for folder, names in checkpoints.items():
                self._upload_checkpoint(folder, names)
            for name in gone:
                storage.remove(storage.join(self.url, name))
            there = storage.find(self.url)
            for name in gone:
                synced.pop(name)
            synced |= {
                name: _Both(there[name].version, there[name].size, *here[name]) for name in changed if name in there
            }
            self._keep(synced)

    def _gone(self, here: dict[str, tuple[int, int]], synced: dict[str, _Both]) -> set[str]:
        """What the bucket has and the copy no more; all of a checkpoint that was removed while it was listed."""
        gone = synced.keys() - here.keys()
        cut = {found[1] for name in gone if (found := _CHECKPOINT.fullmatch(name))}
        removed = tuple(f"{folder}/" for folder in cut if not (self.folder / folder / MARKER).exists())
        return gone | {name for name in synced if name.startswith(removed)}

    def _upload(self, name: str) -> None:
        with suppress(FileNotFoundError):  # removed since it was listed
            storage.upload(self.folder / name, storage.join(self.url, name))

    def _upload_checkpoint(self, folder: str, names: list[str]) -> None:
        """Uploads a checkpoint, its checksums last and only if it is still whole here."""
        marker = f"{folder}/{MARKER}"
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._upload, [name for name in names if name != marker]))
        if marker in names and (self.folder / marker).exists():
            self._check_owner()
            self._upload(marker)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context in which this copy alone writes to the folder in the bucket, and uploads changes now and then.

        Raises FolderInUse when another process or machine does. The end uploads the rest, whatever happened.
        """
        with ExitStack() as stack:
            stack.enter_context(sole_writer(self.folder, WRITER))
            self.fetch(reset=not self._take())
            stop = threading.Event()
            threads = [
                threading.Thread(target=self._repeat, args=(stop, work), daemon=True)
                for work in (self._beat, self.push)
            ]
            for thread in threads:
                thread.start()
            stack.callback(self._end, stop, threads)
            yield

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Context that uploads what this command writes, beside a run that may go on there."""
        stop = threading.Event()
        thread = threading.Thread(target=self._repeat, args=(stop, self.push), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end(stop, [thread])

    def is_held_here(self) -> bool:
        """Whether a process of this machine holds the copy, which is then newer than the bucket."""
        if not self.folder.exists():
            return False
        try:
            with sole_writer(self.folder, WRITER):
                return False
        except FolderInUse:
            return True

    def _end(self, stop: threading.Event, threads: list[threading.Thread]) -> None:
        stop.set()
        for thread in threads:
            thread.join()
        try:
            self.push()
        except storage.StorageError as error:
            raise storage.StorageError(
                f"{error}. What is not in the bucket yet is kept in {self.folder}; the same command on this machine "
                "goes on from there"
            ) from error
        if self._owner is not None:
            self._write_owner(released=True)

    def _repeat(self, stop: threading.Event, work: Any) -> None:
        while not stop.wait(EVERY):
            try:
                work()
            except FolderInUse as error:
                log.error("%s", error)
                os.kill(os.getpid(), signal.SIGTERM)  # the run saves its state, here, and ends
                return
            except OSError as error:
                log.warning("%s; tried again in %.0f s", error, EVERY)

    def _take(self) -> bool:
        """Makes this copy the one that writes; returns whether it was before, so that it is the newest.

        Raises FolderInUse for a live one.
        """
        path = self.folder / MIRROR
        if not path.exists():
            path.write_text(uuid.uuid4().hex, encoding="utf-8")
        name, before = path.read_text(encoding="utf-8"), self._read_owner()
        ours = before is not None and before.get("mirror") == name
        if before is not None and not ours and not before.get("released"):
            self._wait_for_its_end(before)
        self._owner = {
            "mirror": name,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "command": shlex.join(sys.argv),
        }
        self._owner |= {"session": uuid.uuid4().hex, "beat": 0}
        try:
            self._write_owner(new=before is None)
        except FileExistsError:
            self._owner = None
            raise FolderInUse(f"{self.url}: another machine began to write there a moment ago") from None
        self._check_owner()
        return ours

    def _wait_for_its_end(self, owner: dict[str, Any]) -> None:
        who = f"process {owner.get('process')} on {owner.get('host')}: {owner.get('command')}"
        log.info("%s: waiting up to %.0f s for a sign of life of its last writer, %s", self.url, PATIENCE, who)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(min(EVERY / 4, 5.0))
            now = self._read_owner()
            if now is None or now.get("released"):
                return
            if now != owner:
                raise FolderInUse(
                    f"{self.url} is being written to by {who}. Nothing was changed: wait for it, end it, or choose "
                    "another folder"
                )

    def _beat(self) -> None:
        self._check_owner()
        assert self._owner is not None
        self._owner["beat"] += 1
        self._write_owner()

    def _read_owner(self) -> dict[str, Any] | None:
        try:
            owner = json.loads(storage.read(storage.join(self.url, OWNER)))
        except FileNotFoundError:
            return None
        except ValueError:
            owner = None
        return owner if isinstance(owner, dict) else {"released": True}

    def _write_owner(self, *, released: bool = False, new: bool = False) -> None:
        text = json.dumps((self._owner or {}) | {"released": released})
        storage.write(storage.join(self.url, OWNER), text.encode(), new=new)

    def _check_owner(self) -> None:
        """Raises FolderInUse when another machine has taken the folder from this one."""
        if self._owner is None:
            return
        now = self._read_owner()
        if now is not None and now.get("session") != self._owner["session"]:
            raise FolderInUse(
                f"{self.url} was taken over by process {now.get('process')} on {now.get('host')}, which saw no sign of "
                f"life of this one for {PATIENCE:.0f} s. What this one has not uploaded is in {self.folder}"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread of one process at a time compares the copy with the bucket."""
        with self._in_process, (self.folder / SYNC).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _synced(self) -> dict[str, _Both]:
        try:
            return {n: _Both(*entry) for n, entry in json.loads((self.folder / STATE).read_text("utf-8")).items()}
        except (FileNotFoundError, ValueError, TypeError):
            return {}

    def _keep(self, synced: dict[str, _Both]) -> None:
        write_json(self.folder / STATE, synced)


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of the last change in ns and bytes of each file that both sides have; no checkpoint without checksums."""
    found = {}
    for place, _, names in os.walk(folder):  # which passes over folders that are removed meanwhile
        for path in map(Path(place).joinpath, names):
            name = path.relative_to(folder).as_posix()
            with suppress(FileNotFoundError):
                if not _LOCAL_ALONE.fullmatch(name):
                    stat = path.stat()
                    found[name] = stat.st_mtime_ns, stat.st_size
    return _whole(found)


def _whole(files: dict[str, Any]) -> dict[str, Any]:
    """The files without those of this module and of checkpoints that are not whole."""

    def belongs(name: str) -> bool:
        checkpoint = _CHECKPOINT.fullmatch(name)
        return (
            bool(name) and not _LOCAL_ALONE.fullmatch(name) and (not checkpoint or f"{checkpoint[1]}/{MARKER}" in files)
        )

    return {name: value for name, value in files.items() if belongs(name)}


def _remove_empty(folder: Path) -> None:
    """Removes empty folders below `folder`: an empty one of a checkpoint would count as one."""
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            path.rmdir()


_fetched: dict[str, Mirror] = {}


def local(url: str) -> Path:
    """The local copy of a folder or a file in object storage, fetched as it is now."""
    mirror = Mirror(url)
    if mirror.is_held_here():  # and so newer than the bucket
        _fetched[mirror.url] = mirror
    elif "" in storage.find(mirror.url, depth=1):  # a file
        mirror.folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(mirror.folder) as temporary:
            temporary.write_bytes(storage.read(mirror.url))
    else:
        mirror.fetch()
        _fetched[mirror.url] = mirror
    return mirror.folder


def is_copy(place: str | Path) -> bool:
    """Whether a path is the copy that `local` gave for a URL."""
    return any(mirror.folder == Path(place) for mirror in _fetched.values())


@contextmanager
def working_in(place: str | Path, *, alone: bool = False) -> Iterator[Path]:
    """Context with the local path of a folder that may be in object storage, to which changes go back.

    place: a path, a URL, or the copy that `local` gave for one. alone: for a run, which no other may continue.
    All processes of a job call it; the first one uploads. Raises FolderInUse and StorageError, in all of them.
    """
    folder = local(str(place)) if storage.is_url(place) else to_path(place)
    mirror = next((one for one in _fetched.values() if one.folder == folder), None)
    with ExitStack() as stack:
        if mirror is not None:
            stack.enter_context(_in_job(mirror, alone))
        for other in [one for one in _fetched.values() if one is not mirror and hosts.is_first()]:
            stack.enter_context(other.shared())  # another folder, to which embeddings or exports may go
        _fetched.clear()
        yield folder


@contextmanager
def _in_job(mirror: Mirror, alone: bool) -> Iterator[None]:
    """Context in which the first process of a job uploads, and all of them see its copy."""
    refused: Exception | None = None
    token, sign = 0.0, mirror.folder / JOB
    with ExitStack() as stack:
        try:
            if hosts.is_first():
                stack.enter_context(mirror.held() if alone else mirror.shared())
                token = float(random.randrange(1, 1 << 20))  # exact in float32
                sign.write_text(str(token), encoding="utf-8")
        except (FolderInUse, OSError) as error:
            refused = error
        if hosts.anywhere(refused is not None):
            raise refused or storage.StorageError(f"{mirror.url}: refused by process 0, whose message says why")
        [token] = hosts.largest(token)
        if hosts.anywhere(not sign.exists() or sign.read_text(encoding="utf-8") != str(token)):
            raise storage.StorageError(
                f"{mirror.url}: the processes of this job do not share {mirror.folder}: set ${storage.CACHE} to a "
                "folder that all machines share, or give a mount of the bucket as --workdir"
            )
        yield
