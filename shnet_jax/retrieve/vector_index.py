"""Vector indexes beside the embeddings: FAISS in a file, Milvus in a file or on a server.

An index holds one side ("images" or "texts") of the embeddings and finds the nearest vectors by dot product.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, Self

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.evaluation.tiles import show_progress
from shnet_jax.evaluation.top_k import TopK
from shnet_jax.observe.files import atomic_path
from shnet_jax.retrieve.embeddings import Embeddings

PACKAGES = {"faiss": ("faiss", "faiss-cpu"), "milvus": ("pymilvus", "pymilvus milvus-lite")}
ROWS = 8192  # vectors handed to an index at once
QUERIES = 128  # queries in one request to Milvus

log = logging.getLogger(__name__)


class VectorIndex(Protocol):
    """An index of one side ("images", "texts") of the embeddings.

    bytes_per_vector: what the index stores of a vector; None where it cannot be told.
    """

    bytes_per_vector: float | None

    @staticmethod
    def settings(search: ConfigDict) -> str:
        """The fields of config.search that a stored index depends on."""
        ...

    @classmethod
    def open(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> Self | None:
        """The stored index; None when there is none, or one that is not complete."""
        ...

    @classmethod
    def make(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> Self:
        """Builds and stores the index. Raises ValueError for settings that the library refuses."""
        ...

    def search(self, queries: np.ndarray, k: int, tile: int = 512, mesh: Mesh | None = None) -> TopK:
        """The k nearest vectors of queries [q, d] by dot product; places without a result have index -1.

        tile, mesh: as for `top_k`, of an index that JAX searches; others do not need them.
        """
        ...


class FaissIndex:
    """A FAISS index in one file, of any factory string (config.search.faiss)."""

    bytes_per_vector: float | None

    def __init__(self, index: Any, search: ConfigDict, path: Path):
        self._index, self.bytes_per_vector = index, path.stat().st_size / max(index.ntotal, 1)
        faiss = require("faiss")
        inner = faiss.downcast_index(index)
        while hasattr(inner, "index") and not hasattr(inner, "nprobe"):  # a transform around the index proper
            inner = faiss.downcast_index(inner.index)
        if hasattr(inner, "nprobe"):
            inner.nprobe = min(search.nprobe, inner.nlist)
        elif hasattr(inner, "hnsw"):
            inner.hnsw.efSearch = search.ef_search

    @staticmethod
    def settings(search: ConfigDict) -> str:
        """The fields of config.search that a file of this index depends on."""
        return search.faiss

    @classmethod
    def open(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> FaissIndex | None:
        """The index in its file; None when there is none."""
        faiss, path = require("faiss"), _faiss_file(embeddings, side)
        return cls(faiss.read_index(str(path)), search, path) if path.is_file() else None

    @classmethod
    def make(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> FaissIndex:
        """Trains and fills the index and writes its file. Raises ValueError for settings that FAISS refuses."""
        faiss, path = require("faiss"), _faiss_file(embeddings, side)
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
        with atomic_path(path) as temporary:
            faiss.write_index(index, str(temporary))
        return cls(index, search, path)

    def search(self, queries: np.ndarray, k: int, tile: int = 512, mesh: Mesh | None = None) -> TopK:
        """Searches the index; see `VectorIndex`."""
        score, index = self._index.search(np.ascontiguousarray(queries, np.float32), min(k, self._index.ntotal))
        return TopK(index.astype(np.int64), score)


class MilvusIndex:
    """A Milvus collection, in a file of milvus-lite or on a server (config.search.address)."""

    bytes_per_vector: float | None = None  # the library does not say

    def __init__(self, search: ConfigDict, embeddings: Embeddings, side: str):
        pymilvus = require("milvus")
        address = search.address or str(embeddings.folder.absolute() / "milvus.db")
        try:
            self._client = pymilvus.MilvusClient(uri=address)
        except (pymilvus.MilvusException, ImportError) as error:
            raise ValueError(
                f"Milvus at {address!r} (config.search.address) does not open: {error}; "
                "a file needs pip install milvus-lite, a server an address such as http://localhost:19530"
            ) from None
        # On a server collections of many galleries lie side by side.
        self._collection = f"shnet_{side}_{source_hash(embeddings)[:16]}"
        self._nprobe, self._ef_search = search.nprobe, search.ef_search

    @staticmethod
    def settings(search: ConfigDict) -> str:
        """The fields of config.search that a collection depends on."""
        return f"{search.milvus} {search.address}".strip()

    @classmethod
    def open(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> MilvusIndex | None:
        """The collection of these embeddings; None when there is none, or one that is not full."""
        index = cls(search, embeddings, side)
        client, name = index._client, index._collection
        if not client.has_collection(name):
            return None
        client.load_collection(name)
        stored = client.query(name, filter="", output_fields=["count(*)"])[0]["count(*)"]
        return index if stored == len(getattr(embeddings, side).vector) else None

    @classmethod
    def make(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> MilvusIndex:
        """Makes and fills the collection. Raises ValueError for an index type that Milvus refuses."""
        index = cls(search, embeddings, side)
        pymilvus, client, name = require("milvus"), index._client, index._collection
        vectors = getattr(embeddings, side).vector
        if client.has_collection(name):
            client.drop_collection(name)
        schema = client.create_schema(auto_id=False)
        schema.add_field("row", pymilvus.DataType.INT64, is_primary=True)
        schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        params = client.prepare_index_params()
        build = _milvus_params(search.milvus, len(vectors))
        params.add_index("vector", index_type=search.milvus, metric_type="IP", params=build)
        try:
            client.create_collection(name, schema=schema, index_params=params)
        except pymilvus.MilvusException as error:
            raise ValueError(f"config.search.milvus is {search.milvus!r}; Milvus says: {error}") from None
        for start, block in blocks(vectors, f"milvus {side}: block"):
            client.insert(name, [{"row": start + i, "vector": row} for i, row in enumerate(block)])
        client.flush(name)
        client.load_collection(name)
        return index

    def search(self, queries: np.ndarray, k: int, tile: int = 512, mesh: Mesh | None = None) -> TopK:
        """Searches the index; see `VectorIndex`."""
        index, score = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
        params = {"params": {"ef": max(self._ef_search, k), "nprobe": self._nprobe}}
        for start in range(0, len(queries), QUERIES):
            block = list(np.asarray(queries[start : start + QUERIES], np.float32))
            answers: Iterable[Any] = self._client.search(self._collection, data=block, limit=k, search_params=params)
            for row, hits in enumerate(answers, start=start):
                for place, hit in enumerate(hits):
                    index[row, place], score[row, place] = hit["row"], hit["distance"]
        return TopK(index, score)


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


def source_hash(embeddings: Embeddings) -> str:
    """Hash of the checkpoint and data set that the embeddings come from."""
    return hashlib.sha256(json.dumps(embeddings.source, sort_keys=True).encode()).hexdigest()


def blocks(vectors: np.ndarray, title: str) -> Iterator[tuple[int, np.ndarray]]:
    """Iterates over vectors in blocks of ROWS, each with the number of its first row, and shows progress."""
    with show_progress(-(-len(vectors) // ROWS), title, "vectors") as advance:
        for start in range(0, len(vectors), ROWS):
            block = np.ascontiguousarray(vectors[start : start + ROWS], np.float32)
            yield start, block
            advance(len(block))


def _faiss_file(embeddings: Embeddings, side: str) -> Path:
    return embeddings.folder / f"{side}.faiss"


def _milvus_params(kind: str, count: int) -> dict[str, int]:
    """The build parameters that Milvus wants named: as many lists as FAISS recommends, graphs of 32 neighbours."""
    if kind.startswith("IVF"):
        return {"nlist": int(np.clip(4 * np.sqrt(count), 1, 65536))}
    return {"M": 32, "efConstruction": 200} if kind.startswith("HNSW") else {}
