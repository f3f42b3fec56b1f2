"""Encodes galleries: settings that fit, variables on the devices, every item encoded once, gathered on the host.

encoder = Encoder(experiment, mesh)  # compiles once for all variables
images, texts = encoder.encode(gallery, variables)
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from shnet_jax.data.batches import gather
from shnet_jax.data.gallery import Gallery, Part
from shnet_jax.evaluation.bf16_screening import check_score_dtype
from shnet_jax.evaluation.pipelined import (
    check_pipeline,
    make_pipelined_text_encoder,
    place_variables,
    schedule_text,
    stage_mesh,
)
from shnet_jax.evaluation.ranking_methods import candidates
from shnet_jax.evaluation.tiles import prefetch_one
from shnet_jax.experiment import Experiment
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.hosts import own_rows
from shnet_jax.parallel.mapping import data_mesh, map_encode, put_batch, replicate
from shnet_jax.parallel.rules import step_mesh, variable_specs
from shnet_jax.types import DATA, Array, Batch, Embedding

log = logging.getLogger(__name__)

T = TypeVar("T")
READ_AHEAD = 2  # batches on the devices that wait for their tower where towers overlap: one to go on with, one arriving


def check(model: RetrievalModel, config: ConfigDict | FrozenConfigDict, mesh: Mesh) -> None:
    """Static checks, before I/O or compilation: ValueError for settings that do not fit model or devices."""
    evaluation = config.eval
    check_score_dtype(model.score, evaluation.score_dtype)
    if evaluation.batch_size < 1:
        raise ValueError(f"config.eval.batch_size is {evaluation.batch_size}; it must be at least 1")
    candidates(evaluation)
    if evaluation.overlap and jax.process_count() > 1:
        raise ValueError("config.eval.overlap needs both towers' devices in one process; switch it off for several")
    if jax.process_count() > 1 and config.parallel.mapping == "pmap":
        raise ValueError("several processes evaluate under config.parallel.mapping=shard_map only")
    image_mesh, text_mesh = halves(mesh) if evaluation.overlap else (mesh, mesh)
    for part in (image_mesh, text_mesh):
        step_mesh(part, config.parallel)
    if evaluation.stages != 1:
        if config.parallel.model != 1:
            raise ValueError(
                f"config.eval.stages is {evaluation.stages} and config.parallel.model {config.parallel.model}: both "
                "split the text tower, set one of them to 1"
            )
        check_pipeline(model, stage_mesh(text_mesh, evaluation.stages), evaluation.microbatches, evaluation.batch_size)


class Encoder:
    """Encodes galleries with both towers of a model; compiled once for all variables.

    config.eval.overlap changes when and where a batch is encoded, and no bit of its embedding: each device gets the
    same rows, padded to the same length. Raises ValueError for settings that do not fit devices or model.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh):
        self._evaluation = experiment.config.eval
        check(experiment.model, experiment.config, mesh)
        self._rows = self._evaluation.batch_size * step_mesh(mesh, experiment.config.parallel).shape[DATA]
        self._towers = Towers(experiment, *(halves(mesh) if self._evaluation.overlap else (mesh, mesh)))

    def encode(self, gallery: Gallery, variables: dict[str, Any]) -> tuple[Embedding, Embedding]:
        """Embeddings of the images and captions of a gallery with variables {"params", "batch_stats"}."""
        sides = zip(
            self._towers.place(variables),
            (gallery.image_batches(self._rows), gallery.text_batches(self._rows)),
            (gallery.images, len(gallery.captions)),
            strict=True,
        )
        if not self._evaluation.overlap:
            images, texts = (encode_parts(tower, parts, count) for tower, parts, count in sides)
            return images, texts
        images, texts = run_together([partial(self._encode_ahead, *side) for side in sides])
        return images, texts

    def _encode_ahead(self, tower: Tower, parts: Iterable[Part], count: int, stopped: threading.Event) -> Embedding:
        batches = pieces(parts, self._evaluation.batch_size * tower.parts)
        placed = ((tower.put(part.batch), part.valid, part.numbers) for part in batches)
        unless_stopped = itertools.takewhile(lambda _: not stopped.is_set(), read_ahead(placed, READ_AHEAD))
        return encode(tower.apply, unless_stopped, count)


def run_together(tasks: Sequence[Callable[[threading.Event], T]]) -> list[T]:
    """Runs tasks in threads and returns their results; where one fails, the others are stopped and its error is raised.

    tasks: functions of an event that is set when they are to stop.
    """
    stopped = threading.Event()
    with ThreadPoolExecutor(len(tasks)) as pool:
        futures = [pool.submit(task, stopped) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises the error of a task that failed
        finally:  # also when it is interrupted: threads that go on would keep the process alive
            stopped.set()
    return [future.result() for future in futures]


def read_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yields items that a thread of its own reads, at most `count` of them before they are asked for."""
    iterator, end = iter(items), object()
    reader = ThreadPoolExecutor(1)
    try:
        waiting = deque(reader.submit(next, iterator, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(reader.submit(next, iterator, end))
            yield cast(T, item)
    finally:
        reader.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class Tower:
    """A tower with its variables. apply: a batch that `put` placed on the devices of `mesh` -> its embeddings."""

    mesh: Mesh
    put: Callable[[Any], Batch]
    apply: Callable[[Batch], Embedding]

    @property
    def parts(self) -> int:
        """Parts that the rows of a batch are split into: devices, or groups of them (parallel/rules.py)."""
        return self.mesh.shape[DATA]


class Towers:
    """The compiled towers of a model, images and captions each on their own devices or together on all."""

    def __init__(self, experiment: Experiment, image_mesh: Mesh, text_mesh: Mesh):
        evaluation, self._model, parallel = experiment.config.eval, experiment.model, experiment.config.parallel
        together, self._rules = image_mesh is text_mesh, parallel.rules
        self._text_mesh = text_mesh = step_mesh(text_mesh, parallel)
        self._image_mesh = image_mesh = text_mesh if together else step_mesh(image_mesh, parallel)
        self._mapping = self._text_mapping = parallel.mapping
        self._stage_mesh: Mesh | None = None
        self._encode_image = map_encode(partial(image_tower, self._model), image_mesh, self._mapping)
        if evaluation.stages == 1:
            self._encode_text = map_encode(partial(text_tower, self._model), text_mesh, self._mapping)
        else:
            self._text_mapping = "shard_map"
            self._stage_mesh = stage_mesh(text_mesh, evaluation.stages)
            self._encode_text = make_pipelined_text_encoder(self._model, self._stage_mesh, evaluation.microbatches)
            log.info("%s", schedule_text(evaluation.stages, evaluation.microbatches))

    def place(self, variables: dict[str, Any]) -> tuple[Tower, Tower]:
        """The towers of images and of captions with variables {"params", "batch_stats"} on their devices."""
        text_variables: Any
        if self._stage_mesh is None:
            text_variables = shared = self._split(variables, self._text_mesh)
            rest: Any = variables
        else:
            text_variables = place_variables(self._model, variables, self._stage_mesh)
            shared = rest = text_variables.shared  # without the layers, which may be more than a device holds
        together = self._image_mesh is self._text_mesh
        image_variables = shared if together else self._split(rest, self._image_mesh)
        return (
            self._tower(self._image_mesh, self._mapping, partial(self._encode_image, image_variables)),
            self._tower(self._text_mesh, self._text_mapping, partial(self._encode_text, text_variables)),
        )

    def _split(self, variables: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
        """Variables on the devices of a mesh, in each all of them, or its part where rules say so."""
        return replicate(variables, mesh, variable_specs(variables, self._rules, mesh))

    def _tower(self, mesh: Mesh, mapping: str, apply: Callable[[Batch], Embedding]) -> Tower:
        share = own_rows if mesh.is_multi_process else lambda batch: batch  # a mesh of one process takes all rows
        return Tower(mesh, lambda batch: put_batch(share(batch), mesh, mapping), apply)


def image_tower(model: RetrievalModel, variables: Any, batch: Batch) -> Embedding:
    """Encodes the images of one device's batch of `data.gallery`."""
    return cast(Embedding, model.apply(variables, gather({}, batch), train=False, method="encode_image"))


def text_tower(model: RetrievalModel, variables: Any, batch: Batch) -> Embedding:
    """Encodes the captions of one device's batch of `data.gallery`."""
    return cast(Embedding, model.apply(variables, batch, train=False, method="encode_text"))


def halves(mesh: Mesh) -> tuple[Mesh, Mesh]:
    """Devices for the images and devices for the captions; both on the only one, if there is only one."""
    devices = list(mesh.devices.flat)
    if len(devices) == 1:
        return mesh, mesh
    middle = -(-len(devices) // 2)
    return data_mesh(devices[:middle]), data_mesh(devices[middle:])


def pieces(parts: Iterable[Part], rows: int) -> Iterator[Part]:
    """Cuts parts into batches of `rows` rows, without batches of padding alone.

    On a part of the devices, each device gets the rows that it would have got of all devices, some of them later.
    """
    for part in parts:
        size = len(next(iter(part.batch.values())))
        for start in range(0, part.valid, rows):
            index = np.minimum(np.arange(start, start + rows), size - 1)
            batch = {field: values[index] for field, values in part.batch.items()}
            yield Part(batch, min(rows, part.valid - start), part.numbers[start : start + rows])


def encode_parts(tower: Tower, parts: Iterable[Part], count: int) -> Embedding:
    """Encodes the `count` items of batches of `data.gallery`, onto the host."""
    return encode(lambda batch: tower.apply(tower.put(batch)), parts, count)


def encode(fn: Callable[[Any], Embedding], batches: Iterable[tuple[Any, int, np.ndarray]], count: int) -> Embedding:
    """Encodes a gallery of `count` items.

    Args:
      fn: a batch -> Embedding of its b rows, on the device; usually one tower mapped over all devices.
      batches: batches of static shape in any order, each with the number of its first rows that are real and the
        gallery rows of at least these (`data.gallery` gives them); what is made of the padding is dropped.
      count: items of the gallery.

    Returns:
      An Embedding of NumPy arrays, float32 and bool, with `count` rows. Where batches differ in their number
      of elements (captions padded to several lengths), the shorter ones get zeros that the mask excludes.

    Raises:
      ValueError: an item in no batch or in two, a row outside the gallery, a batch with too few rows.
    """
    gallery = _Gallery(count)
    # Copied to the host while the device computes the batch just dispatched.
    for embedded, rows in prefetch_one((fn(batch), _real_rows(rows, valid, count)) for batch, valid, rows in batches):
        gallery.put(embedded, rows)
    return gallery.result()


class _Gallery:
    """Collects the rows of all batches at their places."""

    def __init__(self, count: int):
        self.times = np.zeros(count, np.int64)  # that each row was put
        self.fields: dict[str, np.ndarray] = {}

    def put(self, batch: Embedding, rows: np.ndarray) -> None:
        fields = host_fields(batch, len(rows))
        if not self.fields:
            self.fields = {k: np.zeros((len(self.times), *a.shape[1:]), a.dtype) for k, a in fields.items()}
        if "elements" in fields:
            length = max(self.fields["elements"].shape[1], fields["elements"].shape[1])
            self.fields, fields = _lengthen(self.fields, length), _lengthen(fields, length)
        for name, values in fields.items():
            self.fields[name][rows] = values
        np.add.at(self.times, rows, 1)

    def result(self) -> Embedding:
        wrong = np.flatnonzero(self.times != 1)
        if wrong.size:
            raise ValueError(
                f"{wrong.size} of {len(self.times)} gallery rows were not encoded exactly once; "
                f"row {wrong[0]} came {self.times[wrong[0]]} times"
            )
        if not self.fields:
            raise ValueError("nothing to encode: the gallery is empty")
        return Embedding(**self.fields)  # type: ignore[arg-type]  # NumPy arrays: a gallery may outgrow the device


def _real_rows(rows: np.ndarray, valid: int, count: int) -> np.ndarray:
    """Gallery rows of the real items of a batch."""
    real = np.asarray(rows)[:valid]
    if len(real) < valid:
        raise ValueError(f"a batch with {valid} real rows names the gallery rows of only {len(real)}")
    outside = real[(real < 0) | (real >= count)]
    if outside.size:
        raise ValueError(f"gallery row {outside[0]} is outside 0 to {count - 1}")
    return real


def host_fields(batch: Embedding, valid: int) -> dict[str, np.ndarray]:
    """The first `valid` rows of an embedding's arrays by name, float32 and bool; elements always come with a mask."""
    if len(batch.vector) < valid:
        raise ValueError(f"a batch with {valid} real rows was encoded into only {len(batch.vector)}")
    fields: dict[str, Array] = {"vector": batch.vector}
    if batch.elements is not None:
        fields["elements"] = batch.elements
        fields["mask"] = jnp.ones(batch.elements.shape[:2], bool) if batch.mask is None else batch.mask
    return {k: np.asarray(a, bool if k == "mask" else np.float32)[:valid] for k, a in fields.items()}


def _lengthen(fields: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Pads the elements of each item with zeros (False in the mask) to `length`."""
    missing = length - fields["elements"].shape[1]
    if not missing:
        return fields
    elements = np.pad(fields["elements"], ((0, 0), (0, missing), (0, 0)))
    return fields | {"elements": elements, "mask": np.pad(fields["mask"], ((0, 0), (0, missing)))}
