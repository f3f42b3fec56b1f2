"""Attention of sets to the convolved label map of their image, without keeping any image's keys for the backward pass.

3SHNet's VSpM lets each region attend to 4096 map positions of 128 channels. The keys of a batch are by far the largest
array of the model, and every step over them waits for memory. Here keys and attention are made from the (small) map
patches, and made again in the backward pass instead of kept for it. On CPU that goes image by image: nothing of size
positions x channels x batch ever exists. On accelerators, which need the work of many images at once, the keys of the
batch are made together and exist for as long as one of the passes runs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from shnet_jax.ops.matmul import DType, einsum
from shnet_jax.types import Array


def attention_weights(query: Array, patches: Array, kernel: Array, position: Array, dtype: DType) -> Array:
    """Attention weights [n, N, P] float32: softmax over positions of query . key. Arguments as `map_attention`."""
    keys = jax.vmap(partial(_keys, dtype=dtype), in_axes=(0, None, None))(patches, kernel, position)
    return jax.nn.softmax(einsum("nkc,npc->nkp", query, keys, dtype), axis=-1)


def _keys(patches: Array, kernel: Array, position: Array, dtype: DType) -> Array:
    return jax.nn.relu(einsum("pi,ic->pc", patches, kernel, dtype) + position)


def _one(query: Array, patches: Array, kernel: Array, position: Array, dtype: DType) -> Array:
    """Attention for one image: query [N, c], patches [P, i] -> [N, c]."""
    keys = _keys(patches, kernel, position, dtype)
    logits = einsum("kc,pc->kp", query, keys, dtype)
    # Dividing after the second product is one pass over [N, P] less than a softmax before it.
    weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    context = einsum("kp,pc->kc", weights, keys, dtype)
    return context / jnp.sum(weights, axis=-1, keepdims=True)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def map_attention(query: Array, patches: Array, kernel: Array, position: Array, dtype: DType) -> Array:
    """Attention softmax_p(query . key_p) . key_p with key = relu(patches @ kernel + position), for each image.

    Args:
      query: [n, N, c] float32, any scale already applied.
      patches: [n, P, i] float32, neighbourhood of each map position.
      kernel: [i, c] float32.
      position: [P, c] float32, what is added at each position in every image.
      dtype: operands of the products, "float32" or "bfloat16" (ops/matmul.py).

    Returns:
      [n, N, c] float32.
    """
    one = partial(_one, kernel=kernel, position=position, dtype=dtype)

    def in_turn(query: Array, patches: Array) -> Array:
        return lax.map(lambda x: one(*x), (query, patches))

    def together(query: Array, patches: Array) -> Array:
        return jax.vmap(one)(query, patches)

    return lax.platform_dependent(query, patches, cpu=in_turn, default=together)


def _forward(query: Array, patches: Array, kernel: Array, position: Array, dtype: DType) -> tuple[Array, Any]:
    return map_attention(query, patches, kernel, position, dtype), (query, patches, kernel, position)


def _backward(dtype: DType, saved: Any, grad: Array) -> tuple[Array, Array, Array, Array]:
    query, patches, kernel, position = saved

    def pull(query: Array, patches: Array, grad: Array) -> tuple[Array, Array, Array, Array]:
        _, vjp = jax.vjp(partial(_one, dtype=dtype), query, patches, kernel, position)
        return vjp(grad)

    def in_turn(*arrays: Array) -> tuple[Array, Array, Array, Array]:
        def step(sums: tuple[Array, Array], one: tuple[Array, ...]):
            d_query, d_patches, d_kernel, d_position = pull(*one)
            return (sums[0] + d_kernel, sums[1] + d_position), (d_query, d_patches)

        start = (jnp.zeros_like(kernel), jnp.zeros_like(position))
        (d_kernel, d_position), (d_query, d_patches) = lax.scan(step, start, arrays)
        return d_query, d_patches, d_kernel, d_position

    def together(*arrays: Array) -> tuple[Array, Array, Array, Array]:
        d_query, d_patches, d_kernel, d_position = jax.vmap(pull)(*arrays)
        return d_query, d_patches, d_kernel.sum(axis=0), d_position.sum(axis=0)

    return lax.platform_dependent(query, patches, grad, cpu=in_turn, default=together)


map_attention.defvjp(_forward, _backward)
