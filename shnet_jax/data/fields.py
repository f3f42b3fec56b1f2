"""Checks of image fields that a user passes to a model, as an import checks those of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shnet_jax.data.records import DataSet
from shnet_jax.data.schema import FIELDS, MAP_VOID, MASKS


def checked_fields(given: Mapping[str, np.ndarray], wanted: Sequence[str], dataset: DataSet) -> dict[str, np.ndarray]:
    """Checked fields `wanted`, n images each, as the model that was trained on `dataset` reads them.

    Masks may be missing where all units are real. 255 in a `seg_map` becomes the number of classes, void.
    Raises ValueError naming field, image, what was expected and what was found.
    """
    missing = [name for name in wanted if name not in given and not name.endswith("_mask")]
    counts = {name: np.shape(values)[0] if np.ndim(values) else "no axis" for name, values in given.items()}
    if missing or len(set(counts.values())) != 1 or not all(counts.values()):
        raise ValueError(
            f"the model reads {', '.join(wanted)} of each image; "
            f"found {', '.join(f'{name} of {count}' for name, count in counts.items()) or 'nothing'}"
        )
    arrays = {name: _checked(name, np.asarray(given[name]), dataset) for name in wanted if name in given}
    for unit, mask in MASKS.items():
        if unit in arrays and mask in arrays:
            if arrays[mask].shape[1] != arrays[unit].shape[1]:
                raise ValueError(
                    f"{mask}: expected {arrays[unit].shape[1]} values an image, one for each of {unit}, "
                    f"found {arrays[mask].shape[1]}"
                )
            _refuse(mask, ~arrays[mask].any(axis=1), "at least one that is real", "none")
    return arrays


def _checked(name: str, values: np.ndarray, dataset: DataSet) -> np.ndarray:
    like = dataset.features[name]
    shape, free = like.shape, name in FIELDS and FIELDS[name].counts_units
    fits = values.ndim == 1 + len(shape) and all(
        size is None or size == actual or (free and axis == 0)
        for axis, (size, actual) in enumerate(zip(shape, values.shape[1:], strict=False))
    )
    if not fits:
        wanted = ", ".join(
            "any" if size is None or (free and axis == 0) else str(size) for axis, size in enumerate(shape)
        )
        raise ValueError(f"{name}: expected [images, {wanted}] as in {dataset.path}, found {list(values.shape)}")
    kinds = {"b": "b", "i": "iu", "u": "iu"}.get(like.dtype.kind, "f")
    if values.dtype.kind not in kinds and values.dtype != like.dtype:
        raise ValueError(f"{name}: expected {like.dtype} as in {dataset.path}, found {values.dtype}")
    if kinds == "f":
        finite = np.isfinite(np.asarray(values, np.float32)).reshape(len(values), -1).all(axis=1)
        _refuse(name, ~finite, "finite numbers", "NaN or infinity")
    if name == "seg_map" and dataset.num_classes is not None:
        values = np.where(values == MAP_VOID, dataset.num_classes, values)
        outside = ((values < 0) | (values > dataset.num_classes)).reshape(len(values), -1).any(axis=1)
        _refuse(name, outside, f"classes up to {dataset.num_classes} (void) or {MAP_VOID}", "another number")
        values = values.astype(like.dtype)
    return values


def _refuse(name: str, wrong: Any, expected: str, actual: str) -> None:
    """Raises ValueError naming the first image where `wrong`, [n] bool, is True."""
    if wrong.any():
        raise ValueError(f"{name} of image {int(np.argmax(wrong))}: expected {expected}, found {actual}")
