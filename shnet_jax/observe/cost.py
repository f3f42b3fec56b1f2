"""FLOPs of the training step, and the utilisation of the devices in the training log.

It is hardware utilisation: matrix products and convolutions of the compiled program count (`observe.work`), with what
the backward pass computes once more (`text.remat`, microbatches, tiles of a loss), and loop bodies times trip count.
Model utilisation (MFU), which counts each product of the model once, is lower where there is such work. Softmax, norms,
sorting and the optimiser do not count. Every step counts as one after the loss's warm-up; during the warm-up the
figures are too low.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from shnet_jax.observe.clock import Clock
from shnet_jax.observe.hardware import chip
from shnet_jax.observe.progress import waiting
from shnet_jax.observe.work import work
from shnet_jax.parallel.mapping import Mapped

log = logging.getLogger(__name__)


def step_flops(compiled: jax.stages.Compiled) -> float | None:
    """FLOPs of one call on one device; None if the backend does not show its program."""
    text = compiled.as_text()
    return work(text).flops if text else None


def peak_flops(devices: list[jax.Device], dtypes: Iterable[str]) -> float | None:
    """Peak FLOP/s of all devices together, with operands of the fastest of the dtypes.

    Accelerators: from `hardware.CHIPS`, float32 at the highest precision (`ops.matmul`); None for an unknown chip.
    CPUs: measured with a matrix product; virtual devices share the machine, so their number does not matter.
    """
    kind, names = devices[0].device_kind, sorted(set(dtypes))
    if devices[0].platform == "cpu":
        return max(measured_flops(devices[0], dtype) for dtype in names)
    peaks = chip(kind)
    if peaks is None:
        log.info("the peak of %s is not known (observe/hardware.py): the log has no utilisation", kind)
        return None
    return len(devices) * max(peaks.peak("highest" if dtype == "float32" else None) for dtype in names)


def measured_flops(device: jax.Device, dtype: str, size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of the fastest of `repeats` products of [size, size] matrices with float32 result."""
    matrix = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    product(matrix, matrix).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Utilisation:
    """Counts the FLOPs of the steps between two log lines.

    step: the mapped step. devices: number of devices it is mapped over. dtypes: of the operands of its products; the
      fastest sets the peak, so utilisation of a step with several dtypes is a lower bound.
    """

    def __init__(self, step: Mapped, devices: int, dtypes: Iterable[str]):
        self._step = step
        self._devices = devices
        self._peak = peak_flops(jax.devices()[:devices], dtypes)
        self._known: dict[tuple[tuple[int, ...], ...], float | None] = {}
        self._total: float | None = 0.0

    def count(self, *arguments: object) -> bool:
        """Counts one step with these arguments (state, batch, ...), just before it runs; whether it was compiled here.

        Compiles the step for new shapes; JAX keeps the program, so the step does not compile again.
        """
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments[1:]))
        if new := shapes not in self._known:
            with waiting("compiling the training step"):
                self._known[shapes] = step_flops(self._step.lower(*arguments).compile())
        flops = self._known[shapes]
        self._total = None if flops is None or self._total is None else self._total + flops * self._devices
        return new

    def report(self, clock: Clock) -> dict[str, float]:
        """Figures of the interval that `clock.interval` has just ended; unknown ones are left out.

        flops_per_second: of all devices together. hardware_utilisation: fraction of their peak, 0..1.
        """
        total, self._total = self._total, 0.0
        if not total or not clock.last.seconds:
            return {}
        rate = total / clock.last.seconds
        return {"flops_per_second": rate} | ({"hardware_utilisation": rate / self._peak} if self._peak else {})
