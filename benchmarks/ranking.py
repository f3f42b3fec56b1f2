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
from configs import base
from shnet_jax.evaluation.ranks import Ranks, ranks
from shnet_jax.evaluation.tiles import tile_size
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import make_mesh
from shnet_jax.types import Embedding


@dataclasses.dataclass(frozen=True)
class Sizes:
    """images, captions: of the gallery; dim: of the embeddings.

    product: images in NumPy's product, the first ones; 0: all. Its scores must fit in memory.
    """

    images: int = 5000
    captions: int = 25_000
    dim: int = 1024
    rounds: int = 3
    product: int = 0


FULL = Sizes()
QUICK = Sizes(images=500, captions=2500, dim=256)
GPU = (FULL, Sizes(images=113_287, captions=566_435, rounds=1, product=1000))  # all images of COCO: 257 GB of scores
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
    # As an evaluation does by default (eval.tile).
    tile = tile_size(base.get_config().eval, make_mesh(1))
    return {
        "ranks": lambda: ranks(Embedding(images), Embedding(texts), owners(sizes), RetrievalModel.score, tile),
        "product": lambda: images[: sizes.product or None] @ texts.T,
        "scores": lambda: SampledScores(images, texts),
    }


@dataclasses.dataclass(frozen=True)
class SampledScores:
    """Scores [images, captions] of which one row, or one column, is computed when it is read."""

    images: np.ndarray
    texts: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Number of images and of captions."""
        return len(self.images), len(self.texts)

    def __getitem__(self, at: int | tuple[slice, int]) -> np.ndarray:
        return self.texts @ self.images[at] if isinstance(at, int) else self.images @ self.texts[at[1]]


def owners(sizes: Sizes) -> np.ndarray:
    """Image of each caption, [captions]."""
    return np.arange(sizes.captions) % sizes.images


def check_ranks(ranks: Ranks, scores: np.ndarray | SampledScores, owner: np.ndarray) -> None:
    """Compares the ranks of SAMPLED images and captions, spread evenly, with those of scores [images, captions].

    They are equal, or differ by no more items than score within ROUNDING of the match. Raises RuntimeError otherwise.
    """
    n, t = scores.shape
    for image in _sample(n):
        row = scores[image]
        _check(f"image {image}", int(ranks.i2t[image]), row, row[owner == image].max())
    for caption in _sample(t):
        column = scores[:, caption]
        _check(f"caption {caption}", int(ranks.t2i[caption]), column, column[owner[caption]])


def _sample(count: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLED)).astype(np.int64)).tolist()


def _check(query: str, rank: int, scores: np.ndarray, match_score: np.floating) -> None:
    before = int((scores > match_score + ROUNDING).sum())
    near = int((np.abs(scores - match_score) <= ROUNDING).sum()) - 1  # but the match itself
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
    full_product = not sizes.product
    peaks = {name: peak_increase(sizes, name) if full_product else None for name in ("ranks", "product")}
    calls = contenders(sizes)
    times = interleave({name: calls[name] for name in peaks}, sizes.rounds)
    check_ranks(calls["ranks"](), calls["product" if full_product else "scores"](), owners(sizes))
    part = "" if full_product else f", of {sizes.product} images"
    return [
        compare(
            "ranking",
            f"ranks in both directions, {sizes.images} images x {sizes.captions} captions, D {sizes.dim}",
            times["ranks"],
            f"NumPy's float32 product of the scores alone (host){part}",
            times["product"],
            work=sizes.images * sizes.captions,
            reference_work=(sizes.product or sizes.images) * sizes.captions,
            unit="scores",
            memory_bytes=peaks["ranks"],
            reference_memory_bytes=peaks["product"],
            memory="rise of the host's peak, the embeddings not counted" if full_product else "",
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
