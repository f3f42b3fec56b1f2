"""Set similarities and their gradients against a float64 oracle that has all cosines at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.ops.set_similarity import SHARPEST, SIMILARITIES, set_similarity
from tests.losses.oracle import gradient, unit

SHARPNESS = 16.0
compiled = jax.jit(set_similarity, static_argnums=(4, 5))


def similarity(*arguments):
    return np.asarray(compiled(*arguments))


def oracle(images, image_mask, texts, text_mask, kind, sharpness=SHARPNESS):
    """[n, t] pair by pair from the elements that are valid."""
    out = np.zeros((len(images), len(texts)))
    for i, j in np.ndindex(out.shape):
        c = images[i][image_mask[i]] @ texts[j][text_mask[j]].T
        if not c.size:
            continue
        match kind:
            case "smooth_chamfer":
                rows, columns = (np.log(np.exp(sharpness * c).sum(axis)) / sharpness for axis in (1, 0))
                out[i, j] = rows.mean() / 2 + columns.mean() / 2
            case "chamfer":
                out[i, j] = c.max(1).mean() / 2 + c.max(0).mean() / 2
            case "maxsim_texts":
                out[i, j] = c.max(0).mean()
            case "maxsim_images":
                out[i, j] = c.max(1).mean()
            case "max":
                out[i, j] = c.max()
            case "mean":
                out[i, j] = c.mean()
    return out


def sets(n=4, t=3, image_size=5, text_size=2, dim=6):
    """Sets of several sizes; the last text is empty."""
    rng = np.random.default_rng(0)
    images, texts = unit(rng.normal(size=(n, image_size, dim))), unit(rng.normal(size=(t, text_size, dim)))
    image_mask, text_mask = rng.random((n, image_size)) < 0.6, np.ones((t, text_size), bool)
    image_mask[:, 1] = True
    image_mask[0], text_mask[0, 0], text_mask[-1] = True, False, False
    return images, image_mask, texts, text_mask


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_value_and_gradient(kind):
    images, image_mask, texts, text_mask = sets()
    weights = np.random.default_rng(1).normal(size=(4, 3))

    def ours(images, texts):
        scores = set_similarity(images, image_mask, texts, text_mask, kind, SHARPNESS)
        return jnp.sum(weights * scores), scores

    def expected(images, texts):
        return (weights * oracle(images, image_mask, texts, text_mask, kind)).sum()

    run = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))
    (_, scores), grads = run(jnp.float32(images), jnp.float32(texts))
    np.testing.assert_allclose(scores, oracle(images, image_mask, texts, text_mask, kind), atol=2e-6)
    assert (scores[:, -1] == 0).all()  # with the empty set
    np.testing.assert_allclose(grads[0], gradient(lambda x: expected(x, texts), images), atol=2e-5)
    np.testing.assert_allclose(grads[1], gradient(lambda x: expected(images, x), texts), atol=2e-5)


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_sets_of_one_element_score_their_product(kind):
    images, _, texts, _ = sets()
    scores = similarity(np.float32(images[:, :1]), None, np.float32(texts[:, :1]), None, kind, SHARPNESS)
    np.testing.assert_allclose(scores, images[:, 0] @ texts[:, 0].T, atol=1e-6)


@pytest.mark.slow
def test_smooth_chamfer_lies_above_chamfer_by_at_most_log_m():
    images, image_mask, texts, text_mask = sets()
    args = np.float32(images), image_mask, np.float32(texts), text_mask
    above = similarity(*args, "smooth_chamfer", SHARPEST) - similarity(*args, "chamfer", 1.0)
    assert (above > -1e-6).all() and (above < np.log(5) / SHARPEST).all() and (above[:, 0] > 1e-6).any()
    same = np.tile(np.eye(6, dtype=np.float32)[0], (1, 4, 1))
    most = similarity(same, None, same, None, "smooth_chamfer", SHARPNESS)
    np.testing.assert_allclose(most, 1 + np.log(4) / SHARPNESS, rtol=1e-6)
    farthest = similarity(same, None, -same, None, "smooth_chamfer", SHARPEST)
    np.testing.assert_allclose(farthest, -1 + np.log(4) / SHARPEST, rtol=1e-6)


@pytest.mark.parametrize("kind", ["smooth_chamfer", "chamfer", "maxsim_texts", "max"])
def test_the_cosines_of_all_elements_never_exist(kind):
    """Temporaries of value and gradient at 16 x 16 elements stay below half of what those cosines alone would take."""
    elements = jax.ShapeDtypeStruct((64, 16, 8), jnp.float32)

    def total(images, texts):
        return jnp.sum(set_similarity(images, None, texts, None, kind, SHARPNESS))

    program = jax.jit(jax.grad(total, argnums=(0, 1))).lower(elements, elements).compile()
    assert program.memory_analysis().temp_size_in_bytes < 64 * 64 * 16 * 16 * 4 / 2


@pytest.mark.parametrize(
    "kind, sharpness, message",
    [("sum", 16.0, "'sum'; choose"), ("max", 0.0, "above 0"), ("smooth_chamfer", 41.0, "at most 40")],
)
def test_what_is_none_is_an_error(kind, sharpness, message):
    images, _, texts, _ = sets()
    with pytest.raises(ValueError, match=message):
        set_similarity(images, None, texts, None, kind, sharpness)
