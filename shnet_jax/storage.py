"""Files in object storage (s3://, gs:// and what else fsspec opens): whole reads and writes, with retries.

An object appears whole or not at all, so a single write is atomic. Faults of the network and of the server are retried
with back-off and named; missing credentials and missing packages are one line. Only this module imports fsspec.
"""

from __future__ import annotations

import datetime
import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

ATTEMPTS = 6
FIRST_WAIT = 0.5
"""Seconds before the second attempt; each wait after it is twice as long, up to LONGEST_WAIT, and up to 50% longer."""
LONGEST_WAIT = 30.0
PIECE = 32 << 20
"""Bytes of one read of a large object."""

CACHE = "SHNET_CACHE"
TIMEOUT = "SHNET_STORAGE_TIMEOUT"
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, run `aws configure`, or give this machine a role",
    "gcs": "run `gcloud auth application-default login`, set GOOGLE_APPLICATION_CREDENTIALS, or give this machine a "
    "service account",
}

log = logging.getLogger(__name__)

T = TypeVar("T")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://.*", re.DOTALL)
_MANGLED = re.compile(r"(s3a?|gcs|gs):/[^/]")  # a URL after pathlib has removed a slash
_OF_THIS_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)
_OF_CLIENTS = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "requests", "urllib3")  # kinds of errors


class StorageError(OSError):
    """Object storage refused a request or cannot be reached, or its package or credentials are missing."""


class ObjectChanged(StorageError):
    """An object was replaced while it was read."""


class Stat(NamedTuple):
    """An object: its bytes, and a text that differs between its versions."""

    size: int
    version: str


def is_url(text: object) -> bool:
    """Whether a text names a place in storage that fsspec opens, as s3://BUCKET/FOLDER.

    Raises StorageError for a URL that has lost a slash, as pathlib leaves it: it would become a folder called "s3:".
    """
    text = str(text)
    if _MANGLED.match(text):
        raise StorageError(f"{text}: expected SCHEME://BUCKET/FOLDER, with two slashes; found one")
    match = _URL.fullmatch(text)
    return match is not None and match[1] not in ("http", "https")


def cache_folder() -> Path:
    """The local folder for what is fetched from storage: $SHNET_CACHE, else ~/.cache/shnet_jax."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "shnet_jax").expanduser().absolute()


def seconds(variable: str, default: float) -> float:
    """The number of seconds in an environment variable. Raises StorageError for what is no number above 0."""
    text = os.environ.get(variable) or str(default)
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise StorageError(f"${variable} is {text!r}; expected seconds, a number above 0")
    return number


def join(url: str, name: str) -> str:
    """The URL of the object `name` below `url`; of `url` itself for ""."""
    return f"{url.rstrip('/')}/{name}" if name else url.rstrip("/")


def find(url: str, depth: int | None = None) -> dict[str, Stat]:
    """Every object below a URL by its name from there, "" for the URL itself; {} where there is none.

    depth: at most so many folders down. Objects that consoles make for folders, whose keys end in "/", are left out.
    Raises StorageError for a key that is no path of a file below the URL, such as one with "..".
    """
    fs, path = _opened(url)

    def listed() -> dict[str, Stat]:
        fs.invalidate_cache()
        # Not with maxdepth: s3fs then takes a folder whose listing fails as empty.
        return {name: _stat(entry) for name, entry in fs.find(path, detail=True).items()}

    try:
        objects = _retried(url, "list", listed)
    except FileNotFoundError as error:
        if "bucket" in str(error.__cause__).lower():
            raise
        return {}
    start = fs._strip_protocol(path).strip("/")  # what fsspec's own names begin with
    named = {
        key.removeprefix("/").removeprefix(start).removeprefix("/"): stat
        for key, stat in objects.items()
        if not key.endswith("/")
    }
    for name in named:
        if (name and not {"", ".", ".."}.isdisjoint(name.split("/"))) or "\0" in name:
            raise StorageError(
                f"{url}: expected objects whose keys are paths of files; found {name!r}, with an empty, '.' or '..' "
                "part: rename or remove it"
            )
    return {name: stat for name, stat in named.items() if depth is None or name.count("/") < depth}


def stat(url: str) -> Stat:
    """Size and version of an object, as `find` gives them. Raises FileNotFoundError."""
    fs, path = _opened(url)
    return _retried(url, "look at", lambda: _stat(fs.info(path)))


def read(url: str, *, within: float | None = None) -> bytes:
    """The bytes of an object. within: a single attempt of at most so many seconds. Raises FileNotFoundError."""
    fs, path = _opened(url)
    return _retried(url, "read", lambda: fs.cat_file(path, **_limit(fs, within)), 1 if within else 0)


def read_range(url: str, start: int, stop: int, *, version: str = "") -> bytes:
    """Bytes start to stop - 1 of an object, all of them.

    version: that of its Stat; ObjectChanged is raised as soon as a failed read shows another one.
    """
    fs, path = _opened(url)

    def ranged() -> bytes:
        try:
            data = fs.cat_file(path, start=start, end=stop)
            if len(data) != stop - start:
                raise ConnectionError(f"expected {stop - start} bytes from {start} on, found {len(data)}")
        except Exception:
            if version and _stat(fs.info(path)).version != version:
                raise ObjectChanged(f"{url}: replaced while it was read") from None
            raise
        return data

    return _retried(url, "read", ranged) if stop > start else b""


def download(url: str, path: Path, size: int, version: str = "") -> None:
    """Writes an object of `size` bytes to a local file; the folder must exist. A shorter read is retried.

    version: that of its Stat; raises ObjectChanged where the object is another one before the last byte was read.
    """
    with path.open("wb") as file:
        for start in range(0, size, PIECE):
            file.write(read_range(url, start, min(start + PIECE, size), version=version))
    if version and stat(url) != (size, version):
        raise ObjectChanged(f"{url}: replaced while it was read")


def write(url: str, data: bytes, *, new: bool = False, within: float | None = None) -> None:
    """Writes an object, whole or not at all.

    new: raises FileExistsError where it is there, if the storage can tell, also when an attempt before, whose answer
    was lost, wrote it. within: a single attempt of at most so many seconds.
    """
    fs, path = _opened(url)
    mode = {"mode": "create"} if new and EXTRAS.get(_scheme(url)) else {}
    mode |= _limit(fs, within)
    _retried(url, "write", lambda: fs.pipe_file(path, data, **mode), 1 if within else 0)


def upload(source: Path, url: str) -> None:
    """Copies a local file to an object, whole or not at all."""
    fs, path = _opened(url)
    # Small files, nearly all, are one request; put_file also lists and makes the bucket or folder.
    if source.stat().st_size <= PIECE:
        data = source.read_bytes()
        _retried(url, "write", lambda: fs.pipe_file(path, data))
    else:
        _retried(url, "write", lambda: fs.put_file(str(source), path))


def remove(url: str) -> None:
    """Removes an object; nothing happens where it is not."""
    fs, path = _opened(url)

    def removed() -> None:
        with suppress(FileNotFoundError):
            fs.rm_file(path)

    _retried(url, "remove", removed)


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _limit(fs: Any, within: float | None) -> dict[str, Any]:
    """The argument by which fsspec ends a call, its own retries included; {} where it has none."""
    return {"timeout": within} if within and fs.async_impl else {}


def _opened(url: str) -> tuple[Any, str]:
    """fsspec's file system and its path of a URL. Raises StorageError for an unknown scheme or a missing package."""
    import fsspec  # imported late: most commands do not need it
    from fsspec.registry import known_implementations

    scheme, patience = _scheme(url), seconds(TIMEOUT, 60)
    options: dict[str, Any] = {"use_listings_cache": False}
    if EXTRAS.get(scheme) == "s3":  # without its own retries: ours are logged
        options["config_kwargs"] = {
            "connect_timeout": min(patience, 10), "read_timeout": patience, "retries": {"max_attempts": 0},
        }  # fmt: skip
    elif EXTRAS.get(scheme) == "gcs":
        options["requests_timeout"] = patience
        if os.environ.get("STORAGE_EMULATOR_HOST"):  # as Google's own clients do
            options["token"] = "anon"
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        remedy = f"pip install 'shnet_jax[{extra}]'" if extra else str(error)
        raise StorageError(f"{url}: the package that opens {scheme}:// is not installed: {remedy}") from None
    except ValueError as error:
        if scheme in known_implementations:
            raise
        near = ", ".join(f"{name}://" for name in ("s3", "gs") if name in known_implementations)
        raise StorageError(f"{url}: nothing here opens {scheme}://; expected a local folder, {near}") from error
    if EXTRAS.get(scheme) == "s3":
        fs.retries = 1
    return fs, path


def _stat(entry: dict[str, Any]) -> Stat:
    keys = ("ETag", "etag", "md5Hash", "generation", "crc32c", "mtime", "created")
    version = next((entry[key] for key in keys if entry.get(key) is not None), "")
    if isinstance(version, datetime.datetime):  # a number in the listings of the same storage
        version = version.timestamp()
    return Stat(int(entry.get("size") or 0), str(version).strip('"'))


def _retried(url: str, action: str, call: Callable[[], T], attempts: int = 0) -> T:
    """Calls until it succeeds. Raises FileNotFoundError and FileExistsError at once, StorageError in the end.

    action: verb for messages. attempts: at most so many calls; 0: ATTEMPTS.
    """
    attempts = attempts or ATTEMPTS
    started, wait = time.monotonic(), FIRST_WAIT
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
        except (FileExistsError, ObjectChanged):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _OF_THIS_DISK:
                raise
            if not isinstance(error, OSError | TimeoutError) and _package(error) not in _OF_CLIENTS:
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no word from the server'}"[:300]
            if refusal := _refusal(url, error):
                raise StorageError(f"{url}: cannot {action} it: {refusal} ({reason})") from error
            if attempt == attempts:
                passed = time.monotonic() - started
                raise StorageError(
                    f"{url}: could not {action} it in {attempts} attempts and {passed:.0f} s, the last one ended with "
                    f"{reason}. Give the same command again when the storage answers"
                ) from error
            pause = min(wait, LONGEST_WAIT) * random.uniform(1.0, 1.5)
            log.warning(
                "%s: could not %s it: %s; attempt %d of %d in %.1f s", url, action, reason, attempt + 1, attempts, pause
            )
            time.sleep(pause)
            wait *= 2
    raise AssertionError("the last attempt returns or raises")


def _package(error: Exception) -> str:
    return type(error).__module__.partition(".")[0]


def _refusal(url: str, error: Exception) -> str:
    """The reason why another attempt is useless; "" for a fault that may be temporary."""
    name, text = type(error).__name__, str(error)
    code = str(getattr(error, "code", "") or getattr(error, "status", ""))
    hint = CREDENTIALS.get(EXTRAS.get(_scheme(url), ""), "")
    if name in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError"):
        return f"no credentials; {hint}"
    if isinstance(error, PermissionError) or code in ("401", "403") or text.startswith("Forbidden"):
        return f"no credentials, or they do not allow it; {hint}"
    if code.startswith("4") and code not in ("408", "429"):
        return "the storage refuses the request"
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return "expected an object there"
    return ""
