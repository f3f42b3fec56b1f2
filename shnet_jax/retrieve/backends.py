"""What FAISS and Milvus indexes have in common: their interface, the libraries they need, vectors in blocks."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator
from types import ModuleType
from typing import Protocol, Self

import numpy as np
from ml_collections import ConfigDict

from shnet_jax.evaluate.nearest import Found
from shnet_jax.observe.clock import Clock
from shnet_jax.observe.progress import Progress
from shnet_jax.retrieve.folder import Embeddings

PACKAGES = {"faiss": ("faiss", "faiss-cpu"), "milvus": ("pymilvus", "pymilvus milvus-lite")}
ROWS = 8192  # vectors handed to an index at once


class Index(Protocol):
    """An index of one side ("images", "texts") of the embeddings."""

    @staticmethod
    def settings(search: ConfigDict) -> str:
        """What of config.search a stored index depends on."""
        ...

    @classmethod
    def open(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> Self | None:
        """The stored index; None when there is none, or one that is not complete."""
        ...

    @classmethod
    def make(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> Self:
        """Builds and stores it. Raises ValueError for settings that the library refuses."""
        ...

    def search(self, queries: np.ndarray, k: int) -> Found:
        """The k nearest of queries [q, d] by dot product; places that nothing was found for have index -1."""
        ...


def require(kind: str) -> ModuleType:
    """The library of an index. Raises ValueError with the command that installs it."""
    module, packages = PACKAGES[kind]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(
            f"config.search.index is {kind!r}, which needs packages that are not installed: "
            f"pip install {packages} (or pip install -e '.[{kind}]')"
        ) from None


def digest(embeddings: Embeddings) -> str:
    """Names what the embeddings come from."""
    return hashlib.sha256(json.dumps(embeddings.source, sort_keys=True).encode()).hexdigest()


def blocks(vectors: np.ndarray, title: str) -> Iterator[tuple[int, np.ndarray]]:
    """The vectors in blocks of ROWS with the number of the first, showing progress."""
    progress, clock = Progress(-(-len(vectors) // ROWS), what=title), Clock()
    with clock:
        for number, start in enumerate(range(0, len(vectors), ROWS), start=1):
            block = np.ascontiguousarray(vectors[start : start + ROWS], np.float32)
            yield start, block
            clock.tick(len(block))
            progress.update(number, clock)
    progress.close()
