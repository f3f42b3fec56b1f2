"""Evaluation of a model on one split: encode every item once, rank, report."""

from __future__ import annotations

import dataclasses
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
from shnet_jax.evaluate.bootstrap import recall_intervals
from shnet_jax.evaluate.compare import Rankings, Way, with_effort
from shnet_jax.evaluate.encode import Portion, encode
from shnet_jax.evaluate.ensemble import Embedded, MeanScore
from shnet_jax.evaluate.extra import WITHIN, Wanted, extra_metrics
from shnet_jax.evaluate.person import person_chance, person_metrics
from shnet_jax.evaluate.pipelined import check_pipeline, make_pipelined_text_encoder, place_variables, stage_mesh
from shnet_jax.evaluate.protocols import Results, Subject, evaluate, find_protocol
from shnet_jax.evaluate.rank import check_captions
from shnet_jax.evaluate.screen import check_score_dtype
from shnet_jax.evaluate.stages import Stages
from shnet_jax.evaluate.tiles import Items, ItemScore, tile_shape
from shnet_jax.experiment import Experiment
from shnet_jax.models.contract import RetrievalModel, has_static_score, scorer
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
    """Opens a split once; the result evaluates variables {"params", "batch_stats"} on it, as often as wanted.

    By the first of config.eval.protocols, which so selects the best checkpoint.
    """
    config, model = experiment.config, experiment.model
    protocol = _protocols(config)[0]
    gallery, encode_both = _open(experiment, split, mesh, (protocol,))
    people = _people(experiment, split)
    rankings = None if has_static_score(model) else Rankings(model, config, _ranking(mesh))

    def evaluator(variables: dict[str, Any], subject: Subject) -> Results:
        images, texts = encode_both(variables)
        way = None if rankings is None else rankings.exact(variables)
        results = _ranked(images, texts, gallery.caption_image, model.score, protocol, subject, config.eval, mesh, way)
        score = scorer(model, variables["params"])
        return _with_persons(results, images, texts, people, gallery.caption_image, score, config.eval, mesh)

    return evaluator


def check(model: RetrievalModel, config: ConfigDict | FrozenConfigDict, mesh: Mesh) -> None:
    """What can be said before anything is read; raises ValueError for settings that do not fit model or devices."""
    evaluation = config.eval
    check_score_dtype(model.score, evaluation.score_dtype)
    if evaluation.batch_size < 1:
        raise ValueError(f"config.eval.batch_size is {evaluation.batch_size}; it must be at least 1")
    if evaluation.two_stage < 0:
        raise ValueError(f"config.eval.two_stage is {evaluation.two_stage}; it is a number of candidates, or 0")
    if not (evaluation.exact or evaluation.two_stage):
        raise ValueError(
            "config.eval.exact is False, which needs config.eval.two_stage candidates: nothing else is ranked"
        )
    if evaluation.overlap and jax.process_count() > 1:
        raise ValueError("config.eval.overlap needs both towers' devices in one process; switch it off for several")
    if jax.process_count() > 1 and config.parallel.mapping == "pmap":
        raise ValueError("several processes evaluate under config.parallel.mapping=shard_map only")
    if evaluation.stages != 1:
        text_mesh = halves(mesh)[1] if evaluation.overlap else mesh
        check_pipeline(model, stage_mesh(text_mesh, evaluation.stages), evaluation.microbatches, evaluation.batch_size)


def embed_split(
    experiment: Experiment, variables: dict[str, Any], split: str, mesh: Mesh, subject: Subject
) -> Embedded:
    """Encodes a split with variables {"params", "batch_stats"}; the result is named like the run."""
    _, encode_both = _open(experiment, split, mesh, _protocols(experiment.config))
    return embedded_split(experiment, variables, *encode_both(variables), mesh, subject)


def embedded_split(
    experiment: Experiment,
    variables: dict[str, Any],
    images: Embedding,
    texts: Embedding,
    mesh: Mesh,
    subject: Subject,
) -> Embedded:
    """The split `subject.split`, whose embeddings are there already: from `embed_split`, or from a folder."""
    split, counts = subject.split, experiment.dataset.caption_counts(subject.split)
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
        way=None if has_static_score(experiment.model) else _rankings(experiment, mesh).exact(variables),
    )


def in_two_stages(experiment: Experiment, variables: dict[str, Any], mesh: Mesh) -> Way:
    """Ranking in two stages alone, of config.eval.two_stage candidates."""
    return _rankings(experiment, mesh).two_stage(variables)


def ways_to_rank(
    experiment: Experiment, variables: dict[str, Any], mesh: Mesh, subject: Subject, folder: Path
) -> list[Way]:
    """The ways in which --mode=eval ranks a gallery, the one that it is about last; [] for a plain exact ranking.

    folder: for the finished blocks of a long exact ranking, which goes on with them when it was stopped.
    """
    evaluation, ways = experiment.config.eval, []
    rankings, in_blocks = _rankings(experiment, mesh), not has_static_score(experiment.model)
    if evaluation.two_stage:
        ways += [rankings.vectors(), rankings.two_stage(variables)]
    if in_blocks or (evaluation.two_stage and evaluation.exact):
        kept = in_blocks and evaluation.exact and jax.process_count() == 1
        identity = _identity(experiment, variables, subject) if kept else {}
        exact = rankings.exact(variables, open_folder(folder, identity) if kept else None)
        ways += [exact] if evaluation.exact or not ways else []
    return ways


def _rankings(experiment: Experiment, mesh: Mesh) -> Rankings:
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
    exact = embedded.way is None or embedded.way.exact
    extra = extra_metrics(embedded, wanted, evaluation.tile, _ranking(mesh)) if exact else {}
    people = embedded.image_person if exact else None
    found = {}
    for protocol in evaluation.protocols:
        results = _ranked(
            embedded.images,
            embedded.texts,
            embedded.caption_image,
            embedded.score,
            protocol,
            embedded.subject,
            evaluation,
            mesh,
            embedded.way,
        )
        results = _with_persons(
            results,
            embedded.images,
            embedded.texts,
            people,
            embedded.caption_image,
            embedded.score,
            evaluation,
            mesh,
        )
        assert results.queries is not None  # `evaluate` gives them
        found[protocol] = dataclasses.replace(
            results,
            extra=extra,
            intervals=recall_intervals([results.queries]) if intervals else {},
            card=results.card | ({"within": WITHIN} if exact and wanted.within else {}),
        )
    return found


def _protocols(config: ConfigDict) -> tuple[str, ...]:
    if not config.eval.protocols:
        raise ValueError('config.eval.protocols is empty; expected at least one, such as ("whole",)')
    return tuple(config.eval.protocols)


def _open(
    experiment: Experiment, split: str, mesh: Mesh, protocols: tuple[str, ...]
) -> tuple[Gallery, Callable[[dict[str, Any]], tuple[Embedding, Embedding]]]:
    config = experiment.config
    check(experiment.model, config, mesh)
    gallery = open_gallery(config, experiment.dataset, split, experiment.tokenizer, experiment.fields)
    _check(experiment, gallery, protocols)
    return gallery, make_encoder(experiment, gallery, mesh)


def _ranked(
    images: Items,
    texts: Items,
    caption_image: np.ndarray,
    score: ItemScore,
    protocol: str,
    subject: Subject,
    evaluation: ConfigDict,
    mesh: Mesh,
    way: Way | None = None,
) -> Results:
    found = evaluate(
        images,
        texts,
        caption_image,
        score,
        protocol,
        subject,
        tile=evaluation.tile,
        mesh=_ranking(mesh),
        score_dtype=evaluation.score_dtype,
        ranker=way.ranker if way else None,
    )
    return with_effort(found, way) if way else found


def _people(experiment: Experiment, split: str) -> np.ndarray | None:
    """[n] the person in each image, when config.eval.person asks for it."""
    if not experiment.config.eval.person:
        return None
    people = experiment.dataset.identities(split)
    if people is None:
        raise ValueError(f"config.eval.person needs the field identity, which {experiment.dataset.path} lacks")
    return people


def _with_persons(
    results: Results,
    images: Items,
    texts: Items,
    people: np.ndarray | None,
    caption_image: np.ndarray,
    score: ItemScore,
    evaluation: ConfigDict,
    mesh: Mesh,
) -> Results:
    """The results and, of the whole gallery, those of a person search; as they are without `people` [n]."""
    if people is None:
        return results
    sides = people, people[caption_image]
    found = person_metrics(images, texts, *sides, score, evaluation.tile, _ranking(mesh))
    return dataclasses.replace(
        results,
        metrics=results.metrics | found,
        chance=results.chance | person_chance(*sides),
        card=results.card | {"persons": f"{len(np.unique(people))}; any image of the caption's person is relevant"},
    )


def _ranking(mesh: Mesh) -> Mesh:
    """Every process has all embeddings in the end, and ranks them on its own devices."""
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


def _in_turn(tower: Tower, parts: Iterable[Part], count: int) -> Embedding:
    return encode(lambda batch: tower.apply(tower.put(batch)), _portions(parts), count)


def _ahead(stages: Stages, tower: Tower, parts: Iterable[Part], count: int) -> Embedding:
    placed = ((tower.put(part.batch), part.valid, part.numbers) for part in parts)
    return encode(tower.apply, stages.ahead(placed, READ_AHEAD), count)


def _portions(parts: Iterable[Part]) -> Iterator[Portion]:
    return ((part.batch, part.valid, part.numbers) for part in parts)
