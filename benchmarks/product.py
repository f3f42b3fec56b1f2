"""The yardstick of utilisation: the best matrix product of a dtype on this device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.timing import interleave

# Large enough to reach the peak of the kind of device, small enough to be measured in between.
CPU_SIZES = (1024, 2048)
ACCELERATOR_SIZES = (8192, 16384)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two [size, size] matrices with float32 sums and result; `flops`: its operations."""

    size: int
    call: Callable[[], Any]

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.size**3


def best_product(dtype: str) -> Product:
    """The fastest of the sizes above. HIGHEST: float32 means float32, not an accelerator's shorter format."""
    sizes = CPU_SIZES if jax.default_backend() == "cpu" else ACCELERATOR_SIZES
    product = jax.jit(
        partial(jnp.matmul, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        if dtype == "float32"
        else partial(jnp.matmul, preferred_element_type=jnp.float32)
    )

    def make(size: int) -> Product:
        a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
        return Product(size, partial(product, a, b))

    products = {str(size): make(size) for size in sizes}
    times = interleave({name: p.call for name, p in products.items()}, 3)
    return max(products.values(), key=lambda p: p.flops / times[str(p.size)].best)
