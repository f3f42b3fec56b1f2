"""Search for the largest batch and microbatch that fit in memory, and advice for a step that does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from shnet_jax.plan.planned_run import PlannedRun, variable_shapes
from shnet_jax.plan.programs import Program
from shnet_jax.training.setup import takes_microbatches


def largest_batch(compiled: Callable[[int], Program], first: Program, unit: int, most: int) -> int:
    """Largest number of pairs on each device that fits, within an eighth: a multiple of `unit`, from 0 to `most`.

    Doubles or halves from `first` to both sides of the limit, then bisects.
    """

    def fits(units: int) -> bool:
        return bool(compiled(units * unit).fits)

    start, last = first.rows // unit, max(most // unit, first.rows // unit)
    low, high = (start, last + 1) if first.fits else (0, start)
    while first.fits and low < last:
        tried = min(2 * low, last)
        if not fits(tried):
            high = tried
            break
        low = tried
    while not first.fits and high > 1 and not low:
        if fits(high // 2):
            low = high // 2
        else:
            high //= 2
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def fitting_microbatch(
    compiled: Callable[[int, PlannedRun], Program], run: PlannedRun, pairs: int
) -> tuple[int, float] | None:
    """First microbatch of pairs / 2, / 4, ... that fits, with the bytes it needs; None if none does."""
    if not takes_microbatches(run.model, variable_shapes(run)):
        return None
    for microbatch in _divisors(pairs, run.config.data.captions_per_image, run.config.train.microbatch or pairs):
        config = run.config.copy_and_resolve_references()
        config.train.microbatch = microbatch
        program = compiled(pairs, dataclasses.replace(run, config=config))
        if program.fits and program.needed is not None:
            return microbatch, program.needed
    return None


def _divisors(pairs: int, unit: int, below: int) -> Iterator[int]:
    """Yields those of pairs / 2, / 4, / 8, ... that are multiples of `unit` and smaller than `below`."""
    while pairs % (2 * unit) == 0:
        pairs //= 2
        if pairs < below:
            yield pairs


def advice(config: ConfigDict, devices: int) -> list[str]:
    """Settings that make a step smaller, the cheapest first."""
    changes = []
    if config.data.resident:
        changes.append(
            "--config.data.resident=False: the features come with the batches instead of staying on every device"
        )
    # Measured: temporaries of four layers of BERT base, compiled for a v5e (docs/results.md).
    if "float32" in (config.model.dtype, config.text.dtype):
        changes.append(
            "--config.model.dtype=bfloat16 --config.text.dtype=bfloat16: a step of BERT takes about a sixth less, as "
            "activations between the products stay in float32"
        )
    if config.model.activation_dtype == "float32":
        changes.append(
            "--config.model.activation_dtype=bfloat16: with bfloat16 products a step of BERT takes about half of what "
            "it takes in float32"
        )
    microbatch = config.train.microbatch
    changes.append(
        "--config.train.microbatch: activations then grow with it and no longer with the batch"
        if not microbatch
        else f"a smaller --config.train.microbatch than {microbatch}"
    )
    if config.loss.pairs.strategy == "gathered":
        changes.append(
            "--config.loss.pairs.strategy=streamed or ring: no device holds its scores with the whole global batch"
        )
    if not config.text.remat:
        changes.append("--config.text.remat=True: layers of the text tower are computed again in the backward pass")
    if not config.parallel.shard_params and devices > 1:
        changes.append("--config.parallel.shard_params=True: parameters and optimiser state are split over the devices")
    changes.append(f"more than {devices} devices for the same --config.train.batch_size, or a smaller batch")
    return changes
