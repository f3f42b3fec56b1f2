"""Scores of a batch of image-text pairs that is spread over devices; every loss is built on this module.

Row i of the images and row i of the texts are a pair (an image with several captions is repeated). b pairs are on this
device and B in the global batch: b times the devices that `ctx.axis` names, b when it is None. A `Direction` holds this
device's b queries (images, or texts) and offers what losses need of their scores with all candidates: `sum` and
`logsumexp` of a function of the score over the negatives, and the `hardest` negative. How the candidates get here, and
how much of the score matrix exists at a time, is the strategy, `ctx.pairs.strategy`:

  local     the candidates are this device's own b pairs, and nothing is sent. Memory b^2. The only one that changes the
            objective: n devices see n independent batches.
  gathered  all candidates are gathered and scored at once. Memory b * B, fastest while that fits.
  streamed  all candidates are gathered, and scored in tiles of `ctx.pairs.tile`. Memory b * tile.
  ring      each device's candidates travel once around the ring of devices, scored where they are. Memory b^2, and no
            device ever holds more than two devices' embeddings.

Streamed and ring score each tile once more in the backward pass instead of keeping it. Only a `total`, the sum over all
queries, computes its gradient in the forward pass over the tiles. Metrics take what they need of the scores from the
pass that the loss makes anyway: a pass of their own would score, and send, all candidates again.

With momentum encoders (`ctx.keys`) a loss has a second part, `over_queues`: the same queries against the other
modality's queue, with the key of their partner as the positive. Every device has the whole queue, scored at once or,
with streamed and ring, in tiles.

The gradient convention of all losses: a loss returns this device's share of the global loss. Shares add up (`psum`) to
the global loss; a mean divides by the global count, which is a constant. Each device scores its own images against all
texts and its own texts against all images, and differentiates through the gathering or the ring, which adds up in
each embedding the gradients of all devices' shares. So the gradient of an embedding is complete on the device that
computed it, and gradients of replicated parameters become complete by one explicit `psum`. Never differentiate a `psum`
or `pmean` of the loss itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.losses.candidates import Block, Candidates, merge_best, tile_size
from shnet_jax.parallel import axis
from shnet_jax.types import Array, Context, Embedding, Pairs, Queue, Score

OfScore = Callable[..., Array]
"""Elementwise function (scores [b, t], *args) -> [b, t]; args are [b, 1] or []. It closes over no traced value."""


@dataclasses.dataclass(frozen=True)
class _Reduction:
    """A reduction over the negatives of a query. ranked: `_Reduced.partner` and `highest` are asked for."""

    kind: Literal["sum", "logsumexp"]
    of_score: OfScore
    ranked: bool = False


@dataclasses.dataclass(frozen=True)
class Direction:
    """This device's b queries of one direction, image to text or text to image, against all candidates.

    queries: b embeddings. candidates: their partners and everybody else's.
    positive: [b], the score of each query with its own partner; with that one's key where the candidates are a queue.
    score: of (queries, candidates). mask_same_image: see `directions`.
    ids: [b], image ids of the queries. in_queue: the candidates are a queue; none of them is a positive.
    known: [b, B], the scores with all candidates where both directions share them; None: each finds its own.
    sharing: queries in a row that have one candidate as their partner, the captions of an image; see `each_image_once`.
    """

    queries: Embedding
    candidates: Candidates
    positive: Array
    score: Score
    mask_same_image: bool
    ids: Array
    in_queue: bool = False
    known: Array | None = None
    sharing: int = 1

    @property
    def size(self) -> int:
        """Pairs in the global batch, B. Undefined for a direction against a queue."""
        return self.positive.shape[0] * axis.axis_size(self.candidates.axis)

    @property
    def width(self) -> int:
        """Candidates that a query meets, its partner included: those of all devices, unless the strategy is local."""
        devices = 1 if self.candidates.pairs.strategy == "local" else axis.axis_size(self.candidates.axis)
        return self.candidates.ids.shape[0] * devices

    def sum(self, of_score: OfScore, *args: Array) -> Array:
        """Sum [b] over each query's negatives of `of_score(score, *args)`; 0 where it has none."""
        return _reduce(self, _Reduction("sum", of_score), args).value

    def total(self, of_score: OfScore, *args: Array) -> Array:
        """Sum [] over all queries of `sum`; in tiles and around the ring, differentiated by scoring each block once."""
        if self.candidates.pairs.strategy in ("local", "gathered"):
            return self.sum(of_score, *args).sum()
        return _Total(self, _Reduction("sum", of_score))(args).value

    def logsumexp(self, of_score: OfScore, *args: Array) -> Array:
        """Log-sum-exp [b] over each query's negatives of `of_score(score, *args)`; -inf where it has none."""
        return _reduce(self, _Reduction("logsumexp", of_score), args).value

    def logsumexp_and_first(self, of_score: OfScore, *args: Array) -> tuple[Array, Array]:
        """Returns `logsumexp`, and whether each query scores its own partner above every negative, [b] bool.

        For the metric of a loss that walks over all candidates anyway. Undefined for a direction against a queue.
        """
        reduced = _reduce(self, _Reduction("logsumexp", of_score, ranked=True), args)
        assert reduced.partner is not None and reduced.highest is not None
        return reduced.value, reduced.partner > reduced.highest

    def hardest(self, rank: int = 1) -> Array:
        """Score [b] of each query's rank-th hardest negative; -inf where it has fewer.

        The search keeps `rank` scores and rows a query; gradients reach these b pairs only.
        """
        scores, rows = _search(self, rank)
        value = _paired(self.score, self.queries, self.candidates.take(rows[:, -1]))
        return jnp.where(jnp.isneginf(scores[:, -1]), -jnp.inf, value)


def directions(
    images: Embedding, texts: Embedding, ids: Array, ctx: Context, *, mask_same_image: bool
) -> tuple[Direction, Direction]:
    """Both directions: the local images against all texts, and the local texts against all images.

    images, texts: b embeddings each, in pairs.
    ids: [b] int32 image ids.
    mask_same_image: captions of the same image are no negatives of it (nor it of them). False, as published by
      VSE-infinity and 3SHNet: everything but the own pair is a negative.
    Raises ValueError when the three do not have equally many rows.
    """
    pairs = ids.shape[0]
    if images.vector.shape[0] != pairs or texts.vector.shape[0] != pairs:
        raise ValueError(
            "a loss takes pairs, with as many images as texts and ids; got "
            f"{images.vector.shape[0]} images, {texts.vector.shape[0]} texts and {pairs} ids"
        )
    positive = _paired(ctx.score, images, texts)

    # A score of elements is costly. Where all candidates are this device's own, both directions have the same scores.
    local = ctx.pairs.strategy == "local" or (ctx.pairs.strategy == "gathered" and axis.axis_size(ctx.axis) == 1)
    known = ctx.score(images, texts) if local and images.elements is not None else None

    def direction(queries: Embedding, items: Embedding, score: Score, known: Array | None) -> Direction:
        candidates = Candidates(items, ids, _with_tile(ctx.pairs, queries, items), ctx.axis)
        return Direction(queries, candidates, positive, score, mask_same_image, ids, known=known)

    return (
        direction(images, texts, ctx.score, known),
        direction(texts, images, lambda x, y: ctx.score(y, x).T, None if known is None else known.T),
    )


def each_image_once(
    images: Embedding, texts: Embedding, ids: Array, ctx: Context, *, mask_same_image: bool
) -> Direction:
    """The local texts against all images, each image once, though it stands in `ctx.captions` rows.

    The image of a caption is its partner whichever of the image's captions it is, and never its negative. For sums over
    the entries of the matrix of N images and `ctx.captions` * N texts; arguments as those of `directions`.
    """
    _, sides = directions(images, texts, ids, ctx, mask_same_image=mask_same_image)
    items = jax.tree.map(lambda x: x[:: ctx.captions], images)
    candidates = Candidates(items, ids[:: ctx.captions], sides.candidates.pairs, ctx.axis)
    return dataclasses.replace(sides, candidates=candidates, known=None, sharing=ctx.captions)


def over_queues(sides: tuple[Direction, Direction], ctx: Context, term: Callable[[Direction], Array]) -> Array:
    """This device's sum [] of `term`, a loss of each query [b], over both directions against the queues.

    0 without momentum encoders, and in steps in which their queues take no part yet. The positive of a query is its
    score with the key of its partner, as in MoCo (He et al. 2020) and USER: with the partner itself the loss could tell
    positives from negatives by their age alone, and moves all embeddings away from those of past steps instead of
    learning (docs/results.md has the figures). No gradient flows into the queues; keys are made outside of what
    a step differentiates.
    """
    if ctx.keys is None:
        return jnp.zeros(())
    keys = ctx.keys
    against = _against(keys.text_queue, keys.texts, sides[0]), _against(keys.image_queue, keys.images, sides[1])
    return jnp.where(keys.active, sum(term(side).sum() for side in against), 0.0)


def _against(queue: Queue, keys: Embedding, direction: Direction) -> Direction:
    """Direction of the same queries against a queue; keys: those of their partners."""
    pairs = direction.candidates.pairs
    at_once = pairs.strategy in ("local", "gathered")
    pairs = dataclasses.replace(pairs, strategy="local" if at_once else "streamed")
    candidates = Candidates(lax.stop_gradient(queue.items), queue.ids, pairs, None)
    positive = _paired(direction.score, direction.queries, keys)
    return dataclasses.replace(direction, candidates=candidates, positive=positive, in_queue=True, known=None)


def _with_tile(pairs: Pairs, queries: Embedding, items: Embedding) -> Pairs:
    return dataclasses.replace(pairs, tile=tile_size(pairs, queries, items))


def _paired(score: Score, queries: Embedding, candidates: Embedding) -> Array:
    """Score [b] of each query with the candidate of the same row."""

    def one(query: Embedding, candidate: Embedding) -> Array:
        query, candidate = jax.tree.map(lambda x: x[None], (query, candidate))
        return score(query, candidate)[0, 0]

    return jax.vmap(one)(queries, candidates)


Best = tuple[Array, Array]
"""Scores [b, rank] of each query's best negatives so far, and their rows."""


def _search(direction: Direction, rank: int) -> Best:
    """Scores and rows of each query's `rank` hardest negatives; without gradient."""
    b = direction.positive.shape[0]
    queries, items = lax.stop_gradient((direction.queries, direction.candidates.items))
    candidates = dataclasses.replace(direction.candidates, items=items)
    detached = dataclasses.replace(direction, queries=queries, candidates=candidates)
    none = jnp.full((b, rank), -jnp.inf), jnp.zeros((b, rank), jnp.int32)

    def visit(best: Best, block: Block) -> Best:
        # Here and not behind the walk: a score may have parameters, and its backward pass is not wanted.
        scores = lax.stop_gradient(_scores(detached, block))
        scores = jnp.where(_negatives(direction, block), scores, -jnp.inf)
        values, columns = _best(scores, min(rank, scores.shape[1]))
        return merge_best(best, (values, block.rows[columns]), rank)

    return candidates.walk(visit, none)


def _best(scores: Array, rank: int) -> tuple[Array, Array]:
    """Values and columns of the `rank` largest scores of each row, [b, rank] both; ties go to the first."""
    if rank > 1:
        return lax.top_k(jnp.where(scores == 0, 0.0, scores), rank)  # for it -0.0 is below 0.0; they are a tie
    column = jnp.argmax(scores, axis=1)[:, None]  # much faster than top_k
    return jnp.take_along_axis(scores, column, axis=1), column


def _negatives(direction: Direction, block: Block) -> Array:
    """Mask [b, t] bool of the block's candidates that count as negatives."""
    counted = block.rows >= 0
    if direction.mask_same_image:  # its own image among them
        return (direction.ids[:, None] != block.ids) & counted
    if direction.in_queue:
        return jnp.broadcast_to(counted, (direction.ids.shape[0], *counted.shape))
    queries = direction.ids.shape[0]
    query_rows = axis.axis_index(direction.candidates.axis) * queries + jnp.arange(queries, dtype=jnp.int32)
    return (query_rows[:, None] // direction.sharing != block.rows) & counted


class _Reduced(NamedTuple):
    """A reduction over the blocks so far, [b] each.

    partner: the score of each query with its own partner. highest: that of its highest negative. Both are as the blocks
    have them, so of two equal items neither is above the other. They have no gradient. None where not asked for.
    """

    value: Array
    partner: Array | None = None
    highest: Array | None = None


class _Differentiated(NamedTuple):
    """The arrays, other than the candidates, by which a reduction is differentiated.

    captured: what the score closes over, as parameters of its model.
    """

    queries: Embedding
    args: tuple[Array, ...]
    captured: list[Array]


class _Fixed(NamedTuple):
    """The arrays by which a reduction is not differentiated."""

    query_ids: Array
    candidate_ids: Array
    query_mask: Array | None
    candidate_mask: Array | None


def _reduce(direction: Direction, reduction: _Reduction, args: tuple[Array, ...]) -> _Reduced:
    """Reduction over the negatives of all blocks."""
    block = direction.candidates.in_one_block()
    if block is None:
        return _Blockwise(direction, reduction)(args)
    # Scored once; what the backward pass needs of it is kept.
    reduced = lax.stop_gradient(_reduce_block(direction, reduction, args, block))
    slope = _slope(direction, reduction, args, block, reduced.value)
    return reduced._replace(value=reduced.value + (slope - lax.stop_gradient(slope)))


class _Blockwise:
    """A reduction over several blocks, which are scored once more in the backward pass instead of being kept."""

    def __init__(self, direction: Direction, reduction: _Reduction):
        self.direction, self.reduction = direction, reduction
        # A score may close over traced parameters of its model: gradients must find them among the arguments.
        items = direction.candidates.tile_items()
        self.score, self.captured = jax.closure_convert(direction.score, direction.queries, items)
        self.reduce = jax.custom_vjp(self.fold)
        self.reduce.defvjp(self.forward, self.backward)

    def __call__(self, args: tuple[Array, ...]) -> _Reduced:
        queries, candidates = self.direction.queries, self.direction.candidates
        inputs = _Differentiated(_without_mask(queries), args, self.captured)
        fixed = _Fixed(self.direction.ids, candidates.ids, queries.mask, candidates.items.mask)
        return self.reduce(inputs, _without_mask(candidates.items), fixed)

    def bound(self, inputs: _Differentiated, items: Embedding, fixed: _Fixed) -> Direction:
        """The direction, made of the arguments of the differentiated function alone."""
        items = dataclasses.replace(items, mask=fixed.candidate_mask)
        return dataclasses.replace(
            self.direction,
            queries=dataclasses.replace(inputs.queries, mask=fixed.query_mask),
            candidates=dataclasses.replace(self.direction.candidates, items=items, ids=fixed.candidate_ids),
            ids=fixed.query_ids,
            score=lambda queries, items: self.score(queries, items, *inputs.captured),
        )

    def fold(self, inputs: _Differentiated, items: Embedding, fixed: _Fixed) -> _Reduced:
        """Folds the reduction over the blocks."""
        direction = self.bound(inputs, items, fixed)
        combine, start = (jnp.add, 0.0) if self.reduction.kind == "sum" else (jnp.logaddexp, -jnp.inf)

        def visit(total: _Reduced, block: Block) -> _Reduced:
            part = _reduce_block(direction, self.reduction, inputs.args, block)
            ranks = jax.tree.map(jnp.maximum, total[1:], part[1:])
            return _Reduced(combine(total.value, part.value), *ranks)

        lowest = jnp.full(direction.positive.shape, -jnp.inf)
        ranks = (lowest, lowest) if self.reduction.ranked else ()
        return direction.candidates.walk(visit, _Reduced(jnp.full_like(lowest, start), *ranks))

    def forward(self, inputs: _Differentiated, items: Embedding, fixed: _Fixed) -> tuple[_Reduced, Any]:
        """The reduction and what its backward pass needs: inputs and values, no scores."""
        reduced = self.reduce(inputs, items, fixed)  # not `fold`, of which jax.checkpoint would keep what no tile needs
        return reduced, (inputs, items, fixed, reduced.value)

    def backward(self, residuals: Any, cotangents: _Reduced) -> tuple[_Differentiated, Embedding, None]:
        """Gradients by inputs and by this device's candidates; scores each block once more."""
        inputs, items, fixed, value = residuals

        def visit(sums: _Differentiated, block: Block) -> tuple[_Differentiated, Embedding]:
            slope = partial(self.slope, items, fixed, value, block)
            _, pull = jax.vjp(slope, inputs, _without_mask(block.items))
            by_inputs, by_tile = pull(cotangents.value)
            return jax.tree.map(jnp.add, sums, by_inputs), by_tile

        zeros = jax.tree.map(jnp.zeros_like, inputs)
        return *self.bound(inputs, items, fixed).candidates.walk_back(visit, zeros), None

    def slope(
        self, items: Embedding, fixed: _Fixed, value: Array, block: Block, inputs: _Differentiated, tile: Embedding
    ) -> Array:
        """`_slope` of a block as a function of the inputs and of the block's own items."""
        block = dataclasses.replace(block, items=dataclasses.replace(tile, mask=block.items.mask))
        return _slope(self.bound(inputs, items, fixed), self.reduction, inputs.args, block, value)


class _Total(_Blockwise):
    """The sum [] of a reduction over the queries, with its gradient from the same walk: each block is scored once.

    The backward pass has one number for all queries, so it can multiply gradients that are there: those of the queries
    and of this device's candidates, b embeddings each. A sum for each query has to wait for the weights of its queries.
    """

    def fold(self, inputs: _Differentiated, items: Embedding, fixed: _Fixed) -> _Reduced:
        """The sum alone, for calls without a gradient."""
        return _Reduced(super().fold(inputs, items, fixed).value.sum())

    def forward(self, inputs: _Differentiated, items: Embedding, fixed: _Fixed) -> tuple[_Reduced, Any]:
        """The sum, and its gradients by inputs and by this device's candidates."""

        def visit(sums: tuple[Array, _Differentiated], block: Block) -> tuple[tuple[Array, _Differentiated], Embedding]:
            slope = partial(self.slope, items, fixed, sums[0], block)
            values, pull = jax.vjp(slope, inputs, _without_mask(block.items))
            by_inputs, by_tile = pull(jnp.ones_like(values))
            return jax.tree.map(jnp.add, sums, (values, by_inputs)), by_tile

        zeros = jnp.zeros_like(self.direction.positive), jax.tree.map(jnp.zeros_like, inputs)
        (values, by_inputs), by_items = self.bound(inputs, items, fixed).candidates.walk_back(visit, zeros)
        return _Reduced(values.sum()), (by_inputs, by_items)

    def backward(self, residuals: Any, cotangents: _Reduced) -> tuple[_Differentiated, Embedding, None]:
        """Multiplies the gradients by that of the sum."""
        return *jax.tree.map(lambda gradient: cotangents.value * gradient, residuals), None


def _without_mask(items: Embedding) -> Embedding:
    return dataclasses.replace(items, mask=None)


def _scores(direction: Direction, block: Block) -> Array:
    """Scores [b, t] of the queries with one block."""
    return direction.score(direction.queries, block.items) if direction.known is None else direction.known


def _reduce_block(direction: Direction, reduction: _Reduction, args: tuple[Array, ...], block: Block) -> _Reduced:
    """Reduction over the negatives of one block."""
    scores, negative = _scores(direction, block), _negatives(direction, block)
    values = reduction.of_score(scores, *args)
    ranks: tuple[Array, ...] = ()
    if reduction.ranked:
        partner = direction.candidates.own_block().rows[:, None] == block.rows
        ranks = tuple(jnp.max(jnp.where(counted, scores, -jnp.inf), axis=1) for counted in (partner, negative))
    if reduction.kind == "sum":
        return _Reduced(jnp.sum(jnp.where(negative, values, 0.0), axis=1), *ranks)
    return _Reduced(jax.nn.logsumexp(jnp.where(negative, values, -jnp.inf), axis=1), *ranks)


def _slope(direction: Direction, reduction: _Reduction, args: tuple[Array, ...], block: Block, value: Array) -> Array:
    """Surrogate [b] whose derivative is the block's part of the derivative of the reduction, `value` [b]."""
    values = reduction.of_score(_scores(direction, block), *args)
    weights = _negatives(direction, block).astype(values.dtype)
    if reduction.kind == "logsumexp":
        share = jnp.exp(values - value[:, None])  # of the sum of exponentials
        weights = lax.stop_gradient(jnp.where(weights > 0, share, 0.0))
    return jnp.sum(weights * values, axis=1)
