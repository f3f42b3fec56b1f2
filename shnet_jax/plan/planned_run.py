"""The run that is planned, and the shapes of everything that its programs take."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from shnet_jax import registry
from shnet_jax.data.batches import gather, stored_fields, token_buckets
from shnet_jax.data.pictures import VIEW
from shnet_jax.data.records import DataSet, Feature
from shnet_jax.data.schema import FIELDS
from shnet_jax.data.tokenise import load_tokenizer
from shnet_jax.data.vector_batches import with_masks
from shnet_jax.evaluation.encode import image_tower, text_tower
from shnet_jax.experiment import assemble, fit_weights, optional_fields, settle_dtypes
from shnet_jax.models.contract import RetrievalModel, check_activations
from shnet_jax.models.text import text_fields
from shnet_jax.types import Embedding

BERT_VOCABULARY = 30522  # bert-base-uncased; taken if nothing else gives the size
MADE_SIZES = {"h": 7, "w": 7, "H": 64, "W": 64, "R": 15}
"""Sizes of the axes of fields that the importers make: seg_semantic, seg_map, relations."""


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A complete configuration, its model, and its data set, real or described by config.plan."""

    config: ConfigDict
    model: RetrievalModel
    dataset: DataSet
    fields: tuple[str, ...]
    captions: int  # of the training split


def describe(config: ConfigDict) -> PlannedRun:
    """Makes the run of a configuration. Sizes come from config.data.dir if it is set, else from config.plan.

    Raises ValueError or FileNotFoundError for a missing data set, or one without a field that the model reads.
    """
    if config.data.dir:
        experiment = assemble(config)
        captions = int(experiment.dataset.caption_counts(config.data.train_split).sum())
        complete = ConfigDict(experiment.config.to_dict())
        return PlannedRun(complete, experiment.model, experiment.dataset, experiment.fields, captions)
    config = ConfigDict(config.to_dict())
    settle_dtypes(config)
    fit_weights(config)
    if config.tokenizer.path and not config.text.vocab_size:
        config.text.vocab_size = load_tokenizer(config).vocab_size
    config.text.vocab_size = config.text.vocab_size or BERT_VOCABULARY
    if config.loss.weights.get("identity", 0.0):
        identity = config.loss.identity
        identity.dim, identity.classes = identity.dim or config.model.dim, identity.classes or config.plan.persons
    module = registry.model(config.model.name)
    captions = config.plan.images * config.plan.captions
    dataset = _described(config)
    fields = (*module.image_fields(config), *optional_fields(module, config, dataset)[0])
    model = module.build(config)
    check_activations(model, config)
    return PlannedRun(config, model, dataset, fields, captions)


def _described(config: ConfigDict) -> DataSet:
    """A data set of the sizes in config.plan, with every image field as the importers store it."""
    p, classes = config.plan, config.model.num_classes
    sizes = {"K": p.regions, "D": p.region_dim, "G": p.grid, "Dg": p.grid_dim, "C": classes, "E": p.image_embedding}
    sizes |= MADE_SIZES | dict(zip("YX", p.picture, strict=True))
    shapes = {name: field.sized(sizes) for name, field in FIELDS.items()}
    del shapes["relation_scores"]  # of models that read relations without them
    if not config.loss.weights.get("identity", 0.0):
        del shapes["identity"]
    features = {name: Feature(shape, FIELDS[name].dtype) for name, shape in shapes.items() if shape is not None}
    tokens = token_buckets(config.data)[-1]
    features["caption_embeddings"] = Feature((None, p.caption_embedding), np.dtype(np.float32))
    features["caption_tokens"] = Feature((None, tokens, p.caption_embedding), np.dtype(np.float32))
    return DataSet(Path("config.plan"), {config.data.train_split: p.images}, features, classes, {})


def train_batch_shapes(run: PlannedRun, pairs: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of `data.batches.train_batches`, padded to the longest captions."""
    data = run.config.data
    images = pairs // data.captions_per_image
    fields = image_batch_shapes(run, images)
    keeps = {
        keep: jax.ShapeDtypeStruct((images, run.dataset.features[unit].shape[0]), bool)
        for unit, keep in (("regions", "region_keep"), ("grid", "grid_keep"))
        if unit in fields
    }
    if "image" in fields:
        keeps["image_view"] = jax.ShapeDtypeStruct((images, VIEW), np.int32)
    if "identity" in run.dataset.features and data.identity:
        keeps["identity"] = jax.ShapeDtypeStruct((images,), np.int32)
    kept = {"image_index": fields["image_index"]} if data.resident else fields
    if data.resident and text_fields(run.config):
        return {**kept, **keeps, "caption_index": jax.ShapeDtypeStruct((pairs,), np.int32)}
    return {**kept, **keeps, **text_batch_shapes(run, pairs)}


def random_batch(run: PlannedRun, pairs: int, seed: int) -> dict[str, np.ndarray]:
    """A random batch in the shapes of `train_batch_shapes`, nothing masked."""
    rng = np.random.default_rng(seed)
    limits = {"tokens": run.config.text.vocab_size, "seg_map": run.config.model.num_classes, "image": 256}

    def values(name: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
        if name in ("image_index", "caption_index"):
            return np.arange(like.shape[0], dtype=like.dtype)
        if name == "categories":
            return rng.random(like.shape) < 0.1
        if like.dtype == bool:
            return np.ones(like.shape, bool)
        if name == "identity":  # persons of two images each
            return (np.arange(like.shape[0]) // 2).astype(like.dtype)
        if np.issubdtype(like.dtype, np.integer):
            return rng.integers(1, limits.get(name, 2), like.shape).astype(like.dtype)
        return rng.random(like.shape, np.float32).astype(like.dtype)

    return {name: values(name, like) for name, like in train_batch_shapes(run, pairs).items()}


def image_batch_shapes(run: PlannedRun, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the image fields of a training or evaluation batch."""
    features = {field: run.dataset.features[field] for field in stored_fields(run.dataset, run.fields)}
    index = {"image_index": jax.ShapeDtypeStruct((rows,), np.int32)}
    return index | {field: jax.ShapeDtypeStruct((rows, *f.shape), f.dtype) for field, f in features.items()}


def resident_table_shapes(run: PlannedRun) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of `data.batches.resident_table` of the training split."""
    images = image_batch_shapes(run, run.dataset.splits[run.config.data.train_split])
    texts = text_batch_shapes(run, run.captions) if text_fields(run.config) else {}
    return {field: shape for field, shape in images.items() if field != "image_index"} | texts


def text_batch_shapes(run: PlannedRun, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the caption fields of a batch, padded to the largest token bucket; of stored vectors as they are."""
    if of_texts := text_fields(run.config):
        features = {name: run.dataset.features[name] for name in with_masks(run.dataset, of_texts)}
        return {name: jax.ShapeDtypeStruct((rows, *f.shape[1:]), f.dtype) for name, f in features.items()}
    shape = rows, token_buckets(run.config.data)[-1]
    return {"tokens": jax.ShapeDtypeStruct(shape, np.int32), "token_mask": jax.ShapeDtypeStruct(shape, bool)}


def variable_shapes(run: PlannedRun) -> dict[str, Any]:
    """Shapes of the model's {"params", "batch_stats"}."""
    batch = image_batch_shapes(run, 1) | text_batch_shapes(run, 1)
    init = lambda batch: run.model.init(jax.random.key(0), gather({}, batch), train=False)  # noqa: E731
    shapes = dict(jax.eval_shape(init, batch))
    return {name: shapes.get(name, {}) for name in ("params", "batch_stats")}


def gallery_size(run: PlannedRun) -> tuple[int, int]:
    """Number of images and captions that are ranked: of config.eval.split, or of config.plan without a data set."""
    config, dataset = run.config, run.dataset
    if not config.data.dir:
        return config.plan.gallery, config.plan.gallery * config.plan.captions
    counts = dataset.caption_counts(config.eval.split)
    return len(counts), int(counts.sum())


def embedding_shapes(run: PlannedRun) -> tuple[Embedding, Embedding]:
    """Shapes of the embeddings of one image and one caption, padded to the largest token bucket."""
    given = variable_shapes(run)
    image = jax.eval_shape(partial(image_tower, run.model), given, image_batch_shapes(run, 1))
    return image, jax.eval_shape(partial(text_tower, run.model), given, text_batch_shapes(run, 1))
