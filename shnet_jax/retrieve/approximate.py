"""Approximate search: opens or builds a vector index and measures its recall against the exact search.

An index stands in for the default score, the dot product of unit vectors. For any other score it finds the candidates
that the score re-ranks. The measured recall is kept beside the index.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.evaluation.tiles import check_no_nan
from shnet_jax.evaluation.top_k import TopK, is_dot_product, top_k
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.observe.files import disk_faults, sole_writer, write_json
from shnet_jax.retrieve.code_index import BINARY_QUERIES, BinaryIndex, Int8Index
from shnet_jax.retrieve.embeddings import Embeddings
from shnet_jax.retrieve.vector_index import FaissIndex, MilvusIndex, VectorIndex, source_hash
from shnet_jax.types import Embedding, Score
from shnet_jax.untrusted import read_object

BUILDERS: dict[str, type[VectorIndex]] = {
    "int8": Int8Index,
    "binary": BinaryIndex,
    "faiss": FaissIndex,
    "milvus": MilvusIndex,
}
KINDS = ("exact", *BUILDERS)
EFFORT = ("nprobe", "ef_search", "rescore", "binary")  # fields of config.search that a search reads, not an index
SAMPLE, DEPTH = 256, 10  # queries whose first DEPTH results are compared with the exact ones


def check_index(kind: str, score: Score, candidates: int = 0) -> None:
    """Raises ValueError for an unknown kind, or an approximate one for a score that is no dot product.

    candidates: items that the score re-ranks, which any index may find; 0: the results of the index are final.
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


def check_options(search: ConfigDict) -> None:
    """Raises ValueError for a field of config.search that is none of its choices, of those that every search reads."""
    if search.rescore < 1:
        raise ValueError(f"config.search.rescore is {search.rescore}; it must be at least 1")
    if search.binary not in BINARY_QUERIES:
        raise ValueError(f"config.search.binary is {search.binary!r}; choose from {', '.join(BINARY_QUERIES)}")


@dataclasses.dataclass(frozen=True)
class OpenIndex:
    """A vector index and its report.

    report: kind, settings, vectors, nprobe, ef_search, rescore, binary, bytes_per_vector (of the index, None: not
      known), vector_bytes (of a stored vector), recall (share of the exact first `depth` that a search finds), queries
      (number of those that measured it), queries_of (their side: "texts", or "images" of a gallery without captions).
    """

    index: VectorIndex
    report: dict[str, Any]


def open_index(search: ConfigDict, embeddings: Embeddings, side: str, tile: int, mesh: Mesh) -> OpenIndex:
    """The index config.search.index of a side ("images", "texts"), built unless a stored one fits.

    Raises FolderInUse where another process writes to the folder of the embeddings.
    """
    builder = BUILDERS[search.index]
    path = embeddings.folder / f"index_{search.index}_{side}.json"
    identity = {
        "kind": search.index,
        "settings": builder.settings(search),
        "vectors": len(getattr(embeddings, side).vector),
        "source": source_hash(embeddings),
    }
    effort = {name: search[name] for name in EFFORT}
    report = read_object(path) if path.is_file() else {}
    index = builder.open(search, embeddings, side) if identity.items() <= report.items() else None
    if index is not None and effort.items() <= report.items():
        return OpenIndex(index, report)
    with sole_writer(embeddings.folder), disk_faults(embeddings.folder, RuntimeError):  # of FAISS
        if index is None:
            path.unlink(missing_ok=True)  # an interrupted build leaves an index without a report, which is built again
            index = builder.make(search, embeddings, side)
        vectors = getattr(embeddings, side).vector
        size = {"bytes_per_vector": index.bytes_per_vector, "vector_bytes": vectors[:1].nbytes}
        report = identity | effort | size | _measured(index, search.rescore, embeddings, side, tile, mesh)
        write_json(path, report)
    return OpenIndex(index, report)


def find(
    index: VectorIndex, queries: np.ndarray, k: int, vectors: np.ndarray, rescore: int, tile: int, mesh: Mesh
) -> TopK:
    """The k best of the `rescore` * k items that an index finds for each query, by the stored vectors; see `rescored`.

    queries: [q, d] float32. vectors: [n, d], those of the index. tile, mesh: as for `top_k`.
    """
    nearest = index.search(queries, min(rescore * k, len(vectors)), tile, mesh)
    best = rescored(nearest, queries, vectors)
    return TopK(best.index[:, :k], best.score[:, :k])


def _measured(
    index: VectorIndex, rescore: int, embeddings: Embeddings, side: str, tile: int, mesh: Mesh
) -> dict[str, Any]:
    """Recall of an index against the exact search: {"recall", "depth", "queries", "queries_of"}."""
    # A gallery without captions is asked by its images.
    asking = "texts" if side == "images" and embeddings.ids.captions else "images"
    other = getattr(embeddings, asking)
    sample = np.linspace(0, len(other.vector) - 1, min(SAMPLE, len(other.vector))).astype(np.int64)
    queries = np.asarray(other.vector[sample])
    gallery = Embedding(getattr(embeddings, side).vector)
    exact = top_k(Embedding(queries), gallery, DEPTH, RetrievalModel.score, tile, mesh)  # type: ignore[arg-type]
    approximate = find(index, queries, exact.index.shape[1], gallery.vector, rescore, tile, mesh)  # type: ignore[arg-type]
    recall = overlap(approximate.index, exact.index)
    return {"recall": recall, "depth": DEPTH, "queries": len(sample), "queries_of": asking}


def overlap(approximate: np.ndarray, exact: np.ndarray) -> float:
    """Recall of an approximate search: the share of the exact results [q, k] among its own [q, k]."""
    return float(np.mean([np.isin(e, a).mean() for a, e in zip(approximate, exact, strict=True)]))


def rescored(results: TopK, queries: np.ndarray, vectors: np.ndarray) -> TopK:
    """The results of an index with the scores of the stored vectors instead of those of its compressed ones.

    In the order of the exact search; places without a result come last, with index -1 and score -inf. Raises ValueError
    for scores that are NaN, as the exact search does.
    """
    score = np.full(results.index.shape, -np.inf, np.float32)
    for row, index in enumerate(results.index):
        candidates = np.asarray(vectors[index[index >= 0]])
        # Not a BLAS product: its last bits depend on the place of a row, and equal vectors must tie.
        score[row, index >= 0] = np.einsum("nd,d->n", candidates, queries[row])
    check_no_nan(int(np.isnan(score).sum()), *results.index.shape)
    order = np.lexsort((results.index, -score), axis=1)
    return TopK(np.take_along_axis(results.index, order, 1), np.take_along_axis(score, order, 1))
