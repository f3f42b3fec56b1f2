"""Old place of `pair_scores`."""

from shnet_jax.evaluate.pair_scores import digest

__all__ = ["digest"]
