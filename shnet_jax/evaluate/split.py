"""Evaluation of a model on one split: encode every item once, rank, report."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.data.batches import gather
from shnet_jax.data.gallery import Gallery, Part, open_gallery
from shnet_jax.evaluate.blocks import digest, open_folder
from shnet_jax.evaluate.compare import Effort, Rankings, with_effort
from shnet_jax.evaluate.encode import Portion, encode
from shnet_jax.evaluate.pipelined import check_pipeline, make_pipelined_text_encoder, place_variables, stage_mesh
from shnet_jax.evaluate.protocols import Ranker, Results, Subject, evaluate
from shnet_jax.evaluate.rank import check_captions
from shnet_jax.evaluate.screen import check_score_dtype
from shnet_jax.evaluate.stages import Stages
from shnet_jax.evaluate.tiles import tile_shape
from shnet_jax.experiment import Experiment
from shnet_jax.models.contract import RetrievalModel, has_static_score
from shnet_jax.parallel.hosts import own_rows
from shnet_jax.parallel.mapping import data_mesh, map_encode, put_batch, replicate
from shnet_jax.types import Batch, Embedding

Evaluator = Callable[[dict[str, Any], Subject], Results]

READ_AHEAD = 2  # batches on the devices that wait for their tower when stages overlap: one to go on with, one arriving


def subject(experiment: Experiment, split: str, step: int, selected_on: str, devices: int) -> Subject:
    """What the protocol card says of a checkpoint of this experiment. selected_on: see `protocols.Subject`."""
    config = experiment.config
    return Subject(
        dataset=experiment.dataset.path.parent.name,
        split=split,
        checkpoint_step=step,
        parameters=f"running average (decay {config.optim.ema})" if config.optim.ema else "trained",
        dtype=f"image {config.model.dtype}, text {config.text.dtype}",
        selected_on=selected_on,
        devices=devices,
        notes=experiment.notes or "none",
    )


def make_evaluator(experiment: Experiment, split: str, mesh: Mesh) -> Evaluator:
    """Opens a split once; the result evaluates variables {"params", "batch_stats"} on it, as often as wanted."""
    gallery, encode_both, rankings = _open(experiment, split, mesh)

    def evaluator(variables: dict[str, Any], subject: Subject) -> Results:
        ranker = rankings.exact(variables, Effort())
        return _evaluated(experiment, gallery, encode_both(variables), subject, ranker)

    return evaluator


def check(model: RetrievalModel, config: ConfigDict | FrozenConfigDict, mesh: Mesh) -> None:
    """What can be said before anything is read; raises ValueError for settings that do not fit model or devices."""
    evaluation = config.eval
    check_score_dtype(model.score, evaluation.score_dtype)
    if evaluation.batch_size < 1:
        raise ValueError(f"config.eval.batch_size is {evaluation.batch_size}; it must be at least 1")
    if evaluation.two_stage < 0:
        raise ValueError(f"config.eval.two_stage is {evaluation.two_stage}; it is a number of candidates, or 0")
    if evaluation.overlap and jax.process_count() > 1:
        raise ValueError("config.eval.overlap needs both towers' devices in one process; switch it off for several")
    if jax.process_count() > 1 and config.parallel.mapping == "pmap":
        raise ValueError("several processes evaluate under config.parallel.mapping=shard_map only")
    if evaluation.stages != 1:
        text_mesh = halves(mesh)[1] if evaluation.overlap else mesh
        check_pipeline(model, stage_mesh(text_mesh, evaluation.stages), evaluation.microbatches, evaluation.batch_size)


def make_comparison(
    experiment: Experiment, split: str, mesh: Mesh, folder: Path
) -> Callable[[dict[str, Any], Subject], dict[str, Results]]:
    """As `make_evaluator`, with results by the way of ranking: exact (config.eval.exact), two stages, vectors alone.

    folder: for the finished blocks of a long exact ranking, which goes on with them when it was stopped; removed when
    all is done.
    """
    config = experiment.config
    gallery, encode_both, rankings = _open(experiment, split, mesh)

    def comparison(variables: dict[str, Any], subject: Subject) -> dict[str, Results]:
        embeddings, arms = encode_both(variables), {}

        def add(name: str, ranker: Ranker, effort: Effort, ranking: str | None) -> None:
            found = _evaluated(experiment, gallery, embeddings, subject, ranker)
            arms[name] = with_effort(found, effort, ranking)

        if config.eval.exact or not config.eval.two_stage:
            effort, kept = Effort(), None
            if jax.process_count() == 1 and not has_static_score(experiment.model):
                kept = open_folder(folder, _identity(experiment, variables, subject, gallery))
            add("exact", rankings.exact(variables, effort, kept), effort, None)
        if k := config.eval.two_stage:
            effort = Effort()
            ranking = (
                f"two stages: {k} candidates of each query by global vectors, re-ranked by the score; then as exact"
            )
            add(f"two-stage {k}", rankings.two_stage(variables, effort), effort, ranking)
            effort = Effort()
            add("global vectors", rankings.vectors(effort), effort, "by the product of global vectors alone")
        shutil.rmtree(folder, ignore_errors=True)
        return arms

    return comparison


def _open(
    experiment: Experiment, split: str, mesh: Mesh
) -> tuple[Gallery, Callable[[dict[str, Any]], tuple[Embedding, Embedding]], Rankings]:
    """The gallery of a split, what encodes it and what ranks it."""
    config = experiment.config
    check(experiment.model, config, mesh)
    gallery = open_gallery(config, experiment.dataset, split, experiment.tokenizer, experiment.fields)
    _check(experiment, gallery)
    # Every process has all embeddings in the end, and ranks them on its own devices.
    ranking = mesh if jax.process_count() == 1 else data_mesh(jax.local_devices())
    return gallery, make_encoder(experiment, gallery, mesh), Rankings(experiment.model, config, ranking)


def _evaluated(
    experiment: Experiment, gallery: Gallery, embeddings: tuple[Embedding, Embedding], subject: Subject, ranker: Ranker
) -> Results:
    folds = experiment.config.eval.folds
    protocol = f"folds{folds}" if folds > 1 else "whole"
    score = experiment.model.score
    return evaluate(*embeddings, gallery.caption_image, score, protocol, subject, ranker=ranker)


def _identity(experiment: Experiment, variables: dict[str, Any], subject: Subject, gallery: Gallery) -> dict[str, Any]:
    """Which scores a folder of blocks holds."""
    config = experiment.config
    return {
        "subject": dataclasses.asdict(subject),
        "dataset": str(experiment.dataset.path),
        "images": gallery.images,
        "captions": len(gallery.captions),
        "variables": digest(variables),
        "model": config.model.to_dict(),
        "data": config.data.to_dict(),
        "folds": config.eval.folds,
        "tile": config.eval.tile,
    }


def _check(experiment: Experiment, gallery: Gallery) -> None:
    """What would otherwise fail after hours of encoding, or at the end of the first epoch."""
    evaluation = experiment.config.eval
    check_captions(gallery.caption_image, gallery.images, len(gallery.captions))
    tile_shape(gallery.images, len(gallery.captions), evaluation.tile)
    if evaluation.folds < 0 or (evaluation.folds > 1 and gallery.images % evaluation.folds):
        raise ValueError(
            f"config.eval.folds is {evaluation.folds}; the split has {gallery.images} images, which must divide into "
            "folds of equal size (0: the whole split)"
        )


def make_encoder(
    experiment: Experiment, gallery: Gallery, mesh: Mesh
) -> Callable[[dict[str, Any]], tuple[Embedding, Embedding]]:
    """The result encodes the images and captions of a gallery with variables {"params", "batch_stats"}.

    config.eval.overlap changes when and where a batch is encoded, and no bit of its embedding: each device gets the
    same rows, padded to the same length. Raises ValueError for config.eval.stages that do not fit devices or model.
    """
    evaluation = experiment.config.eval
    check(experiment.model, experiment.config, mesh)
    make_towers = _make_towers(experiment, *(halves(mesh) if evaluation.overlap else (mesh, mesh)))
    rows = evaluation.batch_size * mesh.size

    def encode_both(variables: dict[str, Any]) -> tuple[Embedding, Embedding]:
        image, text = make_towers(variables)
        image_parts, text_parts = gallery.image_batches(rows), gallery.text_batches(rows)
        n, t = gallery.images, len(gallery.captions)
        if not evaluation.overlap:
            return _in_turn(image, image_parts, n), _in_turn(text, text_parts, t)
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
class _Tower:
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


def _make_towers(
    experiment: Experiment, image_mesh: Mesh, text_mesh: Mesh
) -> Callable[[dict[str, Any]], tuple[_Tower, _Tower]]:
    config, model = experiment.config, experiment.model
    mapping, stages = config.parallel.mapping, config.eval.stages
    together = image_mesh is text_mesh

    encode_image = map_encode(partial(image_tower, model), image_mesh, mapping)
    if stages == 1:
        encode_text = map_encode(partial(text_tower, model), text_mesh, mapping)
    else:
        staged = stage_mesh(text_mesh, stages)
        encode_text = make_pipelined_text_encoder(model, staged, config.eval.microbatches)

    def place(variables: dict[str, Any]) -> tuple[Any, Any]:
        if stages == 1:
            for_text = replicate(variables, text_mesh)
            return (for_text if together else replicate(variables, image_mesh)), for_text
        placed = place_variables(model, variables, staged)
        # Without the layers of the text tower, which may be more than a device holds.
        return (placed.shared if together else replicate(placed.shared, image_mesh)), placed

    def towers(variables: dict[str, Any]) -> tuple[_Tower, _Tower]:
        for_image, for_text = place(variables)
        return (
            _Tower(
                image_mesh,
                lambda batch: put_batch(own_rows(batch), image_mesh, mapping),
                partial(encode_image, for_image),
            ),
            _Tower(
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


def _in_turn(tower: _Tower, parts: Iterable[Part], count: int) -> Embedding:
    return encode(lambda batch: tower.apply(tower.put(batch)), _portions(parts), count)


def _ahead(stages: Stages, tower: _Tower, parts: Iterable[Part], count: int) -> Embedding:
    placed = ((tower.put(part.batch), part.valid, part.numbers) for part in parts)
    return encode(tower.apply, stages.ahead(placed, READ_AHEAD), count)


def _portions(parts: Iterable[Part]) -> Iterator[Portion]:
    return ((part.batch, part.valid, part.numbers) for part in parts)
