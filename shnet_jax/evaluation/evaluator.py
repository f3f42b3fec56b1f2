"""Evaluation of a model on one split: encode every item once, rank, report.

evaluator = Evaluator(experiment, "val", mesh)  # opens the split and compiles once
results = evaluator.run(variables, step)  # as often as wanted
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.data.gallery import open_gallery
from shnet_jax.evaluation.bf16_screening import check_score_dtype
from shnet_jax.evaluation.bootstrap import recall_intervals
from shnet_jax.evaluation.encode import Encoder
from shnet_jax.evaluation.ensemble import Embedded, MeanScore
from shnet_jax.evaluation.extra_metrics import WITHIN, ExtraMetrics, extra_metrics
from shnet_jax.evaluation.pair_scores import digest, open_folder
from shnet_jax.evaluation.protocols import Provenance, Results, count_folds, evaluate
from shnet_jax.evaluation.ranking_methods import RankingMethod, RankingMethods
from shnet_jax.evaluation.ranks import check_captions
from shnet_jax.evaluation.tiles import tile_shape, tile_size
from shnet_jax.experiment import Experiment
from shnet_jax.models.contract import has_static_score, scorer
from shnet_jax.parallel import hosts
from shnet_jax.parallel.mapping import own_devices
from shnet_jax.types import Embedding


def provenance(experiment: Experiment, split: str, step: int, selected_on: str, devices: int) -> Provenance:
    """The protocol card's part on a checkpoint of this experiment. selected_on: see `protocols.Provenance`."""
    config = experiment.config
    return Provenance(
        dataset=experiment.dataset.path.parent.name,
        split=split,
        checkpoint_step=step,
        parameters=f"running average (decay {config.optim.ema})" if config.optim.ema else "trained",
        dtype=f"image {config.model.dtype}, text {config.text.dtype}",
        selected_on=selected_on,
        devices=devices,
        notes=experiment.notes or "none",
    )


class Evaluator:
    """Evaluates one model on one split, for any variables {"params", "batch_stats"}; compiles once.

    The first of config.eval.protocols is that of `run`, which so selects the best checkpoint. Raises ValueError for
    settings, devices or a split that do not fit, before anything is encoded.
    """

    def __init__(self, experiment: Experiment, split: str, mesh: Mesh):
        config = experiment.config
        if not config.eval.protocols:
            raise ValueError('config.eval.protocols is empty; expected at least one, such as ("whole",)')
        self.experiment, self.split, self.mesh = experiment, split, mesh
        experiment.dataset.check_captioned(split)
        self._encoder = Encoder(experiment, mesh)
        _image_persons(experiment, split)
        self._gallery = open_gallery(
            config, experiment.dataset, split, experiment.tokenizer, experiment.fields, experiment.text_fields
        )
        n, t = self._gallery.images, len(self._gallery.captions)
        check_captions(self._gallery.caption_image, n, t)
        tile_shape(n, t, tile_size(config.eval, mesh))
        self._check_folds(config.eval.protocols[:1])
        self.methods = make_ranking_methods(experiment, mesh)

    def run(self, variables: dict[str, Any], step: int, selected_on: str = "none") -> Results:
        """Results by the first protocol. step, selected_on: for the protocol card, see `protocols.Provenance`."""
        evaluation = self.experiment.config.eval
        return _evaluate_by(self._embed(variables, step, selected_on), evaluation.protocols[0], evaluation, self.mesh)

    def embed(self, variables: dict[str, Any], step: int, selected_on: str = "none") -> Embedded:
        """The encoded split, named like the run, to be evaluated by all of config.eval.protocols."""
        self._check_folds(self.experiment.config.eval.protocols)
        return self._embed(variables, step, selected_on)

    def _embed(self, variables: dict[str, Any], step: int, selected_on: str) -> Embedded:
        images, texts = self._encoder.encode(self._gallery, variables)
        card = provenance(self.experiment, self.split, step, selected_on, self.mesh.size)
        return embedded_split(self.experiment, self.split, variables, images, texts, card, self.methods)

    def _check_folds(self, protocols: Sequence[str]) -> None:
        for protocol in protocols:
            if self._gallery.images % count_folds(protocol):
                raise ValueError(
                    f"config.eval.protocols has {protocol!r}; the split has {self._gallery.images} images, which must "
                    'divide into folds of equal size ("whole": the whole split)'
                )


def embedded_split(
    experiment: Experiment,
    split: str,
    variables: dict[str, Any],
    images: Embedding,
    texts: Embedding,
    provenance: Provenance,
    methods: RankingMethods,
) -> Embedded:
    """A split whose embeddings exist already: just encoded, or from a folder."""
    counts = experiment.dataset.caption_counts(split)
    return Embedded(
        name=experiment.config.name,
        images=images,
        texts=texts,
        score=scorer(experiment.model, variables["params"]),
        caption_image=np.repeat(np.arange(len(counts)), counts),
        image_ids=experiment.dataset.image_ids(split),
        captions=tuple(caption for of_image in experiment.dataset.captions(split) for caption in of_image),
        provenance=provenance,
        image_person=_image_persons(experiment, split),
        method=None if has_static_score(experiment.model) else methods.exact(variables),
    )


def make_ranking_methods(experiment: Experiment, mesh: Mesh) -> RankingMethods:
    """The ranking methods of an experiment's model."""
    return RankingMethods(experiment.model, experiment.config, own_devices(mesh))


def choose_ranking_methods(
    experiment: Experiment, variables: dict[str, Any], mesh: Mesh, provenance: Provenance, folder: Path
) -> list[RankingMethod]:
    """The ranking methods of --mode=eval, the one that it is about last; [] for a plain exact ranking.

    folder: for the finished blocks of a long ranking, which goes on with them when it was stopped.
    """
    evaluation, chosen = experiment.config.eval, []
    methods, in_blocks = make_ranking_methods(experiment, mesh), not has_static_score(experiment.model)
    blocks = None
    if evaluation.two_stage or in_blocks:
        blocks = folder
        hosts.by_first(lambda: open_folder(folder, _identity(experiment, variables, provenance, mesh)))
    if evaluation.two_stage:
        chosen += [*methods.vectors(), methods.rerank(variables, blocks)]
    if (in_blocks or evaluation.two_stage) and (evaluation.exact or not chosen):
        chosen += [methods.exact(variables, blocks if in_blocks else None)]
    return chosen


def _identity(experiment: Experiment, variables: dict[str, Any], provenance: Provenance, mesh: Mesh) -> dict[str, Any]:
    """JSON values that identify the scores in a folder of blocks."""
    config = experiment.config
    return {
        "subject": dataclasses.asdict(provenance),
        "dataset": str(experiment.dataset.path),
        "images": experiment.dataset.splits[provenance.split],
        "variables": digest(variables),
        "model": config.model.to_dict(),
        "data": config.data.to_dict(),
        "tile": tile_size(config.eval, mesh),
    }


def evaluate_embedded(
    embedded: Embedded, extra: ExtraMetrics, evaluation: ConfigDict, mesh: Mesh, intervals: bool = True
) -> dict[str, Results]:
    """Results by protocol, of all config.eval.protocols, each with the extra metrics.

    An ensemble is scored in float32, which gives the same ranks whatever config.eval.score_dtype says.
    """
    if isinstance(embedded.score, MeanScore):
        evaluation = ConfigDict(evaluation.to_dict() | {"score_dtype": "float32"})
    check_score_dtype(embedded.score, evaluation.score_dtype)
    # Extra metrics are of the model's score, so of no other ranking method.
    by_score = embedded.method is None or embedded.method.exact
    values = extra_metrics(embedded, extra, tile_size(evaluation, mesh), own_devices(mesh)) if by_score else {}
    by_protocol = {}
    for protocol in evaluation.protocols:
        results = _evaluate_by(embedded, protocol, evaluation, mesh)
        assert results.queries is not None  # `evaluate` gives them
        by_protocol[protocol] = dataclasses.replace(
            results,
            extra=values,
            intervals=recall_intervals([results.queries]) if intervals else {},
            card=results.card | ({"within": WITHIN} if values and extra.within else {}),
        )
    return by_protocol


def _evaluate_by(embedded: Embedded, protocol: str, evaluation: ConfigDict | FrozenConfigDict, mesh: Mesh) -> Results:
    """Results by one protocol, with the metrics of a person search where the persons are known."""
    return evaluate(
        embedded.images,
        embedded.texts,
        embedded.caption_image,
        embedded.score,
        protocol,
        embedded.provenance,
        tile=tile_size(evaluation, mesh),
        mesh=own_devices(mesh),
        score_dtype=evaluation.score_dtype,
        method=embedded.method,
        image_person=embedded.image_person,
    )


def _image_persons(experiment: Experiment, split: str) -> np.ndarray | None:
    """Person [n] in each image, where config.eval.person asks for it."""
    if not experiment.config.eval.person:
        return None
    persons = experiment.dataset.identities(split)
    if persons is None:
        raise ValueError(f"config.eval.person needs the field identity, which {experiment.dataset.path} lacks")
    return persons
