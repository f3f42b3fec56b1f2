"""Checksums of a checkpoint whose metadata orbax writes once more after they were taken."""

import json

import pytest

from shnet_jax.training.integrity import faults, write_checksums

NAME = "_CHECKPOINT_METADATA"
HANDLERS = {"model": "a handler"}


@pytest.mark.parametrize("handlers", [None, HANDLERS])
def test_metadata_that_is_completed_later_is_whole(handlers, tmp_path):
    """Handlers come from a thread of orbax's own, before or after the checksums; the time of the name always after."""
    metadata = {"item_handlers": handlers, "metrics": {}, "init_timestamp_nsecs": 1, "commit_timestamp_nsecs": None}
    (tmp_path / NAME).write_text(json.dumps(metadata))
    write_checksums(tmp_path)
    completed = metadata | {"item_handlers": HANDLERS, "commit_timestamp_nsecs": 2}
    (tmp_path / NAME).write_text(json.dumps(completed))
    assert faults(tmp_path) == []
    for damaged in (json.dumps(completed | {"init_timestamp_nsecs": 3}), "[]", "{", json.dumps(completed)[:-1]):
        (tmp_path / NAME).write_text(damaged)
        assert len(faults(tmp_path)) == 1
