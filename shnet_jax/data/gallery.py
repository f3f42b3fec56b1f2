"""A split read for evaluation: each image once, each caption once, nothing altered, nothing left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

from shnet_jax.data.batches import HostBatch, pad_tokens, read_options, stack_images, stored_fields, token_buckets
from shnet_jax.data.records import DataSet, RandomAccess
from shnet_jax.data.tokenise import Captions, Tokenizer, counted_captions, tokenise_split
from shnet_jax.data.vector_batches import CaptionRows, caption_rows


class Part(NamedTuple):
    """Batch of full size; its first `valid` rows are the images or captions `numbers` [valid] of the split.

    The rows after those repeat the first one: a compiled function meets one shape, and no row is empty.
    """

    batch: HostBatch
    valid: int
    numbers: np.ndarray


@dataclass(frozen=True)
class Gallery:
    """The images and captions of a split; number them 0..N-1 and 0..T-1 in the order of the data set.

    texts: stored vectors of captions that the text side reads in place of tokens.
    """

    records: RandomAccess
    captions: Captions
    tokenizer: Tokenizer
    data: ConfigDict
    texts: Mapping[str, CaptionRows] = field(default_factory=dict)

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
        if self.texts:
            return vector_text_batches(self.texts, len(self.captions), batch_size, first)
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


def vector_text_batches(
    texts: Mapping[str, CaptionRows], count: int, batch_size: int, first: int = 0
) -> Iterator[Part]:
    """All `count` captions in order as stored vectors and their masks, [batch_size, ...] by field.

    first: batches left out at the beginning.
    """
    for start in range(first * batch_size, count, batch_size):
        numbers = np.arange(start, min(start + batch_size, count))
        padded = np.pad(numbers, (0, batch_size - len(numbers)), constant_values=start)
        yield Part({name: rows.take(padded) for name, rows in texts.items()}, len(numbers), numbers)


def open_gallery(
    config: ConfigDict,
    dataset: DataSet,
    split: str,
    tokenizer: Tokenizer,
    fields: Sequence[str],
    text_fields: Sequence[str] = (),
) -> Gallery:
    """The gallery of a split with the image fields that the model reads.

    Tokenises its captions, unless the text side reads `text_fields`.
    """
    records = dataset.open_split(split, stored_fields(dataset, fields))
    if text_fields:
        captions = counted_captions(dataset.caption_counts(split))
        return Gallery(records, captions, tokenizer, config.data, caption_rows(dataset, split, text_fields))
    return Gallery(records, tokenise_split(dataset, split, tokenizer), tokenizer, config.data)


def _image_part(records: RandomAccess, batch_size: int, start: int) -> Part:
    numbers = np.arange(start, min(start + batch_size, len(records)))
    padded = np.pad(numbers, (0, batch_size - len(numbers)), constant_values=start)
    return Part({"image_index": padded.astype(np.int32), **stack_images(records, padded)}, len(numbers), numbers)
