"""Work folders in object storage: a local copy that is fetched first and written back while a command works in it.

    $SHNET_CACHE/work/NAME-HASH/FOLDER    the copy of one URL; everything that reads or writes a run sees a local folder
    $SHNET_CACHE/work/NAME-HASH/.*        its locks, and a list of the files when both sides were last equal

JAX's checkpoint library writes to gs:// alone and needs a file system's rename for the rest, so all checkpoints are
written locally. A file that says that a folder is complete, such as checksums.json of a checkpoint, is uploaded last
and removed first. Files of a run go in the order in which they were written, and before the checkpoint that needs them.

Where the copy was the last to own the folder in the bucket, its files are the newest and stay. Otherwise it is made
like the bucket before a command works in it.
"""

from __future__ import annotations

import fcntl
import hashlib
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from shnet_jax import storage
from shnet_jax.locks import lock
from shnet_jax.observe.files import FolderInUse, atomic_path, sole_writer, write_text
from shnet_jax.parallel import hosts
from shnet_jax.paths import to_path

OWNER = ".shnet_owner.json"
"""In the bucket: who writes there, and a heartbeat counter."""
PLACE, MIRROR = ".url", ".id"
"""Beside the copy: its URL, and its unique name, which the bucket's owner file records."""
STATE = ".synced.jsonl"
"""Beside the copy: a line each time that a file became equal on both sides, or was removed on both."""
RESET = ".reset"
"""Beside the copy: present until the copy has been made equal to a bucket that another copy wrote to."""
WRITER, SYNC, USERS = ".lock_mirror", ".lock_sync", ".lock_users"
JOB = ".job"
"""Beside the copy: a random number of the job, by which its processes check that they share the copy."""
MARKER = "checksums.json"
SYNC_SECONDS = "SHNET_SYNC_SECONDS"
PATIENCE = 3
"""Heartbeats that a writer on another machine may miss before it counts as dead."""
AT_ONCE = 8
"""Files that are uploaded or downloaded at the same time."""
ROUNDS = 5
"""Attempts to fetch a folder that changes meanwhile."""

log = logging.getLogger(__name__)

_ALIASES = {"s3a": "s3", "gcs": "gs"}
_LOCAL_ALONE = re.compile(
    r"(.*/)?(\.lock[^/]*|\.shnet_[^/]*|[^/]*\.tmp|.*\.orbax-checkpoint-tmp.*|checkpoints/removed/.*)"
)
_CHECKPOINT = re.compile(r"((?:.*/)?checkpoints/\d+)/.+")
_MARKER = re.compile(  # not of folders of parts, where it is written first
    rf"(?:.*/)?checkpoints/\d+/{re.escape(MARKER)}|(?!(?:.*/)?parts/)(?:.*/)?(?:embeddings|index_[^/]*)\.json"
)


def every() -> float:
    """Seconds between two uploads of changes, and between two heartbeats; the same on all machines."""
    return storage.seconds(SYNC_SECONDS, 20)


def patience() -> float:
    """Seconds without a heartbeat after which a writer on another machine counts as dead."""
    return PATIENCE * every()


class _Both(NamedTuple):
    """A file as it was when both sides were equal."""

    version: str
    remote_size: int
    time: int
    size: int


class Mirror:
    """The local copy of a folder, or of a file, in object storage. folder: its path; made by `refresh` and `fetch`."""

    def __init__(self, url: str):
        scheme, _, place = url.removesuffix("/").partition("://")
        scheme = _ALIASES.get(scheme.lower(), scheme.lower())
        parts = place.removeprefix("/").split("/") if scheme == "file" else place.split("/")
        if not {"", ".", ".."}.isdisjoint(parts) or (len(parts) < 2 and scheme != "file"):
            raise storage.StorageError(f"{url}: expected SCHEME://BUCKET/FOLDER, without empty, '.' or '..' parts")
        self.url = f"{scheme}://{place}"
        self.parts = (scheme, *parts)
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(parts))[-80:].lstrip(".-")
        self.base = _root() / f"{readable}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"
        self.folder = self.base / parts[-1]
        self._owner: dict[str, Any] | None = None
        self._as_last_owner = False  # uploads only while the bucket's owner is this copy
        self._in_process, self._depth = threading.RLock(), 0
        self._noting = threading.Lock()

    def refresh(self) -> bool:
        """Makes the copy like the bucket, for a command that does not hold it; returns whether it is a folder.

        What was not yet uploaded stays where the bucket's owner is this copy, and while another command works here. A
        copy that a command of this machine holds is newer than the bucket and stays as it is.
        Raises FolderInUse where one holds a folder inside or around this one.
        """
        self._refuse_nested()
        with self._alone():
            if self.is_held_here():
                self._as_last_owner = True
                return True
            if "" in (objects := storage.find(self.url)):
                self._fetch_single(objects[""])
                return False
            ours = self._is_ours(self._read_owner())
            with self._without_others() as alone:
                self.fetch(reset=not ours and alone)
            self._as_last_owner = ours and self._has_news()
            return True

    def fetch(self, *, reset: bool = False) -> None:
        """Makes the copy equal to the bucket, without checkpoints that are incomplete there.

        Local changes that were not yet uploaded stay. reset: they are dropped, as another copy was the last to write.
        Raises StorageError, also where objects change during each of ROUNDS attempts.
        """
        with self._alone():
            self.folder.mkdir(parents=True, exist_ok=True)
            for _ in range(ROUNDS):
                there = _whole(storage.find(self.url))
                self._remove_cut()
                if self._fetch_listed(there, reset):
                    self._keep(self._synced())
                    return
        raise storage.StorageError(f"{self.url}: objects changed in each of {ROUNDS} listings; try again later")

    def _fetch_listed(self, there: dict[str, storage.Stat], reset: bool) -> bool:
        """One round of `fetch`; returns whether every object was still as it was listed."""
        here, synced = _files(self.folder), self._synced()
        for name in here.keys() - there.keys():
            if reset or (name in synced and here[name] == synced[name][2:]):
                self._unlink(name)
        for name in synced.keys() - there.keys():
            self._note(name, None)
        changed = {name for name in here if name not in synced or here[name] != synced[name][2:]}
        wanted = set()
        for name, stat in there.items():
            if not reset and _CHECKPOINT.fullmatch(name) and _covers(name, changed):  # the local checkpoint is newer
                if name not in here:
                    self._note(name, _Both(stat.version, stat.size, 0, 0))
            elif not reset and name not in here and any(name in _covers(other, [name]) for other in changed):
                self._note(name, _Both(stat.version, stat.size, 0, 0))  # removed here; the next push removes it there
            elif not self._is_current(stat, here.get(name), synced.get(name), reset):
                wanted.add(name)
        for name in set().union(*(_covers(name, there) for name in wanted)) - (set() if reset else changed):
            self._unlink(name)  # fetched again after the files that it covers
            wanted.add(name)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for last in (False, True):
                part = sorted(name for name in wanted if bool(_MARKER.fullmatch(name)) is last)
                if not all(list(pool.map(lambda name: self._fetch_file(name, there[name]), part))):
                    return False
        return True

    @staticmethod
    def _is_current(stat: storage.Stat, here: tuple[int, int] | None, synced: _Both | None, reset: bool) -> bool:
        """Whether the local file stays, as it is that of the bucket or a newer one."""
        if here is None:
            return False
        if synced is None or here != synced[2:]:
            return not reset
        return (stat.version, stat.size) == synced[:2]

    def _fetch_file(self, name: str, stat: storage.Stat) -> bool:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_path(path) as temporary:
                storage.download(storage.join(self.url, name), temporary, *stat)
                local = temporary.stat()
        except (FileNotFoundError, storage.ObjectChanged):
            return False
        self._note(name, _Both(stat.version, stat.size, local.st_mtime_ns, local.st_size))
        return True

    def _fetch_single(self, stat: storage.Stat) -> None:
        for _ in range(ROUNDS):
            with suppress(storage.ObjectChanged), atomic_path(self.folder) as temporary:
                storage.download(self.url, temporary, *stat)
                return
            stat = storage.stat(self.url)
        raise storage.StorageError(f"{self.url}: it changed while it was read, {ROUNDS} times; try again later")

    def _remove_cut(self) -> None:
        """Removes local checkpoints without checksums, which an interrupted fetch or removal left."""
        for path in list(self.folder.rglob("checkpoints/*")):
            if path.name.isdecimal() and path.is_dir() and not (path / MARKER).exists():
                shutil.rmtree(path, ignore_errors=True)

    def _unlink(self, name: str) -> None:
        """Removes a local file, and the folders that this empties."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        with suppress(OSError):
            while (path := path.parent) != self.folder:
                path.rmdir()

    def _has_news(self) -> bool:
        here, synced = _files(self.folder), self._synced()
        return any(name not in here or here[name] != synced[name][2:] for name in synced) or bool(here.keys() - synced)

    def push(self) -> None:
        """Uploads what has changed here, and removes there what was removed here. Raises StorageError, FolderInUse."""
        with self._alone():
            self._check_owner()
            here, synced = _files(self.folder), self._synced()
            gone = self._gone(here, synced)
            if synced and not here:
                raise storage.StorageError(
                    f"{self.folder} was emptied while a command works in it. Nothing is removed from {self.url}"
                )
            changed = {name for name in here.keys() - gone if name not in synced or synced[name][2:] != here[name]}
            withdrawn = set().union(*(_covers(name, synced) for name in changed & synced.keys()))
            changed |= withdrawn & here.keys() - gone
            for name in sorted(withdrawn | {name for name in gone if _MARKER.fullmatch(name)}):
                self._remove(name)
            ordered = sorted(changed, key=lambda name: (bool(_MARKER.fullmatch(name)), here[name]))  # by time
            checkpoints: dict[str, list[str]] = {}
            for name in ordered:
                if match := _CHECKPOINT.fullmatch(name):
                    checkpoints.setdefault(match[1], []).append(name)
                else:
                    self._upload(name, here[name])
            for folder, names in checkpoints.items():
                self._upload_checkpoint(folder, names, here)
            for name in sorted(gone - withdrawn):
                if not _MARKER.fullmatch(name):
                    self._remove(name)

    def _gone(self, here: dict[str, tuple[int, int]], synced: dict[str, _Both]) -> set[str]:
        """Files that were removed here; all files of a checkpoint that was removed while it was listed."""
        gone = synced.keys() - here.keys()
        cut = {match[1] for name in gone if (match := _CHECKPOINT.fullmatch(name))}
        removed = tuple(f"{folder}/" for folder in cut if not (self.folder / folder / MARKER).exists())
        return gone | {name for name in synced if name.startswith(removed)}

    def _upload(self, name: str, here: tuple[int, int]) -> None:
        """Uploads a file and notes it. here: its time and size when it was listed, before it is read."""
        url = storage.join(self.url, name)
        with suppress(FileNotFoundError):  # removed since it was listed
            self._check_owner()
            storage.upload(self.folder / name, url)
            there = storage.stat(url)
            self._note(name, _Both(there.version, there.size, *here))

    def _remove(self, name: str) -> None:
        self._check_owner()
        storage.remove(storage.join(self.url, name))
        self._note(name, None)

    def _upload_checkpoint(self, folder: str, names: list[str], here: dict[str, tuple[int, int]]) -> None:
        """Uploads a checkpoint. If it is still complete here, removes unknown files there and uploads its checksums."""
        marker = f"{folder}/{MARKER}"
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda name: self._upload(name, here[name]), [name for name in names if name != marker]))
        if marker in names and (self.folder / marker).exists():
            for name in storage.find(storage.join(self.url, folder)):
                if f"{folder}/{name}" not in here:  # left by a writer that was killed
                    self._remove(f"{folder}/{name}")
            self._upload(marker, here[marker])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context in which this copy alone writes to the folder in the bucket, and uploads changes now and then.

        Raises FolderInUse when another process or machine does. The end uploads the rest, whatever happened, and lets
        other machines write at once.
        """
        with ExitStack() as stack:
            self._enter_writer(stack)
            self._refuse_nested()
            stack.callback(self._release)  # after the last heartbeat
            with self._without_others() as alone:
                self._take(alone)
                stack.enter_context(self._repeated(self._beat))
                self.fetch(reset=(self.base / RESET).exists())
                (self.base / RESET).unlink(missing_ok=True)
            self._remove_orphans()
            with self._uploading():
                yield

    def _release(self) -> None:
        """Lets other machines write at once, unless files are not uploaded yet or another machine has taken over."""
        if self._owner is not None and not self._has_news():
            with suppress(FolderInUse):
                self._check_owner()
                self._write_owner(released=True)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Context that uploads what this command writes, beside a run that may go on there."""
        with (self.base / USERS).open("a") as users:
            _lock(users, fcntl.LOCK_SH)
            with self._uploading():
                yield

    def is_held_here(self) -> bool:
        """Whether a process of this machine holds the copy, which is then newer than the bucket."""
        with suppress(FileNotFoundError), (self.base / WRITER).open("rb") as file:
            return not _lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # beside others that ask
        return False

    def _enter_writer(self, stack: ExitStack) -> None:
        for attempt in range(20):
            try:
                stack.enter_context(sole_writer(self.base, WRITER))
                return
            except FolderInUse:
                if attempt == 19:
                    raise
                time.sleep(0.05)  # others may just ask whether it is held

    def _refuse_nested(self) -> None:
        """Raises FolderInUse where a command of this machine holds a folder inside or around this one."""
        for note in _root().glob(f"*/{PLACE}"):
            with suppress(FileNotFoundError, storage.StorageError):
                other = Mirror(note.read_text(encoding="utf-8"))
                shorter = min(len(other.parts), len(self.parts))
                nested = len(other.parts) != len(self.parts) and other.parts[:shorter] == self.parts[:shorter]
                if nested and other.is_held_here():
                    where = "inside" if shorter == len(other.parts) else "around"
                    raise FolderInUse(
                        f"{self.url} lies {where} {other.url}, which a command of this machine writes to. Nothing was "
                        "changed: wait for it, or end it"
                    )

    @contextmanager
    def _without_others(self) -> Iterator[bool]:
        """Context that other commands of this machine wait for; yields whether none of them works in the copy now."""
        with (self.base / USERS).open("a") as users:
            yield _lock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @contextmanager
    def _repeated(self, work: Callable[[], None]) -> Iterator[None]:
        """Context in which a thread does the work every now and then."""
        stop = threading.Event()
        thread = threading.Thread(target=self._repeat, args=(stop, work, every()), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextmanager
    def _uploading(self) -> Iterator[None]:
        """Context in which changes are uploaded now and then, and the rest at its end, whatever happened."""
        try:
            with self._repeated(self.push):
                yield
        finally:
            try:
                self.push()
            except storage.StorageError as error:
                raise storage.StorageError(
                    f"{error}. What is not in the bucket yet is kept in {self.folder}; the same command on this "
                    "machine goes on from there"
                ) from error

    def _repeat(self, stop: threading.Event, work: Callable[[], None], seconds: float) -> None:
        due = time.monotonic() + seconds
        while not stop.wait(max(due - time.monotonic(), 0.0)):
            due = max(due + seconds, time.monotonic())
            try:
                work()
            except FolderInUse as error:
                log.error("%s", error)
                os.kill(os.getpid(), signal.SIGTERM)  # the run saves its state, here, and ends
                return
            except Exception as error:
                log.warning("%s: %s; tried again in %.0f s", type(error).__name__, error, seconds)

    def _take(self, alone: bool) -> None:
        """Makes this copy the writer; creates RESET where another copy wrote last, so that this one is outdated.

        Raises FolderInUse for a live writer, and, where the copy must be reset, for commands that work in it.
        """
        asked = time.monotonic()
        before = self._read_owner()
        ours = self._is_ours(before)
        if before is not None and before.get("mirror") != self._name() and not before.get("released"):
            self._wait_for_its_end(before)
            asked = time.monotonic()
        if not ours:
            if not alone:
                raise FolderInUse(
                    f"{self.url}: another command of this machine works in {self.folder}, which is older than the "
                    "bucket. Nothing was changed: wait for it, or end it"
                )
            (self.base / RESET).touch()
        self._owner = {
            "mirror": self._name(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "command": shlex.join(sys.argv),
        }
        self._owner |= {"session": uuid.uuid4().hex, "beat": 0}
        with suppress(FileExistsError):  # written by another machine, or by us in an attempt whose reply was lost
            self._write_owner(new=before is None)
        # A competitor that read the same owner has written by then.
        time.sleep(max(every() / 10, time.monotonic() - asked))
        if (self._read_owner() or {}).get("session") != self._owner["session"]:
            self._owner = None
            raise FolderInUse(f"{self.url}: another machine began to write there a moment ago")

    def _is_ours(self, owner: dict[str, Any] | None) -> bool:
        """Whether this copy was the last to write to the bucket, and is like it or newer."""
        return owner is not None and owner.get("mirror") == self._name() and not (self.base / RESET).exists()

    def _name(self) -> str:
        path = self.base / MIRROR
        if not path.exists():
            with self._alone():
                if not path.exists():
                    write_text(path, uuid.uuid4().hex)
        return path.read_text(encoding="utf-8")

    def _remove_orphans(self) -> None:
        """Removes incomplete checkpoints, which killed writers left in the bucket: those without checksums."""
        objects = storage.find(self.url)
        for name in objects:
            checkpoint = _CHECKPOINT.fullmatch(name)
            if checkpoint and f"{checkpoint[1]}/{MARKER}" not in objects:
                self._remove(name)

    def _wait_for_its_end(self, owner: dict[str, Any]) -> None:
        who = f"process {owner.get('process')} on {owner.get('host')}: {owner.get('command')}"
        log.info("%s: waiting up to %.0f s for a sign of life of its last writer, %s", self.url, patience(), who)
        end = time.monotonic() + patience()
        while time.monotonic() < end:
            time.sleep(min(every() / 4, 5.0))
            now = self._read_owner()
            if now is None or now.get("released"):
                return
            if now != owner:
                raise FolderInUse(
                    f"{self.url} is being written to by {who}. Nothing was changed: wait for it, end it, or choose "
                    "another folder"
                )

    def _beat(self) -> None:
        """Writes a heartbeat in less than `every()` seconds, or fails."""
        self._check_owner(within=every() / 2)
        assert self._owner is not None
        self._owner["beat"] += 1
        self._write_owner(within=every() / 2)

    def _read_owner(self, within: float | None = None) -> dict[str, Any] | None:
        try:
            owner = json.loads(storage.read(storage.join(self.url, OWNER), within=within))
        except FileNotFoundError:
            return None
        except ValueError:
            owner = None
        return owner if isinstance(owner, dict) else {"released": True}

    def _write_owner(self, *, released: bool = False, new: bool = False, within: float | None = None) -> None:
        text = json.dumps((self._owner or {}) | {"released": released})
        storage.write(storage.join(self.url, OWNER), text.encode(), new=new, within=within)

    def _check_owner(self, within: float | None = None) -> None:
        """Raises FolderInUse when another machine has taken the folder from this one."""
        if self._owner is None and not self._as_last_owner:
            return
        now = self._read_owner(within)
        if now is None:
            return
        same = now.get("session") == self._owner["session"] if self._owner else now.get("mirror") == self._name()
        if not same:
            raise FolderInUse(
                f"{self.url} was taken over by process {now.get('process')} on {now.get('host')}, which saw no sign of "
                f"life of this one for {patience():.0f} s. What this one has not uploaded is in {self.folder}"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Context that one thread of one process at a time enters, to compare the copy with the bucket."""
        with self._in_process, ExitStack() as stack:
            if self._depth == 0:
                self.base.mkdir(parents=True, exist_ok=True)
                _lock(stack.enter_context((self.base / SYNC).open("a")), fcntl.LOCK_EX)
                if not (self.base / PLACE).exists():
                    write_text(self.base / PLACE, self.url)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def _synced(self) -> dict[str, _Both]:
        synced = {}
        with suppress(FileNotFoundError):
            for line in (self.base / STATE).read_text("utf-8", errors="replace").splitlines():
                with suppress(ValueError, TypeError):  # of a process that was killed
                    name, *entry = json.loads(line)
                    if entry:
                        synced[name] = _Both(*entry)
                    else:
                        synced.pop(name, None)
        return synced

    def _note(self, name: str, both: _Both | None) -> None:
        """Adds to STATE that both sides have the same file now, or none."""
        with self._noting, (self.base / STATE).open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps([name, *(both or ())])}\n")

    def _keep(self, synced: dict[str, _Both]) -> None:
        """Writes STATE anew, with one line a file."""
        write_text(self.base / STATE, "".join(f"{json.dumps([n, *entry])}\n" for n, entry in synced.items()))


def _root() -> Path:
    return storage.cache_folder() / "work"


def _lock(file: IO[Any], how: int) -> bool:
    """Locks a file; returns whether it could, True on a file system without locks, of which `sole_writer` warns."""
    try:
        lock(file, how)
    except BlockingIOError:
        return False
    return True


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """(time of the last change in ns, bytes) of each file that is kept on both sides; see `_whole`."""
    files = {}
    for place, _, names in os.walk(folder):  # skips folders that are removed meanwhile
        for path in map(Path(place).joinpath, names):
            name = path.relative_to(folder).as_posix()
            with suppress(FileNotFoundError):
                if not _LOCAL_ALONE.fullmatch(name):
                    stat = path.stat()
                    files[name] = stat.st_mtime_ns, stat.st_size
    return _whole(files)


def _whole(files: dict[str, Any]) -> dict[str, Any]:
    """The files without those of this module and of incomplete checkpoints, which have no checksums."""

    def belongs(name: str) -> bool:
        checkpoint = _CHECKPOINT.fullmatch(name)
        return (
            bool(name) and not _LOCAL_ALONE.fullmatch(name) and (not checkpoint or f"{checkpoint[1]}/{MARKER}" in files)
        )

    return {name: value for name, value in files.items() if belongs(name)}


def _covers(name: str, names: Iterable[str]) -> set[str]:
    """Those of `names` that mark the folder of the file `name` as complete."""
    if _MARKER.fullmatch(name):
        return set()
    if match := _CHECKPOINT.fullmatch(name):
        return {f"{match[1]}/{MARKER}"} & set(names)
    folder = name.rpartition("/")[0]
    return {other for other in names if _MARKER.fullmatch(other) and other.rpartition("/")[0] == folder}


_fetched: dict[str, Mirror] = {}


def local(url: str) -> Path:
    """The local copy of a folder or a file in object storage, fetched as it is now."""
    mirror = Mirror(url)
    if mirror.refresh():
        _fetched[mirror.url] = mirror
    return mirror.folder


def is_copy(place: str | Path) -> bool:
    """Whether a path is the copy that `local` gave for a URL."""
    return any(mirror.folder == Path(place) for mirror in _fetched.values())


@contextmanager
def working_in(place: str | Path, *, alone: bool = False) -> Iterator[Path]:
    """Context with the local path of a folder that may be in object storage, to which changes go back.

    place: a path, a URL, or the copy that `local` gave for one. alone: for a run, which no other may continue.
    All processes of a job call it; the first one uploads. Raises FolderInUse and StorageError; the
    other processes ValueError for what the first one raises.
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
    token, sign = 0.0, mirror.base / JOB
    with ExitStack() as stack:

        def claim() -> None:
            nonlocal token
            stack.enter_context(mirror.held() if alone else mirror.shared())
            token = float(random.randrange(1, 1 << 20))  # exact in float32
            sign.write_text(str(token), encoding="utf-8")

        hosts.by_first(claim)
        [token] = hosts.largest(token)
        if hosts.anywhere(not sign.exists() or sign.read_text(encoding="utf-8") != str(token)):
            raise storage.StorageError(
                f"{mirror.url}: the processes of this job do not share {mirror.folder}: set ${storage.CACHE} to a "
                "folder that all machines share, or give a mount of the bucket as --workdir"
            )
        yield
