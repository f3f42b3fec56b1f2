"""Fixed-dimensional encodings against a NumPy float64 implementation, and their products against Chamfer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.ops.fixed_encoding import (
    EncodingOptions,
    Projections,
    draw_projections,
    encode_documents,
    encode_queries,
)
from tests.losses.oracle import unit

DIM = 12
queries_of, documents_of = (jax.jit(f, static_argnums=3) for f in (encode_queries, encode_documents))


def sets(n, size, seed, dim=DIM):
    rng = np.random.default_rng(seed)
    mask = rng.random((n, size)) < 0.7
    mask[:, 1] = True
    return unit(rng.normal(size=(n, size, dim))), mask


def oracle(elements, mask, projections, d_final, document):
    """Set by set, partition by partition and cell by cell."""
    planes, inner = np.float64(projections.planes), projections.inner
    out = []
    for members in (x[m] for x, m in zip(elements, mask, strict=True)):
        blocks = []
        for r in range(len(planes)):
            codes = (members @ planes[r].T > 0).astype(int)
            projected = members if inner is None else members @ np.float64(inner[r])
            for cell in range(2 ** planes.shape[1]):
                bits = np.array([cell >> i & 1 for i in range(planes.shape[1])], int)
                distance = (codes != bits).sum(1)
                inside = projected[distance == 0]
                if not document:
                    blocks.append(inside.sum(0) / max(len(members), 1))
                elif len(members):
                    blocks.append(inside.mean(0) if len(inside) else projected[np.argmin(distance)])
                else:
                    blocks.append(np.zeros(projected.shape[1]))
        whole = np.concatenate(blocks) / np.sqrt(len(planes))
        if d_final:
            sketch = np.zeros(d_final)
            np.add.at(sketch, np.asarray(projections.place), whole * np.float64(projections.sign))
            whole = sketch
        out.append(whole)
    return np.array(out)


@pytest.mark.parametrize(
    "options",
    [
        EncodingOptions(3, 4, 5, 0),
        EncodingOptions(2, 3, 0, 0),
        EncodingOptions(3, 2, 4, 16),
        EncodingOptions(0, 1, 0, 0),
    ],
    ids=["projected", "whole", "sketched", "one cell"],
)
def test_both_roles_equal_the_equations(options):
    elements, mask = sets(6, 5, 0)
    mask[2] = False  # an empty set
    given = np.where(mask[..., None], elements, np.nan)  # what is masked is not read
    projections = draw_projections(options, DIM, seed=1)
    for encode, document in ((queries_of, False), (documents_of, True)):
        found = encode(jnp.float32(given), mask, projections, options.d_final)
        assert found.shape == (6, options.width(DIM)) and (found[2] == 0).all()
        np.testing.assert_allclose(found, oracle(elements, mask, projections, options.d_final, document), atol=1e-6)
    everything = encode_documents(jnp.float32(elements), None, projections, options.d_final)
    whole = encode_documents(jnp.float32(elements), jnp.ones_like(mask), projections, options.d_final)
    np.testing.assert_array_equal(everything, whole)


def test_products_approach_one_sided_chamfer():
    """The error falls with the number of partitions, to less than that of the product of means."""
    queries, documents = unit(np.random.default_rng(0).normal(size=(16, 4, DIM))), sets(40, 6, 1)
    documents[0][:16, :4] = unit(queries + 0.2 * np.random.default_rng(2).normal(size=queries.shape))
    documents[1][:16, :4] = True
    cosines = np.einsum("qad,nbd->qnab", queries, documents[0])
    exact = np.where(documents[1][None, :, None], cosines, -np.inf).max(-1).mean(-1)

    def product(options, seed):
        projections = draw_projections(options, DIM, seed)
        first = queries_of(jnp.float32(queries), None, projections, options.d_final)
        return np.asarray(first @ documents_of(jnp.float32(documents[0]), documents[1], projections, options.d_final).T)

    def error(options):
        """Root mean square of what differs, but for the constant that no ranking sees."""
        off = [product(options, seed) - exact for seed in range(3)]
        return np.mean([np.std(x) for x in off])

    errors = [error(EncodingOptions(3, reps, 8, 0)) for reps in (1, 8, 64)]
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.7 * errors[1], errors
    assert errors[2] < 0.75 * error(EncodingOptions(0, 64, 0, 0))  # the product of means
    assert error(EncodingOptions(3, 64, 8, 2048)) < errors[0]
    best = product(EncodingOptions(3, 64, 8, 0), 0).argmax(1)
    np.testing.assert_array_equal(best, exact.argmax(1))


def test_the_seed_decides_every_random_number():
    options = EncodingOptions(3, 2, 4, 8)
    draw = draw_projections.__wrapped__  # what is kept of a draw would be the same anyway
    one, same, other = (draw(options, DIM, seed) for seed in (0, 0, 1))
    for name in Projections._fields:
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
        assert (getattr(one, name) != getattr(other, name)).any()
    assert set(np.unique(one.sign)) == {-1, 1} and set(np.unique(np.abs(one.inner))) == {np.float32(0.5)}


@pytest.mark.parametrize("sizes", [(17, 1, 1, 0), (2, 0, 1, 0), (2, 1, -1, 0), (2, 1, 1, -1)])
def test_sizes_that_do_not_exist_are_errors(sizes):
    with pytest.raises(ValueError, match="at least 1 partition"):
        EncodingOptions(*sizes)
