"""Floating point operations of a compiled step, and how much of the devices' peak the training uses.

Counted are the matrix products and convolutions of the compiled program (`observe.work`), what is recomputed in the
backward pass included, the bodies of loops times their turns. Softmax, norms, sorting and the optimiser are not. Every
step counts as one after the loss's warm-up: while that lasts, the figures are rather too low than too high.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from shnet_jax.observe.clock import Clock
from shnet_jax.observe.hardware import chip
from shnet_jax.observe.work import work
from shnet_jax.parallel.mapping import Mapped

log = logging.getLogger(__name__)


def step_flops(compiled: jax.stages.Compiled) -> float | None:
    """Operations of one call on one device; None when the backend does not show its program."""
    text = compiled.as_text()
    return work(text).flops if text else None


def peak_flops(devices: list[jax.Device], dtypes: Iterable[str]) -> float | None:
    """Operations per second that the devices could do at most, together, with operands of the fastest of the dtypes.

    For accelerators, of the table, float32 at the highest precision (`ops.matmul`); None when they are not in it. For
    CPUs, of a matrix product that is measured: virtual devices share it, whatever their number.
    """
    kind, names = devices[0].device_kind, sorted(set(dtypes))
    if devices[0].platform == "cpu":
        return max(measured_flops(devices[0], dtype) for dtype in names)
    found = chip(kind)
    if found is None:
        log.info("the peak of %s is not known (observe/hardware.py): the log has no utilisation", kind)
        return None
    return len(devices) * max(found.peak("highest" if dtype == "float32" else None) for dtype in names)


def measured_flops(device: jax.Device, dtype: str, size: int = 1024, repeats: int = 5) -> float:
    """Operations per second of the fastest of `repeats` products of [size, size] matrices, float32 result."""
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
    """Counts the operations of the steps between two log lines.

    step: the mapped step. devices: how many it is mapped over. dtypes: of the operands of its matrix products, of
    which the fastest sets the peak: in a step of several dtypes utilisation is rather too low than too high.
    """

    def __init__(self, step: Mapped, devices: int, dtypes: Iterable[str]):
        self._step = step
        self._devices = devices
        self._peak = peak_flops(jax.devices()[:devices], dtypes)
        self._known: dict[tuple[tuple[int, ...], ...], float | None] = {}
        self._total: float | None = 0.0

    def count(self, *arguments: object) -> None:
        """Counts one step with these arguments (state, batch, ...), just before it is made.

        Compiles it when their shapes are new; JAX keeps the result, so the step does not compile again.
        """
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments[1:]))
        if shapes not in self._known:
            self._known[shapes] = step_flops(self._step.lower(*arguments).compile())
        flops = self._known[shapes]
        self._total = None if flops is None or self._total is None else self._total + flops * self._devices

    def report(self, clock: Clock) -> dict[str, float]:
        """Of the interval that `clock.interval` has just ended; what is not known is left out.

        flops_per_second: of all devices together. utilisation: their share of the peak, 0..1.
        """
        total, self._total = self._total, 0.0
        if not total or not clock.last.seconds:
            return {}
        rate = total / clock.last.seconds
        return {"flops_per_second": rate} | ({"utilisation": rate / self._peak} if self._peak else {})
