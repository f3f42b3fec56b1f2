"""Old place of `top_k`."""

from shnet_jax.evaluate.top_k import TopK as Found
from shnet_jax.evaluate.top_k import is_dot_product, top_k
from shnet_jax.evaluate.top_k import transpose_score as turned

__all__ = ["Found", "is_dot_product", "top_k", "turned"]
