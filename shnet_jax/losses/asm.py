"""Adaptive Semantic Margin: hardest-negative hinge whose margin depends on semantic similarity.

Source: docs/models.md, a reconstruction ("ESA-style") of the loss named in Zhao et al. (Image and Vision
Computing 152, 2024), whose equation was not available. Related, and not the same: ASMR (arXiv 2108.04533) and the
CIDEr-based margin of arXiv 2110.02623.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.losses import pairs
from shnet_jax.types import Array, Context, Embedding


def loss(
    images: Embedding,
    texts: Embedding,
    ids: Array,
    ctx: Context,
    *,
    margin: float,
    sign: int,
    scale: float,
    of: str,
) -> dict[str, Array]:
    """Adaptive-margin hinge loss. With S the scores of B pairs, g their global vectors and y their ids,

        m_ij = margin (1 + sign scale k_ij),  k_ij = clip((<gv_i, gv_j> + <gt_i, gt_j>) / 2, 0, 1) without gradient
        1/B sum_i [max_j (m_ij + S_ij) - S_ii]+  +  1/B sum_j [max_i (m_ij + S_ij) - S_jj]+

    over negatives, y_j != y_i: the largest violation, which for equal margins is that of the hardest negative.

    margin: m_0, in units of the score.
    sign: -1, a smaller margin between items that are close in meaning | 1, a larger one.
    scale: of the semantic term; 0: a fixed margin.
    of: "score", the model's whole score | "set", what it scores with global vectors of zeros: its set term.
    Returns shares that add up over devices to: asm_loss; asm_violated, the share of queries whose negative breaks its
    margin; asm_positive, the mean score of the pairs.

    Raises ValueError for a sign or `of` that is none of its choices, a scale outside 0..1, a "set" without elements.
    """
    if sign not in (-1, 1) or of not in ("score", "set") or not 0 <= scale <= 1:
        raise ValueError(
            f"loss.asm: sign is -1 or 1, of 'score' or 'set', scale in 0..1; they are {sign}, {of!r} and {scale}"
        )
    if of == "set" and (images.elements is None or texts.elements is None):
        raise ValueError("loss.asm.of is 'set', and this model's embeddings have no elements: set it to 'score'")
    dim = images.vector.shape[1]
    meaning = lax.stop_gradient(jnp.concatenate([images.vector, texts.vector], axis=1))
    margins = partial(_margins, margin, sign * scale)

    def score_plus_margin(images: Embedding, texts: Embedding) -> Array:
        """Score plus margin. The vector of each item is its own global vector, then both vectors of its pair."""
        vectors = [jnp.zeros_like(x.vector[:, :dim]) if of == "set" else x.vector[:, :dim] for x in (images, texts)]
        pair_vectors = lax.stop_gradient([x.vector[:, dim:] for x in (images, texts)])
        images, texts = (dataclasses.replace(x, vector=v) for x, v in zip((images, texts), vectors, strict=True))
        return ctx.score(images, texts) + margins(*pair_vectors)

    images, texts = (
        dataclasses.replace(x, vector=jnp.concatenate([x.vector, meaning], axis=1)) for x in (images, texts)
    )
    ctx_of_margin = dataclasses.replace(ctx, score=score_plus_margin)
    sides = pairs.directions(images, texts, ids, ctx_of_margin, mask_same_image=True)
    positive = sides[0].positive - jax.vmap(lambda pair: margins(pair[None], pair[None])[0, 0])(meaning)
    size = sides[0].size
    gaps = jnp.stack([side.hardest() for side in sides]) - positive
    return {
        "asm_loss": jax.nn.relu(gaps).sum() / size,
        "asm_violated": (gaps > 0).sum() / (2 * size),
        "asm_positive": positive.sum() / size,
    }


def _margins(margin: float, strength: float, a: Array, b: Array) -> Array:
    """Margins [n, t] of items whose pairs have the vectors a [n, 2d] and b [t, 2d]."""
    close = jnp.clip(jnp.einsum("id,jd->ij", a, b, precision=lax.Precision.HIGHEST) / 2, 0.0, 1.0)
    return margin * (1 + strength * close)
