"""Prefixes of embeddings: the first numbers of each vector at unit length, on the host.

A run trained with `config.loss.matryoshka` was trained for some sizes of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from shnet_jax.experiment import Experiment, vector_size
from shnet_jax.models.contract import check_prefixes
from shnet_jax.types import Embedding

log = logging.getLogger(__name__)


def prefix(items: Embedding, size: int) -> Embedding:
    """The first `size` numbers of each vector, brought to unit length, [n, size] float32; vectors of that size stay.

    items: on the host, also `np.memmap`; of a score that is the dot product, so elements are left out.
    """
    if items.vector.shape[1] == size:
        return items
    vectors = np.asarray(items.vector[:, :size], np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return Embedding(vectors / np.where(lengths > 0, lengths, 1))  # type: ignore[arg-type]  # NumPy


def check_sizes(experiment: Experiment, sizes: Sequence[int], field: str) -> None:
    """Raises ValueError for sizes that config.`field` cannot have with this model; warns of those not trained for."""
    if not sizes:
        return
    check_prefixes(experiment.model, field)
    width = vector_size(experiment)
    if wrong := [size for size in sizes if not 1 <= size <= width]:
        raise ValueError(f"config.{field} is {wrong[0]}; the vectors of this model have {width} numbers: 1 to {width}")
    trained = tuple(experiment.config.loss.get("matryoshka", ()))
    if others := [str(size) for size in sizes if size not in (*trained, width)]:
        how = f"config.loss.matryoshka = {trained}" if trained else "no config.loss.matryoshka"
        log.warning("config.%s: %s: this run was trained with %s, not for these sizes", field, ", ".join(others), how)
