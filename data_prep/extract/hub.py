"""The Hugging Face hub, which may not be there."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants, snapshot_download

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
