"""Encoded galleries, and ensembles of models: the weighted mean of their scores, tile by tile."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from shnet_jax.evaluation.protocols import Provenance
from shnet_jax.evaluation.ranking_methods import RankingMethod
from shnet_jax.evaluation.tiles import Items, ItemScore
from shnet_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Encoded images and captions of a split.

    images, texts: one embedding of each, or for an ensemble a tuple with one of each member.
    score: (some images, some texts) -> scores of their pairs.
    caption_image: [t] int, image of each caption.
    image_ids: unicode [n]. captions: the t sentences.
    image_person: [n] int, person in each image, for a person search; None for none.
    method: how they are ranked; None: by `ranks.ranks` with the score.
    """

    name: str
    images: Items
    texts: Items
    score: ItemScore
    caption_image: np.ndarray
    image_ids: np.ndarray
    captions: tuple[str, ...]
    provenance: Provenance
    image_person: np.ndarray | None = None
    method: RankingMethod | None = None


@dataclasses.dataclass(frozen=True)
class MeanScore:
    """Score of an ensemble: the sum of weight * score over its members; the weights add up to 1.

    Called with one embedding of each member on either side. Equal ones are equal, so they share compiled programs.
    """

    scores: tuple[ItemScore, ...]
    weights: tuple[float, ...]

    def __call__(self, images: Sequence[Items], texts: Sequence[Items]) -> Array:
        """Scores [n, t] of n images and t captions."""
        members = zip(self.weights, self.scores, images, texts, strict=True)
        first, *rest = (weight * score(a, b).astype("float32") for weight, score, a, b in members)
        return sum(rest, start=first)


def mean_score(scores: Sequence[ItemScore], weights: Sequence[float] = ()) -> MeanScore:
    """The mean of scores, weighted in proportion to `weights` (none: equally).

    Raises ValueError for weights that are too many or few, negative, not finite or all zero.
    """
    given = np.asarray(weights if len(weights) else [1.0] * len(scores), np.float64)
    if len(given) != len(scores):
        raise ValueError(f"config.eval.ensemble_weights has {len(given)} numbers for {len(scores)} models")
    if not np.isfinite(given).all() or (given < 0).any() or not given.sum():
        raise ValueError(
            f"config.eval.ensemble_weights is {tuple(weights)}; expected finite numbers >= 0, not all of them 0"
        )
    return MeanScore(tuple(scores), tuple((given / given.sum()).tolist()))


def combine(name: str, members: Sequence[Embedded], weights: Sequence[float] = ()) -> Embedded:
    """The ensemble of models that encoded the same gallery; it scores by the mean of their scores.

    The members may differ in model, text tower and features. Raises ValueError unless there are at least two, with the
    same images and captions in the same order.
    """
    if len(members) < 2:
        raise ValueError(f"an ensemble has at least 2 members, got {len(members)}")
    first = members[0]
    for other in members[1:]:
        _check_same_gallery(first, other)
    score = mean_score([m.score for m in members], weights)
    parts = ", ".join(f"{m.name} ({w:.3g})" for m, w in zip(members, score.weights, strict=True))
    return dataclasses.replace(
        first,
        name=name,
        images=tuple(m.images for m in members),
        texts=tuple(m.texts for m in members),
        score=score,
        method=None,
        provenance=_joint_provenance(
            [m.provenance for m in members], f"mean of the scores of {len(members)} models: {parts}"
        ),
    )


def _check_same_gallery(first: Embedded, other: Embedded) -> None:
    where = " and ".join(f"{e.name} ({e.provenance.dataset}, {e.provenance.split})" for e in (first, other))
    for kind in ("image_ids", "captions", "caption_image"):
        a, b = (np.asarray(getattr(gallery, kind)) for gallery in (first, other))
        kind = "images" if kind == "image_ids" else kind
        if len(a) != len(b):
            raise ValueError(f"ensemble of {where}: {len(a)} and {len(b)} {kind}; expected the same gallery")
        if (a != b).any():
            row = int(np.argmax(a != b))
            raise ValueError(
                f"ensemble of {where}: {kind} row {row} is {a.item(row)!r} and {b.item(row)!r}; expected the same, in "
                "the same order"
            )


def _joint_provenance(members: Sequence[Provenance], ensemble: str) -> Provenance:
    """The fields equal in all members, and the different values of the rest in the order of the members."""
    joint = {}
    for field in dataclasses.fields(Provenance):
        values = [getattr(member, field.name) for member in members]
        joint[field.name] = values[0] if len(set(values)) == 1 else ", ".join(map(str, values))
    return Provenance(**joint | {"ensemble": ensemble})
