import threading

import jax.numpy as jnp
import numpy as np
import pytest

from shnet_jax.evaluation.encode import encode, read_ahead, run_together
from shnet_jax.types import Embedding
from tests.patience import PATIENCE


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
    found = encode(double, portions(order, size), 7)
    np.testing.assert_array_equal(found.vector, 2.0 * np.arange(7)[:, None])
    assert isinstance(found.vector, np.ndarray) and found.vector.dtype == np.float32
    assert found.elements is None and found.mask is None


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


@pytest.mark.parametrize("count", [1, 3])
def test_reading_ahead_keeps_the_order_and_its_bound(count):
    read, ahead = [], threading.Event()

    def source():
        for i in range(20):
            read.append(i)
            if i == count:
                ahead.set()
            yield i

    items = read_ahead(source(), count)
    assert next(items) == 0 and ahead.wait(PATIENCE)
    for taken in range(1, 20):
        assert next(items) == taken
        assert len(read) <= taken + 1 + count
    assert not list(items)


def test_what_fails_while_reading_ahead_is_raised_and_a_reader_that_is_left_ends():
    def source():
        yield 0
        raise OSError("disk on fire")

    before = {*threading.enumerate()}
    with pytest.raises(OSError, match="disk on fire"):
        list(read_ahead(source(), 3))
    items = read_ahead(range(10**9), 2)
    next(items)
    items.close()
    for thread in {*threading.enumerate()} - before:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_tasks_run_together_and_one_that_fails_stops_the_others():
    meet = threading.Barrier(2, timeout=PATIENCE)
    assert run_together([lambda _: meet.wait() >= 0, lambda _: -1 if meet.wait() < 0 else 2]) == [True, 2]
    seen = []

    def broken(_):
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        run_together([lambda stopped: seen.append(stopped.wait(PATIENCE)), broken])
    assert seen == [True]
