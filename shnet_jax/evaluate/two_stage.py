"""Old place of `rerank`."""

from shnet_jax.evaluate.rerank import best_candidates, candidates
from shnet_jax.evaluate.rerank import rerank_top_k as two_stage_top_k

__all__ = ["best_candidates", "candidates", "two_stage_top_k"]
