"""Evaluation of a model on one split: encode every item once, rank, report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from jax.sharding import Mesh

from shnet_jax.data.batches import gather
from shnet_jax.data.gallery import open_gallery
from shnet_jax.evaluate.encode import encode
from shnet_jax.evaluate.protocols import Results, Subject, evaluate
from shnet_jax.experiment import Experiment
from shnet_jax.parallel.mapping import map_encode, put_batch, replicate
from shnet_jax.types import Batch, Embedding

Evaluator = Callable[[dict[str, Any], Subject], Results]


def subject(experiment: Experiment, split: str, step: int, selected_on: str, devices: int) -> Subject:
    """What the protocol card says of a checkpoint of this experiment. selected_on: see `protocols.Subject`."""
    config = experiment.config
    return Subject(
        dataset=experiment.dataset.path.parent.name,
        split=split,
        checkpoint_step=step,
        parameters=f"running average (decay {config.optim.ema})" if config.optim.ema else "trained",
        dtype=config.model.dtype,
        selected_on=selected_on,
        devices=devices,
    )


def make_evaluator(experiment: Experiment, split: str, mesh: Mesh) -> Evaluator:
    """Opens a split once; the result evaluates variables {"params", "batch_stats"} on it, as often as wanted."""
    config, model = experiment.config, experiment.model
    gallery = open_gallery(config, experiment.dataset, split, experiment.tokenizer, experiment.fields)
    mapping = config.parallel.mapping
    protocol = f"folds{config.eval.folds}" if config.eval.folds > 1 else "whole"
    rows = config.eval.batch_size * mesh.size

    def image(variables: dict[str, Any], batch: Batch) -> Embedding:
        return cast(Embedding, model.apply(variables, gather({}, batch), train=False, method="encode_image"))

    def text(variables: dict[str, Any], batch: Batch) -> Embedding:
        return cast(Embedding, model.apply(variables, batch, train=False, method="encode_text"))

    encode_image, encode_text = (map_encode(fn, mesh, mapping) for fn in (image, text))

    def evaluator(variables: dict[str, Any], subject: Subject) -> Results:
        variables = replicate(variables, mesh)
        images = encode(
            lambda batch: encode_image(variables, put_batch(batch, mesh, mapping)),
            ((part.batch, part.valid, part.numbers) for part in gallery.image_batches(rows)),
            gallery.images,
        )
        texts = encode(
            lambda batch: encode_text(variables, put_batch(batch, mesh, mapping)),
            ((part.batch, part.valid, part.numbers) for part in gallery.text_batches(rows)),
            len(gallery.captions),
        )
        return evaluate(images, texts, gallery.caption_image, model.score, protocol, subject, tile=config.eval.tile)

    return evaluator
