"""The training clock, on a clock that the test moves."""

import json

import pytest

from shnet_jax.observe.clock import Clock


class Time:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def time():
    return Time()


def steps(clock, time, count, seconds, wait):
    for _ in range(count):
        with clock.waiting_for_data():
            time.now += wait
        time.now += seconds - wait
        clock.tick(8)


def test_interval(time):
    clock = Clock(now=time)
    time.now += 50  # before the clock runs
    with clock:
        steps(clock, time, count=4, seconds=2.0, wait=0.5)
        actual = clock.interval(steps_left=10)
        assert actual == {
            "seconds": 8.0,
            "examples": 32,
            "examples_per_second": 4.0,
            "data_wait": 0.25,
            "eta_seconds": 20.0,
        }
        steps(clock, time, count=2, seconds=1.0, wait=0.0)
        actual = clock.interval(steps_left=8)
    assert (actual["seconds"], actual["examples"]) == (10.0, 48)
    assert (actual["examples_per_second"], actual["data_wait"], actual["eta_seconds"]) == (8.0, 0.0, 8.0)


def test_pauses_do_not_count(time):
    clock = Clock(now=time)
    with clock:
        steps(clock, time, count=1, seconds=2.0, wait=0.0)
        with clock.paused():
            time.now += 1000
        steps(clock, time, count=1, seconds=2.0, wait=0.0)
    time.now += 1000
    assert clock.totals() == {"seconds": 4.0, "examples": 16}


def test_resumes_from_a_checkpoint(time):
    first = Clock(now=time)
    with first:
        steps(first, time, count=3, seconds=2.0, wait=0.0)
        first.interval(0)
        steps(first, time, count=1, seconds=2.0, wait=0.0)
        saved = json.loads(json.dumps(first.state()))
    second = Clock(saved, now=time)
    with second:
        steps(second, time, count=2, seconds=1.0, wait=0.0)
        actual = second.interval(0)
    assert (actual["seconds"], actual["examples"]) == (10.0, 48)
    assert actual["examples_per_second"] == 8.0  # of this piece alone


def test_speed_joins_the_last_interval_with_the_current_one(time):
    clock = Clock(now=time)
    with clock:
        assert clock.speed() == (0.0, 0.0)
        steps(clock, time, count=3, seconds=2.0, wait=0.0)
        clock.interval(0)
        steps(clock, time, count=1, seconds=6.0, wait=0.0)
        assert clock.speed() == (32 / 12, 3.0)
