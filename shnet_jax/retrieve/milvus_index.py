"""A Milvus collection, in a file (milvus-lite) or on a server."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from shnet_jax.evaluate.nearest import Found
from shnet_jax.retrieve.backends import blocks, digest, require
from shnet_jax.retrieve.folder import Embeddings


class MilvusIndex:
    """A Milvus collection, in a file of milvus-lite or on a server (config.search.address)."""

    def __init__(self, client: Any, collection: str, effort: int):
        self._client, self._collection, self._effort = client, collection, effort

    @staticmethod
    def settings(search: ConfigDict) -> str:
        """What a collection depends on."""
        return f"{search.milvus} {search.address}".strip()

    @classmethod
    def _connect(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> MilvusIndex:
        pymilvus = require("milvus")
        address = search.address or str(embeddings.folder.absolute() / "milvus.db")
        try:
            client = pymilvus.MilvusClient(uri=address)
        except (pymilvus.MilvusException, ImportError) as error:
            raise ValueError(
                f"Milvus at {address!r} (config.search.address) does not open: {error}; "
                "a file needs pip install milvus-lite, a server an address such as http://localhost:19530"
            ) from None
        # On a server collections of many galleries lie side by side.
        return cls(client, f"shnet_{side}_{digest(embeddings)[:16]}", search.effort)

    @classmethod
    def open(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> MilvusIndex | None:
        """The collection of these embeddings; None when there is none, or one that is not full."""
        found = cls._connect(search, embeddings, side)
        if not found._client.has_collection(found._collection):
            return None
        found._client.load_collection(found._collection)
        stored = found._client.query(found._collection, filter="", output_fields=["count(*)"])[0]["count(*)"]
        return found if stored == len(getattr(embeddings, side).vector) else None

    @classmethod
    def make(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> MilvusIndex:
        """Makes and fills the collection. Raises ValueError for an index type that Milvus refuses."""
        found = cls._connect(search, embeddings, side)
        pymilvus, client, name = require("milvus"), found._client, found._collection
        vectors = getattr(embeddings, side).vector
        if client.has_collection(name):
            client.drop_collection(name)
        schema = client.create_schema(auto_id=False)
        schema.add_field("row", pymilvus.DataType.INT64, is_primary=True)
        schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        index = client.prepare_index_params()
        index.add_index("vector", index_type=search.milvus, metric_type="IP", params=_milvus_params(search, vectors))
        try:
            client.create_collection(name, schema=schema, index_params=index)
        except pymilvus.MilvusException as error:
            raise ValueError(f"config.search.milvus is {search.milvus!r}; Milvus says: {error}") from None
        for start, block in blocks(vectors, f"milvus {side}: block"):
            client.insert(name, [{"row": start + i, "vector": row} for i, row in enumerate(block)])
        client.flush(name)
        client.load_collection(name)
        return found

    def search(self, queries: np.ndarray, k: int) -> Found:
        """See `Index`."""
        index, score = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
        params = {"params": {"ef": max(self._effort, k), "nprobe": self._effort}}
        for start in range(0, len(queries), 128):
            block = list(np.asarray(queries[start : start + 128], np.float32))
            answers: Iterable[Any] = self._client.search(self._collection, data=block, limit=k, search_params=params)
            for row, hits in enumerate(answers, start=start):
                for place, hit in enumerate(hits):
                    index[row, place], score[row, place] = hit["row"], hit["distance"]
        return Found(index, score)


def _milvus_params(search: ConfigDict, vectors: np.ndarray) -> dict[str, int]:
    """The build parameters that Milvus wants named: as many lists as FAISS recommends, graphs of 32 neighbours."""
    if search.milvus.startswith("IVF"):
        return {"nlist": int(np.clip(4 * np.sqrt(len(vectors)), 1, 65536))}
    return {"M": 32, "efConstruction": 200} if search.milvus.startswith("HNSW") else {}
