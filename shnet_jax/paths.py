"""Paths as users type them: `~`, and `=` and `,` in names. A path that exists is a path, whatever is in it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from shnet_jax import storage

_NAMED = re.compile(r"(\w+)=(.+)", re.DOTALL)


def expand(text: str) -> str:
    """The text with `~` as the home folder, unless there is such a file or folder as it is written."""
    return text if os.path.lexists(text) else os.path.expanduser(text)


def to_path(text: str | Path) -> Path:
    """The path that a flag or a configuration names. Raises StorageError for a URL."""
    if storage.is_url(text):
        raise storage.StorageError(f"{text}: this option takes a local file or folder, not a URL")
    return Path(expand(str(text)))


def to_paths(text: str) -> list[Path]:
    """Paths of a comma-separated list."""
    return [to_path(entry) for entry in _entries(text, _exists)]


def to_places(text: str) -> list[str]:
    """Paths and URLs of a comma-separated list."""
    return [entry if storage.is_url(entry) else str(to_path(entry)) for entry in _entries(text, _exists)]


def named_paths(text: str) -> list[tuple[str, Path]]:
    """Name and path of each entry of NAME=PATH,NAME=PATH,...; the name is "" where only a path is given."""
    paths = []
    for entry in _entries(text, lambda entry: _exists(entry) or _exists(_split(entry)[1])):
        name, rest = ("", entry) if _exists(entry) else _split(entry)
        paths.append((name, to_path(rest)))
    return paths


def _exists(text: str) -> bool:
    return bool(text) and os.path.lexists(expand(text))


def _split(entry: str) -> tuple[str, str]:
    match = _NAMED.fullmatch(entry)
    return (match[1], match[2]) if match else ("", entry)


def _entries(text: str, exists: Callable[[str], bool]) -> Iterator[str]:
    """The parts between commas, but no empty ones, joined again where a longer part is there that has commas."""
    parts = text.split(",")
    while parts:
        longest = next((n for n in range(len(parts), 1, -1) if exists(",".join(parts[:n]))), 1)
        if any(parts[:longest]):
            yield ",".join(parts[:longest])
        del parts[:longest]
