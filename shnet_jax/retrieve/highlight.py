"""Collects the gates, attention and pooling weights that a model sows while it encodes.

A model shows these by sowing into the collection "intermediates" (flax `Module.sow`) under the names below; one that
sows none of them has nothing to show. Encoding is not changed by looking.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, cast

import jax
import numpy as np

from shnet_jax.data.batches import gather, stack_images, stored_fields
from shnet_jax.experiment import Experiment
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Batch, Embedding

GATE, ATTENTION, WEIGHTS = ("semantic", "gate"), ("spatial", "attention"), ("pool", "weights")
UNITS = ("regions", "grid")  # in the order in which a model joins them


@dataclasses.dataclass(frozen=True)
class Highlight:
    """The gates, attention and pooling weights of one image; None for what the model does not show.

    units: number of units of each kind, in the order of the rows below. valid: [N] bool.
    gate: [N] float32, how much of each unit passes, 0..1. attention: [N, P] float32, over the label map row by row.
    weights: [m] float32, of the ranks of the pooled set, as many as it has members.
    """

    units: dict[str, int]
    valid: np.ndarray
    gate: np.ndarray | None
    attention: np.ndarray | None
    weights: np.ndarray | None


def highlights(experiment: Experiment, variables: dict[str, Any], split: str, rows: list[int]) -> list[Highlight]:
    """Encodes the images `rows` of a split once more, looking inside."""
    if not rows:
        return []
    dataset = experiment.dataset
    records = dataset.open_split(split, stored_fields(dataset, experiment.fields))
    batch: dict[str, Any] = {"image_index": np.asarray(rows, np.int32), **stack_images(records, rows)}
    _, sown, full = jax.tree.map(np.asarray, look(experiment.model, variables, batch))
    units = {name: full[name].shape[1] for name in UNITS if name in full}
    masks = [full[f"{'region' if name == 'regions' else name}_mask"] for name in units]
    valid = np.concatenate(masks, axis=1) if masks else np.zeros((len(rows), 0), bool)
    looks = []
    for i in range(len(rows)):
        gate, attention, weights = (sown[name][i] if name in sown else None for name in (GATE, ATTENTION, WEIGHTS))
        if weights is not None:
            weights = weights[: int(np.flatnonzero(weights).max(initial=0)) + 1]
        looks.append(Highlight(units, valid[i], gate, attention, weights))
    return looks


@partial(jax.jit, static_argnums=0)
def look(
    model: RetrievalModel, variables: dict[str, Any], batch: Batch
) -> tuple[Embedding, dict[tuple[str, ...], Any], Batch]:
    """Encodes the images of a batch of `data.gallery`.

    Returns:
      Their embeddings, {(module, name): array [n, ...]} of what the image tower sowed under the names of this file, and
      the units and masks that it saw.
    """
    full = gather({}, batch)
    embedding, state = model.apply(variables, full, train=False, method="encode_image", mutable=["intermediates"])
    sown = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(cast(dict, state).get("intermediates", {})):
        names = tuple(str(part.key) for part in path if hasattr(part, "key"))
        if names[-2:] in (GATE, ATTENTION, WEIGHTS):
            sown[names[-2:]] = leaf
    units = {name: values for name, values in full.items() if name in UNITS or name.endswith("_mask")}
    return cast(Embedding, embedding), sown, units
