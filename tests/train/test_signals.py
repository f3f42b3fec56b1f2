"""When several processes ask each other for signals; that they obey together: tests/train/test_processes.py."""

from __future__ import annotations

import signal

import jax
import pytest

from shnet_jax.training import signals
from shnet_jax.training.signals import ASK_SECONDS, ASK_STEPS, StopVote, steps_until


@pytest.mark.parametrize(
    ("seconds", "steps"), [(0.0, 1), (0.001, ASK_STEPS), (0.5, 10), (1.0, 5), (2.4, 2), (4.9, 1), (300.0, 1)]
)
def test_a_signal_waits_for_a_step_or_a_few_seconds(seconds, steps):
    assert steps_until(seconds) == steps
    assert steps == 1 or steps * seconds <= ASK_SECONDS


def test_alone_a_signal_counts_after_the_step():
    vote = StopVote()
    assert vote.after(1, [], 0.0) is None
    assert vote.after(2, [signal.SIGINT, signal.SIGTERM], 0.0) == signal.SIGINT


def test_several_ask_at_the_same_steps_and_give_one_answer(monkeypatch):
    """This process is fast, the other one takes 2 s for a step and is told to stop after step 4."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    asked = []

    def largest(told, seconds):
        asked.append(step)
        return [max(told, float(step >= 4)), max(seconds, 2.0)]

    monkeypatch.setattr(signals.hosts, "largest", largest)
    vote, answers = StopVote(), []
    for step in range(1, 6):
        answers.append(vote.after(step, [], 0.1))
    assert asked == [1, 3, 5] and answers == [None] * 4 + [signal.SIGTERM]
