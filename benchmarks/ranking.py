"""Ranks of a COCO-sized test set, against the product of all its scores in NumPy."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.rows import Row, compare
from benchmarks.timing import interleave
from shnet_jax.evaluation.ranks import Ranks, ranks
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.types import Embedding


@dataclasses.dataclass(frozen=True)
class Sizes:
    """images, captions: of the gallery; dim: of the embeddings."""

    images: int = 5000
    captions: int = 25_000
    dim: int = 1024
    rounds: int = 3


FULL = Sizes()
QUICK = Sizes(images=500, captions=2500, dim=256)
SAMPLED = 50  # images, and captions, whose ranks are compared with NumPy's
ROUNDING = 8 * np.finfo(np.float32).eps  # of a product of unit vectors, which other libraries sum in another order


def contenders(sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """Both functions on the same unit vectors, which are in host memory as an encoded gallery is."""
    rng = np.random.default_rng(0)

    def unit_vectors(count: int) -> Any:
        vectors = rng.standard_normal((count, sizes.dim), np.float32)
        for row in vectors:  # in place: a copy would count as peak memory
            row /= np.linalg.norm(row)
        return vectors

    images, texts = unit_vectors(sizes.images), unit_vectors(sizes.captions)
    return {
        "ranks": lambda: ranks(Embedding(images), Embedding(texts), owners(sizes), RetrievalModel.score),
        "product": lambda: images @ texts.T,
    }


def owners(sizes: Sizes) -> np.ndarray:
    """Image of each caption, [captions]."""
    return np.arange(sizes.captions) % sizes.images


def check_ranks(found: Ranks, scores: np.ndarray, owner: np.ndarray) -> None:
    """Compares the ranks of SAMPLED images and captions, spread evenly, with those of scores [images, captions].

    They are equal, or differ by no more items than score within ROUNDING of the match. Raises RuntimeError otherwise.
    """
    n, t = scores.shape
    for image in _sample(n):
        _check(f"image {image}", int(found.i2t[image]), scores[image], scores[image, owner == image].max())
    for caption in _sample(t):
        match = scores[owner[caption], caption]
        _check(f"caption {caption}", int(found.t2i[caption]), scores[:, caption], match)


def _sample(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLED)).astype(np.int64))


def _check(query: str, rank: int, scores: np.ndarray, own: np.floating) -> None:
    before = int((scores > own + ROUNDING).sum())
    near = int((np.abs(scores - own) <= ROUNDING).sum()) - 1  # but the match itself
    if not before <= rank <= before + near:
        raise RuntimeError(f"{query} has rank {rank}; by NumPy's scores {before}, or up to {near} more by near ties")


def peak_increase(sizes: Sizes, name: str) -> int | None:
    """Bytes that the peak memory of a process rises by when it calls one of `contenders`, in a process of its own."""
    options = [f"--{field}={value}" for field, value in dataclasses.asdict(sizes).items()]
    command = [sys.executable, "-m", "benchmarks.ranking", f"--call={name}", *options]
    # An accelerator's memory is mostly taken by this process.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def run(sizes: Sizes) -> list[Row]:
    """Both directions of all recalls against the product of the scores alone; raises RuntimeError for wrong ranks."""
    peaks = {name: peak_increase(sizes, name) for name in ("ranks", "product")}
    calls = contenders(sizes)
    times = interleave(calls, sizes.rounds)
    check_ranks(calls["ranks"](), calls["product"](), owners(sizes))
    return [
        compare(
            "ranking",
            f"ranks in both directions, {sizes.images} images x {sizes.captions} captions, D {sizes.dim}",
            times["ranks"],
            "NumPy's float32 product of the scores alone (host)",
            times["product"],
            memory_bytes=peaks["ranks"],
            reference_memory_bytes=peaks["product"],
            memory="rise of the host's peak, the embeddings not counted",
        )
    ]


def main() -> None:
    """Calls one contender and prints the rise of the peak, or null where the system does not tell."""
    parser = argparse.ArgumentParser("benchmarks.ranking")
    parser.add_argument("--call", choices=("ranks", "product"), required=True)
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, required=True)
    options = vars(parser.parse_args())
    call = contenders(Sizes(**{field.name: options[field.name] for field in dataclasses.fields(Sizes)}))
    before = machine.peak_bytes()
    call[options["call"]]()
    after = machine.peak_bytes()
    print(json.dumps(None if before is None or after is None else after - before))


if __name__ == "__main__":
    main()
