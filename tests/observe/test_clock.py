"""The training clock, on a clock that the test moves."""

import json

import pytest

from shnet_jax.observe import clock as clocks
from shnet_jax.observe.clock import KINDS, Clock, TimeRecord, read_wall_time, shares_line


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
        with clock.spent_on("input"):
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


@pytest.mark.parametrize("kind", ["compile", "evaluation", "checkpoint"])
def test_what_is_no_training_time(kind, time):
    clock = Clock(now=time)
    with clock:
        steps(clock, time, count=1, seconds=2.0, wait=0.0)
        with clock.spent_on(kind):
            time.now += 1000
        steps(clock, time, count=1, seconds=2.0, wait=0.0)
    time.now += 1000
    assert clock.totals() == {"seconds": 4.0, "examples": 16}
    assert clock.spent() == dict.fromkeys(KINDS, 0.0) | {"step": 4.0, kind: 1000.0}


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


def test_shares_of_the_wall_time(time):
    started = time.now
    time.now += 10
    clock = Clock(now=time, started=started)
    assert clock.shares() == {} and shares_line(clock.spent()) == "no wall time yet"
    with clock:
        with clock.spent_on("compile"):
            time.now += 20
        steps(clock, time, count=5, seconds=10.0, wait=1.0)
        with clock.spent_on("evaluation"):
            time.now += 10
            with clock.spent_on("checkpoint"):  # inside, and not counted twice
                time.now += 5
            time.now += 5
    shares = {kind: clock.shares()[f"share_{kind}"] for kind in KINDS}
    expected = {"startup": 10, "compile": 20, "input": 5, "step": 45, "evaluation": 15, "checkpoint": 5, "lost": 0}
    assert shares == {kind: pytest.approx(seconds / 100) for kind, seconds in expected.items()}
    assert shares_line(clock.spent()) == (
        "wall time 1.7 min, in per cent: startup 10.0, compile 20.0, input 5.0, step 45.0, evaluation 15.0, "
        "checkpoint 5.0, lost 0.0"
    )


def session(folder, time, resumed, state, count, startup=3.0):
    """Steps of a second each after `startup` seconds; the record is written after each and the process then killed."""
    started = time.now
    time.now += startup
    record = TimeRecord(folder, now=time)
    clock = record.resume(resumed, state, started)
    states = {}
    with clock:
        for step in range(resumed + 1, resumed + 1 + count):
            steps(clock, time, count=1, seconds=1.0, wait=0.0)
            states[step] = clock.state()
            record.write(step, clock)
    return clock, states


def test_steps_that_are_made_again_are_lost(time, tmp_path):
    _, states = session(tmp_path, time, 0, None, count=7)
    time.now += 1000  # nothing runs
    clock, more = session(tmp_path, time, 4, states[4], count=5)  # killed after 7, the last checkpoint is 4
    assert clock.spent() == dict.fromkeys(KINDS, 0.0) | {"startup": 3.0, "step": 9.0, "lost": 3.0 + 3.0}
    clock, _ = session(tmp_path, time, 4, states[4], count=1)  # and again, before the next checkpoint
    assert clock.spent() == dict.fromkeys(KINDS, 0.0) | {"startup": 3.0, "step": 5.0, "lost": 6.0 + 5.0 + 3.0}
    assert sum(clock.spent().values()) == 3 * 3 + 7 + 5 + 1
    assert more[9]["seconds"] == 9.0 and clock.totals()["seconds"] == 5.0


def test_nothing_is_lost_where_a_run_ends_in_order(time, tmp_path):
    clock, states = session(tmp_path, time, 0, None, count=4)
    with clock, clock.spent_on("checkpoint"):
        time.now += 2  # the state of step 4 is being written
    TimeRecord(tmp_path, now=time).write(4, clock)
    clock, _ = session(tmp_path, time, 4, states[4], count=1)
    assert clock.spent() == dict.fromkeys(KINDS, 0.0) | {"startup": 3.0, "step": 5.0, "checkpoint": 2.0, "lost": 3.0}


def test_killed_before_the_first_checkpoint(time, tmp_path):
    session(tmp_path, time, 0, None, count=6)
    clock, _ = session(tmp_path, time, 0, None, count=1)
    assert clock.spent() == dict.fromkeys(KINDS, 0.0) | {"startup": 3.0, "step": 1.0, "lost": 9.0}


@pytest.mark.parametrize("text", ["", "[]", '{"step": 3, "spent": {}}', '{"step": "x"}', "\0"])
def test_a_record_that_is_none(text, time, tmp_path):
    (tmp_path / clocks.WALL_TIME).write_text(text)
    assert read_wall_time(tmp_path) is None
    clock, _ = session(tmp_path, time, 2, {"seconds": 2.0, "examples": 16}, count=1)  # of before there were kinds
    assert clock.spent() == dict.fromkeys(KINDS, 0.0) | {"startup": 3.0, "step": 3.0}


def test_the_record_is_written_every_few_seconds(time, tmp_path):
    record, clock = TimeRecord(tmp_path, now=time), Clock(now=time)
    written = []
    with clock:
        for step in range(1, 13):
            steps(clock, time, count=1, seconds=clocks.RECORD_SECONDS / 4, wait=0.0)
            record.update(step, clock)
            written.append(read_wall_time(tmp_path)["step"])
    assert written == [1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9]
    TimeRecord(tmp_path / "none", written=False, now=time).write(1, clock)
    assert not (tmp_path / "none").exists()
