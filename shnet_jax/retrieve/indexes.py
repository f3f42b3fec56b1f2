"""Nearest-neighbour indexes of embeddings: FAISS files and Milvus collections, beside the exact search.

An index stands in for the default score, the dot product of unit vectors; for any other it finds candidates only. When
it is built, its recall against the exact search is measured with queries of the other side and kept beside it.
"""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.evaluate.nearest import Found, is_dot_product, top_k
from shnet_jax.foreign import read_object
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.observe.files import disk_faults, sole_writer, write_json
from shnet_jax.retrieve.backends import Index, digest
from shnet_jax.retrieve.faiss_index import FaissIndex
from shnet_jax.retrieve.folder import Embeddings
from shnet_jax.retrieve.milvus_index import MilvusIndex
from shnet_jax.types import Embedding, Score

BUILDERS: dict[str, type[Index]] = {"faiss": FaissIndex, "milvus": MilvusIndex}
KINDS = ("exact", "faiss", "milvus")
SAMPLE, DEPTH = 256, 10  # queries whose first DEPTH results are compared with the exact ones


def check_index(kind: str, score: Score, candidates: int = 0) -> None:
    """Raises ValueError for an unknown kind, or an approximate one for a score that is no dot product.

    candidates: that the score re-ranks, which any index may find; 0: what is found is the result.
    """
    if kind not in KINDS:
        raise ValueError(f"config.search.index is {kind!r}; choose from {', '.join(KINDS)}")
    if kind != "exact" and not candidates and not is_dot_product(score):
        name = getattr(score, "__qualname__", repr(score))
        raise ValueError(
            f"config.search.index is {kind!r}, an index of dot products; this model scores pairs in a way of its own "
            f"({name}): set it to 'exact', or let it find candidates that the score re-ranks, "
            "--config.eval.two_stage=128 --config.eval.exact=False"
        )


def open_index(search: ConfigDict, embeddings: Embeddings, side: str, tile: int, mesh: Mesh) -> tuple[Index, dict]:
    """The index config.search.index of a side ("images", "texts"), built if it is not there or of other embeddings.

    Returns:
      The index, and what is known of it: kind, settings, vectors, effort, recall (share of the exact first `depth`
      found with that effort), queries (that it was measured with).

    Raises:
      FolderInUse: another process writes to the folder of the embeddings.
    """
    build: type[Index] = BUILDERS[search.index]
    note = embeddings.folder / f"index_{search.index}_{side}.json"
    wanted = {
        "kind": search.index,
        "settings": build.settings(search),
        "vectors": len(getattr(embeddings, side).vector),
        "source": digest(embeddings),
    }
    known = read_object(note) if note.is_file() else {}
    index = build.open(search, embeddings, side) if {key: known.get(key) for key in wanted} == wanted else None
    if index is not None and known.get("effort") == search.effort:
        return index, known
    with sole_writer(embeddings.folder), disk_faults(embeddings.folder, RuntimeError):  # of FAISS
        if index is None:
            note.unlink(missing_ok=True)  # a build that is interrupted leaves an index that nothing is known of
            index = build.make(search, embeddings, side)
        known = wanted | {"effort": search.effort} | measured(index, embeddings, side, tile, mesh)
        write_json(note, known)
    return index, known


def measured(index: Index, embeddings: Embeddings, side: str, tile: int, mesh: Mesh) -> dict[str, float]:
    """Recall of an index against the exact search: {"recall", "depth", "queries"}."""
    other = embeddings.texts if side == "images" else embeddings.images
    sample = np.linspace(0, len(other.vector) - 1, min(SAMPLE, len(other.vector))).astype(np.int64)
    queries = np.asarray(other.vector[sample])
    gallery = Embedding(getattr(embeddings, side).vector)
    exact = top_k(Embedding(queries), gallery, DEPTH, RetrievalModel.score, tile, mesh)  # type: ignore[arg-type]
    found = index.search(queries, exact.index.shape[1])
    return {"recall": overlap(found.index, exact.index), "depth": DEPTH, "queries": len(sample)}


def overlap(found: np.ndarray, exact: np.ndarray) -> float:
    """Recall of an approximate search: the share of the exact results [q, k] that are among those found [q, k]."""
    return float(np.mean([np.isin(e, f).mean() for f, e in zip(found, exact, strict=True)]))


def rescored(found: Found, queries: np.ndarray, vectors: np.ndarray) -> Found:
    """What an index found, with the scores of the stored vectors instead of those of its compressed ones.

    In the order of the exact search; places that nothing was found for come last, with index -1 and score -inf.
    """
    score = np.full(found.index.shape, -np.inf, np.float32)
    for row, index in enumerate(found.index):
        score[row, index >= 0] = np.asarray(vectors[index[index >= 0]]) @ queries[row]
    order = np.lexsort((found.index, -score), axis=1)
    return Found(np.take_along_axis(found.index, order, 1), np.take_along_axis(score, order, 1))
