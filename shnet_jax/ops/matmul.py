"""Matrix products with float32 sums: operands in float32 or bfloat16, results and gradients always float32.

`dtype` is that of the operands, as in `config.model.dtype` and `config.text.dtype`. With bfloat16 the two
products of the backward pass round their operands too; JAX alone would run them in float32 (or, with a
bfloat16 result, lose the float32 sums), which matrix units do at a fraction of their speed.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from shnet_jax.types import Array

DType = Any
"""Dtype of operands: `jnp.float32`, `jnp.bfloat16` or their names."""

DTYPES = ("float32", "bfloat16")
"""Names of the dtypes, as a configuration gives them."""


def einsum(equation: str, a: Array, b: Array, dtype: DType) -> Array:
    """`jnp.einsum` of two arrays with operands of `dtype` and a float32 result.

    equation: a plain product such as "tqhd,tkhd->thqk": no "...", no letter twice in one operand, and each
      letter of one operand also in the other or in the result (so that the gradients are such products too).

    Raises ValueError for another equation or dtype.
    """
    _gradient_equations(equation)  # a wrong equation fails here, not in a later backward pass
    a, b = jnp.asarray(a), jnp.asarray(b)
    if jnp.dtype(dtype) == jnp.bfloat16:
        return _rounded_einsum(equation, a, b)
    if jnp.dtype(dtype) != jnp.float32:
        raise ValueError(f"operands of a matrix product are float32 or bfloat16, not {jnp.dtype(dtype)}")
    if a.dtype == b.dtype == jnp.float32:
        return _exact_einsum(equation, a, b)
    # The backward pass keeps the operands as they came, not their float32 copies.
    return jax.checkpoint(partial(_exact_einsum, equation))(a, b)


def matmul(x: Array, w: Array, dtype: DType) -> Array:
    """Matrix product x [..., i] @ w [i, o] -> [..., o] float32."""
    out = einsum("ri,io->ro", x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), w, dtype)
    return out.reshape(*x.shape[:-1], w.shape[-1])


def _gradient_equations(equation: str) -> tuple[str, str]:
    """Equations of the gradients of a (from that of the result and b) and of b (from a and that of the result).

    In this order a weight's gradient comes out laid out as the weight: only the (smaller) operand is transposed.
    """
    operands, arrow, out = equation.partition("->")
    a, comma, b = operands.partition(",")
    distinct = all(s.isalpha() and len(set(s)) == len(s) for s in (a, b, out))
    if not (arrow and comma and distinct and set(a) <= set(b + out) and set(b) <= set(a + out)):
        raise ValueError(f"einsum {equation!r} is not a plain product of two arrays such as 'tqhd,tkhd->thqk'")
    return f"{out},{b}->{a}", f"{a},{out}->{b}"


def _exact_einsum(equation: str, a: Array, b: Array) -> Array:
    # HIGHEST: accelerators would otherwise round float32 operands (TPU to bfloat16, GPU to TF32).
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded_einsum(equation: str, a: Array, b: Array) -> Array:
    return _product(equation, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))


def _forward(equation: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    # The backward pass needs the rounded operands only. The empty arrays carry the inputs' dtypes.
    low_a, low_b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return _product(equation, low_a, low_b), (low_a, low_b, jnp.empty(0, a.dtype), jnp.empty(0, b.dtype))


def _backward(equation: str, saved: tuple[Array, Array, Array, Array], grad: Array) -> tuple[Array, Array]:
    a, b, like_a, like_b = saved
    to_a, to_b = _gradient_equations(equation)
    grad = grad.astype(jnp.bfloat16)
    return _product(to_a, grad, b).astype(like_a.dtype), _product(to_b, a, grad).astype(like_b.dtype)


_rounded_einsum.defvjp(_forward, _backward)


def _product(equation: str, a: Array, b: Array) -> Array:
    """Product of bfloat16 operands with float32 sums."""
    native = partial(jnp.einsum, equation, preferred_element_type=jnp.float32)
    return lax.platform_dependent(a, b, cpu=partial(_cpu_product, equation), default=native)


def _cpu_product(equation: str, a: Array, b: Array) -> Array:
    """`_product` in a form that XLA runs well on CPU.

    jaxlib 0.10.2 refuses some such products at run time ("Unsupported element type for DotThunk"): batched
    ones and those whose result it chooses to lay out by columns. It also leaves the matrix unit unused when
    the left operand is laid out by columns, as in every weight gradient; a transposed copy costs far less.
    """
    operands, out = equation.split("->")
    first, second = operands.split(",")
    if set(first) & set(second) & set(out):
        # Batched: nothing to gain. Products of bfloat16 numbers are exact in float32: the sums are the same.
        return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32))
    size = dict(zip(first + second, a.shape + b.shape, strict=True))
    summed = [c for c in first if c in second]
    rows, columns = [c for c in first if c in out], [c for c in second if c in out]
    m, k, n = (math.prod(size[c] for c in letters) for letters in (rows, summed, columns))
    left = _by_rows(a.transpose([first.index(c) for c in rows + summed]).reshape(m, k))
    if list(second) == columns + summed:
        right, contracted = b.reshape(n, k), 1
    else:
        right, contracted = b.transpose([second.index(c) for c in summed + columns]).reshape(k, n), 0
    product = lax.dot_general(left, right, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32)
    free = rows + columns
    return _by_rows(product).reshape([size[c] for c in free]).transpose([free.index(c) for c in out])


def _by_rows(matrix: Array) -> Array:
    return with_layout_constraint(matrix, Layout(major_to_minor=(0, 1)))
