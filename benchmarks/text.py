"""Length buckets of captions against padding all of them to the longest bucket."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.rows import Row, compare
from benchmarks.step import VOCABULARY, configuration
from benchmarks.timing import interleave
from data_prep import scenes
from shnet_jax.data.batches import pad_tokens
from shnet_jax.models.text import TextEncoder, build_tower
from shnet_jax.types import Array

BUCKETS = (16, 24, 32)
LIMIT = BUCKETS[-1]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """images: rendered scenes, 5 captions each, whose lengths are taken. batch: captions. layers: of BERT."""

    images: int = 128
    batch: int = 64
    layers: int = 12
    rounds: int = 5


FULL = Sizes()
QUICK = Sizes(images=16, batch=16, layers=2, rounds=2)
GPU = Sizes(images=512, batch=512, rounds=3)


def caption_lengths(images: int) -> np.ndarray:
    """Tokens of the scenes' captions in a vocabulary that has their words, as BERT's: words, punctuation and 2."""
    captions = (c for i in range(images) for c in scenes.scene(0, i, label_noise=0.0, regions=16)["captions"])
    return np.array([min(len(re.findall(r"\w+|[^\w\s]", caption)) + 2, LIMIT) for caption in captions])


def batches(lengths: np.ndarray, size: int, buckets: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches (tokens, mask) of captions of these lengths, random ids, each padded to a bucket."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, VOCABULARY, length).astype(np.int32) for length in lengths]
    count = len(ids) // size * size
    padded = (pad_tokens(ids[at : at + size], buckets) for at in range(0, count, size))
    return [(batch["tokens"], batch["token_mask"]) for batch in padded]


def run(sizes: Sizes) -> list[Row]:
    """In random order with the gradient, as in training, and in order of length without it, as in a gallery."""
    config = configuration("bfloat16", sizes.layers)
    tower: Any = TextEncoder(tower=build_tower(config), dim=config.model.dim, dtype=config.text.dtype)
    tokens, mask = np.ones((1, LIMIT), np.int32), np.ones((1, LIMIT), bool)
    params = jax.jit(partial(tower.init, train=False))(jax.random.key(0), tokens, mask)

    @jax.jit
    def embed(params: Any, tokens: Array, mask: Array) -> Array:
        return tower.apply(params, tokens, mask, train=False).vector

    @jax.jit
    def gradient(params: Any, tokens: Array, mask: Array) -> Any:
        rngs = {"dropout": jax.random.key(0)}

        def value(params: Any) -> Array:
            return jnp.sum(tower.apply(params, tokens, mask, train=True, rngs=rngs).vector[:, ::2])

        return jax.grad(value)(params)

    lengths = caption_lengths(sizes.images)
    shuffled = np.random.default_rng(0).permutation(lengths)
    cases = {
        "in random order, with gradient": (gradient, shuffled),
        "in order of length, forward": (embed, np.sort(lengths)),
    }

    def call(program: Callable[..., Any], lengths: np.ndarray, buckets: tuple[int, ...]) -> Callable[[], None]:
        made = jax.device_put(batches(lengths, sizes.batch, buckets))

        def over_all() -> None:
            for batch in made:
                jax.block_until_ready(program(params, *batch))

        return over_all

    calls = {}
    for name, (program, ordered) in cases.items():
        calls[f"{name}, buckets"] = call(program, ordered, BUCKETS)
        calls[f"{name}, padded"] = call(program, ordered, (LIMIT,))
    times = interleave(calls, sizes.rounds)
    captions = len(lengths) // sizes.batch * sizes.batch
    shares = ", ".join(f"{np.mean(lengths <= bucket):.0%} up to {bucket}" for bucket in BUCKETS[:-1])
    return [
        compare(
            "text",
            f"captions {name}, batches of {sizes.batch} padded to {', '.join(map(str, BUCKETS))}",
            times[f"{name}, buckets"],
            f"all padded to {LIMIT}",
            times[f"{name}, padded"],
            work=captions,
            unit="captions",
            note=f"{captions / times[f'{name}, buckets'].median:.4g} against "
            f"{captions / times[f'{name}, padded'].median:.4g} captions/s; {shares} tokens",
        )
        for name in cases
    ]
