import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.evaluate.encode import encode
from shnet_jax.types import Embedding


def portions(order, size):
    """Batches of `size` rows holding the items of `order`; the last is padded with -1."""
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        padded = np.concatenate([rows, np.full(size - len(rows), -1)])
        yield jnp.asarray(padded, jnp.float32), len(rows), padded


def double(batch):
    return Embedding((2 * batch[:, None]).astype(jnp.bfloat16))


@pytest.mark.parametrize("size", [1, 3, 7, 8])
def test_items_come_back_in_the_order_of_the_gallery(size):
    order = np.random.default_rng(0).permutation(7)
    done = []
    found = encode(double, portions(order, size), 7, done.append)
    np.testing.assert_array_equal(found.vector, 2.0 * np.arange(7)[:, None])
    assert isinstance(found.vector, np.ndarray) and found.vector.dtype == np.float32
    assert found.elements is None and found.mask is None
    assert done[-1] == 7 and done == sorted(done)


def test_sets_of_different_length_are_masked():
    def words(length, masked):
        def fn(batch):
            elements = jnp.broadcast_to(batch[:, None, None], (len(batch), length, 2))
            mask = jnp.broadcast_to(jnp.arange(length) < 1, elements.shape[:2]) if masked else None
            return Embedding(batch[:, None], elements, mask)

        return fn

    towers = iter([words(2, False), words(4, True), words(3, False)])
    found = encode(lambda batch: next(towers)(batch), portions(np.arange(6), 2), 6)
    assert found.elements.shape == (6, 4, 2) and found.mask.dtype == bool
    np.testing.assert_array_equal(found.mask.sum(axis=1), [2, 2, 1, 1, 3, 3])
    np.testing.assert_array_equal(found.elements[1], [[1, 1], [1, 1], [0, 0], [0, 0]])
    np.testing.assert_array_equal(found.elements[5, :, 0], [5, 5, 5, 0])


@pytest.mark.parametrize(
    ("order", "count", "message"),
    [
        ([0, 1, 3], 4, "1 of 4 gallery rows .* row 2 came 0 times"),
        ([0, 1, 1], 2, "row 1 came 2 times"),
        ([0, 1, 2], 2, "row 2 is outside 0 to 1"),
        ([], 0, "the gallery is empty"),
    ],
)
def test_each_item_is_encoded_exactly_once(order, count, message):
    with pytest.raises(ValueError, match=message):
        encode(double, portions(np.array(order, int), 2), count)


def test_batches_that_are_too_short_are_named():
    with pytest.raises(ValueError, match="3 real rows was encoded into only 2"):
        encode(double, [(jnp.zeros(2), 3, np.arange(3))], 3)
    with pytest.raises(ValueError, match="2 real rows names the gallery rows of only 1"):
        encode(double, [(jnp.zeros(2), 2, np.arange(1))], 2)
