"""The towers of a model over a split: settings that fit, variables on the devices, every item encoded once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.data.batches import gather
from shnet_jax.data.gallery import Gallery, Part
from shnet_jax.evaluate.encode import encode
from shnet_jax.evaluate.pipelined import (
    check_pipeline,
    make_pipelined_text_encoder,
    place_variables,
    schedule_text,
    stage_mesh,
)
from shnet_jax.evaluate.screen import check_score_dtype
from shnet_jax.evaluate.stages import Stages
from shnet_jax.evaluate.two_stage import candidates
from shnet_jax.experiment import Experiment
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.hosts import own_rows
from shnet_jax.parallel.mapping import data_mesh, map_encode, put_batch, replicate
from shnet_jax.types import Batch, Embedding

log = logging.getLogger(__name__)

READ_AHEAD = 2  # batches on the devices that wait for their tower when stages overlap: one to go on with, one arriving


def check(model: RetrievalModel, config: ConfigDict | FrozenConfigDict, mesh: Mesh) -> None:
    """What can be said before anything is read; raises ValueError for settings that do not fit model or devices."""
    evaluation = config.eval
    check_score_dtype(model.score, evaluation.score_dtype)
    if evaluation.batch_size < 1:
        raise ValueError(f"config.eval.batch_size is {evaluation.batch_size}; it must be at least 1")
    candidates(evaluation)
    if evaluation.overlap and jax.process_count() > 1:
        raise ValueError("config.eval.overlap needs both towers' devices in one process; switch it off for several")
    if jax.process_count() > 1 and config.parallel.mapping == "pmap":
        raise ValueError("several processes evaluate under config.parallel.mapping=shard_map only")
    if evaluation.stages != 1:
        text_mesh = halves(mesh)[1] if evaluation.overlap else mesh
        check_pipeline(model, stage_mesh(text_mesh, evaluation.stages), evaluation.microbatches, evaluation.batch_size)


def make_encoder(
    experiment: Experiment, gallery: Gallery, mesh: Mesh
) -> Callable[[dict[str, Any]], tuple[Embedding, Embedding]]:
    """The result encodes the images and captions of a gallery with variables {"params", "batch_stats"}.

    config.eval.overlap changes when and where a batch is encoded, and no bit of its embedding: each device gets the
    same rows, padded to the same length. Raises ValueError for config.eval.stages that do not fit devices or model.
    """
    evaluation = experiment.config.eval
    check(experiment.model, experiment.config, mesh)
    place = make_towers(experiment, *(halves(mesh) if evaluation.overlap else (mesh, mesh)))
    rows = evaluation.batch_size * mesh.size

    def encode_both(variables: dict[str, Any]) -> tuple[Embedding, Embedding]:
        image, text = place(variables)
        image_parts, text_parts = gallery.image_batches(rows), gallery.text_batches(rows)
        n, t = gallery.images, len(gallery.captions)
        if not evaluation.overlap:
            return encode_parts(image, image_parts, n), encode_parts(text, text_parts, t)
        with Stages() as stages:
            encoding = [
                stages.start(
                    partial(_ahead, stages, tower, pieces(parts, evaluation.batch_size * tower.mesh.size), count)
                )
                for tower, parts, count in ((image, image_parts, n), (text, text_parts, t))
            ]
            images, texts = (each.result() for each in encoding)
        return images, texts

    return encode_both


def pieces(parts: Iterable[Part], rows: int) -> Iterator[Part]:
    """The parts cut into batches of `rows` rows; those that would be padding alone are left out.

    On a part of the devices, the pieces of a batch are what all devices would have got, some of them later.
    """
    for part in parts:
        size = len(next(iter(part.batch.values())))
        for start in range(0, part.valid, rows):
            index = np.minimum(np.arange(start, start + rows), size - 1)
            batch = {field: values[index] for field, values in part.batch.items()}
            yield Part(batch, min(rows, part.valid - start), part.numbers[start : start + rows])


@dataclasses.dataclass(frozen=True)
class Tower:
    """A tower with its variables. apply: a batch that `put` placed on the devices of `mesh` -> its embeddings."""

    mesh: Mesh
    put: Callable[[Any], Batch]
    apply: Callable[[Batch], Embedding]


def image_tower(model: RetrievalModel, variables: Any, batch: Batch) -> Embedding:
    """The images of one device's batch of `data.gallery`, encoded."""
    return cast(Embedding, model.apply(variables, gather({}, batch), train=False, method="encode_image"))


def text_tower(model: RetrievalModel, variables: Any, batch: Batch) -> Embedding:
    """The captions of one device's batch of `data.gallery`, encoded."""
    return cast(Embedding, model.apply(variables, batch, train=False, method="encode_text"))


def make_towers(
    experiment: Experiment, image_mesh: Mesh, text_mesh: Mesh
) -> Callable[[dict[str, Any]], tuple[Tower, Tower]]:
    """The result places variables {"params", "batch_stats"} and gives the towers of images and of captions."""
    config, model = experiment.config, experiment.model
    mapping, stages = config.parallel.mapping, config.eval.stages
    together = image_mesh is text_mesh

    encode_image = map_encode(partial(image_tower, model), image_mesh, mapping)
    if stages == 1:
        encode_text = map_encode(partial(text_tower, model), text_mesh, mapping)
    else:
        staged = stage_mesh(text_mesh, stages)
        encode_text = make_pipelined_text_encoder(model, staged, config.eval.microbatches)
        log.info("%s", schedule_text(stages, config.eval.microbatches))

    def place(variables: dict[str, Any]) -> tuple[Any, Any]:
        if stages == 1:
            for_text = replicate(variables, text_mesh)
            return (for_text if together else replicate(variables, image_mesh)), for_text
        placed = place_variables(model, variables, staged)
        # Without the layers of the text tower, which may be more than a device holds.
        return (placed.shared if together else replicate(placed.shared, image_mesh)), placed

    def towers(variables: dict[str, Any]) -> tuple[Tower, Tower]:
        for_image, for_text = place(variables)
        return (
            Tower(
                image_mesh,
                lambda batch: put_batch(own_rows(batch), image_mesh, mapping),
                partial(encode_image, for_image),
            ),
            Tower(
                text_mesh,
                lambda batch: put_batch(own_rows(batch), text_mesh, mapping if stages == 1 else "shard_map"),
                partial(encode_text, for_text),
            ),
        )

    return towers


def halves(mesh: Mesh) -> tuple[Mesh, Mesh]:
    """Devices for the images and devices for the captions; both on the only one, if there is only one."""
    devices = list(mesh.devices.flat)
    if len(devices) == 1:
        return mesh, mesh
    middle = -(-len(devices) // 2)
    return data_mesh(devices[:middle]), data_mesh(devices[middle:])


def encode_parts(tower: Tower, parts: Iterable[Part], count: int) -> Embedding:
    """The `count` items of batches of `data.gallery`, encoded one after the other, on the host."""
    return encode(lambda batch: tower.apply(tower.put(batch)), parts, count)


def _ahead(stages: Stages, tower: Tower, parts: Iterable[Part], count: int) -> Embedding:
    placed = ((tower.put(part.batch), part.valid, part.numbers) for part in parts)
    return encode(tower.apply, stages.ahead(placed, READ_AHEAD), count)
