"""The progress line, on a terminal and in a log file."""

import io
import types

import pytest

from shnet_jax.observe.progress import Progress

CLOCK = types.SimpleNamespace(speed=lambda: (1234.5, 2.0))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def time():
    return types.SimpleNamespace(now=0.0)


def run(stream, time, seconds):
    progress = Progress(100, stream, now=lambda: time.now)
    for step in range(1, 4):
        progress.update(step, CLOCK, loss=1.23456)
        time.now += seconds
    return progress


def test_log_file_gets_a_plain_line_every_ten_seconds(time):
    stream = io.StringIO()
    run(stream, time, seconds=5).message("done")
    assert stream.getvalue() == (
        "step 1/100 (1%)  1,234 pairs/s  loss 1.235  ETA 0:03:18\n"
        "step 3/100 (3%)  1,234 pairs/s  loss 1.235  ETA 0:03:14\n"
        "done\n"
    )


def test_terminal_line_stays_in_place_and_a_message_replaces_it(time):
    stream = Terminal()
    progress = run(stream, time, seconds=1)
    assert stream.getvalue().count("\r") == 3
    assert "\n" not in stream.getvalue()
    progress.message("R@1 50")
    before, _, after = stream.getvalue().rpartition("\r")
    assert after == "R@1 50\n"
    assert before.endswith(" " * 55)  # the line was wiped out
    progress.close()
    assert stream.getvalue().count("\n") == 1


def test_shorter_line_covers_a_longer_one(time):
    stream = Terminal()
    progress = Progress(100, stream, now=lambda: time.now)
    progress.update(1, types.SimpleNamespace(speed=lambda: (1e9, 2.0)), loss=1.0)
    time.now += 1
    progress.update(2, CLOCK, loss=1.0)
    first, second = stream.getvalue().split("\r")[1:]
    assert len(second) == len(first)
    progress.close()
    assert stream.getvalue().endswith("\n")


def test_another_name_for_a_step_and_no_loss(time):
    stream = io.StringIO()
    Progress(4, stream, now=lambda: time.now, what="images: batch").update(1, CLOCK)
    assert stream.getvalue() == "images: batch 1/4 (25%)  1,234 pairs/s  ETA 0:00:06\n"


@pytest.mark.parametrize(
    ("total", "records", "seconds", "lines"),
    [
        (
            1000, 50, 0.5,
            [
                "toy: 20/1000 (2%)  2 records/s  ETA 0:08:10",
                "toy: 40/1000 (4%)  2 records/s  ETA 0:08:00",
                "toy: 50 records in 0:00:25, 2 records/s",
            ],
        ),
        (None, 24, 0.5, ["toy: 20  2 records/s", "toy: 24 records in 0:00:12, 2 records/s"]),
        (8, 8, 0.1, ["toy: 8 records in 0:00:01, 10 records/s"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_counted_records(total, records, seconds, lines, kind, time):
    stream = kind()
    progress = Progress(total, stream, now=lambda: time.now, what="toy", unit="records")
    for _ in range(records):
        time.now += seconds
        progress.count()
    progress.close()
    assert stream.getvalue().splitlines() == lines


def test_counted_records_left_out(time):
    stream = io.StringIO()
    progress = Progress(9, stream, now=lambda: time.now, what="toy", unit="records")
    for left_out in (False, True):
        time.now += 10
        progress.count(left_out)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "toy: 1/9 (11%)  0 records/s  ETA 0:01:20",
        "toy: 2/9 (22%)  0 records/s  1 left out  ETA 0:01:10",
        "toy: 2 records, 1 of them left out in 0:00:20, 0 records/s",
    ]
