"""Embeddings of a whole gallery, each item encoded once, gathered on the host in the order of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from shnet_jax.types import Array, Embedding

Portion = tuple[Any, int, np.ndarray]
"""A batch of static shape, how many of its first rows are real, and the gallery rows of at least these."""


def encode(
    fn: Callable[[Any], Embedding],
    batches: Iterable[Portion],
    count: int,
    progress: Callable[[int], None] | None = None,
) -> Embedding:
    """Encodes a gallery of `count` items.

    Args:
      fn: a batch -> Embedding of its b rows, on the device; usually one tower mapped over all devices.
      batches: portions in any order (`data.gallery` gives them); what is made of the padding is dropped.
      count: items of the gallery.
      progress: called after each batch with the number of items done so far.

    Returns:
      An Embedding of NumPy arrays, float32 and bool, with `count` rows. Where batches differ in their number
      of elements (captions padded to several lengths), the shorter ones get zeros that the mask excludes.

    Raises:
      ValueError: an item in no batch or in two, a row outside the gallery, a batch with too few rows.
    """
    gallery = _Gallery(count)
    done, ahead = 0, None
    for batch, valid, rows in batches:
        dispatched = fn(batch), _real(rows, valid, count)
        if ahead is not None:  # copied to the host while the device computes the batch just dispatched
            gallery.put(*ahead)
        ahead, done = dispatched, done + valid
        if progress is not None:
            progress(done)
    if ahead is not None:
        gallery.put(*ahead)
    return gallery.result()


class _Gallery:
    """The rows of all batches at their places, as they arrive."""

    def __init__(self, count: int):
        self.times = np.zeros(count, np.int64)  # that each row was put
        self.fields: dict[str, np.ndarray] = {}

    def put(self, portion: Embedding, rows: np.ndarray) -> None:
        fields = host_fields(portion, len(rows))
        if not self.fields:
            self.fields = {k: np.zeros((len(self.times), *a.shape[1:]), a.dtype) for k, a in fields.items()}
        if "elements" in fields:
            length = max(self.fields["elements"].shape[1], fields["elements"].shape[1])
            self.fields, fields = _lengthen(self.fields, length), _lengthen(fields, length)
        for name, values in fields.items():
            self.fields[name][rows] = values
        np.add.at(self.times, rows, 1)

    def result(self) -> Embedding:
        wrong = np.flatnonzero(self.times != 1)
        if wrong.size:
            raise ValueError(
                f"{wrong.size} of {len(self.times)} gallery rows were not encoded exactly once; "
                f"row {wrong[0]} came {self.times[wrong[0]]} times"
            )
        if not self.fields:
            raise ValueError("nothing to encode: the gallery is empty")
        return Embedding(**self.fields)  # type: ignore[arg-type]  # NumPy arrays: a gallery may outgrow the device


def _real(rows: np.ndarray, valid: int, count: int) -> np.ndarray:
    real = np.asarray(rows)[:valid]
    if len(real) < valid:
        raise ValueError(f"a batch with {valid} real rows names the gallery rows of only {len(real)}")
    outside = real[(real < 0) | (real >= count)]
    if outside.size:
        raise ValueError(f"gallery row {outside[0]} is outside 0 to {count - 1}")
    return real


def host_fields(portion: Embedding, valid: int) -> dict[str, np.ndarray]:
    """The first `valid` rows of an embedding's arrays by name, float32 and bool; elements always come with a mask."""
    if len(portion.vector) < valid:
        raise ValueError(f"a batch with {valid} real rows was encoded into only {len(portion.vector)}")
    fields: dict[str, Array] = {"vector": portion.vector}
    if portion.elements is not None:
        mask = portion.mask
        fields["elements"] = portion.elements
        fields["mask"] = jnp.ones(portion.elements.shape[:2], bool) if mask is None else mask
    return {k: np.asarray(a, bool if k == "mask" else np.float32)[:valid] for k, a in fields.items()}


def _lengthen(fields: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Zeros (False in the mask) behind the elements of each item, up to `length` of them."""
    missing = length - fields["elements"].shape[1]
    if not missing:
        return fields
    elements = np.pad(fields["elements"], ((0, 0), (0, missing), (0, 0)))
    return fields | {"elements": elements, "mask": np.pad(fields["mask"], ((0, 0), (0, missing)))}
