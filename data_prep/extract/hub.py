"""The Hugging Face hub, which may not be there."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from data_prep.schema import DataError

PATIENCE = 10.0
"""Seconds without an answer after which the hub counts as not reachable; its own client tries for minutes."""


def fetch(name: str, *patterns: str) -> Path:
    """The folder in the cache with the files of a model that fit the patterns, downloaded if the hub can be reached.

    Raises OSError or ValueError for a model that is neither in the cache nor on the hub, within about PATIENCE where
    the hub does not answer.
    """
    return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=not _answers()))


def cached(name: str) -> Path | None:
    """The folder in the cache with files of a model, None without any; asks nobody."""
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def require(flag: str, name: str) -> None:
    """Raises DataError, one line, for a model that is no folder, has nothing in the cache and cannot be fetched.

    It is asked before transformers, which would try for minutes and say it in many lines.
    """
    if Path(name).is_dir() or cached(name) is not None:
        return
    if name.startswith((".", "/")):
        raise DataError(f"{flag}={name}: no such folder")
    if not _answers():
        raise DataError(
            f"{not_here(flag, name, 'the hub does not answer')}; fetch it on a machine with a network "
            f"(hf download {name} --local-dir=FOLDER) and give {flag}=FOLDER"
        )


def not_here(flag: str, name: str, reason: object) -> str:
    """One line for a model that could not be had, for whatever reason the hub's client gives."""
    text = " ".join(str(reason).split())
    return f"{flag}={name}: not here, and not to be had ({text if len(text) < 120 else f'{text:.120}...'})"


def _answers() -> bool:
    """Whether the hub answers, with an error too; not asked where HF_HUB_OFFLINE is set."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(constants.ENDPOINT, timeout=PATIENCE):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
