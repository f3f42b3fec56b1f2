"""Check of the SHA-256 of the weights that transformers loads."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)

from data_prep.extract.encoders import DESCRIBED
from data_prep.schema import DataError
from shnet_jax.data.checksums import sha256


def check(flag: str, name: str, expected: str) -> str:
    """Fetches the weights of the model `name` and compares them with `expected`; "" says what they have.

    flag: the flag that names the model, without dashes, as "backbone". Returns their SHA-256. Raises DataError before
    anything of them is loaded.
    """
    sha = digest(name)
    if not expected:
        print(f"{flag} {name}: sha256 of its weights {sha}", file=sys.stderr, flush=True)
    elif sha != expected.lower():
        raise DataError(f"{flag} {name}: sha256 of its weights: expected {expected} (--{flag}_sha256), found {sha}")
    return sha


def described(name: str) -> dict[str, str]:
    """SHA-256 of each file of a loaded model that says how it is built and how it sees pictures."""
    config = found(name, "config.json")
    folder = Path(name) if config is None else config.parent
    return {file: sha256(folder / file) for file in DESCRIBED if (folder / file).is_file()}


@contextmanager
def no_bar() -> Iterator[None]:
    """Without the bar that transformers draws while it loads weights, which are here already."""
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def digest(name: str) -> str:
    """SHA-256 of the weights of a folder or hub name: of the file, or, of shards, of the lines of `sha256sum`.

    Raises DataError for a model without weights in PyTorch's form.
    """
    for file, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (path := found(name, file)) is not None:
            return sha256(path)
        if (path := found(name, index)) is not None:
            shards = sorted({*json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()})
            return hashlib.sha256("".join(_line(name, shard) for shard in shards).encode()).hexdigest()
    raise DataError(f"{name}: expected weights, {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, found neither")


def _line(name: str, shard: str) -> str:
    path = found(name, shard)
    if path is None:
        raise DataError(f"{name}: expected the shard {shard} that its index names, found none")
    return f"{sha256(path)}  {shard}\n"


def found(name: str, file: str) -> Path | None:
    """The local copy of a file of a model on the hub, downloaded if needed; None if the model has no such file."""
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)
