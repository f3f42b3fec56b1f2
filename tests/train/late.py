"""The toy model, whose compilation takes long in the second process of a job and holds Python's lock meanwhile."""

from __future__ import annotations

import ctypes
import functools

import jax
from ml_collections import ConfigDict

from shnet_jax.types import Batch, Embedding
from tests.train import toy

SECONDS = 50
"""More than the heartbeat of the jobs in test_processes.py, 10 s, and than the 30 s for which Gloo waits."""


@functools.cache
def fall_silent(train: bool) -> None:
    ctypes.PyDLL(None).sleep(SECONDS)  # unlike time.sleep, keeps the lock
    print(f"silent for {SECONDS} s, {train=}", flush=True)


class Late(toy.Toy):
    def encode_image(self, batch: Batch, *, train: bool) -> Embedding:
        if jax.process_index() == 1 and len(batch["regions"]) > 1:  # not where the parameters are made
            fall_silent(train)
        return super().encode_image(batch, train=train)


image_fields = toy.image_fields


def build(config: ConfigDict) -> Late:
    made = toy.build(config)
    return Late(made.image, made.text)
