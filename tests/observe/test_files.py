"""Files that several processes write, and the ones that a killed process leaves."""

import os
import time

import pytest

from shnet_jax.observe.files import STALE, atomic_path, write_text


def test_two_that_write_a_file_at_once_have_temporary_files_of_their_own(tmp_path):
    path = tmp_path / "results.md"
    with atomic_path(path, shared=True) as slow:
        slow.write_text("slow")
        write_text(path, "fast")
        assert path.read_text() == "fast" and slow.read_text() == "slow"
    assert path.read_text() == "slow" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_in_time(tmp_path):
    path, old, new = (tmp_path / name for name in ("a[1].md", "a[1].md.0f.tmp", "a[1].md.1f.tmp"))
    for left, age in ((old, STALE + 60), (new, 60)):
        left.write_text("half")
        os.utime(left, times=(time.time() - age,) * 2)
    write_text(path, "whole")
    assert sorted(tmp_path.iterdir()) == [path, new]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "results.md"
    write_text(path, "before")
    for shared in (False, True):
        with pytest.raises(OSError, match="full"), atomic_path(path, shared=shared) as temporary:
            temporary.write_text("half")
            raise OSError("the disk is full")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
