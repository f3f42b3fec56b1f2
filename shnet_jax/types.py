"""The vocabulary that every part shares: a batch, an embedding, the context of a loss.

Nothing here computes. Shapes use n for images, t for texts, d for the joint embedding size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import struct

Array = jax.Array

DATA = "data"
"""Name of the device axis that a step is mapped over: each device holds its own part of the batch."""

MODEL = "model"
"""Name of the device axis that parameters are split over by rules; see parallel/rules.py."""

WARM_UP = "warm_up"
"""Scope (`jax.named_scope`) of a `lax.cond` that is true for the first steps of a training only: by it
`observe.work` knows, in the compiled program, which branch is that of all the steps after them."""

PAIR_STRATEGIES = ("local", "gathered", "streamed", "ring")
"""Strategies by which a loss reaches the pairs of other devices; see losses/pairs.py."""

Batch = Mapping[str, Array]
"""One device's examples. Image arrays have n rows and text arrays t = n * captions_per_image rows,
image-major: text row j belongs to image row j // (t // n).

image fields (a batch carries only those that the model asks for; `data/schema.py` describes them; in training a picture
is flipped, cropped and erased as `image_view` says):
  image_index     [n] int32             number of the image in its split; equal numbers are the same image
  regions         [n, K, D] float       detector features, zero where masked
  region_mask     [n, K] bool           valid regions; absent when all are
  boxes           [n, K, 4] float32     x1 y1 x2 y2 divided by image width and height, 0..1
  box_classes     [n, K] int32          the detector's label, >= 0
  box_scores      [n, K] float32        the detector's confidence
  grid            [n, G, Dg] float      grid or patch tokens, row by row
  grid_mask       [n, G] bool           valid tokens; absent when all are
  seg_semantic    [n, C, h, w] float    map of each class
  seg_map         [n, H, W] uint8       class of each pixel; C is void, and 255 becomes C
  categories      [n, C] bool           classes present
  relations       [n, R, 3] int32       subject box, predicate, object box; padded rows are -1
  relation_scores [n, K, K] float       largest confidence in any predicate of each ordered pair, 0..1
  image_embedding [n, E] float          global vector of a pretrained model
  image           [n, Y, X, 3] uint8    the picture itself, RGB, all of one size
  identity        [n] int32             number of the person among those of the split, in training only: the `ids`
                                        that losses get in place of `image_index`
text fields, tokens or, of a text side on stored vectors (models/text.py), one of the other two:
  tokens              [t, L] int32      token ids, 0 where masked
  token_mask          [t, L] bool       valid tokens
  caption_embeddings  [t, E] float      vector of each caption
  caption_tokens      [t, L, E] float   vectors of its tokens
  caption_token_mask  [t, L] bool       valid tokens; absent when all are
  caption_index       [t] int32         in training with resident features alone: the number of each caption
"""

TEXT_ROWS = ("tokens", "caption_embeddings", "caption_tokens", "caption_index")
"""Text fields by which the captions of a batch are counted; a batch has one of them."""


def count_texts(batch: Batch) -> int:
    """Number of captions in a batch."""
    return next(batch[name].shape[0] for name in TEXT_ROWS if name in batch)


@struct.dataclass
class Embedding:
    """Embeddings of n items, the output of a tower.

    vector:   [n, d] global vector of each item, of unit length for the models whose score is a dot product.
    elements: [n, m, d] set members, regions or words, for models whose score looks inside the item; else None.
    mask:     [n, m] bool, valid elements; None when there are no elements or all are valid.
    """

    vector: Array
    elements: Array | None = None
    mask: Array | None = None

    def repeat(self, count: int) -> Embedding:
        """Each item `count` times in a row: an image encoded once meets each of its captions."""
        return jax.tree.map(lambda a: a.repeat(count, axis=0), self) if count > 1 else self


Score = Callable[[Embedding, Embedding], Array]
"""Score function (images of n items, texts of t items) -> scores [n, t]."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Strategy by which a loss reaches all pairs of a global batch: `config.loss.pairs`.

    strategy: one of PAIR_STRATEGIES. tile: candidates scored at once by "streamed"; 0: a size by the device's memory
    (`losses.candidates.tile_size`). dtype: of the operands of the scores; the step gives losses a score function of it
    (`models.contract.scorer`). memory: bytes of a device; 0 where that is not known.
    """

    strategy: str = "gathered"
    tile: int = 0
    dtype: str = "float32"
    memory: float = 0.0

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown strategy or a tile below 0."""
        if self.strategy not in PAIR_STRATEGIES:
            raise ValueError(f"loss.pairs.strategy is {self.strategy!r}; choose from {', '.join(PAIR_STRATEGIES)}")
        if self.tile < 0:
            raise ValueError(f"loss.pairs.tile is {self.tile}; it must be at least 1, or 0 for a size by memory")


@struct.dataclass
class Queue:
    """Embeddings of one modality that momentum encoders gave for past batches (training/momentum.py).

    vectors: [K, d] float32, of unit length. ids: [K] int32, their image ids; NO_IMAGE where no batch has been yet.
    pointer: [] int32, the slot that is overwritten next.
    """

    vectors: Array
    ids: Array
    pointer: Array

    @property
    def items(self) -> Embedding:
        """Contents of the slots, as embeddings."""
        return Embedding(self.vectors)


@struct.dataclass
class SetQueue(Queue):
    """Queue of a model whose embeddings are sets of a fixed size. elements: [K, m, d] float32.

    A class of its own, as a field that is None would be part of every checkpoint.
    """

    elements: Array

    @property
    def items(self) -> Embedding:
        """Contents of the slots, as embeddings."""
        return Embedding(self.vectors, self.elements)


NO_IMAGE = -1
"""Image id of a queue slot that still holds its random initial vector, a negative of every query."""


@struct.dataclass
class Keys:
    """Momentum encoders' outputs for a loss; a step computes them outside of the differentiated function.

    images, texts: [b, d] key embeddings of this device's own b pairs. image_queue, text_queue: keys of past batches.
    active: [] bool, whether the queues take part in this step.
    """

    images: Embedding
    texts: Embedding
    image_queue: Queue
    text_queue: Queue
    active: Array | bool = True


DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
"""Directions of retrieval: in names of metrics, and in print."""


@struct.dataclass
class Context:
    """Inputs of a loss other than the embeddings.

    step:   [] int32, batches done before this one.
    params: learnable parameters of this loss (a temperature, ...), {} when it has none.
    score:  the model's score function.
    axis:   name of the mapped device axis, None when unmapped.
    pairs:  how the loss reaches the pairs of other devices.
    keys:   outputs of the momentum encoders, whose queues hold negatives of past batches; None without them.
    captions: captions of each image: rows i * captions to (i + 1) * captions - 1 are one image and its captions.
    """

    step: Array
    params: Mapping[str, Any]
    score: Score = struct.field(pytree_node=False)
    axis: str | None = struct.field(pytree_node=False, default=None)
    pairs: Pairs = struct.field(pytree_node=False, default=Pairs())
    keys: Keys | None = None
    captions: int = struct.field(pytree_node=False, default=1)
