"""What a process of several does with a fault that it has alone; the jobs themselves: tests/train/test_processes.py."""

import os
import types

import jax
import numpy as np
import pytest

from shnet_jax.parallel import hosts


class Common(RuntimeError):
    """What all processes raise together."""


class Exited(BaseException):
    """In place of the end of the process."""


def as_processes(monkeypatch, count, call):
    """What `call` gives in each of `count` processes, of which each hears zeros from the others."""

    def heard(x):
        return np.stack([x, *[np.zeros_like(x)] * (count - 1)])

    for index in range(count):
        with monkeypatch.context() as m:
            m.setattr(jax, "process_count", lambda: count)
            m.setattr(jax, "process_index", lambda index=index: index)
            m.setattr(hosts.multihost_utils, "process_allgather", heard)
            m.setattr(hosts, "meet", lambda name: None)
            yield call()


@pytest.fixture
def second_of_three(monkeypatch):
    def leave(status):
        raise Exited(status)

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(os, "_exit", leave)


def test_a_fault_of_one_process_ends_it_at_once_with_a_word(second_of_three, capsys):
    with pytest.raises(Exited, match="1"), hosts.ending_together(Common):
        raise ValueError("record 7 of shard 3")
    said = capsys.readouterr().err
    assert "record 7 of shard 3" in said
    assert "process 1 of 3 ends" in said and "another process died" in said and "same command" in said


@pytest.mark.parametrize("error", [Common("all"), SystemExit(143), KeyboardInterrupt()])
def test_what_all_raise_is_an_orderly_end(error, second_of_three):
    with pytest.raises(type(error)), hosts.ending_together(Common):
        raise error


def test_alone_nothing_changes():
    with pytest.raises(ValueError, match="of its own"), hosts.ending_together(Common):
        raise ValueError("of its own")


def test_the_heartbeat_is_that_of_the_coordination_service(monkeypatch):
    given = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *args, **options: given.append((args, options)))
    monkeypatch.setattr("faulthandler.enable", lambda **_: None)
    hosts.connect("127.0.0.1:1", 2, 0, heartbeat=7)
    hosts.connect("", 0, -1, start=50)
    limits = {"heartbeat_timeout_seconds": 7, "initialization_timeout": 900, "shutdown_timeout_seconds": 900}
    found = limits | {"heartbeat_timeout_seconds": 60, "initialization_timeout": 50}
    assert given == [(("127.0.0.1:1", 2, 0), limits), ((None, None, None), found)]


def test_a_heartbeat_takes_a_second_at_least():
    with pytest.raises(ValueError, match="heartbeat_seconds is 0"):
        hosts.connect("127.0.0.1:1", 2, 0, heartbeat=0)
    with pytest.raises(ValueError, match="start_seconds is 0"):
        hosts.connect("127.0.0.1:1", 2, 0, start=0)


def test_processes_meet_by_the_coordination_service(monkeypatch):
    hosts.meet("alone")  # waits for nobody
    met = []
    client = types.SimpleNamespace(wait_at_barrier=lambda name, timeout_in_ms: met.append((name, timeout_in_ms)))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.distributed.global_state, "client", client)
    hosts.meet("compiled", seconds=3)
    assert met == [("compiled", 3000)]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_each_piece_is_of_one_process(count, monkeypatch):
    for share in (hosts.own_range, hosts.own_part):
        shares = list(as_processes(monkeypatch, 3, lambda share=share: [*share(count)]))
        assert sorted(piece for own in shares for piece in own) == [*range(count)] and max(map(len, shares)) <= -(
            -count // 3
        )


def test_what_process_0_does_and_raises(monkeypatch):
    done = []
    list(as_processes(monkeypatch, 2, lambda: hosts.by_first(lambda: done.append(jax.process_index()))))
    assert done == [0]

    def fails():
        raise OSError("disk 7")

    with pytest.raises(OSError, match="disk 7"):
        next(as_processes(monkeypatch, 2, lambda: hosts.by_first(fails)))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="process 0 ended with an error"):
        patch.setattr(jax, "process_index", lambda: 1)
        patch.setattr(hosts, "anywhere", lambda flag: True)
        hosts.by_first(fails)


def test_sums_in_chunks(monkeypatch):
    monkeypatch.setattr(hosts, "CHUNK", 48)
    values = np.arange(35, dtype=np.int64).reshape(5, 7)
    for summed in as_processes(monkeypatch, 2, lambda: hosts.add_up(values)):
        np.testing.assert_array_equal(summed, values)
