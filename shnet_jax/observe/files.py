"""Atomic file writes, and folders that one process at a time writes to."""

from __future__ import annotations

import datetime
import errno
import fcntl
import glob
import json
import logging
import os
import shlex
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shnet_jax.locks import lock

LOCK = ".lock"
STALE = 3600
"""Seconds after which a temporary file that several processes may write belongs to none of them any more."""
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)

log = logging.getLogger(__name__)


class FolderInUse(RuntimeError):
    """Another process writes to the folder."""


@contextmanager
def atomic_path(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields the temporary name PATH.tmp to write to; it is renamed to `path` when the block ends without an error.

    An interrupted block leaves the previous file as it was; the folder must exist. shared: several threads or processes
    may write `path` at the same time. Each then has a temporary name of its own, PATH.ID.tmp, and the last one wins.
    What a killed one left is removed after STALE seconds.
    """
    if shared:
        _remove_stale(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp" if shared else f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_stale(path: Path) -> None:
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):  # another process removes it too
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, also where others write it at the same time."""
    with atomic_path(path, shared=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Writes `document` as indented JSON atomically."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def free_space(path: str | Path) -> str:
    """Free disk space, in words, at a file or folder, or at the nearest folder above it that exists."""
    path = Path(path).absolute()
    usage = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists()))
    return f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB are free"


@contextmanager
def sole_writer(folder: str | Path, name: str = LOCK) -> Iterator[None]:
    """Makes this process the only one that writes to `folder`, which is made if it is not there.

    The lock (flock on a file in it) is the kernel's and ends with the process, however that ends. Who only reads takes
    no notice of it. A file system without locks gets a warning. name: of the file, where only a part of the folder is
    meant. A folder that was made here and in which nothing was left is removed.
    Raises FolderInUse, naming process and host, when another process has it; nothing was changed then.
    """
    folder = Path(folder)
    made = not folder.exists()
    path = folder / name
    file = _locked(path)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {_now()}: {shlex.join(sys.argv)}\n".encode())
        yield
    except OSError as error:
        if error.filename is None and error.errno in _OF_DISKS:  # Python does not say which file a write was for
            error.filename = str(folder)
        raise
    finally:
        path.unlink(missing_ok=True)  # before the lock goes with the file
        file.close()
        if made:
            with suppress(OSError):  # there is something in it
                folder.rmdir()


@contextmanager
def disk_faults(folder: str | Path, *kinds: type[Exception]) -> Iterator[None]:
    """Context that turns exceptions of these kinds that report a full disk into an OSError on `folder`."""
    try:
        yield
    except kinds as error:
        full = os.strerror(errno.ENOSPC)
        if full not in str(error):
            raise
        raise OSError(errno.ENOSPC, full, str(folder)) from error


def describe(error: OSError) -> str:
    """One-line description of an OSError: the file, the reason and, where one is known, the remedy."""
    name = error.filename2 or error.filename
    where = f"{name}: " if name is not None else ""
    text = f"{where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = f"; {free_space(os.fsdecode(name))} there" if isinstance(name, (str, bytes, os.PathLike)) else ""
        return f"{text}{free}. What was whole before is so still: make space, then give the same command"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{text}; needed was to write there, as user {os.geteuid()}"
    return text


def _locked(path: Path) -> Any:
    """Opens and locks the file; tries again when its last holder removed it, or its folder, in between."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
        try:
            if not lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                log.warning("%s: this file system has no locks; see to it that no second run writes here", path.parent)
                return file
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "another process"
            raise FolderInUse(
                f"{path.parent} is being written to by {holder}. Nothing was changed: wait for it, end it, or choose "
                "another folder"
            ) from None
        except OSError:
            file.close()
            raise
        file.close()


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(" ", "seconds")
