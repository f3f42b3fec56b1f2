"""Similarity of every pair of embedding sets: smooth Chamfer, Chamfer, max, mean of the cosines of their elements.

Source: spec section 4, after Kim et al., "Improving Cross-Modal Retrieval with Set of Diverse Embeddings" (CVPR 2023).
The cosines of all elements of all pairs never exist at once: forward and backward walk over the image elements, and
only the planes [n, t] of one image element with each text element are there at a time.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.ops.matmul import einsum
from shnet_jax.types import Array

SIMILARITIES = ("smooth_chamfer", "chamfer", "max", "mean")

_LOW = -1e30  # in place of a masked cosine; finite, so that differences of two of them are no NaN

_Planes = tuple[Array, Array]


def set_similarity(
    images: Array, image_mask: Array | None, texts: Array, text_mask: Array | None, kind: str, sharpness: float
) -> Array:
    """Similarities [n, t] float32 of n image sets and t text sets.

    With c_ab the product of image element a and text element b, over valid elements, M_v and M_t of them:

      smooth_chamfer  1/(2 s M_v) sum_a log sum_b exp(s c_ab) + 1/(2 s M_t) sum_b log sum_a exp(s c_ab)
      chamfer         1/(2 M_v) sum_a max_b c_ab + 1/(2 M_t) sum_b max_a c_ab, its limit for large s
      max             max_ab c_ab (multiple instance learning)
      mean            mean_ab c_ab

    Of sets of one element each, all four are the product itself. A pair with an empty set scores 0.

    Args:
      images: [n, M_v, d]; texts: [t, M_t, d]; unit vectors where cosines are meant.
      image_mask, text_mask: [n, M_v] and [t, M_t] bool, valid elements; None: all.
      kind: one of SIMILARITIES. sharpness: s > 0 of "smooth_chamfer" (DivE 16).

    Raises:
      ValueError: an unknown kind, or a sharpness that is not above 0.
    """
    if kind not in SIMILARITIES:
        raise ValueError(f"set similarity {kind!r}; choose from {', '.join(SIMILARITIES)}")
    if not sharpness > 0:
        raise ValueError(f"the sharpness of a smooth Chamfer similarity must be above 0; it is {sharpness}")
    image_mask = jnp.ones(images.shape[:2], bool) if image_mask is None else image_mask
    text_mask = jnp.ones(texts.shape[:2], bool) if text_mask is None else text_mask
    if kind == "mean":
        return einsum("nd,td->nt", _mean(images, image_mask), _mean(texts, text_mask), "float32")
    # Elements lead: a reduction over them is then a sum of whole planes.
    of_images, of_texts = images.swapaxes(0, 1), texts.swapaxes(0, 1)
    return _best_matches(kind, sharpness, of_images, image_mask.T, of_texts, text_mask.T)


def _mean(elements: Array, mask: Array) -> Array:
    weight = mask[..., None].astype(elements.dtype)
    return jnp.sum(elements * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1.0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _best_matches(
    kind: str, sharpness: float, images: Array, image_mask: Array, texts: Array, text_mask: Array
) -> Array:
    """images [a, n, d], image_mask [a, n], texts [b, t, d], text_mask [b, t] -> [n, t]."""
    return _forward(kind, sharpness, images, image_mask, texts, text_mask)[0]


def _shares(kind: str, mask: Array) -> Array:
    """[m, k] what the best match of each of the m elements weighs in the similarity of its set, of k sets."""
    valid = mask.astype(jnp.float32)
    return valid if kind == "max" else valid / (2 * jnp.maximum(jnp.sum(valid, axis=0), 1.0))


def _forward(
    kind: str, sharpness: float, images: Array, image_mask: Array, texts: Array, text_mask: Array
) -> tuple[Array, tuple]:
    """The similarities, and of each element with each set of the other side its best matches (see `_Planes`).

    For the smooth kind a plane holds log sum exp(s c), for the others the number of the best element.
    """
    smooth = kind == "smooth_chamfer"
    n, t, count = images.shape[1], texts.shape[1], texts.shape[0]

    def visit(by_text: _Planes, at: tuple[Array, Array, Array]) -> tuple[_Planes, _Planes]:
        number, element, valid = at
        scale = sharpness if smooth else 1.0
        cosines = scale * einsum("nd,btd->bnt", element, texts, "float32")
        to_texts = jnp.where(text_mask[:, None, :], cosines, _LOW)
        to_image = jnp.where(valid[None, :, None], cosines, _LOW)
        best, place = by_text
        if smooth:
            return (jnp.logaddexp(best, to_image), place), (jax.nn.logsumexp(to_texts, axis=0), place[0])
        place = jnp.where(to_image > best, number, place)
        by_image = jnp.max(to_texts, axis=0), jnp.argmax(to_texts, axis=0).astype(jnp.int16)
        return (jnp.maximum(best, to_image), place), by_image

    numbers = jnp.arange(images.shape[0], dtype=jnp.int16)
    places = (1, 1, 1) if smooth else (count, n, t)
    start = jnp.full((count, n, t), _LOW), jnp.zeros(places, jnp.int16)
    (columns, column_places), (rows, row_places) = lax.scan(visit, start, (numbers, images, image_mask))

    pairs = image_mask.any(axis=0)[:, None] & text_mask.any(axis=0)[None, :]
    if kind == "max":
        rows = jnp.where(image_mask[:, :, None], rows, _LOW)
        value, column_places = jnp.max(rows, axis=0), jnp.argmax(rows, axis=0).astype(jnp.int16)[None]
    else:
        of_image, of_text = _shares(kind, image_mask), _shares(kind, text_mask)
        value = jnp.sum(of_image[:, :, None] * rows, axis=0) + jnp.sum(of_text[:, None, :] * columns, axis=0)
        value = value / sharpness if smooth else value
    found = (rows, columns) if smooth else (row_places, column_places)
    return jnp.where(pairs, value, 0.0), (images, image_mask, texts, text_mask, pairs, found)


def _backward(kind: str, sharpness: float, residuals: tuple, cotangent: Array) -> tuple:
    images, image_mask, texts, text_mask, pairs, (rows, columns) = residuals
    cotangent = jnp.where(pairs, cotangent, 0.0)
    of_image, of_text = _shares(kind, image_mask), _shares(kind, text_mask)
    numbers = jnp.arange(texts.shape[0], dtype=jnp.int16)[:, None, None]

    def visit(sums: Array, at: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array]:
        number, element, valid, row, share = at  # row: [n, t], plane of this image element
        both = valid[None, :, None] & text_mask[:, None, :]
        if kind == "smooth_chamfer":
            logits = sharpness * einsum("nd,btd->bnt", element, texts, "float32")
            logits = jnp.where(both, logits, 2 * _LOW)
            weights = share[None, :, None] * jnp.exp(logits - row)
            weights += of_text[:, None, :] * jnp.exp(logits - columns)
        elif kind == "chamfer":
            weights = share[None, :, None] * (row == numbers) + of_text[:, None, :] * (columns == number)
        else:
            weights = ((row == numbers) & (columns == number)).astype(jnp.float32)
        weights = jnp.where(both, weights * cotangent, 0.0)
        sums += einsum("bnt,nd->btd", weights, element, "float32")
        return sums, einsum("bnt,btd->nd", weights, texts, "float32")

    counted = jnp.arange(images.shape[0], dtype=jnp.int16), images, image_mask, rows, of_image
    of_texts, of_images = lax.scan(visit, jnp.zeros_like(texts), counted)
    return of_images, None, of_texts, None


_best_matches.defvjp(_forward, _backward)
