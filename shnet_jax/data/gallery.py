"""A split read for evaluation: each image once, each caption once, nothing altered, nothing left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

from shnet_jax.data.batches import HostBatch, pad_tokens, read_options, stack_images, stored_fields, token_buckets
from shnet_jax.data.records import DataSet, RandomAccess
from shnet_jax.data.tokenise import Captions, Tokenizer, tokenise_split


class Part(NamedTuple):
    """Batch of full size; its first `valid` rows are the images or captions `numbers` [valid] of the split.

    The rows after those repeat the first one: a compiled function meets one shape, and no row is empty.
    """

    batch: HostBatch
    valid: int
    numbers: np.ndarray


@dataclass(frozen=True)
class Gallery:
    """The images and captions of a split; number them 0..N-1 and 0..T-1 in the order of the data set."""

    records: RandomAccess
    captions: Captions
    tokenizer: Tokenizer
    data: ConfigDict

    @property
    def images(self) -> int:
        """Number of images, N."""
        return len(self.records)

    @property
    def caption_image(self) -> np.ndarray:
        """Image [T] int32 that each caption belongs to."""
        return self.captions.image

    def image_batches(self, batch_size: int, first: int = 0) -> Iterator[Part]:
        """All images in order: `image_index` and the image fields as stored; finish with `batches.gather`.

        first: batches left out at the beginning.
        """
        starts = range(first * batch_size, self.images, batch_size)
        parts = grain.MapDataset.source(starts).map(partial(_image_part, self.records, batch_size))
        return iter(parts.to_iter_dataset(read_options(self.data)))

    def text_batches(self, batch_size: int, first: int = 0) -> Iterator[Part]:
        """All captions as `text_batches` gives them, in the order of the data set by their numbers."""
        return text_batches(self.captions, self.tokenizer, self.data, batch_size, first)


def text_batches(
    captions: Captions, tokenizer: Tokenizer, data: ConfigDict, batch_size: int, first: int = 0
) -> Iterator[Part]:
    """All captions, short ones first so that little is padding: `tokens`, `token_mask` [batch_size, L].

    L is the first of data.token_buckets that fits; captions beyond data.max_tokens are cut. Write row r
    of what is made of a part to position `numbers[r]`, and the result is in the order of the captions.
    first: batches left out at the beginning.
    """
    buckets = token_buckets(data)
    order = np.argsort(captions.lengths(), kind="stable")
    for start in range(first * batch_size, len(order), batch_size):
        numbers = order[start : start + batch_size]
        ids = [tokenizer.enclose(captions.caption(t)[0], data.max_tokens) for t in numbers]
        yield Part(pad_tokens(ids + ids[:1] * (batch_size - len(ids)), buckets), len(numbers), numbers)


def open_gallery(
    config: ConfigDict, dataset: DataSet, split: str, tokenizer: Tokenizer, fields: Sequence[str]
) -> Gallery:
    """The gallery of a split with the image fields that the model reads; tokenises its captions."""
    records = dataset.open_split(split, stored_fields(dataset, fields))
    return Gallery(records, tokenise_split(dataset, split, tokenizer), tokenizer, config.data)


def _image_part(records: RandomAccess, batch_size: int, start: int) -> Part:
    numbers = np.arange(start, min(start + batch_size, len(records)))
    padded = np.pad(numbers, (0, batch_size - len(numbers)), constant_values=start)
    return Part({"image_index": padded.astype(np.int32), **stack_images(records, padded)}, len(numbers), numbers)
