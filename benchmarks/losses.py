"""Losses over large batches, in every strategy, with their gradient, against a plain implementation."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import machine
from benchmarks.rows import Row, compare
from benchmarks.timing import interleave
from configs import base
from shnet_jax.losses import total
from shnet_jax.models.contract import RetrievalModel
from shnet_jax.parallel.mapping import make_mesh, map_encode, put_batch, replicate
from shnet_jax.scaling.processes import virtual_devices
from shnet_jax.types import Array, Context, Embedding

TEMPERATURE, MARGIN, SCALE, BIAS = 0.07, 0.2, 10.0, -10.0
LOSSES = ("infonce", "triplet", "sigmoid")
STEPS_PER_EPOCH = 1000
ONE_DEVICE = ("gathered", "streamed")
SEVERAL_DEVICES = ("ring",)
FITS = 0.8  # share of the free memory that a program may take


@dataclasses.dataclass(frozen=True)
class Sizes:
    """pairs: global batches, ascending. dim: of the embeddings. devices: virtual ones of the ring; 0: no ring.

    budget: seconds after which no further round of a batch size begins.
    """

    pairs: tuple[int, ...] = (4096, 16384, 32768)
    dim: int = 512
    devices: int = 4
    rounds: int = 3
    budget: float = 60.0


FULL = Sizes()
QUICK = Sizes(pairs=(1024, 4096), rounds=1)
GPU = Sizes(devices=0, budget=10.0)


def dense_infonce(images: Array, texts: Array) -> tuple[Array, Array]:
    """Reference InfoNCE (loss, accuracy) from the whole score matrix of pairs whose images are all different."""
    scores = jnp.matmul(images, texts.T, precision=lax.Precision.HIGHEST)  # as the library's score
    matches = jnp.diagonal(scores) / TEMPERATURE
    logits = scores / TEMPERATURE
    by_image, by_text = jax.nn.logsumexp(logits, axis=1), jax.nn.logsumexp(logits, axis=0)
    number = jnp.arange(len(images))
    accuracy = jnp.mean(scores.argmax(axis=1) == number) + jnp.mean(scores.argmax(axis=0) == number)
    return jnp.mean(by_image - matches + by_text - matches) / 2, accuracy / 2


def dense_triplet(images: Array, texts: Array) -> tuple[Array, Array]:
    """Reference triplet (loss, share of violated margins) from the whole score matrix, as `dense_infonce`."""
    scores = jnp.matmul(images, texts.T, precision=lax.Precision.HIGHEST)
    matches = jnp.diagonal(scores)
    others = jnp.where(jnp.eye(len(images), dtype=bool), -jnp.inf, scores)
    gaps = jnp.stack([MARGIN + others.max(axis=1) - matches, MARGIN + others.max(axis=0) - matches])
    return jax.nn.relu(gaps).sum(), jnp.mean(gaps > 0)


def dense_sigmoid(images: Array, texts: Array) -> tuple[Array, Array]:
    """Reference sigmoid loss (loss, its part of negatives) from the whole score matrix, as `dense_infonce`."""
    logits = SCALE * jnp.matmul(images, texts.T, precision=lax.Precision.HIGHEST) + BIAS
    positive = jax.nn.softplus(-jnp.diagonal(logits)).sum()
    negative = jnp.where(jnp.eye(len(images), dtype=bool), 0.0, jax.nn.softplus(logits)).sum()
    return (positive + negative) / len(images), negative / len(images)


DENSE = {"infonce": dense_infonce, "triplet": dense_triplet, "sigmoid": dense_sigmoid}


@dataclasses.dataclass(frozen=True)
class Program:
    """A loss with its gradient, compiled for one batch; `memory`: bytes on each device."""

    pairs: int
    call: Callable[[], Any]
    memory: int

    @property
    def fits(self) -> bool:
        """Whether the memory that is free now holds it; virtual devices share that of the machine."""
        shared = jax.device_count() if jax.default_backend() == "cpu" else 1
        return self.memory * shared <= FITS * machine.free_bytes()


def dense_program(loss: str, pairs: int, dim: int) -> Program:
    """The plain implementation on one device."""
    vectors = jax.device_put(embeddings(pairs, dim))
    program = jax.jit(jax.value_and_grad(DENSE[loss], argnums=(0, 1), has_aux=True))
    compiled = program.lower(*vectors).compile()
    return Program(pairs, partial(compiled, *vectors), machine.program_bytes(compiled))


def lower_loss(loss: str, strategy: str, mesh: Mesh, step: Any, batch: dict[str, Any]) -> jax.stages.Lowered:
    """Lowers a loss with its default options, its metrics and all gradients; of arrays, or of their shapes.

    batch: images and texts [pairs, dim], ids [pairs], split over the devices. step: [], on every device.
    """
    config = base.get_config().loss
    config.weights, config.pairs.strategy = ConfigDict({loss: 1.0}), strategy
    learned, compute = total.build(config, STEPS_PER_EPOCH)

    def per_device(step: Array, batch: dict[str, Array]) -> Any:
        def share(images: Array, texts: Array, params: Any) -> tuple[Array, dict[str, Array]]:
            ctx = Context(step, params, RetrievalModel.score, axis=mesh.axis_names[0])
            terms = compute(Embedding(images), Embedding(texts), batch["ids"], ctx)
            return terms["loss"], terms

        slopes = jax.grad(share, argnums=(0, 1, 2), has_aux=True)
        (*gradients, of_params), terms = slopes(batch["images"], batch["texts"], learned)
        return gradients, jax.tree.map(lambda x: x[None], (terms, of_params))

    return map_encode(per_device, mesh).lower(step, batch)


def loss_program(loss: str, strategy: str, pairs: int, dim: int, devices: int) -> Program:
    """A loss as `lower_loss` has it, over `devices` devices.

    Its warm-up, where it has one, is part of the program and over: what nearly all steps of a training are.
    """
    mesh = make_mesh(devices)
    images, texts = embeddings(pairs, dim)
    batch = put_batch({"images": images, "texts": texts, "ids": np.arange(pairs, dtype=np.int32)}, mesh)
    given = replicate(np.int32(STEPS_PER_EPOCH), mesh), batch
    compiled = lower_loss(loss, strategy, mesh, *given).compile()
    return Program(pairs, partial(compiled, *given), machine.program_bytes(compiled))


def embeddings(pairs: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and texts [pairs, dim], unit vectors; the two of a pair are alike."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((pairs, dim), np.float32)
    texts = images + 2 * rng.standard_normal((pairs, dim), np.float32)
    for vectors in (images, texts):
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return images, texts


def run(sizes: Sizes) -> list[Row]:
    """Every loss in the strategies of one device here, in the ring in a process with virtual devices."""
    return measure(sizes, ONE_DEVICE, 1) + (_with_devices(sizes) if sizes.devices else [])


def measure(sizes: Sizes, strategies: tuple[str, ...], devices: int) -> list[Row]:
    """The rows of these strategies. Where the plain implementation does not fit, it is that of the last that did."""
    rows = []
    for loss in LOSSES:
        reference: Program | None = None
        for pairs in sizes.pairs:
            dense = dense_program(loss, pairs, sizes.dim)
            if dense.fits:
                reference = dense
            programs = {s: loss_program(loss, s, pairs, sizes.dim, devices) for s in strategies}
            # All of them before any runs: what a program has taken may not be given back.
            running = {name: program for name, program in programs.items() if program.fits}
            calls = {name: program.call for name, program in running.items()}
            times = {}
            if reference is not None and running:
                times = interleave({**calls, "dense": reference.call}, sizes.rounds, budget=sizes.budget)
            for name, program in programs.items():
                description = f"{loss}, {name}, {pairs} pairs, D {sizes.dim}"
                if devices > 1:
                    description += f", {devices} virtual CPU devices"
                if name not in running or reference is None:
                    label = name if name not in running else "plain jnp"
                    lacking = program if name not in running else dense
                    rows.append(
                        Row("losses", description, "plain jnp", note=f"{label} does not fit: {_needs(lacking)}")
                    )
                    continue
                rows.append(
                    compare(
                        "losses",
                        description,
                        times[name],
                        f"plain jnp on one device, {reference.pairs} pairs",
                        times["dense"],
                        work=pairs**2,
                        reference_work=reference.pairs**2,
                        unit="scores",
                        memory_bytes=program.memory,
                        reference_memory_bytes=reference.memory,
                        memory="results and temporaries of one device",
                        note="" if dense.fits else f"plain jnp of {pairs} pairs does not fit: {_needs(dense)}",
                    )
                )
    return rows


def _needs(program: Program) -> str:
    return f"it needs {program.memory / 2**30:.1f} GiB a device, {machine.free_bytes() / 2**30:.1f} GiB are free"


def _with_devices(sizes: Sizes) -> list[Row]:
    """`measure` of the ring in a process that has virtual devices: their number is fixed when JAX starts."""
    flags = virtual_devices(os.environ.get("XLA_FLAGS", ""), sizes.devices)
    command = [sys.executable, "-m", "benchmarks.losses", json.dumps(dataclasses.asdict(sizes))]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """Prints the rows of the ring as JSON; the one argument is `Sizes` as JSON."""
    parser = argparse.ArgumentParser("benchmarks.losses")
    parser.add_argument("sizes", type=json.loads)
    options = parser.parse_args().sizes
    sizes = Sizes(**{**options, "pairs": tuple(options["pairs"])})
    print(json.dumps([dataclasses.asdict(row) for row in measure(sizes, SEVERAL_DEVICES, sizes.devices)]))


if __name__ == "__main__":
    main()
