"""Similarity of every pair of embedding sets: smooth Chamfer, Chamfer, MaxSim, max, mean of their elements' cosines.

Source: docs/models.md, after Kim et al., "Improving Cross-Modal Retrieval with Set of Diverse Embeddings" (CVPR 2023).
The cosines of all elements of all pairs never exist at once: forward and backward walk over the image elements, and
only those of one image element with each text element are there at a time, [n, M_t, t].
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.ops.matmul import einsum
from shnet_jax.types import Array

SIMILARITIES = ("smooth_chamfer", "chamfer", "maxsim_texts", "maxsim_images", "max", "mean")

HALVES = {"chamfer": (1.0, 1.0), "maxsim_texts": (0.0, 2.0), "maxsim_images": (2.0, 0.0)}
"""Factors on the two halves of Chamfer, over image elements and over text elements; both halves have weight 1/2."""

SHARPEST = 40.0
"""Largest sharpness: exp(s (c - 1)) of cosines c stays far from the smallest float32, so nothing has to be rescaled."""

_LOW = -1e30  # in place of a masked cosine
_UNROLL = 2  # image elements whose steps the compiler sees together: fewer copies of what is summed up


def set_similarity(
    images: Array, image_mask: Array | None, texts: Array, text_mask: Array | None, kind: str, sharpness: float
) -> Array:
    """Similarities [n, t] float32 of n image sets and t text sets.

    With c_ab the product of image element a and text element b, over valid elements, M_v and M_t of them:

      smooth_chamfer  1/(2 s M_v) sum_a log sum_b exp(s c_ab) + 1/(2 s M_t) sum_b log sum_a exp(s c_ab)
      chamfer         1/(2 M_v) sum_a max_b c_ab + 1/(2 M_t) sum_b max_a c_ab, its limit for large s
      maxsim_texts    1/M_t sum_b max_a c_ab: each text element finds its best image element. The late interaction of
                      ColBERT (arXiv 2004.12832), divided by M_t: for a caption as the query the order is the same
      maxsim_images   1/M_v sum_a max_b c_ab: the other way round
      max             max_ab c_ab (multiple instance learning)
      mean            mean_ab c_ab

    Of sets of one element each, all of them are the product itself. A pair with an empty set scores 0.

    Args:
      images: [n, M_v, d]; texts: [t, M_t, d]; unit vectors where cosines are meant.
      image_mask, text_mask: [n, M_v] and [t, M_t] bool, valid elements; None: all.
      kind: one of SIMILARITIES. sharpness: s of "smooth_chamfer", for vectors of at most unit length (DivE 16).

    Raises:
      ValueError: an unknown kind, or a sharpness that is not above 0 and at most SHARPEST.
    """
    if kind not in SIMILARITIES:
        raise ValueError(f"set similarity {kind!r}; choose from {', '.join(SIMILARITIES)}")
    if not 0 < sharpness <= SHARPEST:
        raise ValueError(
            f"the sharpness of a smooth Chamfer similarity must be above 0 and at most {SHARPEST}, it is {sharpness}; "
            "its limit for large ones is 'chamfer'"
        )
    image_mask = jnp.ones(images.shape[:2], bool) if image_mask is None else image_mask
    text_mask = jnp.ones(texts.shape[:2], bool) if text_mask is None else text_mask
    if kind == "mean":
        return einsum("nd,td->nt", _mean(images, image_mask), _mean(texts, text_mask), "float32")
    of_images, of_texts = images.swapaxes(0, 1), texts.swapaxes(0, 1)
    if kind == "smooth_chamfer":
        return _smooth(sharpness, of_images, image_mask.T, of_texts, text_mask.T)
    return _hard(kind, of_images, image_mask.T, of_texts, text_mask.T)


def _mean(elements: Array, mask: Array) -> Array:
    weight = mask[..., None].astype(elements.dtype)
    return jnp.sum(elements * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)


def _shares(mask: Array) -> Array:
    """Weight [m, k] of each of the m elements in the similarity of its set, for k sets."""
    valid = mask.astype(jnp.float32)
    return valid / (2 * jnp.maximum(jnp.sum(valid, axis=0), 1.0))


def _cosines(element: Array, texts: Array) -> Array:
    """Cosines [n, b, t] of one element of each image [n, d] with all elements of the texts [b, t, d]."""
    return einsum("nd,btd->nbt", element, texts, "float32")


def _products(weights: Array, element: Array, texts: Array) -> tuple[Array, Array]:
    """Gradients [n, d] and [b, t, d] of `_cosines` from that of its result, weights [n, b, t]."""
    return einsum("nbt,btd->nd", weights, texts, "float32"), einsum("nbt,nd->btd", weights, element, "float32")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _smooth(sharpness: float, images: Array, image_mask: Array, texts: Array, text_mask: Array) -> Array:
    """Smooth Chamfer: images [a, n, d], image_mask [a, n], texts [b, t, d], text_mask [b, t] -> [n, t]."""
    return _smooth_forward(sharpness, images, image_mask, texts, text_mask)[0]


def _smooth_forward(
    sharpness: float, images: Array, image_mask: Array, texts: Array, text_mask: Array
) -> tuple[Array, tuple]:
    """Similarities and residuals: beside the arguments the sums of exp(s (c - 1)) are kept.

    rows [a, n, t]: over the text elements. columns [n, b, t]: over the image elements.
    """

    def visit(columns: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        element, valid = at
        powers = jnp.exp(sharpness * (_cosines(element, texts) - 1))
        row = jnp.sum(jnp.where(text_mask, powers, 0.0), axis=1)
        return columns + jnp.where(valid[:, None, None], powers, 0.0), row

    start = jnp.zeros((images.shape[1], *text_mask.shape))
    columns, rows = lax.scan(visit, start, (images, image_mask), unroll=_UNROLL)
    of_image, of_text = _shares(image_mask), _shares(text_mask)
    value = jnp.sum(of_image[:, :, None] * jnp.log(rows), axis=0) + jnp.sum(of_text * jnp.log(columns), axis=1)
    # Both halves add s / 2 that the exponents lack: together 1.
    value = jnp.where(_both(image_mask, text_mask), value / sharpness + 1, 0.0)
    return value, (images, image_mask, texts, text_mask, rows, columns)


def _smooth_backward(sharpness: float, residuals: tuple, cotangent: Array) -> tuple:
    images, image_mask, texts, text_mask, rows, columns = residuals
    of_column = _shares(text_mask) / columns

    def visit(sums: Array, at: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        element, valid, row, share = at
        powers = jnp.exp(sharpness * (_cosines(element, texts) - 1))
        weights = powers * ((share[:, None] / row)[:, None, :] + of_column) * cotangent[:, None, :]
        weights = jnp.where(valid[:, None, None] & text_mask, weights, 0.0)
        of_element, of_texts = _products(weights, element, texts)
        return sums + of_texts, of_element

    of_texts, of_images = lax.scan(
        visit, jnp.zeros_like(texts), (images, image_mask, rows, _shares(image_mask)), unroll=_UNROLL
    )
    return of_images, None, of_texts, None


def _both(image_mask: Array, text_mask: Array) -> Array:
    """Mask [n, t] bool: whether both sets have a valid element."""
    return image_mask.any(axis=0)[:, None] & text_mask.any(axis=0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hard(kind: str, images: Array, image_mask: Array, texts: Array, text_mask: Array) -> Array:
    """Similarity "max" or one of HALVES; the arguments are those of `_smooth`."""
    return _hard_forward(kind, images, image_mask, texts, text_mask)[0]


def _hard_forward(kind: str, images: Array, image_mask: Array, texts: Array, text_mask: Array) -> tuple[Array, tuple]:
    """Similarities and residuals: beside the arguments the indices of the best matches are kept, as int16.

    rows [a, n, t]: of each image element, the text element. columns: of each text element, the image element
    [n, b, t]; for "max" the image element of the best pair [n, 1, t]. None: of a half that the kind leaves out.
    """
    by_rows, by_columns = HALVES.get(kind, (1.0, 0.0))

    def visit(best: Any, at: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        number, element, valid = at
        cosines, row = _cosines(element, texts), None
        if by_rows:
            to_texts = jnp.where(text_mask, cosines, _LOW)
            row = jnp.max(to_texts, axis=1), jnp.argmax(to_texts, axis=1).astype(jnp.int16)
        if by_columns:
            to_image = jnp.where(valid[:, None, None], cosines, _LOW)
            best = jnp.maximum(best[0], to_image), jnp.where(to_image > best[0], number, best[1])
        return best, row

    shape = images.shape[1], *text_mask.shape
    numbers = jnp.arange(images.shape[0], dtype=jnp.int16)
    start: Any = (jnp.full(shape, _LOW), jnp.zeros(shape, jnp.int16)) if by_columns else None
    columns, rows = lax.scan(visit, start, (numbers, images, image_mask), unroll=_UNROLL)
    value, text_numbers, image_numbers = jnp.zeros(()), None, None
    if by_rows:
        best_texts, text_numbers = rows
        if kind == "max":
            best_texts = jnp.where(image_mask[:, :, None], best_texts, _LOW)
            value, image_numbers = (
                jnp.max(best_texts, axis=0),
                jnp.argmax(best_texts, axis=0).astype(jnp.int16)[:, None],
            )
        else:
            value = jnp.sum(by_rows * _shares(image_mask)[:, :, None] * best_texts, axis=0)
    if by_columns:
        best_images, image_numbers = columns
        value += jnp.sum(by_columns * _shares(text_mask) * best_images, axis=1)
    value = jnp.where(_both(image_mask, text_mask), value, 0.0)
    return value, (images, image_mask, texts, text_mask, text_numbers, image_numbers)


def _hard_backward(kind: str, residuals: tuple, cotangent: Array) -> tuple:
    images, image_mask, texts, text_mask, rows, columns = residuals
    by_rows, by_columns = HALVES.get(kind, (1.0, 1.0))
    of_image, of_text = by_rows * _shares(image_mask), by_columns * _shares(text_mask)
    numbers = jnp.arange(texts.shape[0], dtype=jnp.int16)[:, None]

    def visit(sums: Array, at: tuple[Array, Array, Array, Array | None, Array]) -> tuple[Array, Array]:
        number, element, valid, row, share = at
        by_image = False if row is None else row[:, None, :] == numbers
        by_text = False if columns is None else columns == number
        weights = by_image & by_text if kind == "max" else share[:, None, None] * by_image + of_text * by_text
        weights = jnp.where(valid[:, None, None] & text_mask, weights * cotangent[:, None, :], 0.0)
        of_element, of_texts = _products(weights, element, texts)
        return sums + of_texts, of_element

    counted = jnp.arange(images.shape[0], dtype=jnp.int16), images, image_mask, rows, of_image
    of_texts, of_images = lax.scan(visit, jnp.zeros_like(texts), counted, unroll=_UNROLL)
    return of_images, None, of_texts, None


_smooth.defvjp(_smooth_forward, _smooth_backward)
_hard.defvjp(_hard_forward, _hard_backward)
