"""Indexes of compressed vectors, searched by JAX on the devices: int8 and binary codes in a file beside the embeddings.

The file is memory-mapped and read tile by tile, as the exact search reads the vectors, and k results come in the same
order: higher scores first, of equal ones the smaller row. The codes only find candidates; `approximate.find` scores
these with the stored float32 vectors.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from shnet_jax.evaluation.top_k import TopK, top_k
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.observe.files import atomic_path
from shnet_jax.retrieve import tensors
from shnet_jax.retrieve.embeddings import Embeddings
from shnet_jax.retrieve.vector_index import ROWS, blocks
from shnet_jax.types import Array, Embedding

LEVELS = 127  # int8 codes lie in -127 .. 127: the range is symmetric, -128 is unused
WORD = 32  # dimensions in a uint32 of a binary code
BINARY_QUERIES = ("asymmetric", "hamming")

Codes = dict[str, Any]
"""Arrays of codes by their name in the file, a row a vector."""


class _CodeIndex(abc.ABC):
    """The common part of both kinds: the file, and the search through a score of codes and queries."""

    kind: ClassVar[str]
    bytes_per_vector: float | None

    def __init__(self, codes: Codes, dim: int, search: ConfigDict):
        self._codes, self._dim, self._queries = codes, dim, search.binary
        self.bytes_per_vector = sum(array[:1].nbytes for array in codes.values())

    @staticmethod
    @abc.abstractmethod
    def _layout(rows: int, dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each array of the file."""

    @staticmethod
    @abc.abstractmethod
    def _encode(vectors: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of each array for vectors [n, dim]."""

    @classmethod
    def settings(cls, search: ConfigDict) -> str:
        """No field of config.search changes a file of codes."""
        return ""

    @classmethod
    def open(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> Self | None:
        """The codes in their file; None when there is none. Raises ValueError for a file of other shapes."""
        path, (rows, dim) = cls._file(embeddings, side), getattr(embeddings, side).vector.shape
        if not path.is_file():
            return None
        codes = tensors.open_mapped(path)
        layout = {name: (array.shape, array.dtype) for name, array in codes.items()}
        if layout != cls._layout(rows, dim):
            raise ValueError(
                f"{path}: expected {cls._layout(rows, dim)}, found {layout}; delete it, and it is made again"
            )
        return cls(codes, dim, search)

    @classmethod
    def make(cls, search: ConfigDict, embeddings: Embeddings, side: str) -> Self:
        """Encodes the vectors block by block and writes the file. Raises ValueError for one that is not finite."""
        path, vectors = cls._file(embeddings, side), getattr(embeddings, side).vector
        rows, dim = vectors.shape
        with atomic_path(path) as temporary:
            arrays = tensors.create(temporary, cls._layout(rows, dim))
            for start, block in blocks(vectors, f"{cls.kind} {side}: block"):
                finite = np.isfinite(block).all(axis=1)
                if not finite.all():
                    row = start + int(np.argmin(finite))
                    raise ValueError(
                        f"{embeddings.folder / side}.safetensors: vector of row {row} is not finite, so it has no code"
                    )
                for name, values in cls._encode(block).items():
                    arrays[name][start : start + ROWS] = values
            for array in arrays.values():
                if isinstance(array, np.memmap):
                    array.flush()
        return cls(tensors.open_mapped(path), dim, search)

    @classmethod
    def _file(cls, embeddings: Embeddings, side: str) -> Path:
        return embeddings.folder / f"{side}.{cls.kind}.safetensors"


class Int8Index(_CodeIndex):
    """Vectors as int8 with a float32 scale each: code = round(vector / scale), scale = max |vector| / 127.

    A scale for each vector bounds the error of a score by |query|_1 * scale / 2, whatever else is in the gallery, and
    one pass over the vectors makes the codes. The query stays float32. d + 4 bytes a vector.
    """

    kind = "int8"

    @staticmethod
    def _layout(rows: int, dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"codes": ((rows, dim), np.dtype(np.int8)), "scale": ((rows,), np.dtype(np.float32))}

    @staticmethod
    def _encode(vectors: np.ndarray) -> dict[str, np.ndarray]:
        codes, scale = to_int8(vectors)
        return {"codes": codes, "scale": scale}

    def search(self, queries: np.ndarray, k: int, tile: int = 512, mesh: Mesh | None = None) -> TopK:
        """Searches the codes; see `VectorIndex`."""
        return top_k(_on_host(queries), self._codes, k, int8_score, tile, mesh)


class BinaryIndex(_CodeIndex):
    """Vectors as the signs of their numbers, a bit each.

    config.search.binary: "asymmetric", the float32 query times the signs, or "hamming", the signs of the query compared
    with them. 4 * ceil(d / 32) bytes a vector.
    """

    kind = "binary"

    @staticmethod
    def _layout(rows: int, dim: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"signs": ((rows, math.ceil(dim / WORD)), np.dtype(np.uint32))}

    @staticmethod
    def _encode(vectors: np.ndarray) -> dict[str, np.ndarray]:
        return {"signs": to_signs(vectors)}

    def search(self, queries: np.ndarray, k: int, tile: int = 512, mesh: Mesh | None = None) -> TopK:
        """Searches the codes; see `VectorIndex`."""
        if self._queries == "hamming":
            return top_k({"signs": to_signs(queries)}, self._codes, k, hamming_score, tile, mesh)
        padding = (
            self._codes["signs"].shape[1] * WORD - self._dim
        )  # numbers that fill the last word; they add 0 to every score
        padded = np.pad(queries / np.float32(math.sqrt(self._dim)), ((0, 0), (0, padding)))
        return top_k(_on_host(padded), self._codes, k, sign_score, tile, mesh)


def to_int8(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [n, d] int8 and scales [n] float32 of finite vectors [n, d]; a vector of zeros has scale 0."""
    scale = np.abs(vectors).max(axis=1).astype(np.float32) / np.float32(LEVELS)
    divisor = np.where(scale > 0, scale, np.float32(1))[:, None]
    return np.clip(np.rint(vectors / divisor), -LEVELS, LEVELS).astype(np.int8), scale


def to_signs(vectors: np.ndarray) -> np.ndarray:
    """Bits [n, ceil(d / 32)] uint32 of vectors [n, d]: bit i of word w is whether number 32 w + i is above 0."""
    padding = -vectors.shape[1] % WORD
    bits = np.pad(vectors > 0, ((0, 0), (0, padding)))
    return np.packbits(bits, axis=1, bitorder="little").view("<u4").astype(np.uint32)


def int8_score(gallery: Mapping[str, Array], queries: Embedding) -> Array:
    """Products [n, q] float32 of {"codes" [n, d] int8, "scale" [n]} and float32 queries [q, d]."""
    codes = gallery["codes"].astype(jnp.float32)
    return RetrievalModel.score(Embedding(codes), queries) * gallery["scale"][:, None]


def sign_score(gallery: Mapping[str, Array], queries: Embedding) -> Array:
    """Products [n, q] float32 of the signs {"signs" [n, w] uint32}, as -1 and 1, and float32 queries [q, 32 w]."""
    words = gallery["signs"]
    bits = (words[..., None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    signs = jnp.where(bits.reshape(len(words), -1) > 0, 1.0, -1.0)
    return RetrievalModel.score(Embedding(signs), queries)


def hamming_score(gallery: Mapping[str, Array], queries: Mapping[str, Array]) -> Array:
    """Minus the Hamming distances [n, q], as float32, of {"signs" [n, w] uint32} and {"signs" [q, w]}."""
    different = jnp.bitwise_xor(gallery["signs"][:, None], queries["signs"][None])
    counts = jnp.bitwise_count(different).astype(jnp.int32)
    return -jnp.sum(counts, axis=-1).astype(jnp.float32)


def _on_host(queries: np.ndarray) -> Embedding:
    return Embedding(np.ascontiguousarray(queries, np.float32))  # type: ignore[arg-type]  # `top_k` places them
