"""Zero-shot evaluation of the pretrained dual encoder whose vectors a data set carries."""

from __future__ import annotations

from typing import Any

import numpy as np

from shnet_jax.data.records import DataSet
from shnet_jax.data.schema import ONE_MODEL
from shnet_jax.evaluation.ensemble import Embedded
from shnet_jax.evaluation.protocols import Provenance
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Embedding

FIELDS = ("image_embedding", "caption_embeddings")
NAME = "zero-shot"


def zero_shot(dataset: DataSet, split: str) -> Embedded | None:
    """Gallery ranked by the cosine of `image_embedding` and `caption_embeddings`; None unless one model made both.

    They are of one model where they are equally wide and the metadata neither name another text encoder nor say
    `one_model` false, as imports of two unrelated folders do.

    Raises ValueError for a vector of length 0, which has no direction.
    """
    if not all(field in dataset.features for field in FIELDS) or "text_encoder" in dataset.metadata:
        return None
    if not dataset.metadata.get(ONE_MODEL, True):
        return None
    if len({dataset.features[field].shape[-1] for field in FIELDS}) > 1:
        return None
    images, captions = [], []
    for record in dataset.open_split(split, FIELDS):
        images.append(record["image_embedding"])
        captions.append(record["caption_embeddings"])
    sides = [
        _unit(dataset, split, *side) for side in ((FIELDS[0], np.stack(images)), (FIELDS[1], np.concatenate(captions)))
    ]
    return Embedded(
        name=NAME,
        images=sides[0],
        texts=sides[1],
        score=RetrievalModel.score,
        caption_image=np.repeat(np.arange(len(images)), [len(c) for c in captions]),
        image_ids=dataset.image_ids(split),
        captions=tuple(caption for of_image in dataset.captions(split) for caption in of_image),
        provenance=Provenance(
            dataset=dataset.path.parent.name,
            split=split,
            checkpoint_step=0,
            parameters="none learned here: cosine of image_embedding and caption_embeddings",
            dtype="as stored",
            selected_on="none",
        ),
    )


def _unit(dataset: DataSet, split: str, field: str, vectors: np.ndarray) -> Embedding:
    length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    if not length.all():
        raise ValueError(f"{dataset.path}: split {split!r}: {field}: row {int(np.argmin(length))} is all zero")
    unit: Any = (vectors / length).astype(np.float32)  # stays on the host
    return Embedding(unit)
