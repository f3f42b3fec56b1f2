"""Training batches: the batch of step s is a function of (seed, s), on any number of hosts.

A host's stream is a grain dataset of batches. The random choices are made per example before the examples are
dealt to hosts, so that k hosts together see in step s exactly the examples that one host would see.

Streaming and resident reading share everything but the place where image features come from: the batch
itself, or a table that stays on the device. `gather` finishes both, so the model sees the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import grain
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from shnet_jax.data.augment import Augmentation, alter_words, keep_grid, keep_regions
from shnet_jax.data.negatives import Negatives, group_size, open_negatives
from shnet_jax.data.pictures import Views, viewed
from shnet_jax.data.records import DataSet, RandomAccess
from shnet_jax.data.tokenise import Captions, Tokenizer
from shnet_jax.data.vector_batches import images_of, vector_batches, with_first, with_masks
from shnet_jax.types import Array, Batch

HostBatch = dict[str, np.ndarray]

# unit field -> its mask in the data set, and the mask of what augmentation keeps (training batches only)
_UNITS = {"regions": ("region_mask", "region_keep"), "grid": ("grid_mask", "grid_keep")}


def steps_per_epoch(dataset: DataSet, split: str, batch_size: int) -> int:
    """Steps after which as many captions were seen as `split` has; `batch_size` counts pairs over all hosts.

    Raises ValueError when the split has fewer captions than one batch.
    """
    captions = int(dataset.caption_counts(split).sum())
    if captions < batch_size:
        raise ValueError(f"{dataset.path}: split {split!r} has {captions} captions, fewer than a batch of {batch_size}")
    return captions // batch_size


def train_batches(
    config: ConfigDict,
    dataset: DataSet,
    captions: Captions | None,
    tokenizer: Tokenizer,
    fields: Sequence[str],
    text_fields: Sequence[str] = (),
    *,
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.DatasetIterator[HostBatch]:
    """The endless stream of this host's batches, to be finished by `gather` on the device.

    Its `get_state` and `set_state` (or grain.checkpoint) resume it with the next batch.
    With data.captions_per_image = C = 1 an example is an (image, caption) pair; a pass meets every pair once,
    in an order that changes with each pass. With C > 1 it is an image with C of its captions, drawn without
    replacement (an image with fewer repeats them evenly). The last, partial batch of a pass is left out.
    With data.negatives each example is followed by its hard negatives, examples like others (data/negatives.py).

    A batch has, with n = batch_size / C:
      image_index  [n] int32, number of the image in the split
      region_keep  [n, K] bool, units that augmentation leaves, if `fields` has regions; so grid_keep [n, G]
      image_view   [n, 7] int32, how the picture is altered (`pictures.Views`), if `fields` has image
      identity     [n] int32, number of the person among those of the split, if data.identity and it has any
      tokens       [batch_size, L] int32, 0 where masked; row j belongs to image j // C
      token_mask   [batch_size, L] bool
      and, unless data.resident, `fields` and the masks of their units, as stored.
    L is the first of data.token_buckets that fits; with several hosts, which must agree on it, the largest.
    With `text_fields` these and their masks, [batch_size, ...], stand in the place of tokens, or, with data.resident,
    caption_index [batch_size] int32 (data/vector_batches.py).

    Args:
      captions: of data.train_split (`tokenise.tokenise_split`); None with `text_fields`.
      fields: image fields of the model (`image_fields`).
      text_fields: stored vectors that the text side reads (`models.text.text_fields`); (): it reads tokens.
      batch_size: pairs in a batch of this host.
      seed: order and augmentation; the same on all hosts.
      shard_index, shard_count: this host among all.
    """
    data = config.data
    images = images_per_batch(batch_size, data)
    if text_fields:
        hosts = {"host": shard_index, "hosts": shard_count}
        stored = stored_fields(dataset, fields)
        source = vector_batches(data, dataset, stored, text_fields, batch_size=batch_size, seed=seed, **hosts)
        stream = grain.MapDataset.source(source)
    else:
        assert captions is not None
        stream = _token_stream(data, dataset, captions, tokenizer, fields, images, seed, shard_index, shard_count)
    return iter(stream.to_iter_dataset(read_options(data)))


def _token_stream(
    data: ConfigDict,
    dataset: DataSet,
    captions: Captions,
    tokenizer: Tokenizer,
    fields: Sequence[str],
    images: int,
    seed: int,
    shard_index: int,
    shard_count: int,
) -> grain.MapDataset[HostBatch]:
    """`train_batches` of captions as tokens; images: of a batch of this host."""
    groups = images // group_size(data)
    examples, used = _pass_size(dataset, data, captions, groups * shard_count)
    records = dataset.open_split(data.train_split, stored_fields(dataset, fields))
    draw = _ExampleDraw.from_config(data, captions, tokenizer, records[0], open_negatives(data, dataset))
    buckets = token_buckets(data)
    collate = partial(_collate, buckets=buckets if shard_count == 1 else buckets[-1:])
    # Explicit seeds: grain's default ones depend on the position in the pipeline, and so would a resumed run.
    order_seed, draw_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    drawn = grain.MapDataset.range(examples).shuffle(seed=order_seed).random_map(draw, seed=draw_seed)
    # Hosts take consecutive batches in turn: together, in their order, they hold the rows of one host's larger batch.
    stream = drawn[:used].batch(groups, batch_fn=collate)[shard_index::shard_count].repeat()
    persons = dataset.identities(data.train_split) if data.identity else None
    if persons is not None:
        numbers = np.unique(persons, return_inverse=True)[1].astype(np.int32)
        stream = stream.map(lambda batch: batch | {"identity": numbers[batch["image_index"]]})
    if not data.resident:
        stream = stream.map(lambda batch: batch | stack_images(records, batch["image_index"]))
    return stream


def read_options(data: ConfigDict) -> grain.ReadOptions:
    """Grain's options: threads, as worker processes would each hold the captions and need absl's flags parsed."""
    return grain.ReadOptions(num_threads=min(data.read_threads, data.prefetch), prefetch_buffer_size=data.prefetch)


def token_buckets(data: ConfigDict) -> tuple[int, ...]:
    """The lengths that captions are padded to, ascending, up to the first that holds data.max_tokens."""
    if data.max_tokens < 2:
        raise ValueError(f"data.max_tokens is {data.max_tokens}; [CLS] and [SEP] alone need 2")
    buckets = sorted(set(data.token_buckets))
    fitting = [length for length in buckets if length >= data.max_tokens]
    if not fitting:
        raise ValueError(
            f"data.token_buckets is {tuple(buckets)}; none holds data.max_tokens = {data.max_tokens} tokens"
        )
    return tuple(length for length in buckets if length <= fitting[0])


def pad_tokens(ids: Sequence[np.ndarray], buckets: Sequence[int]) -> HostBatch:
    """Pads the ids of t captions: `tokens` [t, L] int32, `token_mask` [t, L] bool; L is the first bucket to fit."""
    lengths = np.array([len(i) for i in ids])
    width = next(bucket for bucket in buckets if bucket >= lengths.max())
    mask = np.arange(width) < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(ids)
    return {"tokens": tokens, "token_mask": mask}


def stored_fields(dataset: DataSet, fields: Sequence[str]) -> tuple[str, ...]:
    """Names of `fields` and of the masks of their units where the data set has any (all units are valid without)."""
    masks = [mask for unit, (mask, _) in _UNITS.items() if unit in fields]
    others = [field for field in fields if field not in masks]
    return (*others, *(mask for mask in masks if mask in dataset.features))


def stack_images(records: RandomAccess, numbers: Iterable[int]) -> HostBatch:
    """The image fields of the records `numbers`, as stored, with a leading axis."""
    return records.stack(np.fromiter(numbers, np.int64))


def resident_table(dataset: DataSet, split: str, fields: Sequence[str], text_fields: Sequence[str] = ()) -> HostBatch:
    """All of a split as stored, for `gather`: `fields` and their masks, [N, ...], `text_fields` and theirs [T, ...]."""
    stored = stored_fields(dataset, fields)
    beside = {name: dataset.column(split, name) for name in (*stored, *with_masks(dataset, text_fields))}
    columns = {name: column.block(0, len(column)) for name, column in beside.items() if column is not None}
    if in_records := [name for name in with_masks(dataset, text_fields) if name not in columns]:
        for name in in_records:
            columns[name] = np.concatenate([record[name] for record in dataset.open_split(split, (name,))])
    stored = tuple(name for name in stored if name not in columns)
    return columns | (_read_all(dataset.open_split(split, stored)) if stored else {})


def _read_all(records: RandomAccess) -> HostBatch:
    """All records, [N, ...] by field."""
    table = {field: np.empty((len(records), *np.shape(value)), value.dtype) for field, value in records[0].items()}
    for number, record in enumerate(records):
        for field, values in table.items():
            values[number] = record[field]
    return table


def gather(table: Mapping[str, Array] | None, batch: Batch) -> Batch:
    """Model inputs made from a batch of `train_batches` or a gallery; pure, part of the compiled step.

    Image fields come from `table` [N, ...] by image_index, stored vectors of captions by caption_index; what the table
    lacks comes from the batch itself. Masks are
    narrowed to the units that augmentation keeps; an image that would lose all its units keeps all, as an
    empty set has no pooled vector and keeping one unit would favour it. Units are zero where masked; float16
    and bfloat16 are widened to float32 here, after the transfer to the device; so are pictures altered.
    """
    rows = {
        field: jnp.take(values, batch["caption_index" if field.startswith("caption_") else "image_index"], axis=0)
        for field, values in (table or {}).items()
    }
    out = {field: _widen(jnp.asarray(values)) for field, values in {**batch, **rows}.items()}
    out.pop("caption_index", None)
    for unit, (mask, keep) in _UNITS.items():
        if unit in out:
            valid = out.get(mask, jnp.ones(out[unit].shape[:2], bool))
            kept = valid & out.pop(keep, valid)
            out[mask] = jnp.where(kept.any(axis=1, keepdims=True), kept, valid)
            out[unit] = jnp.where(out[mask][..., None], out[unit], 0)
    if "image_view" in out:
        out["image"] = viewed(out["image"], out.pop("image_view"))
    return out


def _widen(values: Array) -> Array:
    narrow = jnp.issubdtype(values.dtype, jnp.floating) and values.dtype.itemsize < 4
    return values.astype(jnp.float32) if narrow else values


def images_per_batch(batch_size: int, data: ConfigDict) -> int:
    """Images of a batch of `batch_size` pairs, of hard negatives too. Raises ValueError where it does not divide."""
    captions_per_image, group = data.captions_per_image, group_size(data)
    if captions_per_image < 1 or batch_size < 1 or batch_size % (captions_per_image * group):
        hard = f" times {group}, an example and its data.negatives.count hard negatives" if group > 1 else ""
        raise ValueError(
            f"a host's batch has {batch_size} pairs; expected a multiple of data.captions_per_image, "
            f"{captions_per_image}{hard}"
        )
    return batch_size // captions_per_image


def _pass_size(dataset: DataSet, data: ConfigDict, captions: Captions, per_step: int) -> tuple[int, int]:
    """Examples of the training split, and how many of them a pass of whole steps uses."""
    kind, examples = ("captions", len(captions)) if data.captions_per_image == 1 else ("images", captions.images)
    if examples < per_step:
        raise ValueError(
            f"{dataset.path}: split {data.train_split!r} has {examples} {kind}, fewer than the {per_step} of one step"
        )
    return examples, examples // per_step * per_step


class _ExampleDraw(NamedTuple):
    """Draws training examples. units: of an image, by field. views: None without pictures. negatives: None without."""

    captions: Captions
    tokenizer: Tokenizer
    rates: Augmentation
    per_image: int
    max_tokens: int
    units: Mapping[str, int]
    views: Views | None
    negatives: Negatives | None

    @classmethod
    def from_config(
        cls,
        data: ConfigDict,
        captions: Captions,
        tokenizer: Tokenizer,
        record: Mapping[str, np.ndarray],
        negatives: Negatives | None = None,
    ) -> _ExampleDraw:
        """Checks the rates. record: any of the split, for its shapes."""
        units = {unit: len(record[unit]) for unit in _UNITS if unit in record}
        views = Views.from_config(data, record["image"].shape[:2]) if "image" in record else None
        rates = Augmentation.from_config(data)
        return cls(captions, tokenizer, rates, data.captions_per_image, data.max_tokens, units, views, negatives)

    def __call__(self, number: int, rng: np.random.Generator) -> list[dict[str, Any]]:
        """An example, then its hard negatives."""
        if self.per_image == 1:
            image, chosen = int(self.captions.image[number]), [number]
        else:
            image, chosen = number, self._captions_of(number, rng)
        examples = [self._example(image, chosen, rng)]
        if self.negatives is not None:
            hard = self.negatives.draw(np.array(chosen[:1]), np.array([image]), rng)[0]
            for caption, of in zip(hard.tolist(), images_of(self.captions.first, hard).tolist(), strict=True):
                others = [caption] if self.per_image == 1 else self._captions_of(of, rng)
                captions = with_first(np.array([others]), np.array([caption]))[0]
                examples.append(self._example(of, captions.tolist(), rng))
        return examples

    def _captions_of(self, image: int, rng: np.random.Generator) -> list[int]:
        """Captions of an image, without replacement; an image with fewer repeats them evenly."""
        first, last = self.captions.first[image : image + 2]
        return [*(first + np.resize(rng.permutation(last - first), self.per_image))]

    def _example(self, image: int, chosen: Sequence[int], rng: np.random.Generator) -> dict[str, Any]:
        """One example: image, token ids of its captions, kept units, view of its picture."""
        tokenizer, rates = self.tokenizer, self.rates
        altered = (
            alter_words(*self.captions.caption(t), rates, tokenizer.mask_id, tokenizer.random_range, rng)
            for t in chosen
        )
        ids = [tokenizer.enclose(pieces, self.max_tokens) for pieces in altered]
        example: dict[str, Any] = {"image_index": image, "ids": ids}
        if "regions" in self.units:
            example["region_keep"] = keep_regions(self.units["regions"], rates, rng)
        if "grid" in self.units:
            example["grid_keep"] = keep_grid(self.units["grid"], rates, rng)
        if self.views is not None:
            example["image_view"] = self.views.draw(rng)
        return example


def _collate(groups: Sequence[Sequence[dict[str, Any]]], *, buckets: Sequence[int]) -> HostBatch:
    examples = [example for group in groups for example in group]
    keeps = [name for name in examples[0] if name.endswith(("_keep", "_view"))]
    return {
        "image_index": np.array([example["image_index"] for example in examples], np.int32),
        **pad_tokens([ids for example in examples for ids in example["ids"]], buckets),
        **{name: np.stack([example[name] for example in examples]) for name in keeps},
    }
