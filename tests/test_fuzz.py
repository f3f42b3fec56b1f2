"""A few damaged files for every parser in each run of the tests; `python -m tests.fuzz` tries them for minutes."""

from __future__ import annotations

import random
import warnings

import pytest

from tests.fuzz.targets import TARGETS, Target
from tests.fuzz.worker import attempt

INPUTS = 80


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_give_documented_errors(name, tmp_path):
    target, rng = TARGETS[name], random.Random(name)
    seeds = target.seeds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged pictures
        outcomes = [attempt(target, data, tmp_path, None) for data in seeds]
        assert any(taken for _, taken in outcomes)  # else nothing behind the first check is tried
        outcomes += [attempt(target, target.make(rng.choice(seeds), rng), tmp_path, None) for _ in range(INPUTS)]
    wrong = [text for text, _ in outcomes if text]
    assert not wrong, wrong[0]


def test_faults_are_found(tmp_path):
    def undocumented(path):
        raise KeyError("a")

    def silent(path):
        raise ValueError

    for read, match in ((undocumented, "KeyError: 'a'"), (silent, "without a message")):
        wrong, _ = attempt(Target(lambda: [b"x"], "a", (read,)), b"x", tmp_path, None)
        assert wrong is not None and match in wrong
