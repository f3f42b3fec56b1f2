"""Evaluation of a model on one split: encode every item once (`towers`), rank, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.data.gallery import Gallery, open_gallery
from shnet_jax.evaluate.blocks import digest, open_folder
from shnet_jax.evaluate.bootstrap import recall_intervals
from shnet_jax.evaluate.compare import Rankings, Way, with_effort
from shnet_jax.evaluate.ensemble import Embedded, MeanScore
from shnet_jax.evaluate.extra import WITHIN, Wanted, extra_metrics
from shnet_jax.evaluate.person import person_chance, person_metrics, search_persons
from shnet_jax.evaluate.protocols import Results, Subject, evaluate, find_protocol
from shnet_jax.evaluate.rank import check_captions
from shnet_jax.evaluate.screen import check_score_dtype
from shnet_jax.evaluate.tiles import tile_shape
from shnet_jax.evaluate.towers import check, make_encoder
from shnet_jax.experiment import Experiment
from shnet_jax.models.contract import has_static_score, scorer
from shnet_jax.parallel.mapping import data_mesh
from shnet_jax.types import Embedding

Evaluator = Callable[[dict[str, Any], Subject], Results]


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
    """Opens a split once; the result evaluates variables {"params", "batch_stats"} on it, as often as wanted.

    By the first of config.eval.protocols, which so selects the best checkpoint.
    """
    config, protocol = experiment.config, _protocols(experiment.config)[0]
    encode_both = _open(experiment, split, mesh, (protocol,))
    rankings = make_rankings(experiment, mesh)  # once: they are compiled once for all variables

    def evaluator(variables: dict[str, Any], subject: Subject) -> Results:
        found = embedded_split(experiment, split, variables, *encode_both(variables), subject, rankings)
        return _ranked(found, protocol, config.eval, mesh)

    return evaluator


def embed_split(
    experiment: Experiment, variables: dict[str, Any], split: str, mesh: Mesh, subject: Subject
) -> Embedded:
    """Encodes a split with variables {"params", "batch_stats"}; the result is named like the run."""
    encode_both = _open(experiment, split, mesh, _protocols(experiment.config))
    images, texts = encode_both(variables)
    return embedded_split(experiment, split, variables, images, texts, subject, make_rankings(experiment, mesh))


def embedded_split(
    experiment: Experiment,
    split: str,
    variables: dict[str, Any],
    images: Embedding,
    texts: Embedding,
    subject: Subject,
    rankings: Rankings,
) -> Embedded:
    """A split whose embeddings are there already: just encoded, or from a folder."""
    counts = experiment.dataset.caption_counts(split)
    return Embedded(
        name=experiment.config.name,
        images=images,
        texts=texts,
        score=scorer(experiment.model, variables["params"]),
        caption_image=np.repeat(np.arange(len(counts)), counts),
        image_ids=experiment.dataset.image_ids(split),
        captions=tuple(caption for own in experiment.dataset.captions(split) for caption in own),
        subject=subject,
        image_person=_people(experiment, split),
        way=None if has_static_score(experiment.model) else rankings.exact(variables),
    )


def in_two_stages(experiment: Experiment, variables: dict[str, Any], mesh: Mesh) -> Way:
    """Ranking in two stages alone, of config.eval.two_stage candidates."""
    return make_rankings(experiment, mesh).two_stage(variables)


def ways_to_rank(
    experiment: Experiment, variables: dict[str, Any], mesh: Mesh, subject: Subject, folder: Path
) -> list[Way]:
    """The ways in which --mode=eval ranks a gallery, the one that it is about last; [] for a plain exact ranking.

    folder: for the finished blocks of a long ranking, which goes on with them when it was stopped.
    """
    evaluation, ways = experiment.config.eval, []
    rankings, in_blocks = make_rankings(experiment, mesh), not has_static_score(experiment.model)
    kept = None
    if (evaluation.two_stage or in_blocks) and jax.process_count() == 1:
        kept = open_folder(folder, _identity(experiment, variables, subject))
    if evaluation.two_stage:
        ways += [rankings.vectors(), rankings.two_stage(variables, kept)]
    if in_blocks or (evaluation.two_stage and evaluation.exact):
        exact = rankings.exact(variables, kept if in_blocks else None)
        ways += [exact] if evaluation.exact or not ways else []
    return ways


def make_rankings(experiment: Experiment, mesh: Mesh) -> Rankings:
    """The ways to rank with the model of an experiment."""
    return Rankings(experiment.model, experiment.config, _ranking(mesh))


def _identity(experiment: Experiment, variables: dict[str, Any], subject: Subject) -> dict[str, Any]:
    """Which scores a folder of blocks holds."""
    config = experiment.config
    return {
        "subject": dataclasses.asdict(subject),
        "dataset": str(experiment.dataset.path),
        "images": experiment.dataset.splits[subject.split],
        "variables": digest(variables),
        "model": config.model.to_dict(),
        "data": config.data.to_dict(),
        "tile": config.eval.tile,
    }


def evaluate_embedded(
    embedded: Embedded, wanted: Wanted, evaluation: ConfigDict, mesh: Mesh, intervals: bool = True
) -> dict[str, Results]:
    """Results by protocol, of all config.eval.protocols, each with the further numbers that are wanted.

    An ensemble is scored in float32, which gives the same ranks whatever config.eval.score_dtype says.
    """
    if isinstance(embedded.score, MeanScore):
        evaluation = ConfigDict(evaluation.to_dict() | {"score_dtype": "float32"})
    check_score_dtype(embedded.score, evaluation.score_dtype)
    # Further numbers are of the model's score, so of no other way to rank.
    extra = extra_metrics(embedded, wanted, evaluation.tile, _ranking(mesh)) if _by_score(embedded) else {}
    found = {}
    for protocol in evaluation.protocols:
        results = _ranked(embedded, protocol, evaluation, mesh)
        assert results.queries is not None  # `evaluate` gives them
        found[protocol] = dataclasses.replace(
            results,
            extra=extra,
            intervals=recall_intervals([results.queries]) if intervals else {},
            card=results.card | ({"within": WITHIN} if extra and wanted.within else {}),
        )
    return found


def _by_score(embedded: Embedded) -> bool:
    return embedded.way is None or embedded.way.exact


def _protocols(config: ConfigDict) -> tuple[str, ...]:
    if not config.eval.protocols:
        raise ValueError('config.eval.protocols is empty; expected at least one, such as ("whole",)')
    return tuple(config.eval.protocols)


def _open(
    experiment: Experiment, split: str, mesh: Mesh, protocols: tuple[str, ...]
) -> Callable[[dict[str, Any]], tuple[Embedding, Embedding]]:
    config = experiment.config
    check(experiment.model, config, mesh)
    _people(experiment, split)  # told before anything is encoded
    gallery = open_gallery(config, experiment.dataset, split, experiment.tokenizer, experiment.fields)
    _check(experiment, gallery, protocols)
    return make_encoder(experiment, gallery, mesh)


def _ranked(embedded: Embedded, protocol: str, evaluation: ConfigDict | FrozenConfigDict, mesh: Mesh) -> Results:
    """By one protocol, and of the whole gallery the numbers of a person search, where the persons are known."""
    way, mesh, owner = embedded.way, _ranking(mesh), embedded.caption_image
    gallery = embedded.images, embedded.texts
    results = evaluate(
        *gallery,
        owner,
        embedded.score,
        protocol,
        embedded.subject,
        tile=evaluation.tile,
        mesh=mesh,
        score_dtype=evaluation.score_dtype,
        ranker=way.ranker if way else None,
    )
    results = with_effort(results, way) if way else results
    people = embedded.image_person
    if people is None:
        return results
    sides = people, people[owner]
    if way and way.persons:
        found = way.persons(*gallery, *sides)
    else:
        found = search_persons(*gallery, *sides, embedded.score, evaluation.tile, mesh)
    assert results.queries is not None  # `evaluate` gives them
    return dataclasses.replace(
        results,
        metrics=results.metrics | person_metrics(found),
        queries=dataclasses.replace(results.queries, image_person=people, found=found),
        chance=results.chance | person_chance(*sides),
        card=results.card | {"persons": f"{len(np.unique(people))}; any image of the caption's person is relevant"},
    )


def _people(experiment: Experiment, split: str) -> np.ndarray | None:
    """[n] the person in each image, when config.eval.person asks for it."""
    if not experiment.config.eval.person:
        return None
    people = experiment.dataset.identities(split)
    if people is None:
        raise ValueError(f"config.eval.person needs the field identity, which {experiment.dataset.path} lacks")
    return people


def _ranking(mesh: Mesh) -> Mesh:
    """Every process has all embeddings in the end, and ranks its share of the captions on its own devices."""
    return mesh if jax.process_count() == 1 else data_mesh(jax.local_devices())


def _check(experiment: Experiment, gallery: Gallery, protocols: tuple[str, ...]) -> None:
    """What would otherwise fail after hours of encoding, or at the end of the first epoch."""
    evaluation = experiment.config.eval
    check_captions(gallery.caption_image, gallery.images, len(gallery.captions))
    tile_shape(gallery.images, len(gallery.captions), evaluation.tile)
    for protocol in protocols:
        if gallery.images % find_protocol(protocol).folds:
            raise ValueError(
                f"config.eval.protocols has {protocol!r}; the split has {gallery.images} images, which must divide "
                'into folds of equal size ("whole": the whole split)'
            )
