"""A FAISS index in one file of the embeddings' folder."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from shnet_jax.evaluate.nearest import Found
from shnet_jax.observe.files import whole
from shnet_jax.retrieve.backends import blocks, require
from shnet_jax.retrieve.folder import Embeddings

log = logging.getLogger(__name__)


class FaissIndex:
    """A FAISS index in one file, of any factory string (config.search.faiss)."""

    def __init__(self, index: Any):
        self._index = index

    @staticmethod
    def settings(search: ConfigDict) -> str:
        """What a file of this index depends on."""
        return search.faiss

    @staticmethod
    def _path(embeddings: Embeddings, side: str) -> Path:
        return embeddings.folder / f"{side}.faiss"

    @classmethod
    def open(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> FaissIndex | None:
        """The index in its file; None when there is none."""
        faiss, path = require("faiss"), cls._path(embeddings, side)
        return cls(_deepen(faiss, faiss.read_index(str(path)), search.effort)) if path.is_file() else None

    @classmethod
    def make(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> FaissIndex:
        """Trains and fills the index and writes its file. Raises ValueError for settings that FAISS refuses."""
        faiss, path = require("faiss"), cls._path(embeddings, side)
        vectors = getattr(embeddings, side).vector
        try:
            index = faiss.index_factory(vectors.shape[1], search.faiss, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                # Evenly spaced, so that the file is always the same.
                rows = np.linspace(0, len(vectors) - 1, min(len(vectors), search.train_vectors)).astype(np.int64)
                log.info("%s: training %s on %d of %d vectors", path, search.faiss, len(rows), len(vectors))
                index.train(np.ascontiguousarray(vectors[rows], np.float32))
        except RuntimeError as error:
            raise ValueError(
                f"config.search.faiss is {search.faiss!r} for {len(vectors)} {side} of {vectors.shape[1]} numbers; "
                f"FAISS says: {str(error).splitlines()[-1]}"
            ) from None
        for _, block in blocks(vectors, f"faiss {side}: block"):
            index.add(block)
        with whole(path) as temporary:
            faiss.write_index(index, str(temporary))
        return cls(_deepen(faiss, index, search.effort))

    def search(self, queries: np.ndarray, k: int) -> Found:
        """See `Index`."""
        score, index = self._index.search(np.ascontiguousarray(queries, np.float32), min(k, self._index.ntotal))
        return Found(index.astype(np.int64), score)


def _deepen(faiss: ModuleType, index: Any, effort: int) -> Any:
    """Sets how much of the index a query visits: nprobe of inverted lists, efSearch of HNSW graphs."""
    inner = faiss.downcast_index(index)
    while hasattr(inner, "index") and not hasattr(inner, "nprobe"):  # a transform around the index proper
        inner = faiss.downcast_index(inner.index)
    if hasattr(inner, "nprobe"):
        inner.nprobe = min(effort, inner.nlist)
    elif hasattr(inner, "hnsw"):
        inner.hnsw.efSearch = effort
    return index
