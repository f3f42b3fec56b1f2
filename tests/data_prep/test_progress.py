import io

from data_prep.progress import Progress


def _lines(total, steps, seconds):
    """What is printed when each of `steps` records takes `seconds`."""
    clock, stream = [0.0], io.StringIO()
    progress = Progress("toy", total, stream, lambda: clock[0])
    for _ in range(steps):
        clock[0] += seconds
        progress.step()
    progress.close()
    return stream.getvalue().splitlines()


def test_speed_and_time_left_every_few_seconds():
    assert _lines(1000, 30, 0.4) == [
        "toy: 13/1000 records (1%), 2 records/s, ETA 0:06:35",
        "toy: 26/1000 records (2%), 2 records/s, ETA 0:06:30",
        "toy: 30 records in 0:00:12, 2 records/s",
    ]


def test_without_a_total_there_is_no_time_left():
    assert _lines(None, 12, 0.5) == ["toy: 10 records, 2 records/s", "toy: 12 records in 0:00:06, 2 records/s"]


def test_a_short_pass_is_one_line():
    assert _lines(8, 8, 0.1) == ["toy: 8 records in 0:00:01, 10 records/s"]
