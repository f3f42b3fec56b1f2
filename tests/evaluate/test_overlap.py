import threading
import time

import pytest

from shnet_jax.evaluate.overlap import Overlap
from tests.patience import PATIENCE

OTHERS: set[threading.Thread] = set()


class Broken(Exception):
    pass


def endless(count):
    """Items without end that count themselves."""
    while True:
        count.append(len(count))
        yield count[-1]


def settled(values, expected):
    """Their number a while after it has come to what is expected: one thread too many in a hurry would raise it."""
    deadline = time.monotonic() + PATIENCE
    while len(values) < expected and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.15)
    return len(values)


@pytest.fixture(autouse=True)
def others():
    """Threads of other tests, which may go on for as long as they like."""
    OTHERS.clear()
    OTHERS.update(threading.enumerate())


def running():
    """Threads of stages that do not end; one whose work is done still needs a moment for it."""
    stages = [t for t in threading.enumerate() if t not in OTHERS]
    for thread in stages:
        thread.join(timeout=PATIENCE)
    return [t for t in stages if t.is_alive()]


@pytest.mark.parametrize("maxsize", [1, 2, 5])
def test_items_keep_their_order_through_a_chain(maxsize):
    with Overlap() as stages:
        doubled = (2 * x for x in stages.ahead(range(50), maxsize))
        result = stages.start(lambda: list(stages.ahead((x + 1 for x in stages.ahead(doubled, 1)), maxsize)))
        assert list(stages.ahead([], maxsize)) == []
        assert result.result() == [2 * x + 1 for x in range(50)]
    assert not running()


@pytest.mark.parametrize("maxsize", [1, 2, 5])
def test_a_slow_consumer_holds_the_producer_back(maxsize):
    read = []
    with Overlap() as stages:
        items = stages.ahead(endless(read), maxsize)
        for taken in range(1, 4):
            assert next(items) == taken - 1
            expected = taken + maxsize  # those taken, and maxsize in flight
            assert settled(read, expected) == expected
    assert not running()


def test_stages_run_at_the_same_time():
    meet = threading.Barrier(3, timeout=PATIENCE)
    with Overlap() as stages:
        results = [stages.start(meet.wait) for _ in range(3)]
        assert sorted(r.result() for r in results) == [0, 1, 2]


@pytest.mark.parametrize("where", ["source", "work", "main"])
def test_a_failing_stage_stops_the_others_and_raises_its_own_error(where):
    def source():
        yield from range(3)
        if where == "source":
            raise Broken("source")
        yield from endless([])

    def work(items):
        for item in items:
            if where == "work" and item == 2:
                raise Broken("work")

    with pytest.raises(Broken, match=where), Overlap() as stages:
        other = stages.start(lambda: [None for _ in stages.ahead(endless([]), 2)])
        stages.start(lambda: work(stages.ahead(source(), 2)))
        if where == "main":
            raise Broken("main")
        other.result()
    assert not running()


def test_an_error_in_the_reader_of_the_block_itself_is_raised():
    def source():
        yield 0
        raise Broken("source")

    with pytest.raises(Broken), Overlap() as stages:
        assert list(stages.ahead(source(), 1)) == []
    assert not running()


def test_a_stage_nobody_asks_still_raises():
    with pytest.raises(ZeroDivisionError), Overlap() as stages:
        stages.start(lambda: 1 // 0)


def test_a_reader_whose_items_are_not_all_taken_ends():
    with Overlap() as stages:
        assert stages.start(lambda: next(stages.ahead(endless([]), 2))).result() == 0
    assert not running()


def test_a_queue_of_nothing_is_named():
    with pytest.raises(ValueError, match="at least 1 item, got 0"), Overlap() as stages:
        stages.ahead([], 0)
