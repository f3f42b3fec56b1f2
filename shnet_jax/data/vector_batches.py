"""Training batches of a text side on stored vectors: rows of columns, drawn for a whole batch at once.

The batch of step s is a function of (seed, s), on any number of hosts; no captions are read or tokenised. In memory
are 8 bytes an image and, without `data.shuffle_block`, 4 bytes an example; vectors pass through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from shnet_jax.data.augment import Augmentation, keep_grid, keep_regions
from shnet_jax.data.negatives import Negatives, group_size, open_negatives
from shnet_jax.data.pictures import Views
from shnet_jax.data.records import DataSet, RandomAccess

ENDLESS = 2**48
"""Length of the stream in steps; grain needs one, and no training reaches it."""
WINDOW = 16
"""Blocks of `data.shuffle_block` whose examples are mixed."""
_DRAWS = 1  # folded into the seed of what is drawn in a batch, as 0 is into that of the order
_NEGATIVES = 2  # the same for hard negatives, so that the other draws are those of a run without them


class CaptionRows(Protocol):
    """Vectors of captions by their numbers in the split."""

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Copies of rows [n], [n, ...]."""


@dataclass(frozen=True)
class RecordRows:
    """`CaptionRows` of a set whose vectors lie in its records, as those of other tools do; slow."""

    records: RandomAccess
    field: str
    first: np.ndarray

    def take(self, rows: np.ndarray) -> np.ndarray:
        """See `CaptionRows`."""
        images = images_of(self.first, rows)
        vectors_by_image = [self.records[int(image)][self.field] for image in images]
        return np.stack(
            [of_image[row] for of_image, row in zip(vectors_by_image, rows - self.first[images], strict=True)]
        )


def images_of(first: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """Image of each caption; first: [N + 1], first caption of each image."""
    return np.searchsorted(first, captions, side="right") - 1


def with_first(captions: np.ndarray, hard: np.ndarray) -> np.ndarray:
    """Captions [n, c] drawn for n images, of which `hard` [n] stand first; none stands twice that did not before."""
    places = np.where(captions == hard[:, None], np.arange(captions.shape[1]), 0).max(axis=1)
    captions = captions.copy()
    captions[np.arange(len(captions)), places] = captions[:, 0]
    captions[:, 0] = hard
    return captions


def caption_rows(dataset: DataSet, split: str, fields: Sequence[str]) -> dict[str, CaptionRows]:
    """The stored vectors of captions, by field, and their masks where the data set has any."""
    rows_by_field: dict[str, CaptionRows] = {}
    for field in with_masks(dataset, fields):
        column = dataset.column(split, field)
        records = dataset.open_split(split, (field,))
        rows_by_field[field] = RecordRows(records, field, dataset.first_captions(split)) if column is None else column
    return rows_by_field


def with_masks(dataset: DataSet, fields: Sequence[str]) -> tuple[str, ...]:
    """Text fields and the masks of their tokens, where the data set has any."""
    mask = ("caption_token_mask",) if "caption_tokens" in fields and "caption_token_mask" in dataset.features else ()
    return (*fields, *mask)


@dataclass(frozen=True)
class VectorBatches:
    """The batches of one host by step, as grain reads them: [s] gives that of step s.

    first: [N + 1], first caption of each image.
    per_image: captions of an image in a batch.
    images: of a batch of all hosts together, those of hard negatives included.
    host, hosts: number of this host, and of all hosts.
    block: see `Order`.
    units: regions and cells of an image, which augmentation drops, by field.
    views: how pictures are altered, None without.
    texts: what is read of the captions; {} with resident features.
    records: what is read of the images; None with resident features.
    persons: [N] number of the person in each image, or None.
    negatives: hard negatives that follow their example in the batch, or None.
    """

    first: np.ndarray
    per_image: int
    images: int
    host: int
    hosts: int
    seed: int
    block: int
    rates: Augmentation
    units: Mapping[str, int]
    views: Views | None
    texts: Mapping[str, CaptionRows]
    records: RandomAccess | None
    persons: np.ndarray | None
    negatives: Negatives | None = None

    def __len__(self) -> int:
        return ENDLESS

    @cached_property
    def order(self) -> Order:
        """The order of the examples: captions, or images with several captions in a batch."""
        examples = int(self.first[-1]) if self.per_image == 1 else len(self.first) - 1
        group = 1 if self.negatives is None else 1 + self.negatives.count
        return Order(examples, self.images // group, self.seed, self.block)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, _DRAWS, step))
        examples = self.order.batch(step)
        if self.per_image == 1:
            captions, images = examples, images_of(self.first, examples)
        else:
            captions, images = self._choose(examples, rng).reshape(-1), examples
        if self.negatives is not None:
            captions, images = self._with_negatives(self.negatives, captions, images, step)
        kept = self._augment(rng)
        host_rows = slice(self.host * (self.images // self.hosts), (self.host + 1) * (self.images // self.hosts))
        images, captions = images[host_rows], captions.reshape(self.images, -1)[host_rows].reshape(-1)
        batch = {"image_index": images.astype(np.int32), "caption_index": captions.astype(np.int32)}
        batch |= {name: values[host_rows] for name, values in kept.items()}
        if self.persons is not None:
            batch["identity"] = self.persons[images]
        if self.records is not None:
            del batch["caption_index"]
            batch |= self.records.stack(images) | {name: rows.take(captions) for name, rows in self.texts.items()}
        return batch

    def _choose(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Captions [n, per_image] of images, without replacement; an image with fewer repeats them evenly."""
        counts = self.first[images + 1] - self.first[images]
        keys = rng.random((len(images), int(counts.max())))
        order = np.argsort(np.where(np.arange(keys.shape[1]) < counts[:, None], keys, 2.0), axis=1)
        places = np.arange(self.per_image) % counts[:, None]
        return self.first[images][:, None] + np.take_along_axis(order, places, axis=1)

    def _with_negatives(
        self, negatives: Negatives, captions: np.ndarray, images: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Captions and images of the batch, each example followed by its hard negatives."""
        rng, example_captions = np.random.default_rng((self.seed, _NEGATIVES, step)), captions.reshape(len(images), -1)
        hard = negatives.draw(example_captions[:, 0], images, rng)
        of_hard = images_of(self.first, hard.reshape(-1))
        others = self._choose(of_hard, rng) if self.per_image > 1 else hard.reshape(-1, 1)
        others = with_first(others, hard.reshape(-1)).reshape(*hard.shape, -1)
        both = np.concatenate([example_captions[:, None], others], axis=1)
        return both.reshape(-1), np.column_stack([images, of_hard.reshape(hard.shape)]).reshape(-1)

    def _augment(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Augmentation by field: the units that each image keeps, and how its picture is altered."""
        keep = {"regions": ("region_keep", keep_regions), "grid": ("grid_keep", keep_grid)}
        drawn = {
            keep[unit][0]: np.stack([keep[unit][1](count, self.rates, rng) for _ in range(self.images)])
            for unit, count in self.units.items()
        }
        if self.views is not None:
            drawn["image_view"] = np.stack([self.views.draw(rng) for _ in range(self.images)])
        return drawn


@dataclass(frozen=True)
class Order:
    """The examples of each batch, in another order in each pass; the last, partial batch of a pass is left out.

    block: 0: any order is as likely as any other, 4 bytes an example. Else the examples are cut into blocks of this
    many, the blocks drawn in random order, and the examples of WINDOW blocks mixed: a disk reads block by block.
    """

    examples: int
    size: int
    seed: int
    block: int = 0

    def batch(self, step: int) -> np.ndarray:
        """Examples [size] of a step, int64."""
        number, place = divmod(step, self.examples // self.size)
        start = place * self.size
        if not self.block:
            return _permutation(self.seed, number, self.examples)[start : start + self.size].astype(np.int64)
        window = WINDOW * self.block
        windows = range(start // window, (start + self.size - 1) // window + 1)
        mixed = np.concatenate([self._window(number, i) for i in windows])
        return mixed[start - windows[0] * window :][: self.size]

    def _window(self, number: int, window: int) -> np.ndarray:
        return _mixed_window(self.seed, number, window, self.examples, self.block)


@lru_cache(maxsize=2)
def _permutation(seed: int, number: int, examples: int) -> np.ndarray:
    dtype = np.int32 if examples < 2**31 else np.int64
    order = np.arange(examples, dtype=dtype)
    np.random.default_rng((seed, 0, number)).shuffle(order)
    return order


@lru_cache(maxsize=4)
def _mixed_window(seed: int, number: int, window: int, examples: int, block: int) -> np.ndarray:
    """Examples of a window of a pass. The partial block is last, so that all windows before it have the same size."""
    full_blocks = examples // block
    blocks = np.append(np.random.default_rng((seed, 0, number)).permutation(full_blocks), full_blocks)
    chosen = blocks[window * WINDOW : (window + 1) * WINDOW]
    rows = (chosen[:, None] * block + np.arange(block)).reshape(-1)
    rows = rows[rows < examples]
    # `window + 1`: NumPy pads seeds with zeros, so window 0 would have the seed of the order of the blocks.
    return np.random.default_rng((seed, 0, number, window + 1)).permutation(rows)


def vector_batches(
    data: ConfigDict,
    dataset: DataSet,
    image_fields: Sequence[str],
    text_fields: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    host: int,
    hosts: int,
) -> VectorBatches:
    """The source of a run's batches. image_fields: with masks, as `batches.stored_fields` gives them.

    batch_size: pairs in a batch of this host. Raises ValueError for a split with fewer examples than a step needs, and
    for a negative block.
    """
    split, per_image = data.train_split, data.captions_per_image
    if data.shuffle_block < 0:
        raise ValueError(f"config.data.shuffle_block is {data.shuffle_block}; it must be at least 0")
    first = dataset.first_captions(split)
    images = batch_size // per_image * hosts
    negatives = open_negatives(data, dataset)
    examples_of_step = images // group_size(data)
    kind, examples = ("captions", int(first[-1])) if per_image == 1 else ("images", len(first) - 1)
    if examples < examples_of_step:
        raise ValueError(
            f"{dataset.path}: split {split!r} has {examples} {kind}, fewer than the {examples_of_step} of one step"
        )
    records = dataset.open_split(split, image_fields)
    one: Any = {name: dataset.features[name].shape for name in image_fields}
    units = {unit: int(one[unit][0]) for unit in ("regions", "grid") if unit in one}
    persons = dataset.identities(split) if data.identity and "identity" in dataset.features else None
    if persons is not None:
        persons = np.unique(persons, return_inverse=True)[1].astype(np.int32)
    return VectorBatches(
        first,
        per_image,
        images,
        host,
        hosts,
        seed,
        data.shuffle_block,
        Augmentation.from_config(data),
        units,
        Views.from_config(data, one["image"][:2]) if "image" in one else None,
        {} if data.resident else caption_rows(dataset, split, text_fields),
        None if data.resident else records,
        persons,
        negatives,
    )
